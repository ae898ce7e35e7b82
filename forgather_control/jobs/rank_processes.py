"""The processes of a job's ranks, in ``ranks.json`` beside its ``endpoint.json``: for when nobody answers any more.

Floor 2: imports process and record. Written in the job, by rank 0 once it knows all ranks; read by the
client, on any thread. As with a record, nothing that is read here is trusted.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from typing import Any, Final, NamedTuple

from ..processes.liveness import Identity
from .record import check_job_id

RANKS_FILE: Final = "ranks.json"
#: Ten thousand ranks, generously.
MAX_RANKS_FILE: Final = 4 << 20
#: The year 10000, as in ``record``.
_END_OF_TIME: Final = 253402300800.0


class RankRecord(NamedTuple):
    """The process of one rank, and where it writes its stacks; members as in :class:`process.Identity`.

    Attributes:
        stack_fd: the ``fd`` of its :class:`stack_dump.StackDumper`; ``None`` where it has none.
    """

    rank: int
    host: str
    pid: int
    started_at: float | None = None
    booted_at: float | None = None
    boot_id: str | None = None
    machine: str | None = None
    pid_namespace: int | None = None
    stack_fd: int | None = None

    @classmethod
    def of(cls, rank: int, identity: Identity, stack_fd: int | None) -> RankRecord:
        """The record of a process."""
        return cls(rank, *identity, stack_fd)

    @property
    def identity(self) -> Identity:
        """The process."""
        return Identity(*(getattr(self, name) for name in Identity._fields))


#: What each member may be, beside ``None`` where it has a default.
_KINDS: Final[dict[str, tuple[type, ...]]] = {
    **dict.fromkeys(("rank", "pid", "pid_namespace", "stack_fd"), (int,)),
    **dict.fromkeys(("host", "boot_id", "machine"), (str,)),
    **dict.fromkeys(("started_at", "booted_at"), (int, float)),
}


def write(directory: str, ranks: list[RankRecord]) -> None:
    """Write the file, readable by its owner alone; others see it whole or not at all.

    Args:
        directory: the job's.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    path = os.path.join(directory, f".{RANKS_FILE}.{os.getpid()}")
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(file, "wb") as out:
            out.write(json.dumps([rank._asdict() for rank in ranks]).encode("ascii"))
        os.replace(path, os.path.join(directory, RANKS_FILE))
    except OSError:
        os.unlink(path)
        raise


def read(root: str, job_id: str) -> list[RankRecord] | None:
    """The ranks of a job, in order; ``None`` if there is no such file (yet, or any more).

    Raises:
        ValueError: what is there is no such file, and why.
        OSError: this process is out of files.
    """
    try:
        directory = os.open(os.path.join(root, check_job_id(job_id)), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as err:
        _fail_unless(err, errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
        return None
    try:
        # Not blocking, should somebody have put a FIFO there; not through a link.
        file = os.open(RANKS_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
    except OSError as err:
        _fail_unless(err, errno.ENOENT)
        return None
    finally:
        os.close(directory)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise ValueError(f"{RANKS_FILE} is no regular file")
    try:
        with open(file, "rb") as data:
            return parse(data.read(MAX_RANKS_FILE + 1))
    except OSError as err:
        raise ValueError(f"{RANKS_FILE} cannot be read ({err.strerror})") from err


def _fail_unless(err: OSError, *means_none: int) -> None:
    if err.errno in (errno.EMFILE, errno.ENFILE):
        raise err
    if err.errno not in means_none:
        raise ValueError(f"{RANKS_FILE} cannot be opened ({err.strerror})") from None


def parse(data: bytes) -> list[RankRecord]:
    """The ranks in ``data``.

    Raises:
        ValueError: which member of which rank is not what it should be.
    """
    if len(data) > MAX_RANKS_FILE:
        raise ValueError(f"{RANKS_FILE} is longer than {MAX_RANKS_FILE} bytes")
    try:
        value = json.loads(data.decode("utf-8"))
    except RecursionError as err:
        raise ValueError("it is nested too deeply") from err
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError("it is no JSON array of objects")
    ranks = [_record(item) for item in value]
    numbers = [rank.rank for rank in ranks]
    if numbers != sorted(set(numbers)):
        raise ValueError("its ranks are not in order, each once")
    return ranks


def _record(item: dict[str, Any]) -> RankRecord:
    known = {name: _checked(name, item[name]) for name in RankRecord._fields if name in item}
    try:
        return RankRecord(**known)
    except TypeError as err:
        raise ValueError("a member is missing") from err


def _checked(name: str, value: Any) -> Any:
    kinds = _KINDS[name]
    if value is None and name in RankRecord._field_defaults:
        return None
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ValueError(f"{name} must be {kinds[-1].__name__}, not {ascii(value)[:80]}")
    if name in ("rank", "stack_fd") and value not in range(1 << 31):
        raise ValueError(f"{name} {ascii(value)[:80]} is none")
    if name == "pid" and value not in range(1, 1 << 31):
        raise ValueError(f"pid {ascii(value)[:80]} is no process id")
    if isinstance(value, (int, float)) and float in kinds and not abs(value) < _END_OF_TIME:  # not: for NaN
        raise ValueError(f"{name} {ascii(value)[:80]} is no time")
    return value
