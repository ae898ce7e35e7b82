"""Random states around an extra evaluation: what training draws next does not change."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from forgather_control.integrations import random_state

from ..support.harness import Process, needs_torch


@needs_torch
def test_the_next_numbers_are_the_same():
    """Python's, NumPy's and torch's generators give after ``restore`` what they would have given before."""
    import numpy as np
    import torch

    def draw() -> list[Any]:
        return [random.random(), np.random.rand(), torch.rand(1).item()]

    restore = random_state.capture()
    first = draw()
    restore()
    assert draw() == first != draw()


def test_nothing_is_imported_for_it():
    """Without NumPy and torch only Python's generator has a state."""
    source = """
    import random, sys
    from forgather_control.integrations import random_state
    restore = random_state.capture()
    first = random.random()
    restore()
    print(first == random.random(), {"numpy", "torch"} & set(sys.modules))
    """
    with Process(source) as process:
        assert process.line() == "True set()", "".join(process.errors)


@pytest.mark.parametrize("is_used", [False, True])
def test_only_devices_in_use_are_read(monkeypatch, is_used):
    """A device that was not initialised is left alone; of one in use all states are restored."""
    calls = []
    device = SimpleNamespace(
        is_initialized=lambda: is_used, get_rng_state_all=lambda: "state", set_rng_state_all=calls.append
    )
    idle = SimpleNamespace(is_initialized=lambda: False)
    torch = SimpleNamespace(cuda=device, xpu=idle, get_rng_state=lambda: "cpu", set_rng_state=calls.append)
    monkeypatch.setitem(random_state.sys.modules, "torch", torch)
    random_state.capture()()
    assert calls == ["cpu", "state"][: 1 + is_used]
