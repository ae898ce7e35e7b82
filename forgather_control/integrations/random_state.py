"""The states of random number generators, saved around an evaluation that training would not have made."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any


def capture() -> Callable[[], None]:
    """Return a function that restores the current states of the generators of Python, NumPy and torch.

    Only libraries that are loaded are asked, and only devices that are in use.
    """
    states: list[tuple[Callable[[Any], object], Any]] = [(random.setstate, random.getstate())]
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy is not None:
        states.append((numpy.random.set_state, numpy.random.get_state()))
    if torch is not None:
        states.append((torch.set_rng_state, torch.get_rng_state()))
        used = [device for device in (torch.cuda, torch.xpu) if device.is_initialized()]
        states += [(device.set_rng_state_all, device.get_rng_state_all()) for device in used]

    def restore() -> None:
        for set_state, state in states:
            set_state(state)

    return restore
