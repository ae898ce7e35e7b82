"""Rules of a run: when a condition becomes true, a command is given, whether or not a client is there.

They live on rank 0 of the job, and end with it. Clients add and remove them on the server thread. The training thread
feeds them with each log, and with steps only from the step, epoch or hour on at which one of them may change. ``_lock``
guards all of it and is held for microseconds; commands are given without it. No device is read.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from .. import states
from ..errors import ControlError, InvalidParams, TooManyCommands
from ..wire.conditions import STEP_NAMES, number
from ..wire.methods import MethodTable
from ..wire.records import CommandRecord
from . import limits
from .command_queue import Submission
from .loop_actions import RequestedActions
from .progress import RunState
from .rule import Rule

log = logging.getLogger("forgather_control")

#: What a record says of the caller of a rule that no client made: the script did, or it ends a timed pause.
SCRIPT: Final[dict[str, Any]] = {"via": states.VIA_RULE, "uid": None, "user": None, "pid": None, "program": None}
#: Gives commands together; returns for each its record, or why it was refused.
Give = Callable[[list[Submission]], "list[CommandRecord | ControlError]"]


class Rules:
    """The rules of one run.

    Args:
        on_step: the functions that are called with each finished step; see ``Controller``.
        loop: what the run can do.
    """

    def __init__(self, state: RunState, on_step: list[Callable[[int], None]], loop: RequestedActions) -> None:
        self._state, self._on_step, self._loop = state, on_step, loop
        #: Gives the commands of rules, and says whether one could be given now. Set on rank 0 before the run starts.
        self.give: Give | None = None
        self.can_give: Callable[[str], bool] = lambda do: True
        # Reentrant, because a signal handler of the script may log while the training thread holds it.
        self._lock = threading.RLock()
        self._rules: list[Rule] = []
        self._numbers = itertools.count(1)
        self._began = time.monotonic()
        #: Counts the changes of what is listed. Read without the lock.
        self.changes = 0
        #: The rules that wait for a metric. Read without the lock.
        self.waiting: tuple[Rule, ...] = ()
        self._waiting_steps: tuple[Rule, ...] = ()
        # The last step that those were fed with, and from which step, epoch and time (monotonic) they need the next.
        self._fed_step = self._next_step = self._next_epoch = self._next_time = math.inf
        self._is_timed = False  # whether an epoch or a time is

    # On the server thread, or on the training thread before the first step...

    def add(self, rule: Rule) -> dict[str, Any]:
        """Add a rule, and fire it at once if its condition holds already; return it as it is listed.

        Raises:
            TooManyCommands: ``MAX_RULES`` are listed.
        """
        limit = limits.MAX_RULES
        with self._lock:
            if len(self._rules) >= limit:
                fired = [str(each.number) for each in self._rules if each.fired_at_step is not None]
                hint = f"remove one, such as {', '.join(fired)}, which fired" if fired else "remove one of them first"
                raise TooManyCommands(f"there are {limit} rules already; {hint}", limit=limit)
            rule.number = next(self._numbers)
            self._rules.append(rule)
            due = [] if rule.is_declared else self._begin(rule)
            self._sort()
        self._fire(due)
        with self._lock:
            return self._listed(rule)

    def declare(self, rules: Sequence[Mapping[str, Any]], methods: MethodTable) -> None:
        """Add the rules of a script, which begin with the first step. On the training thread.

        By then its commands and settings are known, too; a rule that this run cannot carry out costs a warning.
        """
        found = [Rule(**copy.deepcopy(rule), requested_by=SCRIPT, is_declared=True) for rule in rules]
        for rule in found:
            self.add(rule)

        def first_step(step: int) -> None:
            self._on_step.remove(first_step)
            for rule in found:
                self._check_declared(rule, methods)

        if found:
            self._on_step.insert(0, first_step)

    def _check_declared(self, rule: Rule, methods: MethodTable) -> None:
        try:
            method = methods[rule.do]
            rule.bind(method)
            why = next((why for need in method.needs if (why := self._loop.cannot(need, rule.params))), None)
        except ControlError as err:
            why = str(err)
        if why is not None:
            log.warning("Ignored the rule %s: %s", ascii(str(rule.condition)), why)
        with self._lock:
            rule.is_declared = False
            self._rules = [each for each in self._rules if why is None or each is not rule]
            self._sort()

    def remove(self, number: int) -> dict[str, Any]:
        """Remove a rule; return it. InvalidParams: there is none of this number."""
        with self._lock:
            for rule in self._rules:
                if rule.number == number:
                    self._rules.remove(rule)
                    self._sort()
                    return self._listed(rule)
            known = ", ".join(str(rule.number) for rule in self._rules) or "none"
        raise InvalidParams(f"there is no rule {number}; there is {known}", parameter="id")

    def listed(self) -> list[dict[str, Any]]:
        """Return all rules, oldest first. On any thread."""
        with self._lock:
            return [self._listed(rule) for rule in self._rules]

    # On the training thread...

    def logged(self, held: Mapping[str, Any]) -> None:
        """Note values that were logged. Those that only a device knows are left out."""
        values = _numbers(held)
        with self._lock:
            due = self._due([rule for rule in self.waiting if rule.begun and self._is_new_to(rule)], values)
        self._fire(due)

    def _stepped(self, step: int) -> None:
        if self._fed_step <= step < self._next_step and not (self._is_timed and self._is_time()):
            return
        with self._lock:
            values, due = self._step_values(), []
            due += self._due([rule for rule in self._waiting_steps if rule.begun], values)
            for rule in self._waiting_steps:
                if not (rule.begun or rule.is_declared) and step >= (rule.not_before or 0):
                    due += self._begin(rule)
            self._plan(values)
        self._fire(due)

    def _is_time(self) -> bool:
        epoch = self._state.progress.epoch
        return time.monotonic() >= self._next_time or (epoch is not None and epoch >= self._next_epoch)

    # With the lock held...

    def _is_new_to(self, rule: Rule) -> bool:
        """Return whether a log is not the one with which the rule has begun, on another thread."""
        is_new, rule.added_with = rule.added_with is not self._state.metrics, None
        return is_new

    def _begin(self, rule: Rule) -> list[Rule]:
        """Feed a rule with what is known now, unless it is not to begin; return it if it fires."""
        if self._state.progress.step < (rule.not_before or 0):
            return []
        rule.begun, rule.added_with = True, self._state.metrics
        due = self._due([rule], {**_numbers(rule.added_with), **self._step_values()})
        self._sort()
        return due

    def _due(self, rules: Iterable[Rule], values: Mapping[str, float]) -> list[Rule]:
        """Feed rules; return those that fire now, for ``_fire``."""
        due = [rule for rule in rules if rule.watch.feed(values) or rule.is_due]
        if not due:
            return due
        for rule in due:
            rule.is_due = True
        due = [rule for rule in due if rule.fired_at_step is None and self.can_give(rule.do)]
        for rule in due:
            rule.fired_at_step = self._state.progress.step
        self._sort()
        return due

    def _step_values(self) -> dict[str, float]:
        epoch, hours = self._state.progress.epoch, (time.monotonic() - self._began) / 3600
        return {"step": self._state.progress.step, "hours": hours, **({} if epoch is None else {"epoch": epoch})}

    def _sort(self) -> None:
        rules = [rule for rule in self._rules if rule.fired_at_step is None]
        self.waiting = tuple(rule for rule in rules if not rule.condition.names <= set(STEP_NAMES))
        self._waiting_steps = steps = tuple(rule for rule in rules if rule.counts_steps)
        self._fed_step = math.inf  # the next step is looked at
        self.changes += 1
        is_called = self._stepped in self._on_step
        if steps and not is_called:
            self._on_step.append(self._stepped)
        elif is_called and not steps:
            self._on_step.remove(self._stepped)

    def _plan(self, values: Mapping[str, float]) -> None:
        """Note when the rules about steps need values again: as long as those grow, nothing can change before."""
        self._fed_step = values["step"]
        nexts = dict.fromkeys(STEP_NAMES, math.inf)
        for rule in self._waiting_steps:
            for name in STEP_NAMES:
                nexts[name] = min(nexts[name], rule.next_value(name, values.get(name)))
        self._next_step, self._next_epoch = nexts["step"], nexts["epoch"]
        self._next_time = self._began + nexts["hours"] * 3600
        self._is_timed = min(self._next_epoch, self._next_time) < math.inf

    def _listed(self, rule: Rule) -> dict[str, Any]:
        return rule.listed(self._state, self._loop)

    # Without the lock...

    def _fire(self, due: Sequence[Rule]) -> None:
        if not due:
            return
        assert self.give is not None
        found = self.give([Submission(rule.do, rule.params, rule.why, rule.requested_by) for rule in due])
        for rule, given in zip(due, found):
            if isinstance(given, CommandRecord):
                rule.command_id = given.command_id
                log.info("Rule %d fired: %s, so %s.", rule.number, rule.condition, rule.do)
            else:
                rule.note = f"it fired, and its command was refused: {given}"
                log.warning("Rule %d fired, and its command was refused: %s", rule.number, given)
        self.changes += 1


def _numbers(held: Mapping[str, Any]) -> dict[str, float]:
    """Return the values that are numbers on the host, without those named as the numbers of a step."""
    found = {}
    for name, value in held.items():
        kind = type(value)
        if kind is float or kind is int:
            found[name] = value
        elif (known := number(value)) is not None:
            found[name] = known
    for name in STEP_NAMES:
        found.pop(name, None)
    return found
