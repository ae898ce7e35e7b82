"""What becomes of commands between "taken from the queue" and "over": who waits for a checkpoint, who for the end.

Floor 3, training side: imports commands, errors, mailbox, rounds and group. Each rank has one. What is applied,
saved and ended is noted on the training thread; ``take``, ``put_back``, ``confirm`` and ``submit`` belong to
rank 0 and run on the thread that decides a round: what both touch is the mailbox, and values assigned whole.

What a command waits for after it is applied is its ``completes`` in the table; that rule is kept here. Only
rank 0 has records; on the others a ledger knows what this rank still has to say to rank 0.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Final

from ..errors import CommandFailed, ControlError
from ..ranks.group import RankGroup
from ..wire import builtin
from ..wire.builtin import TrainingLoop
from ..wire.methods import COMMON
from ..wire.records import CommandRecord, Outcome, ScheduledCommand
from .command_queue import Mailbox

log = logging.getLogger("forgather_control")

#: What a command's result says where no checkpoint was saved for it.
_NO_SAVE: Final[dict[str, Any]] = {"path": None, "seconds": None}


class Ledger:
    """The applied commands of one rank.

    Args:
        mailbox: where their records are.
        fresh_seconds: age up to which a checkpoint is not saved again when a signal saves and stops.
    """

    def __init__(self, mailbox: Mailbox, fresh_seconds: float) -> None:
        self._mailbox, self._fresh_seconds = mailbox, fresh_seconds
        self._by_signal: set[str] = set()  # commands; each id is added and taken whole
        self._checkpoint: tuple[float, dict[str, Any]] | None = None  # the last one: when (monotonic), what
        # Applied commands that are not over; training thread only.
        self._saving: dict[str, float] = {}  # since when, monotonic
        self._ending: dict[str, float] = {}
        self._saves: dict[str, dict[str, Any]] = {}  # what was saved for those that still wait for the end

    # On the training thread...

    @property
    def ends(self) -> bool:
        """Whether training is to end."""
        return bool(self._ending)

    def apply(self, commands: list[ScheduledCommand], loop: TrainingLoop, step: int, group: RankGroup) -> None:
        """Run the commands that all ranks run after this step."""
        for command in commands:
            if command.skip_save:
                loop.request_end()
            else:
                builtin.BUILTIN[command.name].run(loop, **command.params)
        group.applied(commands, step, {})
        for command in commands:
            self._follow(group, command)
        if any(command.name == "abort" for command in commands):  # whether the save came before it or behind it
            self.fail_saves(group, "an abort was applied: no checkpoint is written after it")

    def _follow(self, group: RankGroup, command: ScheduledCommand) -> None:
        now = time.monotonic()
        finishes_when = builtin.BUILTIN[command.name].finishes_when
        if "ended" in finishes_when:
            self._ending[command.command_id] = now
        if command.skip_save:
            if self._checkpoint is not None:
                self._saves[command.command_id] = self._checkpoint[1]
            group.report(command.command_id, {})
        elif "saved" in finishes_when:
            self._saving[command.command_id] = now

    def saved(self, step: int, path: str, group: RankGroup) -> None:
        """A checkpoint is complete on disk, or this rank's part of it, whoever asked for it."""
        now = time.monotonic()
        self._checkpoint = now, _save_result(step, path, 0.0)
        for command_id, since in self._saving.items():
            result = _save_result(step, path, now - since)
            if command_id in self._ending:
                self._saves[command_id] = result
            else:
                self._finish(command_id, result, group)
        self._report_saves(group, {})
        for command_id, since in self._ending.items():
            self._saves.setdefault(command_id, _save_result(step, path, now - since))

    def saves_nothing(self, group: RankGroup) -> None:
        """The checkpoint that was asked for has no part that this rank writes. Not on rank 0."""
        self._report_saves(group, {})

    def _report_saves(self, group: RankGroup, outcome: Outcome) -> None:
        for command_id in self._saving:
            group.report(command_id, outcome)
        self._saving.clear()

    def fail_saves(self, group: RankGroup, reason: str, fault: str | None = None) -> None:
        """The checkpoint that was asked for will not come; ``fault``: for want of this rank's part of it."""
        for command_id in self._saving:
            self._ending.pop(command_id, None)
            self._fail(command_id, CommandFailed(reason), group)
        self._report_saves(group, {} if fault is None else {"error": {"code": CommandFailed.code, "message": fault}})

    def end(self, step: int, reason: str | None, group: RankGroup) -> None:
        """Training has ended; ``reason`` says why, if not as it should."""
        for command_id in self._ending if group.rank == 0 else ():
            result = self._saves.get(command_id) or {"step": step, **_NO_SAVE}
            if reason is None:
                self._finish(command_id, result, group)
            else:
                self._mailbox.failed(command_id, CommandFailed(reason), result)
        self._ending.clear()

    def _finish(self, command_id: str, result: dict[str, Any], group: RankGroup) -> None:
        """Say that a command is over, once every rank has done its part."""
        if group.rank == 0:
            group.when_reported(
                command_id, lambda outcomes, fault: self._settled(command_id, result, fault or _first_error(outcomes))
            )

    def _fail(self, command_id: str, error: ControlError, group: RankGroup) -> None:
        """Say that a command failed; also that only once every rank has applied it."""
        if group.rank == 0:
            group.when_reported(command_id, lambda outcomes, fault: self._mailbox.failed(command_id, error))

    def _settled(self, command_id: str, result: dict[str, Any], fault: str | None) -> None:
        if fault is None:
            self._mailbox.finished(command_id, result)
        else:
            self._mailbox.failed(command_id, CommandFailed(fault), result)

    # On the thread that decides; rank 0...

    def take(self) -> list[ScheduledCommand]:
        """Take what is queued."""
        return [self._schedule(record) for record in self._mailbox.drain()]

    def _schedule(self, record: CommandRecord) -> ScheduledCommand:
        own = builtin.BUILTIN[record.command].params[len(COMMON) :]
        params = {**{param.name: param.default for param in own}, **record.params}
        return ScheduledCommand(record.command_id, record.command, params, self._is_spare(record))

    def _is_spare(self, record: CommandRecord) -> bool:
        """Whether it is a signal's, and saves and stops, and what was saved last is young enough."""
        last = self._checkpoint
        if record.command_id not in self._by_signal or record.command != "save_and_stop" or last is None:
            return False
        return time.monotonic() - last[0] < self._fresh_seconds

    def put_back(self, commands: list[ScheduledCommand]) -> None:
        """Queue it again: the round was off."""
        self._mailbox.put_back([command.command_id for command in commands])

    def confirm(self, commands: list[ScheduledCommand], step: int, fault: str | None) -> None:
        """All ranks applied it; or not all, and why."""
        for command_id, command, *_ in commands:
            self._by_signal.discard(command_id)
            if fault is None:
                self._mailbox.applied(command_id, step)
            else:
                self._mailbox.failed(command_id, CommandFailed(f"not all ranks applied the {command}: {fault}"))

    def submit(self, command: str) -> None:
        """A signal on some rank asks for this command."""
        try:
            self._by_signal.add(self._mailbox.submit(command, None).command_id)
        except ControlError as err:
            log.warning("the signal that asks for %s came in vain: %s", command, err)


def _first_error(outcomes: dict[int, Outcome]) -> str | None:
    """The first rank's error, with its rank."""
    errors = {rank: outcome["error"] for rank, outcome in sorted(outcomes.items()) if "error" in outcome}
    return next((f"rank {rank}: {error['message']}" for rank, error in errors.items()), None)


def _save_result(step: int, path: str, seconds: float) -> dict[str, Any]:
    shown = path.encode("utf-8", "backslashreplace").decode("utf-8")  # JSON cannot carry a byte that is no UTF-8
    return {"step": step, "path": shown, "seconds": round(seconds, 6)}
