"""The file ``lock`` in a job's directory: while it is locked, the job's process lives. Any thread, any process.

The lock is that of flock(2), on a descriptor that only the job's process has:

* The kernel releases it when the last descriptor of that open file goes: at exit, at a kill, and at execve(2), because
  of ``O_CLOEXEC``. Programs that the job starts lose the descriptor in the same way.
* A forked child shares the open file (fork(2)), and would keep the lock after the job's death. So the child closes it
  in Python's fork handler, which runs for all forks but those that C code makes by itself without an exec. Such a child
  makes a dead job look silent, never a live one dead.
* The locks of fcntl(2), which children do not inherit, were the other choice. But they are lost as soon as the process
  closes *any* descriptor of the file: a training that copies a directory tree with the file in it would look dead.
* A process that finds out whether the lock is free takes a shared one for a moment: those do not exclude each other,
  and the job takes its own before the file has its name. The job itself may do that, too: its second descriptor is
  another open file, whose lock conflicts with the first.
* Over NFS flock(2) locks all bytes as fcntl(2) does, so that hosts see each other's locks. On a file system that has
  locks on one host only, another host finds the lock free; hence a free lock says nothing about another boot.

The file names the run that holds it, so that the lock of a later job of the same id is not taken for an earlier one's.
"""

from __future__ import annotations

import contextlib
import os
import stat
from typing import Final

from ..descriptors import Kept
from . import private_files

LOCK: Final = "lock"
_OPEN: Final = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # it may be a FIFO
#: A file system can be remounted read-only while files are open for reading; NFS locks only those open for writing.
_MODES: Final = (os.O_RDONLY, os.O_RDWR)


class JobLock:
    """The lock of a job of this process.

    Args:
        path: of the job's directory.
        started_at: of the job's record, which it names.
    """

    def __init__(self, path: str, started_at: float) -> None:
        self._path, self._text = path, _text(started_at)
        self._file: Kept | None = None

    def take(self) -> bool:
        """Put a locked file in place, whatever is there; return False, and leave none, where locks do not work."""
        old, self._file = self._file, None
        try:
            with private_files.opened(self._path) as directory:
                if self._take(directory):
                    return True
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(LOCK, dir_fd=directory)
                return False
        finally:
            _close(old)

    def _take(self, directory: int) -> bool:
        hidden = f".{LOCK}.{os.getpid()}"
        private_files.write(directory, hidden, self._text)
        try:
            for mode in _MODES:
                self._file = _open_noted(hidden, mode, directory)
                why = _lock(self._file.number)
                if why is None:
                    os.rename(hidden, LOCK, src_dir_fd=directory, dst_dir_fd=directory)
                    return True
                self.release()
        except OSError:
            self.release()
            raise
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(hidden, dir_fd=directory)
        _warn(self._path, why)
        return False

    def is_lost(self) -> bool:
        """Return whether the lock was taken, and its descriptor was closed since by others."""
        return self._file is not None and not self._file.is_open()

    def release(self) -> None:
        """Give the lock up; may be called twice."""
        file, self._file = self._file, None
        _close(file)


def is_held(path: str, started_at: float, directory: int | None = None) -> bool | None:
    """Return whether a job holds its lock; ``None`` if there is none, locks do not work, or it is another run's.

    Args:
        path: of the job's directory.
        started_at: of the job's record.
        directory: a descriptor of that directory, if it is open already.
    """
    name = LOCK if directory is not None else os.path.join(path, LOCK)
    try:
        file = os.open(name, os.O_RDONLY | _OPEN, dir_fd=directory)
    except OSError as err:
        if err.errno in private_files.NO_DESCRIPTORS:
            raise
        return None
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode) or os.read(file, 64) not in (b"", _text(started_at)):
            return None
        return _is_locked(file)
    except OSError:
        return None
    finally:
        os.close(file)


def _text(started_at: float) -> bytes:
    return f"{float(started_at)!r}\n".encode()


def _is_locked(file: int) -> bool:
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _lock(file: int) -> str | None:
    """Lock a file that no other process knows; return why that is not possible (ENOLCK, EOPNOTSUPP, ENOSYS ...)."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        return err.strerror or str(err)
    return None


_warned = False


def _warn(path: str, why: str | None) -> None:
    global _warned
    if not _warned:
        _warned = True
        import logging  # not needed at the start of the command line

        log = logging.getLogger("forgather_control")
        log.warning("%s cannot be locked (%s): whether this job lives is judged by its host and pid.", path, why)


# Descriptors, and forks...

_files: set[Kept] = set()  # the descriptors of locks in this process
_forks = 0


def _open_noted(name: str, mode: int, directory: int) -> Kept:
    """Return a descriptor of a file that forked children close."""
    while True:
        forks = _forks
        file = Kept.of(os.open(name, mode | _OPEN, dir_fd=directory))
        _files.add(file)
        if forks == _forks:
            return file
        _close(file)  # another thread may have forked before the descriptor was noted


def _close(file: Kept | None) -> None:
    if file in _files:
        _files.discard(file)
        file.close()


def _in_parent() -> None:
    global _forks
    _forks += 1


def _in_child() -> None:
    for file in list(_files):
        _close(file)


os.register_at_fork(after_in_parent=_in_parent, after_in_child=_in_child)
