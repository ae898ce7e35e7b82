"""Files that only this user may read or change: open a directory, write, read. Any thread, any process.

Nothing here follows a link in the last part of a path, blocks on a FIFO, or leaves a descriptor to child processes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from typing import Final

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # the file may be a FIFO
#: Never a file that exists: it may have a second name anywhere.
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
#: Errors of open(2) where there is no directory: none, another kind of file, a link.
NO_DIRECTORY: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
#: Errors that say nothing about the file: this process, or the system, has no descriptors left.
NO_DESCRIPTORS: Final = (errno.EMFILE, errno.ENFILE)


@contextlib.contextmanager
def opened(path: str, parent: int | None = None, *, make: bool = False) -> Iterator[int]:
    """Open a directory and yield its descriptor.

    Args:
        parent: a descriptor of the directory that ``path`` is relative to.
        make: make the directory (0700) if it does not exist.
    """
    try:
        directory = os.open(path, _DIRECTORY, dir_fd=parent)
    except FileNotFoundError:
        if not make:
            raise
        with contextlib.suppress(FileExistsError):  # another process made it at the same time
            os.mkdir(path, 0o700, dir_fd=parent)
        directory = os.open(path, _DIRECTORY, dir_fd=parent)
    try:
        yield directory
    finally:
        os.close(directory)


def write(directory: int, name: str, data: bytes, *, sync: bool = False) -> None:
    """Write a file (mode 0600) that others see whole or not at all; on an error an older one of this name stays.

    Args:
        sync: whether the content must survive a crash of the host.
    """
    hidden = f".{name}.{os.getpid()}"
    file = os.open(hidden, _NEW, 0o600, dir_fd=directory)
    try:
        with open(file, "wb") as out:
            out.write(data)
            if sync:
                out.flush()
                os.fsync(file)
        os.rename(hidden, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:  # Ctrl-C, too
        with contextlib.suppress(FileNotFoundError):
            os.unlink(hidden, dir_fd=directory)
        raise


def read(directory: int, name: str, limit: int) -> tuple[bytes, os.stat_result]:
    """Return at most ``limit`` bytes of a file, and its facts; raise ValueError if it is no regular file."""
    file = os.open(name, _READ, dir_fd=directory)
    try:
        facts = os.fstat(file)
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError(f"{name} is no regular file")
        return os.read(file, limit), facts
    finally:
        os.close(file)


def read_trusted(path: str, name: str, limit: int, parent: int | None = None) -> bytes | None:
    """Return the content of a file that only this user and root can have written; ``None`` if there is none.

    Args:
        path, parent: the file's directory, as for :func:`opened`.
        limit: the most bytes.

    Raises:
        ValueError: the file cannot be read, is too long, or another user may have written it.
        OSError: this process has no descriptors left, which says nothing about the file.
    """
    what = "its directory"
    try:
        with opened(path, parent) as directory:
            check_writers(os.fstat(directory), what)
            what = name
            data, facts = read(directory, name, limit + 1)
    except OSError as err:
        if err.errno == errno.ENOENT or (what != name and err.errno in NO_DIRECTORY):
            return None
        if err.errno in NO_DESCRIPTORS:
            raise
        raise ValueError(f"{what} cannot be read ({err.strerror})") from None
    check_writers(facts, name)
    if len(data) > limit:
        raise ValueError(f"{name} is longer than {limit} bytes")
    return data


def check_writers(facts: os.stat_result, what: str) -> None:
    """Raise ValueError if a user other than this one and root can have written it; root reads the files of any user."""
    me = os.geteuid()
    if me != 0 and facts.st_uid not in (0, me):
        raise ValueError(f"{what} belongs to another user (uid {facts.st_uid})")
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(f"{what} can be written by other users; chmod go-w")


def empty(directory: int) -> None:
    """Remove all entries of a directory through its descriptor, so that no link is followed."""
    with os.scandir(directory) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_directory in found:
        with contextlib.suppress(FileNotFoundError):  # its reader has removed it meanwhile
            if is_directory:
                with opened(name, directory) as inner:
                    empty(inner)
                os.rmdir(name, dir_fd=directory)
            else:
                os.unlink(name, dir_fd=directory)


def make_directories(path: str) -> None:
    """Make a directory and the missing ones above it, with mode 0700 whatever the umask (``os.makedirs`` obeys it)."""
    if os.path.isdir(path):
        return
    make_directories(os.path.dirname(path))
    with contextlib.suppress(FileExistsError):  # another process makes it at the same time
        os.mkdir(path, 0o700)


def may_replace(facts: os.stat_result, writers: int) -> bool:
    """Return whether ``writers`` (S_IWGRP, S_IWOTH) of a directory can replace what other users put into it."""
    return bool(facts.st_mode & writers) and not facts.st_mode & stat.S_ISVTX


def is_safe(path: str) -> bool:
    """Return whether this user can make a directory there that no other user can replace."""
    with contextlib.suppress(OSError):
        facts = os.stat(path)
        replaceable = may_replace(facts, stat.S_IWGRP | stat.S_IWOTH)
        return os.access(path, os.W_OK) and facts.st_uid in (0, os.geteuid()) and not replaceable
    return False
