"""The settings ``learning_rate`` and ``weight_decay`` of optimizers with their schedulers, in any framework.

All of it runs on the training thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

from ..errors import CommandRefused, InvalidParams
from ..schema import shown
from ..training.setting import Setting
from . import rate_trial, rates

_RATE_DOC: Final = (
    "The rate of the first parameter group; all groups, and the schedule from here on, are multiplied by the same "
    "factor."
)
_DECAY_DOC: Final = "That of the first parameter group that has one; all groups are multiplied by the same factor."


class OptimizerSettings:
    """The learning rates and weight decays of the optimizers of one run.

    Args:
        optimizers: returns the optimizers as they are now: one, or a sequence.
        schedulers: returns their schedulers as they are now: none, one, or a sequence.
        others: returns objects that keep rates for later, such as Lightning's StochasticWeightAveraging.
    """

    def __init__(
        self,
        optimizers: Callable[[], Any],
        schedulers: Callable[[], Any] = lambda: None,
        others: Callable[[], list[Any]] = list,
    ) -> None:
        self._find_optimizers, self._find_schedulers, self._find_others = optimizers, schedulers, others
        self._decays: list[float] = []  # the last that were not all zero

    def settings(self) -> list[Setting]:
        """Return the settings; ``weight_decay`` only where a group has one.

        Raises:
            InvalidParams: what is given is no optimizer, or no scheduler.
        """
        self._check()
        made = [
            Setting("learning_rate", self._rate, self._set_rate, 0, None, float, _RATE_DOC, check=self._cannot_set_rate)
        ]
        if any("weight_decay" in group for group in self._groups()):
            decay = Setting(
                *("weight_decay", self._decay, self._set_decay, 0, None, float, _DECAY_DOC),
                check=self._cannot_set_decay,
            )
            made.append(decay)
        return made

    # The learning rate...

    def _rate(self) -> float | None:
        return rates.lead(self._groups(), "lr")

    def _cannot_set_rate(self, rate: float) -> str | None:
        if any(group.get("relative_step") for group in self._groups()):
            return "the optimizer computes its rates itself (relative_step)"
        before = self._rate()
        if not before:
            first = "that of the first group is 0 now, as in the first step of a warm-up"
            return f"rates are multiplied, and {first}; try again after the next step"
        if rate == 0:
            return "rates are multiplied, so they could never be raised again"
        optimizers, schedulers = self._optimizers(), self._schedulers()
        return self._scaling(rate).problem or rate_trial.obstacle(optimizers, schedulers, rate / before)

    def _set_rate(self, rate: float) -> Callable[[], None]:
        if not self._rate():
            raise CommandRefused("the rate of the first group is 0")
        return self._scaling(rate).apply()

    def _scaling(self, rate: float) -> rates.Scaling:
        scaling, groups = rates.Scaling(), self._groups()
        before = rates.lead(groups, "lr") or math.nan
        family = [*rates.family(self._schedulers()), *self._find_others()]
        scaling.add_rates(groups, family, rate / before)
        scaling.put(groups[0], "lr", rate)  # not a rounding error off
        return scaling

    # The weight decay...

    def _decay(self) -> float | None:
        return next(iter(self._decays_now(nonzero=True)), 0.0)

    def _decays_now(self, nonzero: bool = False) -> list[float]:
        found = [rates.number(group.get("weight_decay")) or 0.0 for group in self._groups()]
        return [decay for decay in found if decay] if nonzero else found

    def _base(self) -> list[float]:
        """Return the decays whose ratios count: those of now, or those of before all were set to 0."""
        now = self._decays_now()
        return now if any(now) or len(self._decays) != len(now) else self._decays

    def _cannot_set_decay(self, decay: float) -> str | None:
        if decay and not any(self._base()):
            return "all parameter groups have weight_decay 0, and groups at zero stay at zero"
        return None

    def _set_decay(self, decay: float) -> Callable[[], None]:
        base, before, scaling = self._base(), self._decays, rates.Scaling()
        first = next((each for each in base if each), None)
        for group, each in zip(self._groups(), base):
            if each and first:
                scaling.put(group, "weight_decay", decay if each == first else each * (decay / first))
        undo_decays = scaling.apply()
        self._decays = base

        def undo() -> None:
            undo_decays()
            self._decays = before

        return undo

    # What there is...

    def _check(self) -> None:
        optimizers = self._optimizers()
        for one in optimizers:
            if not isinstance(getattr(one, "param_groups", None), list) or rates.is_scheduler(one):
                raise InvalidParams(
                    f"an optimizer must have param_groups, as torch's have; this has none: {shown(one)}"
                )
        for one in self._schedulers():
            if not rates.is_scheduler(one):
                raise InvalidParams(f"a scheduler must have step(), as torch's have, unlike {shown(one)}")
        if not self._groups():
            raise InvalidParams("no optimizer is given, or one without parameters")

    def _optimizers(self) -> list[Any]:
        return rates.optimizers_of(self._find_optimizers())

    def _schedulers(self) -> list[Any]:
        found = self._find_schedulers()
        return [one for one in (found if isinstance(found, (list, tuple)) else [found]) if one is not None]

    def _groups(self) -> list[dict[str, Any]]:
        return rates.groups_of(self._optimizers())
