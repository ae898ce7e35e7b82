"""Rank 0's side towards clients: the control server, the job directory and the request files.

``publish``, ``settle``, ``unpublish`` and ``close`` run on the training thread, the tick on the server thread. Only a
third thread uses the jobs directory, and neither waits for it long: a file system may hang. That thread also writes the
log of events, and moves it to those of ended jobs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from ..deadline import Deadline
from ..errors import ControlError, JobIdTaken, StartError
from ..jobs import directory
from ..processes import threads
from ..server import limits as server_limits
from ..server.file_requests import FileRequestServer
from ..server.server import Server
from ..server.tcp import BoundPort
from . import limits
from .event_file import EventFile
from .job_queries import JobQueries
from .options import ControlOptions
from .worker import Task, Worker

log = logging.getLogger("forgather_control")


@dataclass(eq=False)
class JobServer:
    """Serves one job over its socket, a TCP port and request files, and keeps its directory whole."""

    options: ControlOptions  #: Which job id and which TCP port.
    queries: JobQueries
    is_controlled: Callable[[], bool]  #: Whether the job is still controlled; on the server thread before each tick.
    on_restored: Callable[[str], None]  #: Called there with the path of the directory after it was repaired.

    def __post_init__(self) -> None:
        self._disk = Worker("forgather-disk")  # first, as it may find no thread
        self._server = Server(self.queries.answer, self._tick, self._last_look, threads.fault)
        self.queries.check_capacity = self._server.check_room
        self.wake = self.queries.wake = self._server.wake
        self._disk_tick: Task[None] | None = None  # the last one, on the server thread
        self._patience = Deadline(limits.DISK_TIMEOUT)  # of training with the file system, at its start, and at its end
        self._is_ending = self._warned_slow = False
        self._event_task: Task[None] | None = None  # that writes events
        self._event_writes, self._event_at = limits.EVENT_WRITES, time.monotonic()  # that may be begun, at that time
        self.queries.state.events.on_publish = self._note_event
        # On the disk thread...
        self._directory: directory.JobDirectory | None = None
        self._leaving: directory.JobDirectory | None = None  # no longer listed; its last replies may be read
        self._file_requests: FileRequestServer | None = None
        self._event_file: EventFile | None = None
        self._end_reason: str | None = None
        self._warned: str | None = None

    def publish(self) -> str:
        """Claim the job id, start to serve, and return the id. From here on the job can be found.

        Where the file system is slow, that happens later: training does not wait for it.

        Raises:
            StartError: why the job cannot be controlled.
        """
        candidates = self._candidates()
        published = self._disk.submit(partial(self._publish, self._open_port(), list(candidates)))
        if published.wait(self._patience.left() or 0.0):
            return published.result()
        log.warning("The jobs directory is slow: the job can be found once it has answered. Training does not wait.")
        self._disk.submit(partial(self._published_late, published))
        return candidates[0]

    def _published_late(self, published: Task[str]) -> None:
        if published.error is None:
            self.queries.state.job_id = published.result()
        elif not self._is_ending:
            log.warning("Control is off for this run: %s. Training continues.", published.error)

    def _publish(self, bound: BoundPort | None, candidates: list[str]) -> str:
        self._directory = mine = self._claim(bound, candidates)
        self._file_requests = FileRequestServer(
            mine.path,
            lambda reply, line: self._server.call(lambda: self._server.dispatch(reply, line)),
            self.queries.host_status,
            self.queries.mark,
            self.queries.methods,
            self._disk.submit,
        )
        self._event_file = EventFile(self.queries.state.events, mine.path)
        self._write_events()
        self._server.start()
        return mine.job_id

    def _claim(self, bound: BoundPort | None, candidates: list[str]) -> directory.JobDirectory:
        while not self._is_ending:
            mine = directory.JobDirectory(candidates.pop(0), self._server.listen, self.queries.group.size)
            if bound is not None:
                mine.offer(*bound)
            try:
                mine.claim()
                return mine
            except JobIdTaken:
                if not candidates:
                    raise
        raise StartError("training has ended")

    def _candidates(self) -> list[str]:
        if self.options.job_id is not None:
            return [self.options.job_id]
        generated = directory.generate_job_id()
        return [generated, *(f"{generated[:124]}-{suffix}" for suffix in range(2, limits.MAX_SUFFIX))]

    def _open_port(self) -> BoundPort | None:
        try:
            wanted = self.options.tcp_options()
            if wanted is None and (self.options.certfile or self.options.keyfile):
                log.warning("Ignored certfile and keyfile: TLS needs a port. Give port=, too.")
            return None if wanted is None else wanted.open(self._server)
        except StartError as err:
            log.warning("No control over TCP: %s", err)  # the job can still be controlled from this host
            return None

    @property
    def fault(self) -> str | None:
        """Why the server thread can serve no longer; ``None`` while it can."""
        return self._server.fault

    def write(self, write: Callable[[str], None]) -> None:
        """Have ``write`` called with the path of the job directory, unless the job is unpublished. On any thread."""
        self._disk.submit(lambda: None if self._directory is None else write(self._directory.path))

    def _note_event(self) -> None:
        """Have events written soon; where many come, at the next tick. After each event, on its thread."""
        now = time.monotonic()
        room = self._event_writes + (now - self._event_at) * limits.EVENT_WRITE_RATE
        self._event_writes, self._event_at = min(limits.EVENT_WRITES, room), now
        if self._event_writes >= 1 and (self._event_task is None or self._event_task.wait()):
            self._event_writes -= 1
            self._event_task = self._disk.submit(self._write_events)

    def settle(self) -> None:
        """Let the writes that belong to the start finish, unless the file system is slow."""
        self._disk.submit(lambda: None).wait(self._patience.left() or 0.0)

    # On the server thread...

    def _tick(self) -> None:
        if self.is_controlled() and (self._disk_tick is None or self._disk_tick.wait()):
            self._disk_tick = self._disk.submit(self._keep)

    def _last_look(self) -> None:
        if self._leaving is not None and self._file_requests is not None:
            self._disk.submit(self._file_requests.take_last).wait(self._patience.left() or 0.0)

    # On the disk thread...

    def _keep(self) -> None:
        """Repair the directory, answer request files, and write ``status.json``."""
        if self._directory is None or self._file_requests is None:
            return
        try:
            if self._directory.restore():
                log.warning("Restored the job directory, which was damaged.")
                self.on_restored(self._directory.path)
                self._file_requests.renew()
                if self._event_file is not None:
                    self._event_file.move(self._directory.path)
            self._file_requests.tick()
            self._write_events()
        except ControlError as err:
            if str(err) != self._warned:
                log.warning("Clients cannot find this job at the moment: %s", err)
            self._warned = str(err)
            if isinstance(err, JobIdTaken):
                self._directory.release()
                self._directory = self._event_file = None  # it is the other job's now
        except Exception as err:  # boundary: the next tick tries again
            log.exception("Internal error in the control of files (recovered): %s", err)

    def _write_events(self) -> None:
        if self._event_file is not None:
            self._event_file.write()

    def _write_end(self) -> None:
        if self._event_file is None:
            return
        try:
            self._event_file.write_end(self.queries.host_status(), self.queries.queue.records(), self._end_reason)
        except Exception:  # boundary: what is kept of a job must not keep its directory
            log.exception("The last status of this job cannot be kept.")

    def _unpublish(self, may_linger: bool, reason: str | None) -> None:
        mine, self._directory = self._directory, None
        if mine is None:
            return
        self._end_reason = reason
        self._write_events()
        self._write_end()  # what clients see of it once the directory is gone
        if may_linger and self._file_requests is not None and self._file_requests.end():
            with _removing(mine):
                mine.unlist()
                self._leaving = mine
        else:
            with _removing(mine):
                mine.remove()
        if self._event_file is not None:
            self._event_file.move(mine.ended_path)

    def _remove_left(self) -> None:
        self._write_events()
        self._write_end()
        if self._leaving is not None and self._file_requests is not None:
            self._file_requests.linger(server_limits.CLOSE_GRACE)
            with _removing(self._leaving):
                self._leaving.remove()

    # End...

    def unpublish(self, reason: str | None = None) -> None:
        """Take the job out of the list; clients that wait for a reply by file still find their directory.

        Args:
            reason: why training did not end as it should; ``None`` if it did.
        """
        self._is_ending, self._patience = True, Deadline(limits.DISK_TIMEOUT)
        self._finish(partial(self._unpublish, not self._server.is_this_thread, reason))

    def close(self) -> None:
        """Answer what can be answered, close all connections, and remove what is left of the directory."""
        self._server.close(limits.CLOSE_TIMEOUT)
        self._finish(self._remove_left, server_limits.CLOSE_GRACE)
        self._disk.close(0.0 if self._server.is_this_thread else self._patience.left() or 0.0)

    def _finish(self, call: Callable[[], None], seconds: float = 0.0) -> None:
        """Run the last calls on the disk thread; wait for them no longer than the file system may take."""
        done = self._disk.submit(call)
        if done.wait((self._patience.left() or 0.0) + seconds):
            done.result()
        elif not self._warned_slow:
            self._warned_slow = True
            log.warning("The jobs directory is slow. If this job stays there, forgather-control cleanup removes it.")


@contextmanager
def _removing(mine: directory.JobDirectory) -> Iterator[None]:
    """Give up a directory of which something cannot be removed: it is then a dead job's."""
    try:
        yield
    except ControlError as err:
        mine.release()
        log.warning("The job directory could not be removed: %s", err)
