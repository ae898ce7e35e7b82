"""Schedulers that are not known are tried, before a change: would they overwrite it?"""

from __future__ import annotations

import threading

import pytest

from forgather_control.errors import CommandRefused

from ..support.harness import needs_torch
from ..support.schedules import change, follows, given, now, optimizer, step

try:
    import torch
    from torch.optim import lr_scheduler as made
except ImportError:  # every test here is skipped then
    made = None

pytestmark = [needs_torch, pytest.mark.filterwarnings("ignore::UserWarning:torch.*")]


class Own(made.LRScheduler if made else object):
    """Computes rates by a function of itself."""

    def __init__(self, optimizer, rates, **numbers):
        self.rates = rates
        self.__dict__.update(numbers)
        super().__init__(optimizer)

    def get_lr(self):
        return self.rates(self)


def from_base(scheduler):
    return [base / (scheduler.last_epoch + 1) for base in scheduler.base_lrs]


def to_constant(scheduler):
    """Forgather's InfiniteLRScheduler, in short."""
    if scheduler.last_epoch < 5000:
        return [rate * 0.9999 for rate in now(scheduler.optimizer)]
    return [scheduler.constant_lr] * len(scheduler.base_lrs)


def absolute(scheduler):
    return [0.1 / (scheduler.last_epoch + 1)] * 3


def absolute_later(scheduler):
    return from_base(scheduler) if scheduler.last_epoch < 3000 else [1e-3] * 3


def broken(scheduler):
    if scheduler.last_epoch > 7:
        raise RuntimeError("no plan beyond this")
    return scheduler.base_lrs


@pytest.mark.parametrize("numbers", [{"rates": from_base}, {"rates": to_constant, "constant_lr": 0.03}])
def test_a_scheduler_that_is_not_known_is_tried(numbers):
    """If its rates follow, now and far ahead, the change is made; the trial leaves no trace."""
    follows(lambda optimizer: Own(optimizer, **numbers))


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        (absolute, "the scheduler Own would overwrite it 1 steps later"),
        (absolute_later, r"the scheduler Own would overwrite it \d{4} steps later"),
        (broken, "the scheduler Own is not known, and could not be tried: RuntimeError: no plan beyond this"),
    ],
)
def test_a_scheduler_that_would_overwrite_the_change(rates, words):
    """The change is refused, and the sentence names the scheduler; nothing has changed."""
    one = optimizer()
    scheduler = Own(one, rates)
    for number in range(7):
        step(one, scheduler, number)
    before, state = now(one), dict(scheduler.state_dict())
    with pytest.raises(CommandRefused, match=words):
        change(given(one, scheduler), learning_rate=0.5)
    assert now(one) == before and scheduler.state_dict() == state


def test_a_trial_uses_up_no_random_numbers():
    """Neither those of torch nor those of the scheduler."""
    one = optimizer()
    noise = torch.Generator().manual_seed(1)

    def noisy(scheduler):
        return [base * (1 + 0.1 * float(torch.rand(1))) for base in scheduler.base_lrs]

    scheduler = Own(one, noisy, noise=noise)
    torch.manual_seed(3)
    with pytest.raises(CommandRefused, match="would overwrite it"):
        change(given(one, scheduler), learning_rate=0.5)
    found = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(found, torch.rand(1)) and scheduler.noise is noise


def test_a_scheduler_that_the_job_does_not_know():
    """It would overwrite the change, so the change is refused; told of it, the job can make the change."""
    one = optimizer()
    scheduler = made.StepLR(one, 5)
    with pytest.raises(CommandRefused, match="a scheduler that is not known to this job steps the rates of SGD"):
        change(given(one), learning_rate=0.5)
    change(given(one, scheduler), learning_rate=0.5)
    assert now(one)[0] == scheduler.base_lrs[0] == 0.5


def test_a_subclass_of_a_known_scheduler_is_tried():
    """Only methods that it does not override are known."""

    class Mine(made.StepLR):
        def get_lr(self):
            return [0.05 for _ in self.base_lrs]

    one = optimizer()
    with pytest.raises(CommandRefused, match="the scheduler Mine would overwrite it 1 steps later"):
        change(given(one, Mine(one, 5)), learning_rate=0.5)

    class Same(made.StepLR):
        pass

    follows(lambda optimizer: Same(optimizer, 9, 0.5))


def test_with_accelerate():
    """Its wrappers of optimizers and schedulers, as Hugging Face's Trainer uses them."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    one = optimizer()
    prepared, scheduler = accelerator.prepare(one, made.CosineAnnealingLR(one, 20, eta_min=1e-3))
    change(given(prepared, scheduler), learning_rate=0.5)
    assert now(one)[0] == 0.5 and scheduler.scheduler.eta_min == pytest.approx(5e-3)
    mine = accelerator.prepare(Own(one, absolute))
    with pytest.raises(CommandRefused, match="the scheduler Own would overwrite it"):
        change(given(prepared, mine), learning_rate=0.2)


def test_a_scheduler_that_cannot_be_copied():
    """It cannot be tried, so the change is refused."""
    one = optimizer()
    scheduler = Own(one, from_base, guard=threading.Lock())
    with pytest.raises(CommandRefused, match="the scheduler Own is not known, and could not be tried: TypeError"):
        change(given(one, scheduler), learning_rate=0.5)


def test_models_are_not_copied():
    """A scheduler may hold one, or a method of it."""
    copies = []

    class Model(torch.nn.Linear):
        def __deepcopy__(self, memo):
            copies.append(self)
            return self

        def plan(self, scheduler):
            return from_base(scheduler)

    one, model = optimizer(), Model(1, 1)
    scheduler = Own(one, model.plan, model=model, layers=[model])
    change(given(one, scheduler), learning_rate=0.5)
    assert now(one)[0] == 0.5 and not copies and scheduler.last_epoch == 0


def test_a_trial_leaves_the_optimizer_alone():
    """Its groups, its state and its step are not those that the copies use."""
    steps = []

    def nosy(scheduler):
        scheduler.optimizer.step()
        scheduler.optimizer.param_groups[0]["seen"] = True
        return from_base(scheduler)

    one = optimizer()
    scheduler = Own(one, from_base)
    scheduler.rates = nosy
    one.register_step_post_hook(lambda *args: steps.append(args))
    change(given(one, scheduler), learning_rate=0.5)
    assert not steps and "seen" not in one.param_groups[0] and now(one)[0] == 0.5
