"""What a job publishes of itself: its id, its directory's name, its ``endpoint.json``.

Floor 1: imports errors, launch and process. Runs on any thread, in the client and in the job.

Values of the client's half are ``NamedTuple``, not dataclasses: the import of ``dataclasses`` alone
costs half as much as that of argparse, json and socket together, at every start of the command line.

Nothing read here is trusted: a file may be half written, hostile, or another host's. A job id is
checked before it becomes a path, links are not followed, and what another user wrote, or may write, is no
record: in a jobs directory that several share, he would answer in the name of our jobs.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ..errors import BadJobId
from ..processes import liveness

if TYPE_CHECKING:
    from ..processes.launcher import Launch

RECORD: Final = "endpoint.json"
SOCKET: Final = "control.sock"
#: A record is a few hundred bytes; what is longer is not ours.
MAX_RECORD: Final = 64 * 1024
_JOB_ID: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


# Names and places...


def jobs_dir() -> str:
    """The jobs directory: $FORGATHER_JOBS_DIR, else under $XDG_CONFIG_HOME, else under ~/.config."""
    chosen = os.environ.get("FORGATHER_JOBS_DIR")
    if chosen:
        return os.path.abspath(chosen)
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return os.path.abspath(os.path.join(config, "forgather", "jobs"))


def is_job_id(text: object) -> bool:
    """Whether ``text`` can be a job id, and so a directory's name."""
    return isinstance(text, str) and _JOB_ID.fullmatch(text) is not None


def check_job_id(text: object) -> str:
    """``text`` itself.

    Raises:
        BadJobId: it cannot be a job id.
    """
    if not is_job_id(text):
        raise BadJobId(
            f"{ascii(text)[:140]} is no job id: 1 to 128 of A-Z a-z 0-9 . _ -, not starting with a dot or dash"
        )
    return str(text)


# Records...


class JobRecord(NamedTuple):
    """What a job publishes of itself in ``endpoint.json``. Times are seconds since the epoch.

    ``port`` is null without TCP; with it, ``address`` is what it was bound to, ``token`` the secret, and
    ``tls_sha256`` is there if the port speaks TLS. ``machine``, ``booted_at`` and ``pid_namespace`` are there so that
    nobody judges a process that he cannot see; see :class:`process.Identity`. ``launch`` is null
    where neither SLURM nor torchrun launched it.
    """

    job_id: str
    host: str
    port: int | None
    pid: int
    started_at: float
    socket: str | None = None
    process_started_at: float | None = None
    boot_id: str | None = None
    world_size: int = 1
    protocol: int = 1
    version: str = ""
    user: str = ""
    machine: str | None = None
    booted_at: float | None = None
    pid_namespace: int | None = None
    address: str | None = None
    token: str | None = None
    tls_sha256: str | None = None
    launch: Launch | None = None

    @property
    def owner(self) -> liveness.Identity:
        """The process that published it."""
        return liveness.Identity(
            host=self.host,
            pid=self.pid,
            started_at=self.process_started_at,
            booted_at=self.booted_at,
            boot_id=self.boot_id,
            machine=self.machine,
            pid_namespace=self.pid_namespace,
        )

    def to_json(self) -> dict[str, Any]:
        """The object that ``endpoint.json`` holds."""
        return {**self._asdict(), "launch": self.launch and self.launch.to_json()}


_KINDS: Final[dict[str, tuple[type, ...]]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "None": (type(None),),
}


def _words(name: str) -> str:
    """The kinds of a member as its annotation says them (a ``NamedTuple`` keeps it as a forward reference)."""
    kind = JobRecord.__annotations__[name]
    return str(getattr(kind, "__forward_arg__", kind))


#: The types of each member as JSON has them: of bool, which is no number here, none.
_MEMBERS: Final = {
    name: frozenset(kind for word in _words(name).split(" | ") for kind in _KINDS[word])
    for name in JobRecord._fields
    if name != "launch"  # an object, which checks itself
}


#: The year 10000: beyond it no calendar goes, and an integer of 400 digits is no float at all.
_END_OF_TIME: Final = 253402300800.0
_TIME: Final = (-_END_OF_TIME, _END_OF_TIME, "no time")
#: What is no number to who reads ``list --json``, 400 digits say, would be none to us either.
_COUNT: Final = (-(1 << 63), 1 << 63, "too large")
#: Least and most of each number, and what it is beyond them. A port of 65536 has the socket module raise OverflowError.
_RANGES: Final[dict[str, tuple[float, float, str]]] = {
    "port": (1, 65535, "none"),
    "pid": (1, (1 << 31) - 1, "no process id"),
    "started_at": _TIME,
    "process_started_at": _TIME,
    "booted_at": _TIME,
    "world_size": _COUNT,
    "protocol": _COUNT,
    "pid_namespace": _COUNT,
}


def parse_record(data: bytes, name: str) -> JobRecord:
    """The record in ``data``, which was read from the directory ``name``.

    Raises:
        ValueError: which member is not what it should be.
    """
    try:
        value = json.loads(data.decode("utf-8"))
    except RecursionError as err:
        raise ValueError("it is nested too deeply") from err
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    if value.get("job_id") != name:
        raise ValueError(f"it names another job, {ascii(value.get('job_id'))[:140]}")
    given = {member: value[member] for member in _MEMBERS if member in value}
    for member, item in given.items():
        if type(item) not in _MEMBERS[member]:
            raise ValueError(f"{member} must be {_words(member)}, not {ascii(item)[:80]}")
    for member in _RANGES:
        _check_range(member, given.get(member))
    if value.get("launch") is not None:
        from ..processes.launcher import Launch  # few jobs have one, and every client would pay for it

        given["launch"] = Launch.from_json(value["launch"])
    try:
        return JobRecord(**given)
    except TypeError as err:
        raise ValueError("a member is missing") from err


def _check_range(name: str, value: float | None) -> None:
    low, high, what = _RANGES[name]
    if value is not None and not low <= value <= high:  # not: for NaN
        raise ValueError(f"{name} {ascii(value)[:80]} is {what}")


def read_record(root: str, name: str) -> JobRecord | None:
    """The record in the directory ``name``; ``None`` if there is none (yet, or any more).

    Raises:
        ValueError: what is there is no record of this job, and why.
        OSError: this process is out of files, so nothing can be said of the job.
    """
    directory = open_directory(os.path.join(root, name))
    if directory is None:
        return None
    try:
        return record_in(directory, name)
    finally:
        os.close(directory)


def open_directory(path: str, above: int | None = None) -> int | None:
    """A descriptor of a job's directory; ``None`` if there is none, or a link.

    Args:
        above: a descriptor of the jobs directory; then ``path`` is the job's id.

    Raises:
        ValueError, OSError: as :func:`read_record`.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
    except OSError as err:
        if err.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise _fault(err, f"it cannot be opened ({err.strerror})") from None


def record_in(directory: int, name: str) -> JobRecord | None:
    """The record in a directory that is open, as :func:`read_record` has it."""
    _check_hands(os.fstat(directory), "it")
    data = _read_small(directory)
    return None if data is None else parse_record(data, name)


def _check_hands(facts: os.stat_result, what: str) -> None:
    """Make sure that nobody but this user and root can have written it; root looks at what is anybody's.

    Raises:
        ValueError: somebody else can.
    """
    me = os.geteuid()
    if me != 0 and facts.st_uid not in (0, me):
        raise ValueError(f"{what} belongs to another user (uid {facts.st_uid})")
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(f"{what} can be written by other users; chmod go-w")


def _read_small(directory: int) -> bytes | None:
    try:
        # Not blocking, should somebody have put a FIFO there; not through a link.
        file = os.open(RECORD, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
    except FileNotFoundError:
        return None
    except OSError as err:
        raise _fault(err, f"{RECORD} cannot be opened ({err.strerror})") from None
    try:
        facts = os.fstat(file)
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError(f"{RECORD} is no regular file")
        _check_hands(facts, RECORD)
        data = os.read(file, MAX_RECORD + 1)
    except OSError as err:
        raise ValueError(f"{RECORD} cannot be read ({err.strerror})") from err
    finally:
        os.close(file)
    if len(data) > MAX_RECORD:
        raise ValueError(f"{RECORD} is longer than {MAX_RECORD} bytes")
    return data


def _fault(err: OSError, text: str) -> OSError | ValueError:
    """Whose fault it is: this process's, or the record's."""
    return err if err.errno in (errno.EMFILE, errno.ENFILE) else ValueError(text)
