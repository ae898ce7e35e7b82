"""Rates of optimizers and schedulers, multiplied: every scheduler of torch and of transformers.

A run whose rate is changed at some step is compared, over 50 further steps, with a run without the change whose rates
are multiplied from that step on.
"""

from __future__ import annotations

import copy
import functools

import pytest

from forgather_control.integrations.rates import shape

from ..support.harness import needs_torch, needs_transformers
from ..support.schedules import LATER, NAMES, RATES, change, follows, given, now, of_torch, optimizer, sequence, step

try:
    from torch.optim import lr_scheduler as made
except ImportError:  # every test here is skipped then
    pass
try:
    from transformers import SchedulerType, get_scheduler
except ImportError:
    pass

pytestmark = [needs_torch, pytest.mark.filterwarnings("ignore::UserWarning:torch.*")]

OF_TRANSFORMERS = {
    "linear": [{}],
    "cosine": [{}],
    "cosine_with_restarts": [{"num_cycles": 3}],
    "polynomial": [{"lr_end": 1e-3, "power": 2.0}],
    "constant": [{}],
    "constant_with_warmup": [{}],
    "inverse_sqrt": [{}, {"timescale": 30}],
    "reduce_lr_on_plateau": [{"patience": 2, "min_lr": 1e-3}],
    "cosine_with_min_lr": [{"min_lr": 1e-3}, {"min_lr_rate": 0.2}],
    "cosine_warmup_with_min_lr": [{"min_lr_rate": 0.2, "warmup_lr_rate": 0.1}],
    "warmup_stable_decay": [{"num_decay_steps": 20, "min_lr_ratio": 0.1}],
    "greedy": [{"patience": 2, "min_lr": 1e-3, "max_lr": 0.2, "smooth": True, "reset_start": 2}],
}


def test_every_scheduler_of_torch_is_here():
    """A class that a later torch adds must be added to these tests."""
    assert set(NAMES) == set(of_torch())
    assert {name.split()[0] for name in NAMES} == {*made.__all__, "SWALR"} - {"LRScheduler"}


@pytest.mark.parametrize("as_tensors", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("changed_at", [1, 7, 20])
@pytest.mark.parametrize("name", NAMES)
def test_schedulers_of_torch_follow(name, changed_at, as_tensors):
    """All groups keep their ratios, and the schedule its shape, for the next 50 steps."""
    follows(of_torch()[name], changed_at, as_tensors=as_tensors)
    follows(of_torch()[name], changed_at, 2.5, as_tensors)


def of_transformers(name, optimizer, options):
    """A scheduler of a type."""
    if name not in [each.value for each in SchedulerType]:
        pytest.skip(f"this version of transformers has no {name}")
    optimizer.defaults["lr"] = RATES[0]
    return get_scheduler(name, optimizer, 5, 70, dict(options) or None)


@needs_transformers
def test_every_scheduler_of_transformers_is_here():
    """A type that a later version adds must be added to these tests."""
    assert {each.value for each in SchedulerType} <= OF_TRANSFORMERS.keys()


@needs_transformers
@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name, each in OF_TRANSFORMERS.items() for options in each]
)
@pytest.mark.parametrize("changed_at", [1, 7, 20])
def test_schedulers_of_transformers_follow(name, options, changed_at):
    """As those of torch do."""
    make = functools.partial(of_transformers, name, options=options)
    follows(make, changed_at)
    follows(make, changed_at, 1.7)


@pytest.mark.parametrize("as_tensors", [False, True])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "CyclicLR exp_range"])
def test_restored_exactly(name, as_tensors):
    """After an undo, groups, schedulers and all later rates are bit for bit what they were."""

    def run(disturb):
        one = optimizer(as_tensors=as_tensors)
        scheduler = of_torch()[name](one)
        for number in range(7):
            step(one, scheduler, number)
        tensors = [group["lr"] for group in one.param_groups]
        if disturb:
            undone = given(one, scheduler).change({"learning_rate": 0.0123, "weight_decay": "x3"})
            undone.settle("rank 1 could not do it")
        assert not as_tensors or all(a["lr"] is b for a, b in zip(one.param_groups, tensors))
        found = [now(one) + now(one, "weight_decay")]
        for number in range(7, 30):
            step(one, scheduler, number)
            found.append(now(one))
        return found

    assert run(True) == run(False)


def survives(make):
    """Assert that a run resumed from states after a change goes on as the run that was changed."""
    one = optimizer()
    scheduler = make(one)
    for number in range(7):
        step(one, scheduler, number)
    change(given(one, scheduler), learning_rate="x0.37")
    for number in range(7, 12):
        step(one, scheduler, number)
    other = optimizer()
    resumed = make(other)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    resumed.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    for number in range(12, 12 + LATER):
        assert now(other) == now(one), number
        step(one, scheduler, number)
        step(other, resumed, number)
    assert now(other) == now(one)


@pytest.mark.parametrize("name", NAMES)
def test_a_change_survives_in_the_states_of_torch(name):
    """Those of the optimizer and of the scheduler hold all that was multiplied."""
    survives(of_torch()[name])


@needs_transformers
@pytest.mark.parametrize(
    ("name", "options"), [(name, options) for name, each in OF_TRANSFORMERS.items() for options in each]
)
def test_a_change_survives_in_the_states_of_transformers(name, options):
    """As with those of torch."""
    survives(lambda optimizer: of_transformers(name, optimizer, options))


class Wrapper:
    """An optimizer around another."""

    def __init__(self, optimizer):
        self.optimizer, self.param_groups = optimizer, []

    def step(self):
        self.optimizer.step()


class Container(Wrapper):
    """An optimizer of several, as Forgather's Multiopt and torchtitan's container."""

    def __init__(self, *optimizers):
        self.optimizers, self.param_groups = list(optimizers), [*optimizers[0].param_groups]


class Schedulers:
    """A container of schedulers, as torchtitan's."""

    def __init__(self, *schedulers):
        self.schedulers = schedulers

    def step(self):
        for each in self.schedulers:
            each.step()


def test_wrapped_and_contained():
    """What is inside is changed, once."""
    one, other = optimizer(), optimizer()
    both = Schedulers(made.StepLR(one, 3), made.StepLR(other, 3))
    changed = change(given(Container(Wrapper(one), other), both), learning_rate="x2")
    assert changed["learning_rate"]["effective"] == 0.2
    assert now(one) == now(other) == pytest.approx([0.2, 0.04, 0.006])
    assert both.schedulers[0].base_lrs == both.schedulers[1].base_lrs == now(one)


class Sized:
    """A function of a schedule with a length of its own."""

    def __init__(self, total_steps):
        self.lengths = lambda number: number / total_steps


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda o: made.StepLR(o, 5), None),
        (lambda o: made.CosineAnnealingLR(o, 30), "CosineAnnealingLR has T_max=30"),
        (lambda o: made.OneCycleLR(o, 0.1, total_steps=80), "OneCycleLR has total_steps=80"),
        (lambda o: made.LambdaLR(o, Sized(70).lengths), "LambdaLR has total_steps=70"),
        (sequence, "CosineAnnealingLR has T_max=30, LinearLR has total_iters=10"),
    ],
)
def test_the_shape_of_a_schedule(make, words):
    """For how many steps it was made, where it tells."""
    assert shape([make(optimizer())]) == words
