"""What a rank has in tests instead of a controller: a queue of commands, and notes of all that it was told."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

from forgather_control.errors import JobEnding
from forgather_control.wire.records import Outcome, ScheduledCommand

#: Commands that are finished when all ranks have reported.
REPORTED = frozenset({"save_checkpoint", "save_and_stop", "profile"})


#: Those that all ranks carry out, or none.
ATOMIC = frozenset({"change_settings"})


class Record:
    """One command of rank 0's queue."""

    def __init__(self, command: ScheduledCommand) -> None:
        self.command = command
        self.state = "accepted"
        self.applied_at_step: int | None = None
        self.outcomes: dict[int, dict[str, Outcome]] = {}
        self.result: Any = None
        self.error: str | None = None

    @property
    def is_final(self) -> bool:
        """Whether nothing more happens to it."""
        return self.state in ("finished", "failed", "cancelled")


class Delegate:
    """A ``RankGroupDelegate``; ``group`` is the group, once there is one."""

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.group: Any = None
        self.told: list[tuple[str, Any]] = []
        self.reply: Callable[[str], dict[str, Any]] = lambda what: {"rank": rank, "what": what}
        self.records: dict[str, Record] = {}
        self.refused: str | None = None
        self.gone: set[int] = set()
        self._queue: list[ScheduledCommand] = []
        self._lock = threading.RLock()
        self._ids = itertools.count(1)

    # For tests...

    def order(self, name: str, **params: Any) -> str:
        """Queue a command as a client would, unless an equal one is pending; return its id."""
        with self._lock:
            if self.refused is not None:
                raise JobEnding(self.refused)
            for queued in self._queue:
                if (queued.name, queued.params) == (name, params):
                    return queued.command_id
            command = ScheduledCommand(f"{name}-{next(self._ids)}", name, params)
            self.records[command.command_id] = Record(command)
            self._queue.append(command)
        self.group.command_queued()
        return command.command_id

    def cancel(self, command_id: str) -> None:
        """Take a command back that is still pending."""
        with self._lock:
            self._queue.remove(self.records[command_id].command)
            self.records[command_id].state = "cancelled"

    def finish(self, command_id: str, result: Any = None, error: str | None = None) -> None:
        """Give a command its last state, unless it has one."""
        with self._lock:
            record = self.records[command_id]
            if not record.is_final:
                record.result, record.error = result, error
                record.state = "finished" if error is None else "failed"

    def refuse(self, why: str) -> None:
        """Fail what is pending and what comes later."""
        with self._lock:
            self.refused = self.refused or why
            for command in self._queue:
                self.finish(command.command_id, error=why)
            self._queue.clear()

    def close(self, why: str) -> None:
        """Refuse, and fail every command that is not over."""
        self.refuse(why)
        for command_id in list(self.records):
            self.finish(command_id, error=why)

    def notes(self, kind: str) -> list[Any]:
        """What it was told of one kind."""
        return [what for noted, what in self.told if noted == kind]

    # As RankGroupDelegate...

    @property
    def pending(self) -> bool:
        """Whether commands wait."""
        return bool(self._queue)

    def take(self) -> list[ScheduledCommand]:
        """Take them."""
        with self._lock:
            size = next((at for at, each in enumerate(self._queue, 1) if each.name in ATOMIC), len(self._queue))
            taken, self._queue = self._queue[:size], self._queue[size:]
            return taken

    def put_back(self, commands: list[ScheduledCommand]) -> None:
        """Queue them again."""
        with self._lock:
            self._queue[:0] = commands
            if self.refused is not None:
                self.refuse(self.refused)

    def all_applied(
        self,
        commands: list[ScheduledCommand],
        step: int,
        outcomes: dict[int, dict[str, Outcome]],
        fault: str | None,
    ) -> None:
        """Note it in the records."""
        self.told.append(("applied", (commands, step, outcomes, fault)))
        for command in commands:
            record = self.records[command.command_id]
            record.outcomes = outcomes
            if fault is not None:
                self.finish(command.command_id, error=f"not all ranks applied the {command.name}: {fault}")
            elif not record.is_final:
                record.state, record.applied_at_step = "applied", step

    def is_atomic(self, name: str) -> bool:
        """Whether it is."""
        return name in ATOMIC

    def awaits_report(self, name: str) -> bool:
        """Whether it does."""
        return name in REPORTED

    def submit(self, command: str) -> None:
        """Queue what a signal asks for."""
        self.order(command)

    def describe(self) -> dict[str, Any]:
        """What it tells of its process."""
        return {"pid": self.rank}

    def is_gone(self, rank: int) -> bool:
        """Whether the test says so."""
        return rank in self.gone

    def answer(self, what: str) -> dict[str, Any]:
        """What the test set."""
        return self.reply(what)

    def all_joined(self, descriptions: dict[int, dict[str, Any]]) -> None:
        """Note it."""
        self.told.append(("joined", {rank: dict(known) for rank, known in descriptions.items()}))

    def answers_changed(self) -> None:
        """Note it."""
        self.told.append(("answers", None))

    def agreement_lost(self, why: str) -> None:
        """Note it."""
        self.told.append(("lost", why))
        self.refuse(why)
