"""Rules of a run: when a condition becomes true, a command is given, whether or not a client is there.

They live on rank 0 of the job, and end with it. Clients add them on the server thread; from then on the training thread
alone feeds them, with each log and, while a rule is about steps, with each step. ``_lock`` guards the list and what is
listed, and is held for microseconds; the two tuples of rules that wait are assigned whole. No device is read.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from .. import states
from ..errors import CommandRefused, ControlError, InvalidParams
from ..schema import shown
from ..wire.builtin import BUILTIN
from ..wire.conditions import STEP_NAMES, Watch, parse
from ..wire.methods import COMMON_NAMES, OWN, Method
from ..wire.records import CommandRecord
from . import limits
from .progress import RunState

log = logging.getLogger("forgather_control")

#: What a record says of the caller of a rule that the script made.
SCRIPT: Final[dict[str, Any]] = {"via": states.VIA_RULE, "uid": None, "user": None, "pid": None, "program": None}
#: Gives a command: its name, its own parameters, why, and for whom.
Give = Callable[[str, dict[str, Any], str, dict[str, Any]], CommandRecord]


@dataclass
class Rule:
    """One rule; changed under the lock of ``Rules`` only."""

    number: int
    watch: Watch
    do: str
    params: dict[str, Any]
    reason: str
    not_before: int | None
    requested_by: dict[str, Any]
    begun: bool = False  # whether ``not_before`` is over
    note: str | None = None
    fired_at_step: int | None = None
    command_id: str | None = None

    @property
    def earliest(self) -> float:
        """The step before which it need not be looked at after a step."""
        return self.watch.condition.earliest if self.begun else float(self.not_before or 0)

    @property
    def counts_steps(self) -> bool:
        """Whether it must be looked at after each step."""
        return not self.begun or not self.watch.condition.names.isdisjoint(STEP_NAMES)


class Rules:
    """The rules of one run.

    Args:
        on_step: the functions that are called with each finished step; see ``Controller``.
        nan_filter: returns why the trainer logs no NaN for its loss; ``None`` if it does.
    """

    def __init__(
        self, state: RunState, on_step: list[Callable[[int], None]], nan_filter: Callable[[], str | None]
    ) -> None:
        self._state, self._on_step, self._nan_filter = state, on_step, nan_filter
        #: Gives the command of a rule; set on rank 0 before the run starts.
        self.give: Give | None = None
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        self._numbers = itertools.count(1)
        self._began = time.monotonic()
        #: The rules that wait for a metric.
        self.waiting: tuple[Rule, ...] = ()
        self._waiting_steps: tuple[Rule, ...] = ()
        self._earliest = -math.inf  # the step before which none of those can fire

    # On the server thread, or on the training thread before the first step...

    def add(
        self, when: str, do: str, params: dict[str, Any], not_before: int | None, requested_by: dict[str, Any]
    ) -> dict[str, Any]:
        """Add a rule, and fire it at once if its condition holds already; return it as it is listed.

        Args:
            params: the command's own parameters, checked, and perhaps ``reason``.

        Raises:
            InvalidParams: the condition cannot be read.
            CommandRefused: there are too many.
        """
        watch, reason = Watch(parse(when)), params.pop("reason", None)
        with self._lock:
            if len(self._rules) >= limits.MAX_RULES:
                raise CommandRefused(f"there are {limits.MAX_RULES} rules already; remove_rule makes room")
            number = next(self._numbers)
            rule = Rule(number, watch, do, params, reason or f"rule {number}: {when}", not_before, requested_by)
        step = self._state.progress.step
        if not_before is None or step >= not_before:
            rule.begun = True
            self._feed(rule, {**self._state.metrics, **self._step_values(step)})
        with self._lock:
            self._rules.append(rule)
            self._sort()
            return self._listed(rule)

    def declare(self, rules: Sequence[Mapping[str, Any]], methods: Mapping[str, Method]) -> None:
        """Add the rules of a script; one that this run cannot carry out costs a warning. On the training thread.

        Those that give a command of the script are added after the first step, by which that is registered.
        """

        def add(found: Sequence[Mapping[str, Any]]) -> None:
            for rule in found:
                try:
                    params = check(methods[rule["do"]], rule["params"])
                    self.add(rule["when"], rule["do"], params, rule["not_before"], SCRIPT)
                except ControlError as err:
                    log.warning("Ignored the rule %s: %s", ascii(rule["when"]), err)

        def first_step(step: int) -> None:
            self._on_step.remove(first_step)
            add(own)

        own = [rule for rule in rules if rule["do"].startswith(OWN)]
        add([rule for rule in rules if rule not in own])
        if own:
            self._on_step.append(first_step)

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
        for rule in self.waiting:
            if rule.begun:
                self._feed(rule, held)

    def _stepped(self, step: int) -> None:
        if step < self._earliest:
            return
        values = self._step_values(step)
        for rule in self._waiting_steps:
            if rule.begun:
                self._feed(rule, values)
            elif step >= (rule.not_before or 0):  # from now on it is fed as the others are, first with what is known
                rule.begun = True
                self._feed(rule, {**self._state.metrics, **values})
                with self._lock:
                    self._sort()

    # On the training thread, or before a rule waits...

    def _step_values(self, step: int) -> dict[str, Any]:
        return {"step": step, "epoch": self._state.progress.epoch, "hours": (time.monotonic() - self._began) / 3600}

    def _feed(self, rule: Rule, values: Mapping[str, Any]) -> None:
        if not rule.watch.holds(values) or rule.fired_at_step is not None:
            return
        with self._lock:
            rule.fired_at_step = self._state.progress.step
            self._sort()
        assert self.give is not None
        try:
            rule.command_id = self.give(rule.do, rule.params, rule.reason, rule.requested_by).command_id
            log.info("Rule %d fired: %s, so %s.", rule.number, rule.watch.condition, rule.do)
        except ControlError as err:
            rule.note = f"it fired, and its command was refused: {err}"
            log.warning("Rule %d fired, and its command was refused: %s", rule.number, err)

    # With the lock held...

    def _sort(self) -> None:
        rules = [rule for rule in self._rules if rule.fired_at_step is None]
        self.waiting = tuple(rule for rule in rules if not rule.watch.condition.names <= set(STEP_NAMES))
        self._waiting_steps = steps = tuple(rule for rule in rules if rule.counts_steps)
        self._earliest = min((rule.earliest for rule in steps), default=math.inf)
        is_watched = self._stepped in self._on_step
        if steps and not is_watched:
            self._on_step.append(self._stepped)
        elif is_watched and not steps:
            self._on_step.remove(self._stepped)

    def _listed(self, rule: Rule) -> dict[str, Any]:
        known = {"id": rule.number, "when": str(rule.watch.condition), "do": rule.do, "params": rule.params}
        fired = {"fired_at_step": rule.fired_at_step, "command_id": rule.command_id}
        return {**known, "not_before": rule.not_before, **fired, "note": self._note(rule)}

    def _note(self, rule: Rule) -> str | None:
        if rule.fired_at_step is not None:
            return rule.note
        notes = []
        for term in rule.watch.condition.terms:
            if term.number is None and term.name == "loss" and (why := self._nan_filter()):
                notes.append(why)
            if term.name in STEP_NAMES or term.name in rule.watch.seen:
                continue
            value = self._state.metrics.get(term.name)
            if value is None:
                notes.append(f"{term.name} was never logged so far")
            elif type(value) not in (int, float):
                notes.append(f"{term.name} is no number of the host, such as loss.item(), so that no rule can see it")
        return "; ".join(dict.fromkeys([*notes, "the rule ends with this job"]))


def check(method: Method, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the own parameters of a rule's command, checked, and its ``reason``, if it has one.

    Raises:
        InvalidParams: they do not fit, or the method is no command.
    """
    if not method.is_command:
        raise InvalidParams(f"a rule gives a command, and {method.name} is none", parameter="do")
    unfit = sorted((COMMON_NAMES - {"reason"}) & params.keys())
    if unfit:
        raise InvalidParams(f"a rule takes no {unfit[0]}: nobody waits for its command", parameter="params")
    reason = {"reason": params["reason"]} if params.get("reason") is not None else {}
    return {**method.own_params(method.bind(dict(params))), **reason}


def declared(rules: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rules that a script declares, with all parameters of ``add_rule``.

    Raises:
        InvalidParams: one is wrong, as far as that is known without the commands of the script.
    """
    found = []
    for rule in rules:
        if not isinstance(rule, Mapping):
            raise InvalidParams(f"a rule is a mapping with when, do, params and not_before, not {shown(rule)}")
        bound = BUILTIN["add_rule"].bind(dict(rule))
        parse(bound["when"])
        if not bound["do"].startswith(OWN):
            check(BUILTIN[bound["do"]], bound["params"])
        found.append(bound)
    return found
