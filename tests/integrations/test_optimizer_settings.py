"""The settings learning_rate and weight_decay: refused, changed, restored."""

from __future__ import annotations

import math

import pytest

from forgather_control.errors import CommandRefused

from ..support.harness import needs_torch, needs_transformers
from ..support.schedules import DECAYS, RATES, change, given, now, optimizer, step

try:
    import torch
    from torch.optim import lr_scheduler as made
except ImportError:  # every test here is skipped then
    pass
pytestmark = [needs_torch, pytest.mark.filterwarnings("ignore::UserWarning:torch.*")]


def test_there_is_no_factor_from_zero_or_to_zero():
    """In the first step of a warm-up, for example; one step later there is."""
    one = optimizer()
    scheduler = made.LambdaLR(one, lambda number: number / 5)
    settings = given(one, scheduler)
    with pytest.raises(CommandRefused, match="that of the first group is 0 now, as in the first step"):
        change(settings, learning_rate=0.1)
    step(one, scheduler, 0)
    for value in (0, "x0"):
        with pytest.raises(CommandRefused, match="could never be raised again"):
            change(settings, learning_rate=value)
    with pytest.raises(CommandRefused, match="learning_rate must be a number from 0"):
        change(settings, learning_rate=-1)
    assert change(settings, learning_rate="x2")["learning_rate"]["new"] == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("value", "words"),
    [(1e308, "would become inf"), (5e-324, "would become 0")],
)
def test_no_rate_overflows_or_vanishes(value, words):
    """The ratios of the groups would be lost."""
    one = optimizer()
    one.param_groups[2]["lr"] = 1e30 if value > 1 else 1e-30
    with pytest.raises(CommandRefused, match=words):
        change(given(one), learning_rate=value)
    assert now(one)[:2] == list(RATES[:2])


@needs_transformers
def test_optimizers_that_compute_their_own_rates():
    """Adafactor has none, and the optimizers of each parameter are out of reach."""
    from transformers.optimization import Adafactor, AdafactorSchedule, LayerWiseDummyOptimizer

    one = Adafactor([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(CommandRefused, match="its value cannot be read"):
        change(given(one), learning_rate=0.5)
    with pytest.raises(CommandRefused, match=r"the optimizer computes its rates itself \(relative_step\)"):
        change(given(one, AdafactorSchedule(one)), learning_rate=0.5)
    layers = LayerWiseDummyOptimizer({}, lr=0.1)
    with pytest.raises(CommandRefused, match="for each parameter, which are out of reach"):
        change(given(layers), learning_rate=0.5)


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "RAdam", "Adafactor"])
def test_optimizers_of_torch(kind):
    """Groups are multiplied; the first has exactly the rate that was asked for."""
    one = optimizer(kind)
    change(given(one), learning_rate=0.3)
    assert now(one)[0] == 0.3 and now(one) == pytest.approx([rate * 3 for rate in RATES])


def test_several_optimizers_are_multiplied_alike():
    """By the factor of the first one's first group; each with its scheduler."""
    pair = [optimizer(), optimizer("AdamW")]
    pair[1].param_groups[0]["lr"] = 0.4
    schedulers = [made.StepLR(pair[0], 3), made.ExponentialLR(pair[1], 0.9)]
    changed = change(given(pair, schedulers), learning_rate="x0.5", weight_decay="x2")
    assert {name: value["effective"] for name, value in changed.items()} == {"learning_rate": 0.05, "weight_decay": 1}
    assert now(pair[0]) == pytest.approx([0.05, 0.01, 0.0015]) and now(pair[1]) == pytest.approx([0.2, 0.01, 0.0015])
    assert [each.base_lrs[1] for each in schedulers] == pytest.approx([0.01, 0.01])
    assert now(pair[1], "weight_decay") == [1.0, 0.0, 0.02]


def test_rates_that_others_keep_for_later():
    """Those of Lightning's StochasticWeightAveraging, for example."""

    class Averaging:
        def __init__(self):
            self._swa_lrs = [0.01, 0.02]

    averaging = Averaging()
    change(given(optimizer(), None, lambda: [averaging]), learning_rate="x2")
    assert averaging._swa_lrs == [0.02, 0.04]


def test_weight_decay_keeps_ratios_and_zeros():
    """All groups are multiplied; those at zero stay there, also after a zero for all, which can be taken back."""
    one = optimizer()
    settings = given(one)
    change(settings, weight_decay=0.1)
    assert now(one, "weight_decay") == pytest.approx([0.1, 0.0, 0.002])
    assert change(settings, weight_decay=0)["weight_decay"]["effective"] == 0.0
    assert now(one, "weight_decay") == [0.0, 0.0, 0.0]
    assert change(settings, weight_decay=0.5)["weight_decay"] == {"old": 0.0, "new": 0.5, "effective": 0.5}
    assert now(one, "weight_decay") == pytest.approx(DECAYS)


def test_weight_decay_of_groups_that_have_none():
    """There is no way to know which should get one."""
    one = optimizer()
    for group in one.param_groups:
        group["weight_decay"] = 0.0
    with pytest.raises(CommandRefused, match="groups at zero stay at zero"):
        change(given(one), weight_decay=0.1)
    plain = torch.optim.Rprop([torch.nn.Parameter(torch.ones(2))])
    assert [each["name"] for each in given(plain).snapshot] == ["learning_rate"]


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_values_that_are_not_finite(name):
    """No JSON text of ours has them, but a rule or a factor may."""
    with pytest.raises(CommandRefused, match=f"{name} "):
        change(given(optimizer()), **{name: math.inf})
