"""A job's own directory: claim it, publish in it, notice that it was damaged, take it away again.

Floor 3: imports errors, clock, endpoint, jsonrpc, launch, letters, process, record and jobs. In the job only: on the
training thread at the start and the end, on the server thread in between.

Why a claim is atomic: ``mkdir`` makes the name exist once; whoever finds it existing judges its
owner; and both happen under the lock of the jobs directory, up to the moment when the record is
published. So a directory without a record, seen under the lock, is what a crash left.
"""

from __future__ import annotations

import contextlib
import errno
import getpass
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable
from typing import Final

from .. import states
from ..deadline import Deadline
from ..errors import ControlError, JobDead, JobIdTaken, JobsDirUnusable
from ..processes import launcher, liveness
from ..version import PROTOCOL, VERSION
from ..wire import addresses, jsonrpc
from . import record, registry, spool

#: Seconds to wait for the lock of the jobs directory; those who hold it do so for milliseconds.
_PATIENCE: Final = 5.0
#: What socket(2) and bind(2) say where the system, or a file system, has no sockets.
_NO_SOCKETS: Final = (
    errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.EIO, errno.EAFNOSUPPORT
)  # fmt: skip

#: How often a directory is emptied that others may still write into.
_ATTEMPTS: Final = 5

_FileId = tuple[int, int, int]


def generate_job_id() -> str:
    """``job_{timestamp}_{hostname}_{pid}``, with a dash for what a job id may not hold."""
    name = f"job_{time.strftime('%Y%m%d-%H%M%S')}_{socket.gethostname()}_{os.getpid()}"
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)[:128]


class JobDirectory:
    """The directory of the job that runs in this process.

    Args:
        job_id: checked by the caller.
        listen: makes the server listen at a path; raises OSError.
        world_size: for the record.
    """

    def __init__(self, job_id: str, listen: Callable[[str], None], world_size: int) -> None:
        self.job_id = job_id
        self._root = record.jobs_dir()
        self.path = os.path.join(self._root, job_id)
        self._listen = listen
        self._short: str | None = None  # the private directory of a socket that found no place in ours
        self._files: dict[str, _FileId] = {}  # what we made, by path
        me = liveness.current_process()
        self._record = record.JobRecord(
            job_id=job_id,
            host=me.host,
            port=None,
            pid=me.pid,
            started_at=time.time(),
            process_started_at=me.started_at,
            boot_id=me.boot_id,
            world_size=world_size,
            protocol=PROTOCOL,
            version=VERSION,
            user=_user(),
            machine=me.machine,
            booted_at=me.booted_at,
            pid_namespace=me.pid_namespace,
            launch=launcher.of_this_process(),
        )

    def offer(self, address: str, port: int, token: str, tls_sha256: str | None) -> None:
        """Publish a TCP port, too. Before the claim."""
        self._record = self._record._replace(address=address, port=port, token=token, tls_sha256=tls_sha256)

    def claim(self) -> None:
        """Take the job id, listen, and publish: from here on the job can be found.

        Raises:
            JobIdTaken: another job that is not proven dead, nor an earlier turn of this run, has it.
            JobsDirUnusable: the jobs directory cannot be made or written, or is not safe.
        """
        try:
            _make_root(self._root)
            with registry.locked(self._root, _PATIENCE):
                self._take_name()
                try:
                    self._publish()
                except OSError:
                    self._discard()
                    raise
        except OSError as err:
            raise JobsDirUnusable(f"{err.filename or self._root}: {err.strerror or err}") from err

    def restore(self) -> bool:
        """Repair what was deleted or replaced; whether anything was amiss.

        Raises:
            JobIdTaken: the id belongs to another job by now.
            JobsDirUnusable: it cannot be repaired at present.
        """
        if self._is_intact():
            return False
        try:
            _make_root(self._root)
            with registry.locked(self._root, seconds=0.0):
                if not _is_directory(self.path):
                    os.mkdir(self.path, 0o700)
                    self._files[self.path] = _file_id(self.path)
                else:
                    self._give_way()
                self._publish()
        except OSError as err:
            raise JobsDirUnusable(f"{err.filename or self._root}: {err.strerror or err}") from err
        return True

    def remove(self) -> None:
        """Take everything away that is still ours; the rest is somebody else's by now.

        Raises:
            JobsDirUnusable: it cannot be removed; what is left says by its pid that it is dead.
        """
        try:
            with registry.locked(self._root, _PATIENCE):
                self._discard()
        except OSError as err:
            raise JobsDirUnusable(f"{err.filename or self._root}: {err.strerror or err}") from err

    def unlist(self) -> None:
        """As :meth:`remove`, but leave the directory to those who wait for a file in it; to be removed soon.

        Raises:
            JobsDirUnusable: it cannot be done.
        """
        try:
            with registry.locked(self._root, _PATIENCE):
                self._forget_short()
                if self._is_ours():
                    for name in (record.RECORD, record.SOCKET):
                        with contextlib.suppress(FileNotFoundError):
                            os.unlink(os.path.join(self.path, name))
        except OSError as err:
            raise JobsDirUnusable(f"{err.filename or self._root}: {err.strerror or err}") from err

    # With the lock held...

    def _give_way(self) -> None:
        """See whether another job has published here meanwhile, and lives.

        Raises:
            JobIdTaken: it has.
            JobsDirUnusable: whose directory this is by now cannot be said.
        """
        try:
            holder = self._holder()
        except JobsDirUnusable:
            if self._files.get(self.path) != _maybe_file_id(self.path):
                raise
            return  # it is ours, and its record was spoiled: a job would have made a directory of its own
        if holder is not None and holder.owner != self._record.owner and not registry.is_dead(holder):
            raise _taken(holder)

    def _take_name(self) -> None:
        try:
            os.mkdir(self.path, 0o700)
        except FileExistsError:
            self._evict()
            os.mkdir(self.path, 0o700)
        self._files[self.path] = _file_id(self.path)

    def _evict(self) -> None:
        if not _is_directory(self.path):
            raise JobsDirUnusable(f"{self.path} is no directory of this user; remove it, or choose another job id")
        known = _file_id(self.path)
        holder = self._holder()
        if holder is not None and not (registry.is_dead(holder) or self._follows(holder)):
            raise _taken(holder)
        if holder is None and _somebody_listens(os.path.join(self.path, record.SOCKET)):
            raise JobIdTaken(
                f"job id {self.job_id} belongs to a job whose record was deleted, and which will restore it"
            )
        registry.remove_tree(self._root, self.job_id, known[:2])

    def _follows(self, holder: record.JobRecord) -> bool:
        """Whether a launcher ended ``holder``, which this host cannot judge, and began its run anew as us.

        A process of this host that runs keeps its id: its launcher would have ended it first.
        """
        mine, theirs = self._record.launch, holder.launch
        if mine is None or theirs is None or not mine.follows(theirs):
            return False
        answers = holder.socket is not None and _somebody_listens(holder.socket)
        return registry.judge(holder) == states.JOB_FOREIGN and not answers

    def _holder(self) -> record.JobRecord | None:
        try:
            return record.read_record(self._root, self.job_id)
        except ValueError as err:
            raise JobsDirUnusable(f"{self.path} cannot be judged: {err}; remove it, or choose another job id") from err

    def _publish(self) -> None:
        os.chmod(self.path, 0o700)
        name = os.path.join(self.path, record.SOCKET)
        where = self._place_socket(name)
        self._record = self._record._replace(socket=where)
        _write(self.path, record.RECORD, jsonrpc.encode(self._record.to_json()))
        sockets = () if where is None else (name, where)
        made = (self.path, os.path.join(self.path, record.RECORD), *sockets)
        self._files = {path: _file_id(path) for path in made}

    def _place_socket(self, name: str) -> str | None:
        """Where it listens now; ``None`` where nothing can: then it is controlled by file."""
        _unlink_socket(name)
        return self._listen_here(name) or self._listen_elsewhere(name)

    def _listen_here(self, name: str) -> str | None:
        if not addresses.fits(name):
            return None
        try:
            self._listen(name)
        except OSError as err:
            if err.errno not in _NO_SOCKETS:
                raise
            return None
        return name

    def _listen_elsewhere(self, name: str) -> str | None:
        """Too long a path, or a file system without sockets: a short place, and a link to it."""
        self._forget_short()
        self._short = _short_directory()
        where = os.path.join(self._short, "s")
        try:
            self._listen(where)
        except OSError as err:
            self._forget_short()
            if err.errno not in _NO_SOCKETS:
                raise
            return None
        os.symlink(where, name)
        return where

    def _discard(self) -> None:
        self._forget_short()
        if self._is_ours():
            requests = os.path.join(self.path, spool.REQUESTS)
            with contextlib.suppress(OSError):  # out of the way of whoever goes on writing into it
                os.rename(requests, os.path.join(self.path, f".{spool.REQUESTS}"))
        for attempt in range(_ATTEMPTS):
            try:
                if self._is_ours():
                    registry.remove_tree(self._root, self.job_id, self._files[self.path][:2])
                break
            except JobsDirUnusable:  # somebody has put one more into it at this moment
                if attempt == _ATTEMPTS - 1:
                    raise
        self._files.clear()

    def _is_ours(self) -> bool:
        return self.path in self._files and self._files[self.path] == _maybe_file_id(self.path) and self._holds()

    def _holds(self) -> bool:
        """Whether no other job has published here; an inode alone may have been used again."""
        try:
            holder = record.read_record(self._root, self.job_id)
        except ValueError:
            return False
        return holder is None or holder.owner == self._record.owner

    def _forget_short(self) -> None:
        if self._short is not None:
            shutil.rmtree(self._short, ignore_errors=True)
            self._short = None

    # Without the lock...

    def _is_intact(self) -> bool:
        return all(_maybe_file_id(path) == known for path, known in self._files.items())


def _taken(holder: record.JobRecord) -> JobIdTaken:
    return JobIdTaken(
        f"job id {holder.job_id} belongs to pid {holder.pid} on {holder.host}", pid=holder.pid, host=holder.host
    )


def _somebody_listens(path: str) -> bool:
    try:
        addresses.UnixEndpoint(path).connect(Deadline(0.0)).close()
    except JobDead:
        return False
    except ControlError:  # its backlog is full, or it is somebody else's
        pass
    return True


def _make_root(root: str) -> None:
    _make_private(root)
    found, me = os.stat(root), os.geteuid()
    if not stat.S_ISDIR(found.st_mode):
        raise JobsDirUnusable(f"the jobs directory {root} is no directory")
    for owner in (found.st_uid, os.lstat(root).st_uid):  # who made a link may have it point elsewhere tomorrow
        if owner not in (0, me) and me != 0:
            raise JobsDirUnusable(f"the jobs directory {root} belongs to another user (uid {owner})")
    # A group may: with a umask of 002 it is the user's own, and a record that another wrote is believed by nobody.
    if _may_rename(found, stat.S_IWOTH):
        raise JobsDirUnusable(f"anybody may rename what is in the jobs directory {root}; chmod o-w it")


def _may_rename(found: os.stat_result, who: int) -> bool:
    """Whether they, who write by these bits, may put something else in the place of what is in a directory."""
    return bool(found.st_mode & who) and not found.st_mode & stat.S_ISVTX


def _make_private(path: str) -> None:
    """Make a directory and the missing ones above it, 0700 each, whatever the umask (``makedirs`` asks it)."""
    if os.path.isdir(path):
        return
    _make_private(os.path.dirname(path))
    with contextlib.suppress(FileExistsError):  # two jobs start at once; what exists is judged next
        os.mkdir(path, 0o700)


def _is_directory(path: str) -> bool:
    """Whether there is a directory of this user, not a link to one."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid in (os.geteuid(), 0)


def _unlink_socket(path: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISSOCK(mode) or stat.S_ISLNK(mode)):
        raise JobsDirUnusable(f"{path} is in the way and no socket; remove it")
    os.unlink(path)


def _write(directory: str, name: str, data: bytes) -> None:
    """Write a file that others see whole or not at all, and that only its owner can read."""
    path = os.path.join(directory, f".{name}.{os.getpid()}")
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(file, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(file)
        os.replace(path, os.path.join(directory, name))
    except OSError:
        os.unlink(path)
        raise


def _short_directory() -> str:
    """A new private (0700) directory with a short path."""
    for place in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir()):
        if place and _is_safe(place) and addresses.fits(os.path.join(place, "forgather-12345678", "s")):
            return tempfile.mkdtemp(prefix="forgather-", dir=place)
    return tempfile.mkdtemp(prefix="forgather-", dir="/tmp")


def _is_safe(place: str) -> bool:
    """Whether a directory made there stays ours: under ``su`` $XDG_RUNTIME_DIR may be another user's."""
    try:
        found = os.stat(place)
    except OSError:
        return False
    return (
        os.access(place, os.W_OK)
        and found.st_uid in (0, os.geteuid())
        and not _may_rename(found, stat.S_IWGRP | stat.S_IWOTH)
    )


def _file_id(path: str) -> _FileId:
    found = os.lstat(path)
    # The inode of a deleted file is soon used again; a directory's time changes with what is in it.
    return found.st_dev, found.st_ino, 0 if stat.S_ISDIR(found.st_mode) else found.st_mtime_ns


def _maybe_file_id(path: str) -> _FileId | None:
    try:
        return _file_id(path)
    except OSError:
        return None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a uid without a name, as in containers
        return str(os.getuid())
