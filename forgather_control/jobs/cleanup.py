"""Remove the directories of dead jobs, under the lock of the jobs directory; keep their event logs. Any thread.

A directory is removed only if its record names it, the process in the record is proven to be gone, and no process
answers for the job. Links are not followed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from .. import states
from ..deadline import Deadline, lock_file
from ..errors import JobsDirUnusable
from . import ended, limits, private_files
from .record import SOCKET, JobRecord, check_job_id, read_record
from .registry import ask, judge


@contextlib.contextmanager
def locked(root: str, seconds: float | None = None) -> Iterator[bool]:
    """Keep other processes from claiming or removing job directories; yield whether that was possible.

    On a file system without locks (Lustre without ``-o flock``) the work is done without the lock. Two jobs with the
    same id that start within a millisecond can then both get it.

    Raises:
        JobsDirUnusable: another process held the lock for ``seconds``, or the jobs directory cannot be written.
    """
    seconds = limits.LOCK_TIMEOUT if seconds is None else seconds
    try:
        file = os.open(os.path.join(root, ".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as err:
        raise JobsDirUnusable(f"the jobs directory {root} cannot be written ({err.strerror})") from err
    try:
        if os.geteuid() == 0:  # made under sudo in a user's directory, it must not lock the user out
            owner = os.stat(root)
            os.fchown(file, owner.st_uid, owner.st_gid)
        possible = False
        with contextlib.suppress(OSError):
            if not lock_file(file, Deadline(seconds)):
                raise JobsDirUnusable(f"another process has held {root}/.lock for {seconds:g} s; try again")
            possible = True
        yield possible
    finally:
        os.close(file)


def is_dead(record: JobRecord, root: str, directory: int | None = None) -> bool:
    """Return whether the job is proven to have ended, see :func:`judge`, and no process answers for it."""
    return judge(record, root, directory) == states.JOB_DEAD and not ask(
        [record], "ping", Deadline(limits.ANSWER_TIMEOUT)
    )


def remove_dead(root: str, job_id: str) -> bool:
    """Remove the directory of a dead job of this host; return False if it does not exist, is not dead or not readable.

    The job is judged again under the lock, so a job that starts meanwhile is safe. The directory is emptied through
    the descriptor that its record was read from, because where root cleans up, its owner could put another directory
    in its place.

    Raises:
        JobsDirUnusable: the directory cannot be written or removed.
    """
    with locked(root), contextlib.ExitStack() as stack:
        try:
            parent, directory = stack.enter_context(_opened(root, check_job_id(job_id)))
            record = read_record(root, job_id, directory)
        except (OSError, ValueError) as err:
            if getattr(err, "errno", None) in private_files.NO_DESCRIPTORS:
                raise
            return False
        if record is None or not is_dead(record, root, directory):
            return False
        # The record of a dead job may have been put in the place of a live one's; its socket cannot.
        beside = record._replace(socket=os.path.join(root, job_id, SOCKET))
        if beside != record and not is_dead(beside, root, directory):
            return False
        ended.keep(root, job_id, record.started_at, directory)
        _remove(root, parent, job_id, directory)
        return True


def remove_tree(root: str, job_id: str, known: tuple[int, int]) -> None:
    """Remove the directory of a job; call it while ``locked``. Raise JobsDirUnusable if it cannot be removed.

    Args:
        known: device and inode of the directory that was judged; another one is left alone.
    """
    try:
        with _opened(root, job_id) as (parent, directory):
            facts = os.fstat(directory)
            if known == (facts.st_dev, facts.st_ino):
                _remove(root, parent, job_id, directory)
    except OSError as err:
        if err.errno not in private_files.NO_DIRECTORY:
            raise JobsDirUnusable(f"{os.path.join(root, job_id)} cannot be opened ({err.strerror})") from err


@contextlib.contextmanager
def _opened(root: str, job_id: str) -> Iterator[tuple[int, int]]:
    """Yield descriptors of the jobs directory, which may be a link, and of the job's directory in it."""
    only_names = getattr(os, "O_PATH", os.O_RDONLY)  # it need not be readable (open(2))
    try:
        parent = os.open(root, only_names | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as err:
        raise JobsDirUnusable(f"the jobs directory {root} cannot be opened ({err.strerror})") from err
    try:
        with private_files.opened(job_id, parent) as directory:
            yield parent, directory
    finally:
        os.close(parent)


def _remove(root: str, parent: int, job_id: str, directory: int) -> None:
    try:
        private_files.empty(directory)
        os.rmdir(job_id, dir_fd=parent)
    except FileNotFoundError:
        pass
    except (OSError, RecursionError) as err:
        reason = getattr(err, "strerror", None) or "it is nested too deeply"
        raise JobsDirUnusable(f"{os.path.join(root, job_id)} cannot be removed ({reason})") from err
