"""What is left of jobs that have ended: ``.ended/`` of the jobs directory. Any thread, any process.

Each run has a directory ``JOB@STARTED`` with its event log and its last status. A job moves both there when it ends; of
a job that was killed, ``cleanup`` and the next job of its id do so. All of them hold the lock of the jobs directory.
Nothing read here is trusted: owner, size and content are checked as those of a job's record are.
"""

import contextlib
import math
import os
import stat
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any, Final, NamedTuple

from .. import states
from ..errors import InternalError
from ..schema import INTEGER, NULL, TEXT, Field, load, nullable, parse_json
from . import event_log, limits, private_files
from .record import FIELDS, is_job_id
from .spool import STATUS

ENDED: Final = ".ended"  #: No job id begins with a dot.
_FILES: Final = (event_log.EVENTS, STATUS)


class EndedJob(NamedTuple):
    """One run that has ended. Times are seconds since the epoch."""

    job_id: str
    started_at: float
    how: str  #: One of ``states.ENDINGS``.
    ended_at: float  #: Of one that died, when it last wrote something.
    global_step: int | None = None
    checkpoint: str | None = None  #: The path of the last one.
    checkpoint_step: int | None = None
    reason: str | None = None  #: Of one that failed.
    host: str | None = None
    pid: int | None = None
    status: dict[str, Any] | None = None  #: The last one, without ``ended``.

    def to_json(self) -> dict[str, Any]:
        """Return the job as ``list --ended --json`` prints it."""
        return {name: value for name, value in self._asdict().items() if name != "status"}

    @classmethod
    def from_json(cls, value: Any) -> "EndedJob":
        """Return the job that an element of such a list describes; raise InternalError if it is none."""
        try:
            return load(cls, _FIELDS, value, "an ended job")
        except ValueError as err:
            raise InternalError("the other side sent no list of ended jobs") from err


#: The rules for the members of a last status that are used, and for those of its ``ended``.
_STATUS_FIELDS: Final = {"global_step": Field(INTEGER + NULL), "host": FIELDS["host"], "pid": FIELDS["pid"]}
_ENDED_FIELDS: Final = {
    "how": Field(TEXT, choices=states.ENDINGS),
    "ended_at": FIELDS["started_at"],
    **dict.fromkeys(("reason", "checkpoint"), Field(TEXT + NULL)),
    "checkpoint_step": Field(INTEGER + NULL),
}
_FIELDS: Final = {
    **{name: FIELDS[name] for name in ("job_id", "started_at")},
    **_ENDED_FIELDS,
    "global_step": _STATUS_FIELDS["global_step"],
    "host": Field(TEXT + NULL),
    "pid": nullable(FIELDS["pid"]),
}


def path_of(root: str, job_id: str, started_at: float) -> str:
    """Return the directory of an ended run."""
    return os.path.join(root, ENDED, _name(job_id, started_at))


def _name(job_id: str, started_at: float) -> str:
    return f"{job_id}@{float(started_at)!r}"


# Keep, with the lock of the jobs directory held...


def keep(root: str, job_id: str, started_at: float, directory: int) -> None:
    """Move what is kept out of a job's directory, which is open. Where that is not possible, it is lost with it."""
    names = [name for name in _FILES if _is_file(directory, name)]
    if not names:
        return
    with contextlib.suppress(OSError, ValueError), _opened(root, make=True) as folder:
        with private_files.opened(_name(job_id, started_at), folder, make=True) as place:
            _give_to_owner(root, place)
            for name in names:
                os.rename(name, name, src_dir_fd=directory, dst_dir_fd=place)
        _prune(folder)


def _is_file(directory: int, name: str) -> bool:
    with contextlib.suppress(OSError):
        return stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
    return False


def _give_to_owner(root: str, directory: int) -> None:
    """Where root cleans up in a user's directory, what it makes there belongs to that user."""
    if os.geteuid() == 0:
        owner = os.stat(root)
        os.fchown(directory, owner.st_uid, owner.st_gid)


def _prune(folder: int) -> None:
    """Remove what is too old or too much, the oldest first."""
    for name in _entries(folder)[1]:
        with contextlib.suppress(OSError, RecursionError):
            with private_files.opened(name, folder) as old:
                private_files.empty(old)
            os.rmdir(name, dir_fd=folder)


# Read...


def scan(root: str) -> list[EndedJob]:
    """Return the ended jobs that can be read, the last one first."""
    found = []
    with contextlib.suppress(OSError, ValueError), _opened(root) as folder:
        for name in _entries(folder)[0]:
            with contextlib.suppress(OSError, ValueError):
                found.append(_read(folder, name))
    return sorted(found, key=lambda job: -job.ended_at)


def find(root: str, job_id: str, started_at: float | None = None) -> EndedJob | None:
    """Return a run of this id that has ended, the last one or the one of that start; ``None`` if none is kept."""
    return next(
        (job for job in scan(root) if job.job_id == job_id and started_at in (None, job.started_at)),
        None,
    )


def read_events(root: str, job: EndedJob) -> list[dict[str, Any]]:
    """Return the events that are kept of an ended job; ValueError: they cannot be read."""
    with _opened(root) as folder:
        return event_log.read(_name(job.job_id, job.started_at), folder)


@contextlib.contextmanager
def _opened(root: str, *, make: bool = False) -> Iterator[int]:
    """Yield a descriptor of the directory of all ended jobs; ValueError: another user may have written into it."""
    with private_files.opened(os.path.join(root, ENDED), make=make) as folder:
        if make:
            _give_to_owner(root, folder)
        private_files.check_writers(os.fstat(folder), ENDED)
        yield folder


def _entries(folder: int) -> tuple[list[str], list[str]]:
    """Return the names of what is kept, and of what is too old or too much; the newest first."""
    oldest, aged = time.time() - limits.ENDED_SECONDS, []
    with os.scandir(folder) as entries:
        for entry in islice(entries, 100 * limits.MAX_ENDED):
            with contextlib.suppress(OSError):
                if entry.is_dir(follow_symlinks=False):
                    aged.append((entry.stat(follow_symlinks=False).st_mtime, entry.name))
    aged.sort(reverse=True)
    kept = [name for at, name in aged[: limits.MAX_ENDED] if at >= oldest]
    return kept, [name for _, name in aged[len(kept) :]]


def _read(folder: int, name: str) -> EndedJob:
    """Return an ended job; raise ValueError if it is none, or cannot be trusted."""
    job_id, _, started = name.partition("@")
    started_at = float(started)
    if not is_job_id(job_id) or not FIELDS["started_at"].accepts(started_at):
        raise ValueError(f"{ascii(name)} is no ended job")
    status = _status(private_files.read_trusted(name, STATUS, limits.MAX_STATUS, folder), job_id)
    members = _valid(_STATUS_FIELDS, status)
    ending = _valid(_ENDED_FIELDS, status.pop("ended", None))
    if not ending.keys() >= {"how", "ended_at"}:
        ending = {"how": states.ENDING_DIED, "ended_at": _written_at(folder, name, started_at)}
        known = _last_known(event_log.read(name, folder))
        members, ending = {"global_step": known.pop("global_step"), **members}, {**ending, **known}
    return EndedJob(job_id, started_at, **members, **ending, status=status or None)


def _status(data: bytes | None, job_id: str) -> dict[str, Any]:
    """Return the last status of a job; empty if there is none."""
    with contextlib.suppress(ValueError):
        value = parse_json(data or b"")
        if isinstance(value, dict) and value.get("job_id") == job_id:
            return value
    return {}


def _valid(fields: dict[str, Field], value: object) -> dict[str, Any]:
    known = value if isinstance(value, dict) else {}
    return {name: known[name] for name, field in fields.items() if name in known and field.accepts(known[name])}


def _written_at(folder: int, name: str, otherwise: float) -> float:
    """Return when a file of a job that died was last written."""
    times = [otherwise]
    with private_files.opened(name, folder) as place:
        for file in _FILES:
            with contextlib.suppress(OSError):
                times.append(os.stat(file, dir_fd=place, follow_symlinks=False).st_mtime)
    return max(filter(math.isfinite, times))


def _last_known(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the last checkpoint of a job that died, and a step that it had reached, as its events tell."""
    found: dict[str, Any] = {}
    for event in events:
        saved: Any = event.get("result") if event["kind"] == states.EVENT_COMMAND else event
        if isinstance(saved, dict) and isinstance(saved.get("path"), str):
            found = {"checkpoint": saved["path"], "checkpoint_step": saved.get("step")}
    steps = [event["step"] for event in events if type(event.get("step")) is int]
    return {**_valid(_ENDED_FIELDS, found), "global_step": max(steps, default=None)}
