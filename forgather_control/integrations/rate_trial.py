"""Whether a scheduler's next rates follow a change of the learning rate, or would overwrite it.

Classes of torch and transformers are known. Others are tried: two copies, with stand-ins for the optimizers, make the
same steps, one of them with all rates multiplied; its rates must stay multiplied by the same factor.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Sequence
from types import MethodType, SimpleNamespace
from typing import Any, Final

from . import random_state, rates

#: The classes whose rates are known to follow. Methods that a subclass overrides are not.
_KNOWN: Final = {
    "torch.optim.lr_scheduler": None,  # all of them
    "torch.optim.swa_utils": None,
    "transformers.optimization": {"GreedyLR"},
    "accelerate.scheduler": None,  # which pass the steps on
    "accelerate.utils.deepspeed": None,
}
#: Steps that a trial makes one by one, and how often it doubles the way after that.
_STEPS: Final = 24
_DOUBLINGS: Final = 22


def obstacle(optimizers: Sequence[Any], schedulers: Sequence[Any], factor: float) -> str | None:
    """Return why a change of the rates would not last; ``None`` if it would. On the training thread."""
    family = rates.family(schedulers)
    stepped = [rates.innermost(getattr(one, "optimizer", None)) for one in family]
    for optimizer in optimizers:
        kind = type(rates.innermost(optimizer)).__name__
        if hasattr(optimizer, "optimizer_dict"):
            return f"{kind} has an optimizer and a scheduler for each parameter, which are out of reach"
        scheduled = getattr(optimizer.step, "_wrapped_by_lr_sched", False)
        if scheduled and not any(one is rates.innermost(optimizer) for one in stepped):
            return f"a scheduler that is not known to this job steps the rates of {kind}, and would overwrite it"
    if all(_is_known(one) for one in family):
        return None
    return next((why for one in schedulers if (why := _tried(worker(one), optimizers, factor))), None)


def worker(scheduler: Any) -> Any:
    """Return the scheduler that does the work, inside those that pass the steps on (accelerate)."""
    while any(base.__name__ == "AcceleratedScheduler" for base in type(scheduler).__mro__):
        scheduler = scheduler.scheduler
    return scheduler


def _is_known(scheduler: Any) -> bool:
    kind = type(scheduler)
    for name in ("step", "get_lr", "_update_lr", "_get_closed_form_lr"):
        if name in getattr(scheduler, "__dict__", {}):
            return False
        definer = next((base for base in kind.__mro__ if name in vars(base)), None)
        if definer is None:
            continue
        names = _KNOWN.get(definer.__module__, set())
        if names is not None and definer.__name__ not in names:
            return False
    return True


def _tried(scheduler: Any, optimizers: Sequence[Any], factor: float) -> str | None:
    restore, name = random_state.capture(), type(scheduler).__name__
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            steps = _follows(scheduler, optimizers, factor)
    except Exception as err:  # boundary: a scheduler of the script's
        return f"the scheduler {name} is not known, and could not be tried: {type(err).__name__}: {err}"
    finally:
        restore()
    return None if steps is None else f"the scheduler {name} would overwrite it {steps} steps later"


def _follows(scheduler: Any, optimizers: Sequence[Any], factor: float) -> int | None:
    """Return the number of the first step whose rates do not follow; ``None`` if all do."""
    before, after = _Copy(scheduler, optimizers), _Copy(scheduler, optimizers)
    scaling = rates.Scaling()
    scaling.add_rates(after.groups, rates.family([after.scheduler]), factor)
    scaling.apply()
    ways = [1] * _STEPS + [1 << doubling for doubling in range(1, _DOUBLINGS) if before.can_jump]
    done = 0
    for way in ways:
        done += way
        failed = [one.step(way) for one in (before, after)]
        if failed[0] is not None and failed[1] is not None:
            if done == 1:
                raise failed[0]
            return None  # behind its last step
        if failed[0] is not failed[1] or not _is_multiple(before.groups, after.groups, factor):
            return done
    return None


def _is_multiple(before: Iterable[Any], after: Iterable[Any], factor: float) -> bool:
    pairs = [(rates.number(one["lr"]), rates.number(other["lr"])) for one, other in zip(before, after)]
    return all(
        one is not None and other is not None and math.isclose(one * factor, other, rel_tol=1e-5)
        for one, other in pairs
    )


class _Copy:
    """A copy of a scheduler that steps stand-ins of its optimizers."""

    def __init__(self, scheduler: Any, optimizers: Sequence[Any]) -> None:
        memo: dict[int, Any] = {}
        self.groups: list[dict[str, Any]] = []
        originals = [*optimizers, *(getattr(one, "optimizer", None) for one in rates.family([scheduler]))]
        for optimizer in originals:
            if optimizer is not None and id(optimizer) not in memo:
                inner = rates.innermost(optimizer)
                memo[id(optimizer)] = memo[id(inner)] if id(inner) in memo else self._stand_in(inner)
                memo[id(inner)] = memo[id(optimizer)]
        for value in _neighbours(scheduler):
            memo.setdefault(id(value), value)
        self.scheduler = copy.deepcopy(scheduler, memo)
        self._clocks = [one for one in rates.family([self.scheduler]) if type(getattr(one, "last_epoch", None)) is int]
        self.can_jump = bool(self._clocks)

    def _stand_in(self, optimizer: Any) -> Any:
        groups = [
            {name: value if name == "params" else copy.deepcopy(value) for name, value in group.items()}
            for group in optimizer.param_groups
        ]
        self.groups += groups
        defaults = copy.deepcopy(getattr(optimizer, "defaults", {}))
        return SimpleNamespace(param_groups=groups, defaults=defaults, state={}, step=lambda: None)

    def step(self, way: int) -> Exception | None:
        """Make a step that comes ``way`` after the last; return what it raised."""
        for clock in self._clocks:
            clock.last_epoch += way - 1
        try:
            if hasattr(self.scheduler, "patience"):
                self.scheduler.step(1.0)
            else:
                self.scheduler.step()
        except Exception as err:  # boundary: a scheduler of the script's
            return err
        return None


def _neighbours(scheduler: Any) -> Iterable[Any]:
    """Yield what a scheduler refers to and must not be copied: models, trainers."""
    for one in rates.family([scheduler]):
        for value in getattr(one, "__dict__", {}).values():
            for each in value if isinstance(value, (list, tuple)) else [value]:
                owner = each.__self__ if isinstance(each, MethodType) else each
                if any(hasattr(owner, mark) for mark in ("named_parameters", "fit", "train", "trainer")):
                    yield owner
