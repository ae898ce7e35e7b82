"""Control by file, the client's half: for hosts that share only the file system, and for jobs without a socket.

A request is written whole under a new name, and the client looks for its reply until the deadline. Until the job
has taken the request it can be taken back, so an unanswered one is known not to be carried out, or to be unknown.
"""

import errno
import os
import time
from typing import Final

from .. import states
from ..deadline import Deadline
from ..errors import ControlError, FindError, JobNotAnswering
from ..jobs import private_files, registry, spool
from ..jobs.record import JobRecord, jobs_dir
from ..jobs.spool import REPLIES, REQUESTS, STATUS, SUFFIX
from .diagnosis import connection_lost
from .transport import Transport

#: Seconds between two looks for a reply: at first, and at most. The last is shorter than what an ending job leaves.
_PAUSES: Final = (0.05, 0.2)
#: Seconds between two checks that the job still lives, and without a sign of life after which it is given up:
#: three times what a live job lets ``status.json`` age.
_PROBE_INTERVAL: Final = 2.0
_SILENCE: Final = 90.0
#: Longest reply that is read.
_MAX_REPLY: Final = 4 << 20
#: Error codes of a directory that was removed, also of one on another host (ESTALE).
_GONE: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE)


class FileTransport(Transport):
    """One request at a time, and its reply, through the files of one job. No file is open between calls.

    JobDead: the job's directory was removed. FindError: it cannot be written.
    """

    can_withdraw = True

    def __init__(self, record: JobRecord) -> None:
        self._record, self.job_id = record, record.job_id
        self.probe_interval, self.silence = _PROBE_INTERVAL, _SILENCE
        self._path = os.path.join(jobs_dir(), record.job_id)
        self._request, self._status = "", (0, 0)
        self._next_check = self._given_up = Deadline(None)
        try:
            self._home = spool.directory_id(self._path)
            with spool.opened(self._path, REQUESTS, self._home):
                pass
        except OSError as err:
            raise self._refusal(err) from err

    def send(self, line: bytes, seconds: float) -> None:
        self._request = f"{os.getpid()}-{os.urandom(16).hex()}{SUFFIX}"
        self._next_check, self._given_up = Deadline(_PROBE_INTERVAL), Deadline(_SILENCE)
        try:
            with spool.opened(self._path, REQUESTS, self._home) as requests:
                private_files.write(requests, self._request, line)
        except OSError as err:
            raise self._refusal(err) from err

    def receive(self, deadline: Deadline) -> bytes | None:
        pause, longest = _PAUSES
        while (data := self._taken()) is None:
            self._check_job()
            if deadline.passed():
                return None
            left = deadline.left()
            time.sleep(pause if left is None else min(pause, left))
            pause = min(pause * 1.5, longest)
        return data

    def _taken(self) -> bytes | None:
        """Return the reply and remove its file; ``None`` while there is none."""
        try:
            with spool.opened(self._path, REPLIES, self._home) as replies:
                found = spool.read(replies, self._request, _MAX_REPLY)
                if found is not None:
                    spool.remove(replies, self._request)
        except OSError:  # not there; or a fault of the file system, which the deadline bounds
            return None
        return None if found is None else found[0]

    def _check_job(self) -> None:
        try:
            is_there = spool.directory_id(self._path) == self._home
        except OSError as err:
            is_there = err.errno not in _GONE
        if not is_there:
            raise ConnectionResetError("the job's directory was removed")
        if self._next_check.passed():
            self._next_check = Deadline(_PROBE_INTERVAL)
            if registry.judge(self._record) == states.JOB_DEAD:
                raise ConnectionResetError("the job's process is gone")

    def probe(self) -> bool:
        """Whether ``status.json`` still changes; its times are compared for equality only, as another clock may run."""
        try:
            with spool.opened(self._path, ".", self._home) as home:
                facts = os.stat(STATUS, dir_fd=home, follow_symlinks=False)
            status = (facts.st_ino, facts.st_mtime_ns)
        except OSError:
            status = (0, 0)
        if status != self._status:
            self._status, self._given_up = status, Deadline(_SILENCE)
        return not self._given_up.passed()

    def withdraw(self) -> bool:
        try:
            with spool.opened(self._path, REQUESTS, self._home) as requests:
                return spool.remove(requests, self._request)
        except OSError:
            return False

    def _refusal(self, err: OSError) -> ControlError:
        job = self._record.job_id
        if err.errno in _GONE:
            return connection_lost(self._record, "")
        if isinstance(err, PermissionError):
            return FindError(f"The directory of job {job} belongs to another user", job=job)
        text = f"No request can be written into the directory of job {job} ({err.strerror or err})"
        return JobNotAnswering(text, job=job)


def is_offered(record: JobRecord, nothing_listens: bool = False) -> bool:
    """Whether request files are worth a try for a job that lives and cannot be reached otherwise.

    Args:
        nothing_listens: at its socket. Where something does, the job hangs, and would read no file either.
    """
    state = registry.judge(record)
    if state == states.JOB_DEAD or (state == states.JOB_SILENT and record.socket is not None and not nothing_listens):
        return False
    return os.path.isdir(os.path.join(jobs_dir(), record.job_id, REQUESTS))
