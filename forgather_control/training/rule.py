"""One rule of a run: what it waits for, what it does then, and what is told of it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InvalidParams
from ..schema import shown
from ..wire.builtin import BUILTIN
from ..wire.conditions import STEP_NAMES, Watch, number, parse
from ..wire.methods import COMMON_NAMES, OWN, Method
from . import limits
from .loop_actions import RequestedActions
from .progress import RunState


@dataclass(eq=False)
class Rule:
    """One rule; changed under the lock of ``Rules`` only.

    Raises:
        InvalidParams: the condition cannot be read.
    """

    when: str
    do: str
    params: dict[str, Any]  #: Those of its command; its ``reason`` is taken out.
    not_before: int | None
    requested_by: dict[str, Any]
    is_declared: bool = False  #: By the script, before the first step: it is checked then, and begins.
    number: int = 0
    begun: bool = False  #: Whether it is fed: ``not_before`` is over.
    added_with: Mapping[str, Any] | None = None  #: The metrics with which it has begun, until the next log.
    is_due: bool = False  #: Whether its condition held.
    fired_at_step: int | None = None
    command_id: str | None = None
    note: str | None = None  #: Why its command was refused.

    def __post_init__(self) -> None:
        self.condition = parse(self.when)
        self.watch = Watch(self.condition)
        self.reason = self.params.pop("reason", None)

    def bind(self, method: Method) -> None:
        """Check its parameters against the method of its command; InvalidParams: they do not fit."""
        self.params = check(method, self.params)

    @property
    def counts_steps(self) -> bool:
        """Whether steps can change it."""
        return not self.begun or self.is_due or not self.condition.names.isdisjoint(STEP_NAMES)

    def next_value(self, name: str, value: float | None) -> float:
        """Return from which step, epoch or hour on it must be looked at, after a step at which it was."""
        if name == "step" and not self.begun:
            return float(self.not_before or 0)
        if name == "step" and self.is_due:
            return 0.0
        return self.condition.next_value(name, value)

    @property
    def why(self) -> str:
        """The reason in the record of its command."""
        return f"rule {self.number}: {self.condition}" + (f": {self.reason}" if self.reason else "")

    def listed(self, state: RunState, loop: RequestedActions) -> dict[str, Any]:
        """Return it as the wire shows it."""
        params = {**self.params, **({"reason": self.reason} if self.reason else {})}
        known = {"id": self.number, "when": str(self.condition), "do": self.do, "params": params}
        note = self.note
        if self.fired_at_step is None:
            note = "; ".join([*dict.fromkeys(self._notes(state, loop)), "the rule ends with this job"])
        fired = {"fired_at_step": self.fired_at_step, "command_id": self.command_id}
        return {**known, "not_before": self.not_before, **fired, "note": note}

    def _notes(self, state: RunState, loop: RequestedActions) -> Iterator[str]:
        if self.is_due:
            yield "its condition was true; it fires once the ranks have compared what each registered"
        method = BUILTIN.get(self.do)
        if method is not None and method.ends_unsaved and loop.no_stop_save is not None:
            yield f"nothing will be saved: {loop.no_stop_save}"
        for term in self.condition.terms:
            if term.number is None and term.name == "loss" and loop.nan_filter is not None:
                yield loop.nan_filter
            if term.name == "epoch" and state.progress.epoch is None:
                yield "no epoch is known so far"
            elif term.name not in STEP_NAMES and (why := self._unseen(term.name, state.metrics)):
                yield why

    def _unseen(self, name: str, metrics: Mapping[str, Any]) -> str | None:
        if name not in metrics:
            near = difflib.get_close_matches(name, metrics, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            return f"{name} was never logged so far{hint}" if name in self.watch.unseen else None
        if number(metrics[name]) is not None:
            return None
        if hasattr(metrics[name], "item"):
            return f"{name} is logged as a tensor on a device, which no rule reads; log {name}.item() instead"
        return f"{name} is no number, so no rule can see it"


def check(method: Method, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the own parameters of a rule's command, checked, and its ``reason``, if it has one.

    Raises:
        InvalidParams: they do not fit, or the method is no command.
    """
    if not method.is_command:
        commands = ", ".join(each.name for each in BUILTIN.values() if each.is_command)
        text = f"a rule gives a command, and {method.name} is none; use one of {commands} or user.NAME"
        raise InvalidParams(text, parameter="do")
    unfit = sorted((COMMON_NAMES - {"reason"}) & params.keys())
    if unfit:
        text = f"a rule takes no {unfit[0]}, as no caller waits for its command; it takes reason"
        raise InvalidParams(text, parameter="params")
    bound = method.bind(dict(params))
    return {**method.own_params(bound), **({} if bound["reason"] is None else {"reason": bound["reason"]})}


def declared(rules: Any) -> list[dict[str, Any]]:
    """Return the rules that a script declares, with all parameters of ``add_rule``.

    Raises:
        InvalidParams: one is wrong, as far as that is known without the commands and settings of the script.
        MethodNotFound: there is no such command.
    """
    if not isinstance(rules, (list, tuple)):
        raise InvalidParams(f"rules must be a list of mappings, not {shown(rules)}", parameter="rules")
    if len(rules) > limits.MAX_RULES:
        raise InvalidParams(f"a job has at most {limits.MAX_RULES} rules, not {len(rules)}", parameter="rules")
    found = []
    for rule in rules:
        if not isinstance(rule, Mapping):
            text = f"a rule is a mapping with when, do, params and not_before, not {shown(rule)}"
            raise InvalidParams(text, parameter="rules")
        bound = BUILTIN["add_rule"].bind(dict(rule))
        parse(bound["when"])
        if not bound["do"].startswith(OWN):
            bound["params"] = check(BUILTIN[bound["do"]], bound["params"])
        found.append(bound)
    return found
