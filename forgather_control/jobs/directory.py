"""The directory of the job in this process: claim it, publish in it, repair it, remove it.

On the training thread when training starts and ends, on the server thread in between.

A claim is atomic: ``mkdir`` makes the name exist once, a job that finds the name judges its owner, and both happen
under the lock of the jobs directory, which is held until the record is published. So a directory without a record,
seen under the lock, was left by a crash.
"""

from __future__ import annotations

import contextlib
import errno
import getpass
import logging
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Final

from .. import states
from ..deadline import Deadline
from ..errors import ControlError, JobDead, JobIdTaken, JobsDirUnusable
from ..processes import launcher, liveness
from ..version import PROTOCOL, VERSION
from ..wire import addresses, jsonrpc
from . import cleanup, ended, job_lock, limits, missing, private_files, record, registry, spool

log = logging.getLogger("forgather_control")

#: Errors of socket(2) and bind(2) where the system, or a file system, has no sockets.
_NO_SOCKETS: Final = (
    errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.EIO, errno.EAFNOSUPPORT
)  # fmt: skip


def generate_job_id() -> str:
    """Return ``job_NAME``, with dashes for characters that a job id may not have.

    NAME stays the same when SLURM or torchrun restart the job; where neither has one it is timestamp, host and pid.
    """
    launch = launcher.of_this_process()
    name = launch.stable_name if launch is not None else None
    if name is None:
        name = f"{time.strftime('%Y%m%d-%H%M%S')}_{socket.gethostname()}_{os.getpid()}"
    return re.sub(r"[^A-Za-z0-9._-]", "-", f"job_{name}")[:128]


class JobDirectory:
    """The directory of the job in this process; ``listen`` makes the server listen at a path, or raises OSError."""

    def __init__(self, job_id: str, listen: Callable[[str], None], world_size: int) -> None:
        self.job_id = job_id  # checked by the caller
        self._root = record.jobs_dir()
        self.path = os.path.join(self._root, job_id)
        self._listen = listen
        self._short: str | None = None  # a private directory for the socket, where ours cannot hold it
        self._files: dict[str, tuple[int, int, int]] = {}  # what this job made: the _file_id by path
        me = liveness.current_process()._asdict()
        missing.warn_once(me["started_at"] is not None)
        self._record = record.JobRecord(
            job_id=job_id,
            port=None,
            started_at=time.time(),
            process_started_at=me.pop("started_at"),
            world_size=world_size,
            protocol=PROTOCOL,
            version=VERSION,
            user=_user(),
            launch=launcher.of_this_process(),
            **me,
        )
        self._lock = job_lock.JobLock(self.path, self._record.started_at)

    def offer(self, address: str, port: int, token: str, tls_sha256: str | None) -> None:
        """Publish a TCP port, too. Call it before ``claim``."""
        self._record = self._record._replace(address=address, port=port, token=token, tls_sha256=tls_sha256)

    def claim(self) -> None:
        """Take the job id, listen, and publish: from here on clients find the job.

        Raises:
            JobIdTaken: another job has the id; it is not proven dead, nor an earlier start of this run.
            JobsDirUnusable: the jobs directory cannot be made or written, or is not safe.
        """
        with _explained(self.path):
            record.make_jobs_dir(self._root)
            with cleanup.locked(self._root):
                try:
                    self._make()
                except FileExistsError:
                    self._evict()
                    self._make()
                try:
                    self._publish()
                except OSError:
                    self._discard()
                    raise

    def restore(self) -> bool:
        """Repair what was deleted or replaced, if anything was; raise as :meth:`claim` if that is not possible now."""
        if not self._lock.is_lost() and all(map(self._is_as_made, self._files)):
            return False
        with _explained(self.path):
            record.make_jobs_dir(self._root)
            with cleanup.locked(self._root, seconds=0.0):
                if _is_directory(self.path):
                    self._check_holder()
                else:
                    self._make()
                self._publish()
        return True

    def remove(self) -> None:
        """Remove all that this job made and that no other job has taken over; raise JobsDirUnusable if that fails."""
        try:
            with _explained(self.path), cleanup.locked(self._root):
                self._discard()
        finally:
            self.release()

    @property
    def ended_path(self) -> str:
        """Where the event log and the last status are kept once the directory is removed or no longer listed."""
        return ended.path_of(self._root, self.job_id, self._record.started_at)

    def release(self) -> None:
        """Give up the lock: what is left of the directory is now that of a dead job."""
        self._lock.release()

    def unlist(self) -> None:
        """As :meth:`remove`, but only what makes the job found: clients may still wait for a file in the directory."""
        with _explained(self.path), cleanup.locked(self._root):
            self._remove_short()
            if self._is_ours():
                self._keep(self._record.started_at)
                for name in (record.RECORD, record.SOCKET):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(os.path.join(self.path, name))

    # All that follows: with the lock held...

    def _keep(self, started_at: float) -> None:
        """Keep the event log and the last status in the directory, which is that of a run that has ended."""
        with private_files.opened(self.path) as directory:
            ended.keep(self._root, self.job_id, started_at, directory)

    def _make(self) -> None:
        os.mkdir(self.path, 0o700)
        self._files[self.path] = _file_id(self.path)

    def _evict(self) -> None:
        """Remove the directory of an earlier job, or raise JobIdTaken."""
        if not _is_directory(self.path):
            raise JobsDirUnusable(f"{self.path} is no directory of this user; remove it, or choose another job id")
        known = spool.directory_id(self.path)
        holder = self._holder()
        if holder is not None and not (cleanup.is_dead(holder, self._root) or self._follows(holder)):
            raise _taken(holder)
        if holder is None and _is_listening(os.path.join(self.path, record.SOCKET)):
            raise JobIdTaken(f'job id "{self.job_id}" is in use by a job whose record was deleted; it will restore it')
        self._keep(os.lstat(self.path).st_ctime if holder is None else holder.started_at)
        cleanup.remove_tree(self._root, self.job_id, known)

    def _follows(self, holder: record.JobRecord) -> bool:
        """Return whether a launcher ended ``holder``, which this host cannot judge, and started its run again as us."""
        mine, theirs = self._record.launch, holder.launch
        if mine is None or theirs is None or not mine.follows(theirs):
            return False
        # A running process of this host keeps its id: its launcher would have ended it first.
        answers = holder.socket is not None and _is_listening(holder.socket)
        return registry.judge(holder, self._root) == states.JOB_FOREIGN and not answers

    def _holder(self) -> record.JobRecord | None:
        try:
            return record.read_record(self._root, self.job_id)
        except ValueError as err:
            raise JobsDirUnusable(f"{self.path} cannot be judged: {err}; remove it, or choose another job id") from err

    def _check_holder(self) -> None:
        """Raise JobIdTaken if another live job has published here, JobsDirUnusable if that cannot be told."""
        if self._is_as_made(os.path.join(self.path, job_lock.LOCK)):
            return  # another job would have put its own there
        try:
            holder = self._holder()
        except JobsDirUnusable:
            if not self._is_as_made(self.path):
                raise
            return  # our directory with a damaged record: another job would have made a new directory
        if holder is not None and not holder.is_same_run(self._record) and not cleanup.is_dead(holder, self._root):
            raise _taken(holder)

    def _publish(self) -> None:
        os.chmod(self.path, 0o700)
        name = os.path.join(self.path, record.SOCKET)
        where = self._place_socket(name)
        self._record = self._record._replace(socket=where)
        locks = (os.path.join(self.path, job_lock.LOCK),) if self._lock.take() else ()
        with private_files.opened(self.path) as directory:
            private_files.write(directory, record.RECORD, jsonrpc.encode(self._record.to_json()), sync=True)
        sockets = () if where is None else (name, where)
        made = (self.path, os.path.join(self.path, record.RECORD), *sockets, *locks)
        self._files = {path: _file_id(path) for path in made}

    def _place_socket(self, name: str) -> str | None:
        """Listen; return the path, or ``None`` where no socket is possible: the job is then controlled by file."""
        with contextlib.suppress(FileNotFoundError):
            mode = os.lstat(name).st_mode
            if not (stat.S_ISSOCK(mode) or stat.S_ISLNK(mode)):
                raise JobsDirUnusable(f"{name} is in the way and no socket; remove it")
            os.unlink(name)
        if addresses.fits(name) and self._can_listen(name):
            return name
        # Too long a path, or a file system without sockets: listen in a short directory, and link to it.
        self._remove_short()
        self._short = _short_directory()
        where = os.path.join(self._short, "s")
        if not self._can_listen(where):
            self._remove_short()
            return None
        os.symlink(where, name)
        return where

    def _can_listen(self, path: str) -> bool:
        try:
            self._listen(path)
        except OSError as err:
            if err.errno not in _NO_SOCKETS:
                raise
            return False
        return True

    def _discard(self) -> None:
        self._remove_short()
        if self._is_ours():
            self._keep(self._record.started_at)
            requests = os.path.join(self.path, spool.REQUESTS)
            with contextlib.suppress(OSError):  # clients that keep writing lose the path
                os.rename(requests, os.path.join(self.path, f".{spool.REQUESTS}"))
        for attempt in range(limits.REMOVE_ATTEMPTS):
            try:
                if self._is_ours():
                    cleanup.remove_tree(self._root, self.job_id, self._files[self.path][:2])
                break
            except JobsDirUnusable:  # another file was written into it at this moment
                if attempt == limits.REMOVE_ATTEMPTS - 1:
                    raise
        self._files.clear()

    def _is_ours(self) -> bool:
        """Return whether the path has our directory, in which no other job has published; inodes are used again."""
        if not self._is_as_made(self.path):
            return False
        with contextlib.suppress(ValueError):
            holder = record.read_record(self._root, self.job_id)
            return holder is None or holder.is_same_run(self._record)
        return False

    def _is_as_made(self, path: str) -> bool:
        with contextlib.suppress(OSError):
            return self._files.get(path) == _file_id(path)
        return False

    def _remove_short(self) -> None:
        if self._short is not None:
            shutil.rmtree(self._short, ignore_errors=True)
            self._short = None


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turn errors of the file system on a job's directory into JobsDirUnusable."""
    try:
        yield
    except OSError as err:
        where = os.path.join(path, err.filename) if err.filename else path
        raise JobsDirUnusable(f"{where}: {err.strerror or err}") from err


def _taken(holder: record.JobRecord) -> JobIdTaken:
    text = f'job id "{holder.job_id}" is in use by pid {holder.pid} on {holder.host}; use another, or stop that job'
    return JobIdTaken(text, pid=holder.pid, host=holder.host)


def _is_listening(path: str) -> bool:
    try:
        addresses.UnixEndpoint(path).connect(Deadline(0.0)).close()
    except JobDead:
        return False
    except ControlError:  # its backlog is full, or it belongs to another user
        pass
    return True


def _is_directory(path: str) -> bool:
    """Return whether there is a directory of this user, not a link to one."""
    with contextlib.suppress(FileNotFoundError):
        found = os.lstat(path)
        return stat.S_ISDIR(found.st_mode) and found.st_uid in (os.geteuid(), 0)
    return False


def _short_directory() -> str:
    """Return a new private (0700) directory with a short path."""
    for place in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir()):
        if place and private_files.is_safe(place) and addresses.fits(os.path.join(place, "forgather-12345678", "s")):
            return tempfile.mkdtemp(prefix="forgather-", dir=place)
    return tempfile.mkdtemp(prefix="forgather-", dir="/tmp")


def _file_id(path: str) -> tuple[int, int, int]:
    """Return device, inode and time of change of a file; 0 for the time of a directory, which its entries change."""
    found = os.lstat(path)  # the time, because the inode of a deleted file is soon used again
    return found.st_dev, found.st_ino, 0 if stat.S_ISDIR(found.st_mode) else found.st_mtime_ns


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a uid without a name, as in containers
        return str(os.getuid())
