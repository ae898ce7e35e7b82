"""The one object that crosses threads: commands go in on the server thread, out on the training thread.

Floor 2: imports commands and errors only. Records are frozen; the dictionary that holds them and
the list of the pending are guarded by one lock, ``_lock``, held for microseconds and never while
anything is called. ``pending`` is a bare bool that the training thread reads without the lock, so
that an idle step costs one attribute test.

A command's life, and who moves it::

    submit (server) ──▶ accepted ──drain (training)──▶ applied ──▶ finished | failed
                           └──cancel (server)──▶ cancelled

With several ranks, ``put_back`` is the way back from drained to pending, where a round was off.
``close`` fails whatever is left, under the same lock that ``submit`` takes: a command is either
refused or answered, never lost between the two.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, Final

from .. import states
from ..errors import CommandNotFound, ControlError, InvalidParams, JobEnding, NotCancellable, TooManyCommands
from ..wire.records import CommandRecord

#: Most commands of one name that are not over yet: a loop that never saves keeps its saves open for
#: ever, and they must not keep an abort out. Equal pending ones without an id of their own share one
#: record, so only a caller who sends many ids comes here.
MAX_PENDING: Final = 64
#: Records kept, finished ones first to go: four commands times ``MAX_PENDING`` always find room.
MAX_RECORDS: Final = 256


class Mailbox:
    """Commands between two threads.

    Args:
        on_change: called after a record changed, without the lock, on the thread that changed it;
            must not block (the server's ``wake``).
    """

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        self._lock = threading.Lock()
        self._records: dict[str, CommandRecord] = {}
        self._pending: list[str] = []
        self._closed: ControlError | None = None
        #: Whether something waits to be applied. Read by the training thread without the lock.
        self.pending = False
        #: Counts the changes of records. Read without the lock.
        self.changes = 0

    # On the server thread...

    def submit(self, command: str, command_id: str | None) -> CommandRecord:
        """Accept a command; an equal pending one, or the one of this id, is answered instead.

        Raises:
            InvalidParams: the id belongs to another command.
            TooManyCommands: ``MAX_PENDING`` of this name are not over yet.
            JobEnding: the mailbox is closed.
        """
        with self._lock:
            known = self._known(command, command_id)
            if known is not None:
                return known
            if self._closed is not None:
                # A new one each time: one exception, raised again and again, keeps every frame it passed.
                raise JobEnding(self._closed.message, **self._closed.data)
            if sum(r.command == command and not r.is_final for r in self._records.values()) >= MAX_PENDING:
                raise TooManyCommands(f"{MAX_PENDING} commands {command} are not over yet", limit=MAX_PENDING)
            record = CommandRecord(command_id or uuid.uuid4().hex, command, states.COMMAND_ACCEPTED, time.time())
            self._records[record.command_id] = record
            self.changes += 1
            self._forget()
            self._pending.append(record.command_id)
            self.pending = True
            return record

    def _known(self, command: str, command_id: str | None) -> CommandRecord | None:
        if command_id is None:
            pending = (self._records[name] for name in self._pending)
            return next((record for record in pending if record.command == command), None)
        record = self._records.get(command_id)
        if record is not None and record.command != command:
            raise InvalidParams(f"command_id {ascii(command_id)} belongs to a {record.command}", parameter="command_id")
        return record

    def _forget(self) -> None:
        surplus = len(self._records) - MAX_RECORDS
        over = [record.command_id for record in self._records.values() if record.is_final]
        for command_id in over[: max(0, surplus)]:
            del self._records[command_id]

    def cancel(self, command_id: str) -> CommandRecord:
        """Take back a pending command.

        Raises:
            CommandNotFound: no record of this id.
            NotCancellable: it left the queue already.
        """
        with self._lock:
            record = self._get(command_id)
            if command_id not in self._pending:
                state = "being applied" if record.state == states.COMMAND_ACCEPTED else f"{record.state} already"
                raise NotCancellable(f"the {record.command} is {state}", **record.to_json())
            self._pending.remove(command_id)
            self.pending = bool(self._pending)
            record = self._put(record, state=states.COMMAND_CANCELLED, finished_at=time.time())
        self._on_change()
        return record

    def get(self, command_id: str) -> CommandRecord:
        """The record of this id.

        Raises:
            CommandNotFound: there is none.
        """
        with self._lock:
            return self._get(command_id)

    def records(self) -> list[CommandRecord]:
        """All records kept, oldest first."""
        with self._lock:
            return list(self._records.values())

    # On the thread that decides: the training thread, or with several ranks one of the line's...

    def drain(self) -> list[CommandRecord]:
        """Take all pending commands, in the order they came; they can no longer be cancelled."""
        with self._lock:
            taken = [self._records[name] for name in self._pending]
            self._pending.clear()
            self.pending = False
            return taken

    def put_back(self, command_ids: list[str]) -> None:
        """Queue commands again that were taken and not applied, before what came meanwhile."""
        with self._lock:
            self._pending[:0] = [name for name in command_ids if not self._records[name].is_final]
            self.pending = bool(self._pending)
            if self._closed is not None:
                self._refuse(self._closed)
        self._on_change()

    def applied(self, command_id: str, step: int) -> None:
        """Note that every rank applied the command after ``step``."""
        self._change(command_id, state=states.COMMAND_APPLIED, applied_at_step=step)

    def finished(self, command_id: str, result: dict[str, Any] | None) -> None:
        """Note that all the command asked for has happened."""
        self._change(command_id, state=states.COMMAND_FINISHED, finished_at=time.time(), result=result)

    def failed(self, command_id: str, error: ControlError, result: dict[str, Any] | None = None) -> None:
        """Note that the command will not happen (or not wholly: ``result`` is what did), and why."""
        self._change(command_id, **_failure(error), result=result)

    def refuse(self, error: ControlError) -> None:
        """Fail every pending command, and refuse all that come later. May be called twice."""
        with self._lock:
            self._refuse(error)
        self._on_change()

    def close(self, error: ControlError) -> None:
        """Refuse, and fail every other command, too, that is not over. May be called twice."""
        with self._lock:
            self._refuse(error)
            for record in list(self._records.values()):
                if not record.is_final:
                    self._put(record, **_failure(error))
        self._on_change()

    # With the lock held...

    def _refuse(self, error: ControlError) -> None:
        if self._closed is None:
            self._closed = error if isinstance(error, JobEnding) else JobEnding(error.message)
        for command_id in self._pending:
            self._put(self._records[command_id], **_failure(error))
        self._pending.clear()
        self.pending = False

    def _get(self, command_id: str) -> CommandRecord:
        if command_id not in self._records:
            raise CommandNotFound(f"no command {ascii(command_id[:128])} is known (any more)")
        return self._records[command_id]

    def _put(self, record: CommandRecord, **changes: Any) -> CommandRecord:
        assert self._lock.locked()
        changed = self._records[record.command_id] = record._replace(**changes)
        self.changes += 1
        return changed

    def _change(self, command_id: str, **changes: Any) -> None:
        with self._lock:
            record = self._get(command_id)
            if not record.is_final:  # what is over stays as it was told
                self._put(record, **changes)
        self._on_change()


def _failure(error: ControlError) -> dict[str, Any]:
    fault = {"code": error.code, "message": error.message}
    return {"state": states.COMMAND_FAILED, "finished_at": time.time(), "error": fault}
