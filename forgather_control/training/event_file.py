"""The event log of a run as a file, and its last status: in the job's directory, later where ended jobs are kept.

On the thread of the disk only, which alone may wait for a file system.
"""

from __future__ import annotations

import errno
import json
import logging
import time
from collections.abc import Callable
from typing import Any

from .. import states
from ..jobs import event_log, limits, private_files, spool
from ..wire import jsonrpc
from ..wire.records import CommandRecord
from .events import EventLog

log = logging.getLogger("forgather_control")

#: The commands that end training, and how it has then ended.
_ENDINGS = {
    "graceful_stop": states.ENDING_STOPPED,
    "save_and_stop": states.ENDING_STOPPED,
    "abort": states.ENDING_ABORTED,
}


class EventFile:
    """Writes the rare events of a run to ``events.jsonl``, which begins with those that the run still keeps.

    Nothing is raised: what cannot be written now is written the next time, and one warning tells of it.

    Args:
        path: of the job's directory.
    """

    def __init__(self, log: EventLog, path: str) -> None:
        self._log = log
        self._checkpoint: dict[str, Any] = {}  # the event of the last one
        self._ended_at: float | None = None
        self._warned = False
        self._begin()
        self.move(path)

    def _begin(self) -> None:
        self._subscriber, self._unwritten = self._log.subscribe(0, event_log.LOGGED), b""

    def move(self, path: str) -> None:
        """Write to another directory from now on, or to the same one that was made anew."""
        self._path, self._directory = path, (0, 0)
        try:
            self._directory = spool.directory_id(path)
        except OSError as err:
            self._warn(err)

    def write(self) -> None:
        """Write the events that are not written yet."""
        self._try(self._write)

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
            self._warned = False
        except OSError as err:
            self._warn(err)

    def _warn(self, err: OSError) -> None:
        if not self._warned and err.errno != errno.ENOENT:  # a directory that was removed is made again
            log.warning("The event log of this job cannot be written (%s). The job tries again.", err.strerror or err)
            self._warned = True

    def _write(self) -> None:
        self._take()
        if not self._unwritten:
            return
        with spool.opened(self._path, ".", self._directory) as directory:
            if not event_log.append(directory, self._unwritten):
                self._begin()
                self._take()
                private_files.write(directory, event_log.EVENTS, self._unwritten)
        self._unwritten = b""

    def _take(self) -> None:
        for event in self._subscriber.take():
            self._unwritten += jsonrpc.encode(event)
            if event["kind"] == states.EVENT_CHECKPOINT:
                self._checkpoint = event
        if len(self._unwritten) > limits.MAX_EVENT_LOG // 2:
            self._unwritten = event_log.shortened(self._unwritten)

    def write_end(self, status: str | bytes, records: list[CommandRecord], reason: str | None) -> None:
        """Write the last status, with how the run has ended.

        Args:
            status: as JSON.
            records: of all commands, oldest first.
            reason: why training did not end as it should; ``None`` if it did.
        """
        how = states.ENDING_FINISHED if reason is None else states.ENDING_FAILED
        applied = {_ENDINGS.get(record.command) for record in records if record.applied_at_step is not None}
        if states.ENDING_ABORTED in applied:
            how = states.ENDING_ABORTED
        elif states.ENDING_STOPPED in applied and reason is None:
            how = states.ENDING_STOPPED
        self._ended_at = self._ended_at or time.time()
        ended = {"how": how, "ended_at": self._ended_at, "reason": reason}
        saved = {"checkpoint": self._checkpoint.get("path"), "checkpoint_step": self._checkpoint.get("step")}
        data = jsonrpc.encode({**json.loads(status), "ended": {**ended, **saved}})

        def write() -> None:
            with spool.opened(self._path, ".", self._directory) as directory:
                private_files.write(directory, spool.STATUS, data)

        self._try(write)
