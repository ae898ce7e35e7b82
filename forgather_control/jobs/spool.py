"""Letters: small files in a job's directory that one side writes whole and the other takes.

Floor 2: imports record only. Used by both halves of control by file, on the server thread in the job and
on the caller's thread in the client.

Nothing read here is trusted. Directories are opened without following links and named by descriptors
from there on; a letter is a regular file of one name, of the directory's owner, of this user or of root.
Opening a directory makes NFS ask its server what is new in it, where a ``stat`` may answer from a cache
for half a minute (nfs(5), "close-to-open cache consistency").
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from .record import is_job_id

REQUESTS: Final = "requests"
REPLIES: Final = "replies"
STATUS: Final = "status.json"
#: What a letter's name ends in.
SUFFIX: Final = ".json"

#: What open(2) says of what is not for us to read: a link, a socket, another user's.
_NOT_A_SPOOL_FILE: Final = (errno.ELOOP, errno.ENXIO, errno.EOPNOTSUPP, errno.EACCES, errno.EPERM)

#: How a directory is opened: not through a link.
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

#: How a file is made: never one that is there already, whose other name may be anywhere.
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

#: Device and inode: which directory it is, whatever its name is by now.
DirectoryId = tuple[int, int]


def is_file_name(name: str) -> bool:
    """Whether a letter may be called so: as a job; a leading dot hides what is not finished yet."""
    return is_job_id(name)


def directory_id(path: str) -> DirectoryId:
    """Which directory has this path at present."""
    found = os.lstat(path)
    return found.st_dev, found.st_ino


@contextmanager
def opened(path: str, box: str, known: DirectoryId, *, make: bool = False) -> Iterator[int]:
    """A descriptor of ``box`` in the job's directory at ``path``; of the directory itself where ``box`` is ".".

    Args:
        known: the directory that it must be; another job's may have its path by now.
        make: make the box, if it is not there.

    Raises:
        FileNotFoundError: the directory, or the box, is gone.
        OSError: whatever else the file system has to say.
    """
    # As few calls as it takes: beside a loop of pure Python each one waits for the interpreter lock.
    home = os.open(path, _DIRECTORY)
    try:
        facts = os.fstat(home)
        if (facts.st_dev, facts.st_ino) != known:
            raise FileNotFoundError(2, "it is another directory by now", path)
        found = home if box == "." else _open_box(home, box, make)
    except BaseException:
        os.close(home)
        raise
    if found != home:
        os.close(home)
    try:
        if found != home and os.fstat(found).st_uid not in (0, os.geteuid(), facts.st_uid):
            raise PermissionError(13, "it belongs to another user", box)
        yield found
    finally:
        os.close(found)


@contextmanager
def fresh(path: str) -> Iterator[int]:
    """A descriptor of the directory that has this path now, whoever's it is: to see what is new, not to act."""
    found = os.open(path, _DIRECTORY)
    try:
        yield found
    finally:
        os.close(found)


def _open_box(home: int, box: str, make: bool) -> int:
    try:
        return os.open(box, _DIRECTORY, dir_fd=home)
    except FileNotFoundError:
        if not make:
            raise
    with suppress(FileExistsError):
        os.mkdir(box, 0o700, dir_fd=home)
    return os.open(box, _DIRECTORY, dir_fd=home)


def write(box: int, name: str, data: bytes) -> None:
    """Write a letter that others see whole or not at all, and that only its owner can read.

    It is not forced to the disk: after a crash of the host nobody waits for it.
    """
    hidden = f".{name}.{os.getpid()}"
    file = os.open(hidden, _NEW, 0o600, dir_fd=box)
    try:
        try:
            while data:
                data = data[os.write(file, data) :]
        finally:
            os.close(file)
        os.rename(hidden, name, src_dir_fd=box, dst_dir_fd=box)
    except OSError:
        remove(box, hidden)
        raise


def read(box: int, name: str, limit: int) -> tuple[bytes, os.stat_result] | None:
    """At most ``limit`` bytes of a letter, and its facts; ``None`` if what has this name is none.

    Raises:
        FileNotFoundError: nothing has this name.
        OSError: nothing can be read at present.
    """
    # Not blocking, should somebody have put a FIFO there; a link is ELOOP, a socket ENXIO.
    try:
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=box)
    except OSError as err:
        if err.errno in _NOT_A_SPOOL_FILE:
            return None
        raise
    try:
        facts = os.fstat(file)
        return (os.read(file, limit), facts) if is_spool_file(facts, box) else None
    finally:
        os.close(file)


def is_spool_file(facts: os.stat_result, box: int) -> bool:
    """Whether it is a regular file of the right user, and of no other name: a second name can be a stranger's gift."""
    owners = (0, os.geteuid(), os.fstat(box).st_uid)
    return stat.S_ISREG(facts.st_mode) and facts.st_uid in owners and facts.st_nlink == 1


def remove(box: int, name: str) -> bool:
    """Remove a letter; whether it was still there."""
    try:
        os.unlink(name, dir_fd=box)
    except FileNotFoundError:
        return False
    return True
