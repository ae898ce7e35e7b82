"""Rank 0's side towards clients: the control server, the job directory and the request files.

``publish``, ``unpublish`` and ``close`` run on the training thread; the tick runs on the server thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import ControlError, JobIdTaken, StartError
from ..jobs import directory
from ..processes import threads
from ..server import limits as server_limits
from ..server.file_requests import FileRequestServer
from ..server.server import Server
from ..server.tcp import BoundPort
from . import limits
from .job_queries import JobQueries
from .options import ControlOptions

log = logging.getLogger("forgather_control")


@dataclass(eq=False)
class JobServer:
    """Serves one job over its socket, a TCP port and request files, and keeps its directory whole."""

    options: ControlOptions  #: Which job id and which TCP port.
    queries: JobQueries
    is_controlled: Callable[[], bool]  #: Whether the job is still controlled; on the server thread before each tick.
    on_restored: Callable[[str], None]  #: Called there with the path of the directory after it was repaired.

    def __post_init__(self) -> None:
        self._server = Server(self.queries.answer, self._tick, self._last_look, threads.fault)
        self.queries.check_capacity = self._server.check_room
        self.wake = self.queries.wake = self._server.wake
        self._lock = threading.Lock()  # guards _directory against unpublish() during a tick
        self._directory: directory.JobDirectory | None = None
        self._leaving: directory.JobDirectory | None = None  # no longer listed; its last replies may be read
        self._file_requests: FileRequestServer | None = None
        self._warned: str | None = None

    def publish(self) -> str:
        """Claim the job id, start to serve, and return the id. From here on the job can be found.

        Raises:
            StartError: why the job cannot be controlled.
        """
        self._directory = mine = self._claim()
        self._file_requests = FileRequestServer(
            mine.path, self._server.dispatch, self.queries.host_status, self.queries.mark, self.queries.methods
        )
        self._server.start()
        return mine.job_id

    def _claim(self) -> directory.JobDirectory:
        bound, candidates = self._open_port(), self._candidates()
        while True:
            mine = directory.JobDirectory(candidates.pop(0), self._server.listen, self.queries.group.size)
            if bound is not None:
                mine.offer(*bound)
            try:
                mine.claim()
                return mine
            except JobIdTaken:
                if not candidates:
                    raise

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
        """Call ``write`` with the path of the job directory, unless the job is unpublished."""
        with self._lock:
            if self._directory is not None:
                write(self._directory.path)

    # On the server thread...

    def _tick(self) -> None:
        if not self.is_controlled() or not self._lock.acquire(blocking=False):
            return
        try:
            if self._directory is not None and self._file_requests is not None:
                if self._directory.restore():
                    log.warning("Restored the job directory, which was damaged.")
                    self.on_restored(self._directory.path)
                    self._file_requests.renew()
                self._file_requests.tick()
        except ControlError as err:
            if str(err) != self._warned:
                log.warning("Clients cannot find this job at the moment: %s", err)
            self._warned = str(err)
            if isinstance(err, JobIdTaken) and self._directory is not None:
                self._directory.release()
                self._directory = None  # it is the other job's now
        finally:
            self._lock.release()

    def _last_look(self) -> None:
        if self._leaving is not None and self._file_requests is not None:
            self._file_requests.take_last()

    # End...

    def unpublish(self) -> None:
        """Take the job out of the list; clients that wait for a reply by file still find their directory."""
        mine = self._directory
        if mine is None:
            return
        if not self._lock.acquire(timeout=limits.CLOSE_TIMEOUT):
            mine.release()  # a tick hangs in the file system: what stays is judged dead, and cleaned up
            return
        try:
            if self._file_requests is not None and self._file_requests.end() and not self._server.is_this_thread:
                mine.unlist()
                self._leaving = mine
            else:
                mine.remove()
        except ControlError as err:
            mine.release()
            log.warning("The job directory could not be removed: %s", err)
        finally:
            self._directory = None
            self._lock.release()

    def close(self) -> None:
        """Answer what can be answered, close all connections, and remove what is left of the directory."""
        self._server.close(limits.CLOSE_TIMEOUT)
        if self._leaving is None or self._file_requests is None:
            return
        self._file_requests.linger(server_limits.CLOSE_GRACE)
        try:
            self._leaving.remove()
        except ControlError as err:
            log.warning("The job directory could not be removed: %s", err)
