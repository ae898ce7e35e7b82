"""Optimizers with three parameter groups, schedulers of every class of torch, and changes of their settings."""

from __future__ import annotations

import pytest

from forgather_control.integrations.optimizer_settings import OptimizerSettings
from forgather_control.training.settings import Settings

try:
    import torch
    from torch.optim import lr_scheduler as made
    from torch.optim.swa_utils import SWALR
except ImportError:  # all tests that use it are skipped then
    pass

RATES = (0.1, 0.02, 0.003)


DECAYS = (0.5, 0.0, 0.01)


LATER = 50


def optimizer(kind="SGD", as_tensors=False):
    """One with three parameter groups of different rates and decays."""
    groups = [
        {
            "params": [torch.nn.Parameter(torch.ones(2))],
            "lr": torch.tensor(rate, dtype=torch.float64) if as_tensors else rate,
            "weight_decay": decay,
        }
        for rate, decay in zip(RATES, DECAYS)
    ]
    return torch.optim.SGD(groups, momentum=0.9) if kind == "SGD" else getattr(torch.optim, kind)(groups)


def given(optimizers, schedulers=None, others=list):
    """The settings of these, as a run has them."""
    settings = Settings([], lambda: None, lambda: 0)
    settings.add(OptimizerSettings(lambda: optimizers, lambda: schedulers, others).settings())
    return settings


def change(settings, **changes):
    """Change values for good; return what was and is, by name."""
    made = settings.change(changes)
    made.settle(None)
    settings.read_back()
    return made.result(0)


def now(optimizer, name="lr"):
    """The values of all groups."""
    return [float(group[name]) for group in optimizer.param_groups]


def step(optimizer, scheduler, number):
    """Make a step of both; a scheduler that watches a metric gets a loss that falls, and then does not."""
    optimizer.step()
    if hasattr(scheduler, "patience"):
        scheduler.step(1.0 / (number + 1) if number % 20 < 10 else 5.0)
    else:
        scheduler.step()


def rates_after(make, changed_at, factor, as_tensors, steps=LATER):
    """The rates of the steps behind ``changed_at``, where the rate is multiplied by the factor if there is one."""
    one = optimizer(as_tensors=as_tensors)
    scheduler = make(one)
    for number in range(changed_at):
        step(one, scheduler, number)
    if factor is not None:
        result = change(given(one, scheduler), learning_rate=now(one)[0] * factor)
        assert result["learning_rate"]["effective"] == now(one)[0]
    found = [now(one)]
    for number in range(changed_at, changed_at + steps):
        step(one, scheduler, number)
        found.append(now(one))
        if not hasattr(scheduler, "patience"):
            assert [float(rate) for rate in scheduler.get_last_lr()] == found[-1]
    return found


def follows(make, changed_at=7, factor=0.37, as_tensors=False):
    """Assert that a changed run goes on as one that has all rates multiplied."""
    before = rates_after(make, changed_at, None, as_tensors)
    after = rates_after(make, changed_at, factor, as_tensors)
    for number, (was, found) in enumerate(zip(before, after)):
        assert found == pytest.approx([rate * factor for rate in was], rel=1e-6, abs=1e-12), number
    return after


def sequence(optimizer):
    """A warm-up, a decay, and a cosine, one after the other."""
    parts = [
        made.LinearLR(optimizer, 0.1, total_iters=10),
        made.ExponentialLR(optimizer, 0.97),
        made.CosineAnnealingLR(optimizer, 30, eta_min=1e-4),
    ]
    return made.SequentialLR(optimizer, parts, [10, 30])


def nested(optimizer):
    """Chained schedulers, one of them a sequence."""
    parts = [made.ConstantLR(optimizer, 0.5, 8), made.CosineAnnealingWarmRestarts(optimizer, 6, 2, eta_min=1e-4)]
    inner = made.SequentialLR(optimizer, parts, [12])
    return made.ChainedScheduler([inner, made.StepLR(optimizer, 20, 0.9)])


def of_torch():
    """A scheduler of each class, in some variants, by name."""
    return {
        "LambdaLR": lambda o: made.LambdaLR(o, [lambda n: 0.9**n, lambda n: 1 / (n + 1), lambda n: 1.0]),
        "MultiplicativeLR": lambda o: made.MultiplicativeLR(o, lambda n: 0.98),
        "StepLR": lambda o: made.StepLR(o, 9, 0.5),
        "MultiStepLR": lambda o: made.MultiStepLR(o, [5, 10, 40], 0.5),
        "ConstantLR": lambda o: made.ConstantLR(o, 0.25, 20),
        "LinearLR": lambda o: made.LinearLR(o, 0.1, total_iters=30),
        "ExponentialLR": lambda o: made.ExponentialLR(o, 0.97),
        "PolynomialLR": lambda o: made.PolynomialLR(o, 60, 2.0),
        "CosineAnnealingLR": lambda o: made.CosineAnnealingLR(o, 20, eta_min=1e-3),
        "CosineAnnealingWarmRestarts": lambda o: made.CosineAnnealingWarmRestarts(o, 6, 2, eta_min=1e-3),
        "CyclicLR": lambda o: made.CyclicLR(o, [0.01, 0.001, 0.1], [0.1, 0.02, 0.3], 8),
        "CyclicLR triangular2": lambda o: made.CyclicLR(o, 0.01, 0.1, 6, mode="triangular2"),
        "CyclicLR exp_range": lambda o: made.CyclicLR(o, 0.01, 0.1, 6, mode="exp_range", gamma=0.99),
        "OneCycleLR": lambda o: made.OneCycleLR(o, [0.1, 0.2, 0.3], total_steps=80),
        "OneCycleLR three phases": lambda o: made.OneCycleLR(o, 0.1, total_steps=80, three_phase=True),
        "OneCycleLR linear": lambda o: made.OneCycleLR(o, 0.1, total_steps=80, anneal_strategy="linear"),
        "ReduceLROnPlateau": lambda o: made.ReduceLROnPlateau(o, patience=2, min_lr=[1e-3, 1e-3, 1e-4], eps=5e-4),
        "ReduceLROnPlateau one limit": lambda o: made.ReduceLROnPlateau(o, patience=1, factor=0.5, min_lr=1e-3),
        "SWALR": lambda o: SWALR(o, [0.05, 0.01, 0.3], anneal_epochs=20),
        "SWALR linear": lambda o: SWALR(o, 0.05, anneal_epochs=10, anneal_strategy="linear"),
        "SequentialLR": sequence,
        "ChainedScheduler": nested,
    }


NAMES = (
    "LambdaLR", "MultiplicativeLR", "StepLR", "MultiStepLR", "ConstantLR", "LinearLR", "ExponentialLR", "PolynomialLR",
    "CosineAnnealingLR", "CosineAnnealingWarmRestarts", "CyclicLR", "CyclicLR triangular2", "CyclicLR exp_range",
    "OneCycleLR", "OneCycleLR three phases", "OneCycleLR linear", "ReduceLROnPlateau", "ReduceLROnPlateau one limit",
    "SWALR", "SWALR linear", "SequentialLR", "ChainedScheduler",
)  # fmt: skip
