"""Control by file, the client's half: for hosts that share only the file system, and for jobs without a socket.

Floor 3: imports clock, errors, jobs, letters and record. Runs on the caller's thread; ``client.FileClient`` gives
it the interface of a connection.

A request is written whole under a new name, and its reply looked for until the deadline. Until the job has
taken it, it can be taken back; so where nobody answers, this side knows whether anything may have been done.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import Final, NoReturn

from .. import states
from ..deadline import Deadline
from ..errors import ControlError, FindError, JobNotAnswering
from ..jobs import private_files, registry, spool
from ..jobs.record import JobRecord, jobs_dir
from ..jobs.spool import REPLIES, REQUESTS, STATUS, SUFFIX

#: Seconds between two looks for a reply: at first, and at most. The last is shorter than what an ending job leaves.
_PAUSES: Final = (0.05, 0.2)
#: Seconds between two looks whether the job still lives, and without a sign of life after which it is given up:
#: three times what a job that lives lets ``status.json`` age.
_ARE_YOU_THERE: Final = 2.0
_SILENCE: Final = 90.0
#: Longest reply that is read.
_MAX_REPLY: Final = 4 << 20
#: What says that a directory has gone, also one on another host (ESTALE).
_GONE: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE)


class FileTransport:
    """One request at a time, and its reply, through the files of one job.

    Args:
        record: what the job published.
        gone: says why its directory went away, or its process.

    Raises:
        JobDead: its directory has gone.
        FindError: its directory cannot be written.
    """

    def __init__(self, record: JobRecord, gone: Callable[[], ControlError]) -> None:
        self._job, self._gone = record, gone
        self._path = os.path.join(jobs_dir(), record.job_id)
        self._request = ""
        try:
            self._home = spool.directory_id(self._path)
            with spool.opened(self._path, REQUESTS, self._home):
                pass
        except OSError as err:
            raise self._trouble(err) from err

    def send(self, line: bytes) -> None:
        """Leave a request.

        Raises:
            JobDead: its directory has gone.
            FindError: its directory cannot be written.
        """
        name = f"{os.getpid()}-{os.urandom(16).hex()}{SUFFIX}"
        self._request = name
        try:
            with spool.opened(self._path, REQUESTS, self._home) as box:
                private_files.write(box, name, line)
        except OSError as err:
            raise self._trouble(err) from err
        except BaseException:  # Ctrl-C: it may be there already
            self._take_back()
            raise

    def reply(self, deadline: Deadline, patient: bool, fate: str) -> bytes:
        """What it was answered.

        Args:
            patient: wait while the job shows that it lives, rather than until the deadline.
            fate: what to say of a request that was taken and not answered.

        Raises:
            JobDead: the job went away meanwhile.
            JobNotAnswering: it did not take the request, which was taken back; or took it, and does not answer.
        """
        try:
            return self._wait(deadline, patient, fate)
        except BaseException:  # Ctrl-C, too: nobody will read the reply
            self._take_back()
            raise

    def _wait(self, deadline: Deadline, patient: bool, fate: str) -> bytes:
        pause, most = _PAUSES
        watch = _Watch(self._path, self._home)
        while (data := self._taken()) is None:
            if not watch.is_there():
                raise self._gone()
            if deadline.passed() or (patient and watch.silent_for() > _SILENCE):
                self._give_up(fate)
            if watch.is_time() and registry.judge(self._job) == states.JOB_DEAD:
                raise self._gone()
            left = deadline.left()
            time.sleep(pause if left is None else min(pause, left))
            pause = min(pause * 1.5, most)
        return data

    def _taken(self) -> bytes | None:
        """The reply, taken out of its box; ``None`` while there is none."""
        try:
            with spool.opened(self._path, REPLIES, self._home) as replies:
                found = spool.read(replies, self._request, _MAX_REPLY)
                if found is not None:
                    spool.remove(replies, self._request)
        except OSError:  # not there; or the file system has a bad time, and the deadline bounds that
            return None
        return None if found is None else found[0]

    def _give_up(self, fate: str) -> NoReturn:
        job = f"job {self._job.job_id} (pid {self._job.pid} on {self._job.host})"
        if self._take_back():
            text = f"{job} did not take the request out of its directory; it was taken back, and nothing was done"
        else:
            text = f"{job} took the request and does not answer{fate}"
        raise JobNotAnswering(text, job=self._job.job_id)

    def _take_back(self) -> bool:
        """Remove the request; whether it was still there, so that nobody has read it, nor will."""
        try:
            with spool.opened(self._path, REQUESTS, self._home) as box:
                return spool.remove(box, self._request)
        except OSError:
            return False

    def _trouble(self, err: OSError) -> ControlError:
        if err.errno in _GONE:
            return self._gone()
        if isinstance(err, PermissionError):
            return FindError(f"the directory of job {self._job.job_id} belongs to another user", job=self._job.job_id)
        text = f"no request can be written into the directory of job {self._job.job_id} ({err.strerror or err})"
        return JobNotAnswering(text, job=self._job.job_id)


class _Watch:
    """Whether the job's directory is still there, and shows that somebody lives in it.

    Times of the file system are only compared for being equal: the clock of another host is none to count by.
    """

    def __init__(self, path: str, home: spool.DirectoryId) -> None:
        self._path, self._home = path, home
        self._seen: object = None
        self._seen_at = self._looked_at = time.monotonic()

    def is_there(self) -> bool:
        """Whether it is the directory that it was."""
        try:
            return spool.directory_id(self._path) == self._home
        except OSError as err:
            return err.errno not in _GONE

    def is_time(self) -> bool:
        """Whether to look more closely: not at every turn."""
        now = time.monotonic()
        if now - self._looked_at < _ARE_YOU_THERE:
            return False
        self._looked_at = now
        return True

    def silent_for(self) -> float:
        """Seconds since ``status.json`` was last found to be written anew."""
        try:
            with spool.opened(self._path, ".", self._home) as home:
                facts = os.stat(STATUS, dir_fd=home, follow_symlinks=False)
                seen: object = (facts.st_ino, facts.st_mtime_ns)
        except OSError:
            seen = None
        if seen != self._seen:
            self._seen, self._seen_at = seen, time.monotonic()
        return time.monotonic() - self._seen_at


def is_offered(record: JobRecord) -> bool:
    """Whether this way is to be tried: the job is out of reach of its socket, and takes requests by file."""
    state = registry.judge(record)
    if state == states.JOB_DEAD or (state == states.JOB_SILENT and record.socket is not None):
        return False
    return os.path.isdir(os.path.join(jobs_dir(), record.job_id, REQUESTS))
