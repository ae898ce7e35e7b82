"""The spool: ``requests/`` and ``replies/`` in a job's directory, through which a job is controlled by file.

The server thread of the job and the calling thread of a client both use it. Nothing read here is trusted: a spool
file is a regular file with one name that belongs to this user, to root, or to the owner of its directory.

A directory is opened rather than looked at with ``stat``: opening makes NFS ask its server what is new in it, while
``stat`` may answer from a cache for half a minute (nfs(5), "close-to-open cache consistency").
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from . import private_files

REQUESTS: Final = "requests"
REPLIES: Final = "replies"
STATUS: Final = "status.json"
SUFFIX: Final = ".json"

#: Errors of open(2) for what is no spool file: a link, a socket, a file of another user.
_NOT_A_SPOOL_FILE: Final = (errno.ELOOP, errno.ENXIO, errno.EOPNOTSUPP, errno.EACCES, errno.EPERM)

#: Device and inode: they identify a directory whatever its name is.
DirectoryId = tuple[int, int]


def directory_id(path: str) -> DirectoryId:
    """Return which directory has this path now."""
    found = os.lstat(path)
    return found.st_dev, found.st_ino


@contextmanager
def opened(path: str, name: str, known: DirectoryId, *, make: bool = False) -> Iterator[int]:
    """Open the spool directory ``name`` in the job's directory ``path`` and yield its descriptor.

    Args:
        name: "." opens the job's directory itself.
        known: the directory that ``path`` must be, because another job's may have this path now.
        make: make the spool directory if it does not exist.

    Raises:
        OSError: it does not exist any more (FileNotFoundError), or belongs to another user, or cannot be opened.
    """
    # As few calls as possible: beside a training loop in pure Python each one waits for the interpreter lock.
    with private_files.opened(path) as job:
        facts = os.fstat(job)
        if (facts.st_dev, facts.st_ino) != known:
            raise FileNotFoundError(errno.ENOENT, "another directory has this path now", path)
        with private_files.opened(name, job, make=make) as spool:
            if os.fstat(spool).st_uid not in (0, os.geteuid(), facts.st_uid):
                raise PermissionError(errno.EACCES, "it belongs to another user", name)
            yield spool


def read(spool: int, name: str, limit: int) -> tuple[bytes, os.stat_result] | None:
    """Return at most ``limit`` bytes of a spool file, and its facts; ``None`` if this is no spool file."""
    try:
        data, facts = private_files.read(spool, name, limit)
    except ValueError:
        return None
    except OSError as err:
        if err.errno in _NOT_A_SPOOL_FILE:
            return None
        raise
    return (data, facts) if is_spool_file(facts, spool) else None


def is_spool_file(facts: os.stat_result, spool: int) -> bool:
    """Return whether it is a regular file of a permitted user with one name: another user may have made a second."""
    owners = (0, os.geteuid(), os.fstat(spool).st_uid)
    return stat.S_ISREG(facts.st_mode) and facts.st_uid in owners and facts.st_nlink == 1


def remove(spool: int, name: str) -> bool:
    """Remove a spool file; return whether it existed."""
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=spool)
        return True
    return False
