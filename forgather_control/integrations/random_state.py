"""The states of random number generators, saved around an evaluation that training would not have made."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable


def capture() -> Callable[[], None]:
    """Return a function that restores the current states of the generators of Python, NumPy and torch.

    Only libraries that are loaded are asked, and only devices that are in use.
    """
    restores: list[Callable[[], object]] = [functools.partial(random.setstate, random.getstate())]
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy is not None:
        restores.append(functools.partial(numpy.random.set_state, numpy.random.get_state()))
    if torch is not None:
        restores.append(functools.partial(torch.set_rng_state, torch.get_rng_state()))
        for device in (torch.cuda, torch.xpu):
            if device.is_initialized():
                restores.append(functools.partial(device.set_rng_state_all, device.get_rng_state_all()))

    def restore() -> None:
        for each in restores:
            each()

    return restore
