"""What becomes of commands after they are taken from the queue: effects, outcomes, rank reports, results.

Each rank has a tracker. Effects, saves, evaluations and the end are noted on the training thread, the end of a save in
the background on any; ``_lock`` guards what these touch. ``take``, ``all_applied`` and ``submit`` belong to rank 0, run
on the thread that decides a round, and touch only the queue, which has its own lock. Only rank 0 has records; the other
ranks report to it through the group.

A command is finished when all events in its ``finishes_when`` have happened. A command that fails on one rank, in its
effect or in its report, has failed; control continues.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from .. import states
from ..deadline import Deadline
from ..errors import CommandFailed, CommandRefused, ControlError
from ..ranks.group import RankGroup
from ..wire.builtin import TrainingLoop
from ..wire.methods import MethodTable
from ..wire.records import Outcome, ScheduledCommand
from . import outcomes as results
from .applied_command import AppliedCommand, Save
from .command_queue import CommandQueue
from .progress import RunState
from .settings import Change

log = logging.getLogger("forgather_control")

#: What an effect did on this rank, and the future of what it does later.
Done = tuple[Outcome, Future[Any] | None]

#: What did not happen, in messages.
_EVENTS: Final = {
    states.WHEN_SAVED: "the checkpoint was saved",
    states.WHEN_EVALUATED: "the evaluation was finished",
    states.WHEN_REPORTED: "the result was reported",
}
#: What a record says of the caller of a signal's command.
_SIGNAL: Final[dict[str, Any]] = {"via": states.VIA_SIGNAL, "uid": None, "user": None, "pid": None, "program": None}


@dataclass(eq=False)
class CommandTracker:
    """The applied commands of one rank."""

    queue: CommandQueue
    methods: MethodTable
    state: RunState
    loop: TrainingLoop
    group: Callable[[], RankGroup]  #: Returns the group that this rank belongs to.
    fresh_seconds: float  #: A signal's ``save_and_stop`` saves nothing if the last checkpoint is at most this old.

    def __post_init__(self) -> None:
        self._checkpoint: tuple[float, dict[str, Any]] | None = None  # the last one: when (monotonic), result
        self._applied: dict[str, AppliedCommand] = {}
        # Reentrant, because the garbage collector may end this run on a thread that holds it.
        self._lock = threading.Condition(threading.RLock())

    def abandon(self, queue: CommandQueue) -> None:
        """In a forked child: forget the commands, and a lock that a thread of the parent may have held."""
        self.queue = queue
        self.__post_init__()

    # On the training thread...

    def apply(self, commands: list[ScheduledCommand], step: int) -> None:
        """Run the effects of the commands that all ranks apply after this step."""
        done, interrupt = self._run_all(commands)
        acknowledge = self.group().applied if interrupt is None else self.group().interrupted
        acknowledge(commands, step, {name: outcome for name, (outcome, _) in done.items() if outcome})
        last = commands[-1]
        if self.methods[last.name].is_atomic and interrupt is None:
            why, change = self.group().settle(), done[last.command_id][1]
            if isinstance(change, Change):
                change.settle(why)
        for command in commands:
            self._follow(command, *done[command.command_id], step)
        if any("abort" in self.methods[command.name].needs for command in commands):
            self._fail_saves("an abort was applied while it was being written")
            self.report(states.WHEN_SAVED, "an abort was applied: no checkpoint is written after it")
            self.report(states.WHEN_EVALUATED, "an abort was applied before the evaluation")
        if interrupt is not None:
            raise interrupt

    def _run_all(self, commands: list[ScheduledCommand]) -> tuple[dict[str, Done], BaseException | None]:
        """Run the effects; return their outcomes, and what ended them early, such as Ctrl-C in a script's function."""
        done: dict[str, Done] = {}
        self.state.running.forget()  # those of the round before
        try:
            for command in commands:
                done[command.command_id] = self._run(command)
        except BaseException as err:  # it ends training; until then no rank and no client may wait for these commands
            why = results.failure(CommandFailed(f"interrupted on this rank by {type(err).__name__}")), None
            return {command.command_id: done.get(command.command_id, why) for command in commands}, err
        return done, None

    def _run(self, command: ScheduledCommand) -> Done:
        self.state.running.begin(command)
        try:
            if command.skip_save:
                self.loop.request_end()
                return {}, None
            run = self.methods[command.name].run
            assert run is not None  # every command has one
            value = run(self.loop, **command.params)
            if isinstance(value, Future):
                return {}, value
            value = results.value(command.name, value)
        except Exception as err:  # boundary: a failing effect fails its command, never control
            failure, is_theirs = results.failure(err), not isinstance(err, ControlError)
            log.warning("%s failed at its step: %s", command.name, failure["error"]["message"], exc_info=is_theirs)
            return failure, None
        finally:
            self.state.running.end(command)
        return {} if value is None else {"value": value}, None

    def _follow(self, command: ScheduledCommand, outcome: Outcome, future: Future[Any] | None, step: int) -> None:
        method = self.methods[command.name]
        applied = AppliedCommand(command.command_id, method, step, time.monotonic(), future=future)
        if "error" in outcome:  # the record fails once all ranks have applied; they must not wait for this one's report
            if applied.method.rank_report:
                self.group().report(command.command_id, outcome)
        elif applied.ends or applied.method.rank_report:
            with self._lock:
                self._applied[command.command_id] = applied
            self.state.note(ending=applied.ends)
            if command.skip_save:
                applied.result = self._checkpoint[1] if self._checkpoint else None
                self._report(applied, {})
            if future is not None:
                future.add_done_callback(lambda done: self._report_future(applied, done))

    def begin_save(self, step: int, until: int | None = None) -> Save:
        """Note that this rank writes a checkpoint of ``step``, or its part of one, whatever caused it.

        It counts for the commands that were applied ``until`` that step (``None``: for all), unless another one does.
        """
        with self._lock:
            found = [each for each in self._applied.values() if each.lacks_save and not each.is_saving]
            save = Save(step, applied=[each for each in found if until is None or each.step <= until])
            save.is_enough = len(save.applied) == len(found)
            for applied in save.applied:
                applied.is_saving = True
            return save

    # On any thread...

    def _report_future(self, applied: AppliedCommand, future: Future[Any]) -> None:
        with self._lock:
            if applied.awaits(states.WHEN_REPORTED):
                self._report(applied, results.of_future(applied.method.name, future))
            self._lock.notify_all()

    def finish_save(self, save: Save, path: str, evaluated: bool) -> None:
        """Note that a checkpoint is complete on disk."""
        shown = path.encode("utf-8", "backslashreplace").decode("utf-8")  # JSON cannot carry a byte that is no UTF-8
        result = {"step": save.step, "path": shown, "seconds": 0.0, "evaluated": evaluated}
        with self._lock:
            if self._checkpoint is None or save.step >= self._checkpoint[1]["step"]:
                self._checkpoint = save.since, result
            for applied in save.applied:
                if applied.lacks_save:
                    applied.set_result(**result)
            self._end_save(save, {})
        if self.group().rank == 0 and not self.state.ended:
            self.state.events.publish(states.EVENT_CHECKPOINT, step=save.step, path=path)

    def fail_save(self, save: Save, fault: str) -> None:
        """Note that a checkpoint will not be complete, and why."""
        with self._lock:
            self._end_save(save, results.failure(CommandFailed(fault)))

    def _end_save(self, save: Save, outcome: Outcome) -> None:
        for applied in save.applied:
            self._note_saved(applied, outcome)
        self._lock.notify_all()

    def _note_saved(self, applied: AppliedCommand, outcome: Outcome) -> None:
        applied.is_saving, applied.outcome = False, outcome
        if applied.awaits(states.WHEN_SAVED):
            self._report(applied, outcome)

    # On the training thread...

    def evaluated(self, step: int, metrics: dict[str, Any]) -> None:
        """Note that this rank has evaluated, and with which metrics (numbers)."""
        with self._lock:
            for applied in self._applied.values():
                if applied.awaits(states.WHEN_EVALUATED):
                    applied.set_result(step=step, metrics=metrics)
            self.report(states.WHEN_EVALUATED)

    def report(self, event: str, fault: str | None = None) -> None:
        """Report this rank's part in every command that waits for an event, unless a save in the background does it.

        Args:
            fault: why the event will not come on this rank, so that the commands fail; ``None``: the part is complete,
                or there is none, as on a rank that writes nothing of a checkpoint.
        """
        with self._lock:
            for applied in list(self._applied.values()):
                if applied.awaits(event) and not applied.is_busy:
                    self._report(applied, {} if fault is None else results.failure(CommandFailed(fault)))

    def close(self, reason: str | None, fault: str | None, seconds: float) -> None:
        """Report what this rank still owes when training ends, and leave the other ranks.

        Args:
            reason: why training did not end as it should; ``None`` if it did.
            fault: why control ends though training continues.
            seconds: the longest wait for saves in the background, unless training continues, and for the other ranks.
        """
        deadline = Deadline(seconds)
        try:
            self._close_reports(reason)
            self._close_saves(reason, seconds if fault is None else 0.0)
            for applied in self._applied.values():
                if applied.awaits(states.WHEN_ENDED):
                    outcome = applied.outcome if reason is None else results.failure(CommandFailed(reason))
                    self.group().report(applied.command_id, outcome)
        finally:
            self.group().close(deadline.left() or 0.0, fault)

    def _close_reports(self, reason: str | None) -> None:
        # Where training ended as it should, another rank than 0 has no part that is missing: often only rank 0 saves.
        is_clean = reason is None and self.group().rank != 0
        for event, text in _EVENTS.items():
            self.report(event, None if is_clean else reason or f"training ended before {text}")

    def _close_saves(self, reason: str | None, seconds: float) -> None:
        with self._lock:
            self._lock.wait_for(lambda: not any(each.is_busy for each in self._applied.values()), seconds)
            self._fail_saves(f"it was still being written {seconds:g} s after {reason or 'training ended'}")
            why = CommandFailed(f"its result was not there {seconds:g} s after {reason or 'training ended'}")
            for applied in [each for each in self._applied.values() if each.awaits(states.WHEN_REPORTED)]:
                self._report(applied, results.failure(why))

    def _fail_saves(self, why: str) -> None:
        with self._lock:
            for applied in list(self._applied.values()):
                if applied.is_saving:
                    text = f"it is unknown whether the checkpoint was completed: {why}"
                    self._note_saved(applied, results.failure(CommandFailed(text)))

    def end(self, step: int, reason: str | None) -> None:
        """Note that training has ended; ``reason`` says why, if it did not end as it should."""
        with self._lock:
            ended = list(self._applied.values())
            self._applied.clear()
        for applied in ended:
            nothing = {"step": step, "path": None, "seconds": None, "evaluated": False}
            applied.result, fault = applied.result or nothing, reason
            if (path := applied.result["path"]) is not None and not os.path.lexists(path):
                # The trainer has deleted it, as Hugging Face's does where save_total_limit is 1 and another is best.
                gone, applied.result = f"{path} was saved, and deleted before training ended", nothing
                log.warning("%s: %s", applied.method.name, gone)
                if states.WHEN_SAVED in applied.method.finishes_when:
                    fault = fault or gone
            if self.group().rank == 0 and fault is not None:
                self.queue.failed(applied.command_id, CommandFailed(fault), applied.result)
            else:
                self._finish_when_reported(applied)

    def _report(self, applied: AppliedCommand, outcome: Outcome) -> None:
        """Report this rank's part of a command; finish the command here unless it waits for the end of training."""
        applied.reported = True
        self.group().report(applied.command_id, outcome)
        if not applied.ends or "error" in outcome:
            del self._applied[applied.command_id]
            self._finish_when_reported(applied)

    def _finish_when_reported(self, applied: AppliedCommand) -> None:
        def finish(outcomes: dict[int, Outcome], fault: str | None) -> None:
            try:
                if why := fault or results.error_text(outcomes):
                    raise CommandFailed(why)
                self.queue.finished(applied.command_id, applied.result or results.result(applied.method, outcomes))
            except CommandFailed as err:
                self.queue.failed(applied.command_id, err, applied.result)

        if self.group().rank == 0:
            self.group().when_reported(applied.command_id, finish)

    # On the thread that decides; rank 0...

    def take(self) -> list[ScheduledCommand]:
        """Take the queued commands, up to the first atomic one, which may have to be undone before the next one.

        A signal's save_and_stop saves nothing while the last checkpoint is young.
        """
        is_young = self._checkpoint is not None and time.monotonic() - self._checkpoint[0] < self.fresh_seconds
        return [
            ScheduledCommand(
                *(record.command_id, record.command, record.params),
                skip_save=is_young and record.command == "save_and_stop" and record.requested_by == _SIGNAL,
            )
            for record in self.queue.drain(lambda record: self.methods[record.command].is_atomic)
        ]

    def all_applied(
        self, commands: list[ScheduledCommand], step: int, outcomes: dict[int, dict[str, Outcome]], fault: str | None
    ) -> None:
        """Note that all ranks applied the commands, with which outcomes; or not all, and why."""
        self.state.running.forget()
        for command in commands:
            mine = {rank: found[command.command_id] for rank, found in outcomes.items() if command.command_id in found}
            why = f"not all ranks applied the {command.name}: {fault}" if fault else results.error_text(mine)
            method = self.methods[command.name]
            if why is not None and method.is_atomic and fault is None:
                self.group().when_reported(command.command_id, partial(self._fail_atomic, command.command_id, why))
                continue
            if why is not None:
                self.queue.failed(command.command_id, CommandFailed(why))
                continue
            self.queue.applied(command.command_id, step)
            if method.finishes_when == {states.WHEN_APPLIED}:
                self.queue.finished(command.command_id, results.result(method, mine))

    def _fail_atomic(self, command_id: str, why: str, outcomes: dict[int, Outcome], fault: str | None) -> None:
        """Fail a command that a rank could not do, and name the ranks that could not undo it."""
        restored = {rank for rank, each in outcomes.items() if each.get("error", {}).get("data", {}).get("restored")}
        text = results.error_text({rank: each for rank, each in outcomes.items() if rank not in restored})
        self.queue.failed(command_id, CommandFailed(text or why))

    def submit(self, command: str, by: dict[str, Any] = _SIGNAL, reason: str | None = None) -> None:
        """Queue a command that no client gives now: of a signal that some rank received, or ``by`` something else."""
        method = self.methods[command]
        try:
            if why := self.group().obstacle():
                raise CommandRefused(why)
            self.queue.submit(command, None, method.own_params(method.bind({})), reason, by)
        except ControlError as err:
            log.warning("Ignored the %s for %s: %s", by["via"], command, err)
