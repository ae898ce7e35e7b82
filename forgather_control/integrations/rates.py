"""The learning rates of optimizers and of their schedulers, known by attributes only: found, scaled, restored.

A scheduler computes the next rates from numbers of three kinds: the present rates of the groups, base rates that it or
the groups keep, and limits. If all of them are multiplied by one factor, so are all rates that follow, as long as the
scheduler only multiplies, adds, interpolates and compares them. ``rate_trial`` tries that with classes not known here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Final

#: What groups hold: the rate, and the numbers that OneCycleLR and SWALR keep there.
GROUP_RATES: Final = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
#: What schedulers hold, one number or one for each group: those of torch, transformers, DeepSpeed and Forgather, and
#: what others call theirs.
SCHEDULER_RATES: Final = frozenset(
    [
        "base_lrs",
        "max_lrs",
        "min_lrs",
        "delta_lrs",
        "_init_lrs",
        "_last_lr",
        "base_lr",
        "max_lr",
        "min_lr",
        "eta_min",
        "eta_max",
        "default_min_lr",
        "constant_lr",
        "initial_lr",
        "init_lr",
        "start_lr",
        "end_lr",
        "final_lr",
        "lr_init",
        "lr_end",
        "lr_min",
        "lr_max",
        "peak_lr",
        "swa_lr",
        "warmup_start_lr",
        "warmup_lr_init",
        "base_values",
        "_swa_lrs",
    ]
)
#: What schedulers, and functions that compute their factors, call the number of steps that they were made for.
_LENGTHS: Final = ("num_training_steps", "num_decay_steps", "total_steps", "max_steps", "total_iters", "T_max")
#: The least change of a rate that ReduceLROnPlateau and GreedyLR make: theirs only, as it is often something else.
_LEAST_CHANGE: Final = "eps"


def innermost(optimizer: Any) -> Any:
    """Return the optimizer that others wrap (accelerate, DeepSpeed, Lightning Fabric)."""
    seen = []
    while hasattr(inner := getattr(optimizer, "optimizer", None), "param_groups") and inner not in seen:
        seen.append(optimizer)
        optimizer = inner
    return optimizer


def optimizers_of(found: Any) -> list[Any]:
    """Return the optimizers in one, in a container of some, or in a sequence."""
    if found is None:
        return []
    if isinstance(found, (list, tuple)):
        return [each for one in found for each in optimizers_of(one)]
    found = found if is_scheduler(found) else innermost(found)
    inner = getattr(found, "optimizers", None)
    if isinstance(inner, (list, tuple)) and inner:
        return optimizers_of(inner)
    return [found]


def groups_of(optimizers: Iterable[Any]) -> list[dict[str, Any]]:
    """Return the parameter groups of optimizers, each once."""
    groups = {id(group): group for optimizer in optimizers for group in optimizer.param_groups}
    return list(groups.values())


def family(schedulers: Iterable[Any]) -> list[Any]:
    """Return schedulers with all that they wrap, chain or hold, each once."""
    found: dict[int, Any] = {}
    waiting = list(schedulers)
    while waiting:
        one = waiting.pop()
        if id(one) not in found:
            found[id(one)] = one
            waiting += [value for value in _held(one) if is_scheduler(value)]
    return list(found.values())


def is_scheduler(value: Any) -> bool:
    """Return whether a value steps the rates of an optimizer."""
    if isinstance(value, type) or hasattr(value, "param_groups") or not callable(getattr(value, "step", None)):
        return False
    return hasattr(value, "get_last_lr") or hasattr(value, "optimizer") or hasattr(value, "schedulers")


def _held(scheduler: Any) -> Iterator[Any]:
    for value in getattr(scheduler, "__dict__", {}).values():
        yield value
        if isinstance(value, (list, tuple)):
            yield from value


def shape(schedulers: Iterable[Any]) -> str | None:
    """Return in words for how many steps schedules were made; ``None`` if none tells."""
    found = {f"{type(one).__name__} has {name}={steps}" for one in family(schedulers) for name, steps in _lengths(one)}
    return ", ".join(sorted(found)) or None


def _lengths(scheduler: Any) -> Iterator[tuple[str, int]]:
    held = dict(getattr(scheduler, "__dict__", {}))
    for function in held.get("lr_lambdas") or ():
        held.update(getattr(function, "keywords", {}))  # of a partial, as transformers makes them
        closure = getattr(function, "__closure__", None) or ()
        names = function.__code__.co_freevars if closure else ()
        with suppress(ValueError):  # a variable without a value yet
            held.update({name: cell.cell_contents for name, cell in zip(names, closure)})
    yield from ((name, held[name]) for name in _LENGTHS if type(held.get(name)) is int)


class Scaling:
    """Changes of numbers that are planned, then made all or none, and can be taken back exactly.

    A tensor is changed in place, as captured graphs and compiled steps read it.
    """

    def __init__(self) -> None:
        self._numbers: list[tuple[dict[str, Any], str, Any, Any]] = []  # where, by what name, before, after
        self._tensors: dict[int, tuple[Any, Any, Any]] = {}  # the tensor, a copy of before, after
        self.problem: str | None = None  #: Why the changes cannot be made.

    def add_rates(self, groups: Iterable[dict[str, Any]], schedulers: Iterable[Any], factor: float) -> None:
        """Plan to multiply all rates of groups, and of schedulers with those that they hold."""
        for group in groups:
            for name in GROUP_RATES:
                self.multiply(group, name, factor)
        for scheduler in schedulers:
            held = getattr(scheduler, "__dict__", {})
            for name in SCHEDULER_RATES.intersection(held):
                self.multiply(held, name, factor)
            if "min_lrs" in held and "patience" in held:
                self.multiply(held, _LEAST_CHANGE, factor)

    def multiply(self, where: dict[str, Any], name: str, factor: float) -> None:
        """Plan to multiply a number, a tensor, or a sequence of them; anything else stays."""
        value = where.get(name)
        scaled = self._scaled(value, name, factor)
        if scaled is not value:
            self._numbers.append((where, name, value, scaled))

    def put(self, where: dict[str, Any], name: str, value: float) -> None:
        """Plan to set one number exactly."""
        before = where[name]
        if is_tensor(before):
            self._tensors[id(before)] = (before, before.clone(), value)
        else:
            self._numbers.append((where, name, before, value))

    def _scaled(self, value: Any, name: str, factor: float) -> Any:
        if isinstance(value, (list, tuple)):
            scaled = [self._scaled(each, name, factor) for each in value]
            same = all(one is other for one, other in zip(value, scaled))
            return value if same else type(value)(scaled) if type(value) in (list, tuple) else scaled
        if is_tensor(value):
            if id(value) not in self._tensors:
                self._tensors[id(value)] = (value, value.clone(), value * factor)
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return value
        self._judge(name, value, value * factor)
        return value * factor

    def _judge(self, name: str, before: float, after: float) -> None:
        lost = (after == 0) != (before == 0) or math.isfinite(after) != math.isfinite(before)
        if lost and self.problem is None:
            self.problem = f"{name}, which is {before:g} in the schedule, would become {after:g}"

    def apply(self) -> Callable[[], None]:
        """Make the changes; return a function that takes them back."""
        done: list[Callable[[], None]] = []

        def undo() -> None:
            while done:
                done.pop()()

        try:
            for tensor, before, after in self._tensors.values():
                done.append(lambda tensor=tensor, before=before: _fill(tensor, before))  # type: ignore[misc]
                _fill(tensor, after)
            for where, name, before, after in self._numbers:
                done.append(lambda where=where, name=name, before=before: where.update({name: before}))  # type: ignore[misc]
                where[name] = after
        except BaseException:
            undo()
            raise
        return undo


def is_tensor(value: Any) -> bool:
    """Return whether a value is a tensor, without an import of torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _fill(tensor: Any, value: Any) -> None:
    with sys.modules["torch"].no_grad():
        if is_tensor(value):
            tensor.copy_(value)
        else:
            tensor.fill_(value)


def number(value: Any) -> float | None:
    """Return a rate as a number; ``None`` if there is none (Adafactor computes its own)."""
    if is_tensor(value):
        return float(value)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def lead(groups: Iterable[Mapping[str, Any]], name: str) -> float | None:
    """Return the value of the first group; ``None`` if there is none."""
    return next((number(group.get(name)) for group in groups), None)
