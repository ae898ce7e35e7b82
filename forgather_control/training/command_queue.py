"""The queue of commands between the server thread and the training thread, with their records.

Records are frozen; the dictionary that holds them and the list of the pending are guarded by one lock, ``_lock``,
held for microseconds and never while other code is called, except to publish an event, so that events come in the
order of the changes. ``pending`` is a bare bool that the training thread reads without the lock, so that an idle step
costs one attribute test.

A command's life, and the thread that moves it::

    submit (server) ──▶ accepted ──drain (training)──▶ applied ──▶ finished | failed
                           └──cancel (server)──▶ cancelled

With several ranks, ``put_back`` returns drained commands to the queue when the ranks did not agree. ``close`` fails
all that is left, under the lock that ``submit`` takes: a command is either refused or answered, never lost between
the two.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from .. import states
from ..errors import CommandNotFound, ControlError, InvalidParams, JobEnding, NotCancellable, TooManyCommands
from ..wire.records import CommandRecord, ScheduledCommand
from . import limits


class Submission(NamedTuple):
    """A command to be accepted."""

    command: str
    params: dict[str, Any]  #: Its own parameters, checked.
    reason: str
    requested_by: dict[str, Any]


class CommandQueue:
    """Commands between two threads.

    Args:
        on_change: called with each changed record, with the lock held, on the thread that changed it; must not block.
        note: called there with each record that is applied or final, once the lock is released.
    """

    def __init__(
        self, on_change: Callable[[CommandRecord], None], note: Callable[[CommandRecord], None] = lambda record: None
    ) -> None:
        self._on_change, self._note = on_change, note
        self._changed: deque[CommandRecord] = deque()  # to be noted
        self._lock = threading.Lock()
        self._records: dict[str, CommandRecord] = {}
        self._pending: list[str] = []
        self._closed: ControlError | None = None
        #: Whether commands wait to be applied. Read by the training thread without the lock.
        self.pending = False
        #: Counts the changes of records. Read without the lock.
        self.changes = 0

    # On the server thread...

    def submit(
        self,
        command: str,
        command_id: str | None = None,
        params: dict[str, Any] | None = None,
        reason: str | None = None,
        requested_by: dict[str, Any] | None = None,
    ) -> CommandRecord:
        """Accept a command; an equal pending one, or the one of this id, is returned instead.

        Args:
            params: its own parameters, checked.

        Raises:
            InvalidParams: the id belongs to another command.
            TooManyCommands: ``MAX_PENDING`` of this name are unfinished.
            JobEnding: the queue is closed.
        """
        with self._lock:
            return self._submit(command, command_id, params or {}, reason, requested_by)

    def submit_all(self, commands: Iterable[Submission]) -> list[CommandRecord | ControlError]:
        """Accept commands that one ``drain`` finds together; return the record that each has of its own, or its error.

        On the training thread, too.
        """
        found: list[CommandRecord | ControlError] = []
        with self._lock:
            for command in commands:
                try:
                    found.append(self._submit(command.command, uuid.uuid4().hex, *command[1:]))
                except ControlError as err:
                    found.append(err)
        return found

    def _known(self, command: str, command_id: str | None, params: dict[str, Any]) -> CommandRecord | None:
        if command_id is None:
            pending = (self._records[name] for name in self._pending)
            return next((each for each in pending if (each.command, each.params) == (command, params)), None)
        record = self._records.get(command_id)
        if record is not None and (record.command, record.params) != (command, params):
            rest = " with other parameters" if record.command == command else ""
            text = f"command_id {ascii(command_id)} belongs to a {record.command}{rest}"
            raise InvalidParams(text, parameter="command_id")
        return record

    def cancel(self, command_id: str) -> CommandRecord:
        """Cancel a pending command.

        Raises:
            CommandNotFound: no record of this id.
            NotCancellable: it has left the queue.
        """
        with self._changing():
            record = self._get(command_id)
            if command_id not in self._pending:
                accepted = record.state == states.COMMAND_ACCEPTED
                state = "being applied" if accepted else f"{record.state} already"
                raise NotCancellable(f"the {record.command} is {state}", **record.to_json())
            self._pending.remove(command_id)
            return self._put(record, state=states.COMMAND_CANCELLED, finished_at=time.time())

    def find(self, command_id: str | None) -> CommandRecord | None:
        """Return the record of this id, or ``None``."""
        with self._lock:
            return None if command_id is None else self._records.get(command_id)

    def get(self, command_id: str) -> CommandRecord:
        """Return the record of this id; CommandNotFound if there is none."""
        with self._lock:
            return self._get(command_id)

    def records(self) -> list[CommandRecord]:
        """Return all records kept, oldest first."""
        with self._lock:
            return list(self._records.values())

    # On the thread that decides: the training thread, or with several ranks one of the channel's...

    def drain(self, is_last: Callable[[CommandRecord], bool] = lambda record: False) -> list[CommandRecord]:
        """Take the pending commands up to the first that ``is_last``, in the order they came, or all.

        They can no longer be cancelled.
        """
        with self._lock:
            records = [self._records[name] for name in self._take_pending()]
            size = next((at for at, record in enumerate(records, 1) if is_last(record)), len(records))
            self._pending += [record.command_id for record in records[size:]]
            self.pending = bool(self._pending)
            return records[:size]

    def put_back(self, commands: list[ScheduledCommand]) -> None:
        """Queue commands again on which the ranks did not agree, before those that came meanwhile."""
        with self._changing():
            names = [command.command_id for command in commands]
            self._pending[:0] = [name for name in names if not self._records[name].is_final]
            self.pending = bool(self._pending)
            if self._closed is not None:
                self._fail(self._take_pending(), self._closed)

    def applied(self, command_id: str, step: int) -> None:
        """Note that every rank applied the command after ``step``."""
        self._change(command_id, state=states.COMMAND_APPLIED, applied_at_step=step)

    def finished(self, command_id: str, result: dict[str, Any] | None) -> None:
        """Note that everything the command asked for has happened."""
        self._change(command_id, state=states.COMMAND_FINISHED, finished_at=time.time(), result=result)

    def failed(self, command_id: str, error: ControlError, result: dict[str, Any] | None = None) -> None:
        """Note that the command will not be finished, and why; ``result`` is the part of it that happened."""
        self._change(command_id, **_failure(error), result=result)

    def fail_pending(self, error: ControlError) -> None:
        """Fail every pending command."""
        with self._changing():
            self._fail(self._take_pending(), error)

    def close(self, error: ControlError, pending_only: bool = False) -> None:
        """Fail every unfinished command, or every pending one, and refuse all that come later. May be called twice."""
        with self._changing():
            self._closed = self._closed or error
            pending = self._take_pending()
            unfinished = [name for name, record in self._records.items() if not record.is_final]
            self._fail(pending if pending_only else unfinished, error)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the lock, and note afterwards what has changed."""
        try:
            with self._lock:
                yield
        finally:
            with suppress(IndexError):  # none is left; another thread may note some
                while True:
                    self._note(self._changed.popleft())

    # With the lock held...

    def _submit(
        self,
        command: str,
        command_id: str | None,
        params: dict[str, Any],
        reason: str | None,
        requested_by: dict[str, Any] | None,
    ) -> CommandRecord:
        known = self._known(command, command_id, params)
        if known is not None:
            return known
        if self._closed is not None:
            # A new one each time: one exception, raised again and again, keeps every frame it passed.
            raise JobEnding(self._closed.message, **self._closed.data)
        limit = limits.MAX_PENDING
        if sum(r.command == command and not r.is_final for r in self._records.values()) >= limit:
            raise TooManyCommands(f"{limit} {command} commands are unfinished already", limit=limit)
        record = CommandRecord(command_id or uuid.uuid4().hex, command, states.COMMAND_ACCEPTED, time.time())
        self._pending.append(record.command_id)
        record = self._put(record, params=params, reason=reason, requested_by=requested_by)
        final = [record.command_id for record in self._records.values() if record.is_final]
        for forgotten in final[: max(0, len(self._records) - limits.MAX_RECORDS)]:
            del self._records[forgotten]
        return record

    def _take_pending(self) -> list[str]:
        taken = list(self._pending)
        self._pending.clear()
        self.pending = False
        return taken

    def _fail(self, command_ids: list[str], error: ControlError) -> None:
        for command_id in command_ids:
            self._put(self._records[command_id], **_failure(error))

    def _get(self, command_id: str) -> CommandRecord:
        if command_id not in self._records:
            raise CommandNotFound(f"no record of command {ascii(command_id[:128])}; finished ones are kept for a while")
        return self._records[command_id]

    def _put(self, record: CommandRecord, **changes: Any) -> CommandRecord:
        assert self._lock.locked()
        self._records[record.command_id] = record = record._replace(**changes)
        self.pending = bool(self._pending)
        self.changes += 1
        self._on_change(record)
        if record.state != states.COMMAND_ACCEPTED:
            self._changed.append(record)
        return record

    def _change(self, command_id: str, **changes: Any) -> None:
        with self._changing():
            record = self._get(command_id)
            if not record.is_final:  # a final record stays as it was reported
                self._put(record, **changes)


def _failure(error: ControlError) -> dict[str, Any]:
    fault = {"code": error.code, "message": error.message}
    return {"state": states.COMMAND_FAILED, "finished_at": time.time(), "error": fault}
