"""What becomes of commands after they are taken from the queue: effects, outcomes, rank reports, results.

Each rank has a tracker. Effects, saves, evaluations and the end are noted on the training thread; ``take``,
``put_back``, ``all_applied`` and ``submit`` belong to rank 0 and run on the thread that decides a round. What both
touch is the queue, which has its lock. Only rank 0 has records; the other ranks report to it through the group.

A command is finished when all events in its ``finishes_when`` have happened. A command that fails on one rank, in its
effect or in its report, has failed; control continues.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any, Final

from .. import states
from ..errors import CommandFailed, ControlError
from ..ranks.group import RankGroup
from ..wire.builtin import TrainingLoop
from ..wire.methods import Method, MethodTable
from ..wire.records import CommandRecord, Outcome, ScheduledCommand
from .command_queue import CommandQueue
from .run_state import RunState

log = logging.getLogger("forgather_control")

#: What did not happen, in messages.
_EVENTS: Final = {
    states.WHEN_SAVED: "the checkpoint was saved",
    states.WHEN_EVALUATED: "the evaluation was finished",
    states.WHEN_REPORTED: "the result was reported",
}
#: What a record says of the caller of a signal's command.
_SIGNAL: Final[dict[str, Any]] = {"via": states.VIA_SIGNAL, "uid": None, "user": None, "pid": None, "program": None}


@dataclass
class _Applied:
    """A command that this rank has applied and that is not finished here. Training thread only."""

    command_id: str
    method: Method
    since: float  # monotonic
    reported: bool = False
    result: dict[str, Any] | None = None

    @property
    def ends(self) -> bool:
        return states.WHEN_ENDED in self.method.finishes_when

    def awaits(self, event: str) -> bool:
        return self.method.rank_report == event and not self.reported


class CommandTracker:
    """The applied commands of one rank.

    Args:
        queue: holds their records.
        fresh_seconds: a signal's ``save_and_stop`` saves nothing if the last checkpoint is at most this old.
    """

    def __init__(self, queue: CommandQueue, methods: MethodTable, state: RunState, fresh_seconds: float) -> None:
        self._queue, self._methods, self._state = queue, methods, state
        self._fresh_seconds = fresh_seconds
        self._checkpoint: tuple[float, dict[str, Any]] | None = None  # the last one: when (monotonic), result
        self._applied: dict[str, _Applied] = {}

    # On the training thread...

    def apply(self, commands: list[ScheduledCommand], loop: TrainingLoop, step: int, group: RankGroup) -> None:
        """Run the effects of the commands that all ranks apply after this step."""
        outcomes = {command.command_id: self._run(command, loop) for command in commands}
        group.applied(commands, step, {command_id: outcome for command_id, outcome in outcomes.items() if outcome})
        for command in commands:
            self._follow(command, outcomes[command.command_id], group)
        if any("abort" in self._methods[command.name].needs for command in commands):
            self.fail(states.WHEN_SAVED, "an abort was applied: no checkpoint is written after it", group)
            self.fail(states.WHEN_EVALUATED, "an abort was applied before the evaluation", group)

    def _run(self, command: ScheduledCommand, loop: TrainingLoop) -> Outcome:
        try:
            if command.skip_save:
                loop.request_end()
                return {}
            run = self._methods[command.name].run
            assert run is not None  # every command has one
            value = run(loop, **command.params)
        except Exception as err:  # boundary: a failing effect fails its command, never control
            log.warning("%s failed at its step: %s", command.name, err, exc_info=not isinstance(err, ControlError))
            return _failure(err)
        return {} if value is None else {"value": value}

    def _follow(self, command: ScheduledCommand, outcome: Outcome, group: RankGroup) -> None:
        applied = _Applied(command.command_id, self._methods[command.name], time.monotonic())
        if "error" in outcome:  # the record fails once all ranks have applied; they must not wait for this one's report
            if applied.method.rank_report:
                group.report(command.command_id, outcome)
            return
        if not (applied.ends or applied.method.rank_report):
            return
        self._applied[command.command_id] = applied
        if applied.ends:
            self._state.ending = True
        if command.skip_save:
            applied.result = self._checkpoint[1] if self._checkpoint else None
            self._report(applied, {}, group)

    def saved(self, step: int, path: str, evaluated: bool, group: RankGroup) -> None:
        """Note that a checkpoint is complete on disk, or this rank's part of it, whatever caused it."""
        now = time.monotonic()
        self._checkpoint = now, _save_result(step, path, 0.0, evaluated)
        for applied in self._awaiting(states.WHEN_SAVED):
            applied.result = _save_result(step, path, now - applied.since, evaluated)
            self._report(applied, {}, group)
        for applied in self._applied.values():
            if applied.ends and applied.result is None:
                applied.result = _save_result(step, path, now - applied.since, evaluated)

    def evaluated(self, step: int, metrics: dict[str, Any], group: RankGroup) -> None:
        """Note that this rank has evaluated, and with which metrics."""
        now = time.monotonic()
        for applied in self._awaiting(states.WHEN_EVALUATED):
            applied.result = {"step": step, "metrics": metrics, "seconds": round(now - applied.since, 6)}
            self._report(applied, {}, group)

    def nothing_to_save(self, group: RankGroup) -> None:
        """Note that this rank writes no part of the checkpoint that was asked for. Not on rank 0."""
        for applied in self._awaiting(states.WHEN_SAVED):
            self._report(applied, {}, group)

    def fail(self, event: str, reason: str, group: RankGroup) -> None:
        """Note that an event will not come on this rank, so that the commands that wait for it fail."""
        for applied in self._awaiting(event):
            self._report(applied, _failure(CommandFailed(reason)), group)

    def close_reports(self, reason: str | None, group: RankGroup) -> None:
        """Report what this rank still owes when training ends.

        Args:
            reason: why training did not end as it should; ``None`` if it did. Then another rank than 0 has no part that
                is missing (often only rank 0 saves), and on rank 0 the event did not come.
        """
        for applied in [each for each in self._applied.values() if each.method.rank_report and not each.reported]:
            if reason is None and group.rank != 0:
                self._report(applied, {}, group)
            else:
                why = reason or f"training ended before {_EVENTS[applied.method.rank_report or '']}"
                self._report(applied, _failure(CommandFailed(why)), group)

    def end(self, step: int, reason: str | None, group: RankGroup) -> None:
        """Note that training has ended; ``reason`` says why, if it did not end as it should."""
        for applied in [applied for applied in self._applied.values() if applied.ends]:
            applied.result = applied.result or {"step": step, "path": None, "seconds": None, "evaluated": False}
            if group.rank == 0 and reason is None:
                self._finish_when_reported(applied, group)
            elif group.rank == 0:
                self._queue.failed(applied.command_id, CommandFailed(reason or ""), applied.result)
        self._applied.clear()

    def _awaiting(self, event: str) -> list[_Applied]:
        return [applied for applied in self._applied.values() if applied.awaits(event)]

    def _report(self, applied: _Applied, outcome: Outcome, group: RankGroup) -> None:
        """Report this rank's part of a command; finish the command here unless it waits for the end of training."""
        applied.reported = True
        if applied.method.rank_report:
            group.report(applied.command_id, outcome)
        if not applied.ends or "error" in outcome:
            del self._applied[applied.command_id]
            if group.rank == 0:
                self._finish_when_reported(applied, group)

    def _finish_when_reported(self, applied: _Applied, group: RankGroup) -> None:
        def finish(outcomes: dict[int, Outcome], fault: str | None) -> None:
            why = fault or _error_text(outcomes)
            if why is not None:
                self._queue.failed(applied.command_id, CommandFailed(why), applied.result)
            else:
                self._queue.finished(applied.command_id, applied.result or _result(applied.method, outcomes))

        group.when_reported(applied.command_id, finish)

    # On the thread that decides; rank 0...

    def take(self) -> list[ScheduledCommand]:
        """Take the queued commands."""
        return [
            ScheduledCommand(record.command_id, record.command, record.params, self._skips_save(record))
            for record in self._queue.drain()
        ]

    def _skips_save(self, record: CommandRecord) -> bool:
        """Return whether a signal's save_and_stop needs no save, because the last checkpoint is young enough."""
        last = self._checkpoint
        by_signal = (record.requested_by or {}).get("via") == states.VIA_SIGNAL
        if not by_signal or record.command != "save_and_stop" or last is None:
            return False
        return time.monotonic() - last[0] < self._fresh_seconds

    def put_back(self, commands: list[ScheduledCommand]) -> None:
        """Queue commands again on which the ranks did not agree."""
        self._queue.put_back([command.command_id for command in commands])

    def all_applied(
        self, commands: list[ScheduledCommand], step: int, outcomes: dict[int, dict[str, Outcome]], fault: str | None
    ) -> None:
        """Note that all ranks applied the commands, with which outcomes; or not all, and why."""
        for command in commands:
            mine = {rank: found[command.command_id] for rank, found in outcomes.items() if command.command_id in found}
            why = f"not all ranks applied the {command.name}: {fault}" if fault else _error_text(mine)
            method = self._methods[command.name]
            if why is not None:
                self._queue.failed(command.command_id, CommandFailed(why))
                continue
            self._queue.applied(command.command_id, step)
            if method.finishes_when == {states.WHEN_APPLIED}:
                self._queue.finished(command.command_id, _result(method, mine))

    def submit(self, command: str) -> None:
        """Queue the command of a signal that some rank received."""
        try:
            method = self._methods[command]
            self._queue.submit(command, None, method.own_params(method.bind({})), None, _SIGNAL)
        except ControlError as err:
            log.warning("Ignored the signal for %s: %s", command, err)


def _result(method: Method, outcomes: dict[int, Outcome]) -> dict[str, Any]:
    values = {rank: outcomes[rank].get("value") for rank in sorted(outcomes)}
    return method.combine(values) if method.combine is not None else {"value": values.get(0)}


def _failure(err: Exception) -> Outcome:
    message = err.message if isinstance(err, ControlError) else f"{type(err).__name__}: {err}"
    return {"error": {"code": getattr(err, "code", CommandFailed.code), "message": message[:1000]}}


def _error_text(outcomes: dict[int, Outcome]) -> str | None:
    """Say which ranks failed and why: rank 0's message stands for the same message of others."""
    messages: dict[str, list[int]] = {}
    for rank in sorted(outcomes):
        if "error" in outcomes[rank]:
            messages.setdefault(outcomes[rank]["error"]["message"], []).append(rank)
    texts = [
        text if ranks[0] == 0 else f"rank {', '.join(map(str, ranks))}: {text}" for text, ranks in messages.items()
    ]
    return "; ".join(texts) or None


def _save_result(step: int, path: str, seconds: float, evaluated: bool) -> dict[str, Any]:
    shown = path.encode("utf-8", "backslashreplace").decode("utf-8")  # JSON cannot carry a byte that is no UTF-8
    return {"step": step, "path": shown, "seconds": round(seconds, 6), "evaluated": evaluated}
