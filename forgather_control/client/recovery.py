"""What can be done from outside for a job that does not answer: see its ranks, read their stacks, end them.

Floor 5: imports clock, dump, errors, process, record, roster and client. On the caller's thread; loaded
only by the verbs that need it. It sees the processes of this host, as the job recorded them; the
launcher (torchrun, srun) is not among them, and is left alone.
"""

from __future__ import annotations

import os
from typing import Any, Final, NamedTuple

from .. import states
from ..deadline import Deadline
from ..errors import ControlError, DeadlinePassed, FindError, InternalError, JobDead
from ..jobs import rank_processes
from ..jobs.rank_processes import RankRecord
from ..jobs.record import JobRecord, jobs_dir
from ..processes import liveness, stack_dump
from ..processes.liveness import Identity
from ..processes.terminate import terminate
from . import api

#: Seconds beyond its own time-out that a job has for saying which of its ranks did not answer.
_SLACK: Final = 3.0
#: Seconds between SIGTERM and SIGKILL.
GRACE: Final = 10.0
#: Seconds for the stacks of one rank: see ``dump.dump_stacks``.
_DUMP: Final = 6.0
#: Ranks whose stacks are read at once.
_AT_ONCE: Final = 32


class JobProcesses(NamedTuple):
    """The processes of a job, as it recorded them.

    Attributes:
        ranks: all of them, or rank 0 alone where no more was recorded.
        missing: how many were not.
        owner: the user whose job it is; root must not be talked into ending anybody else's process.
    """

    ranks: list[RankRecord]
    missing: int
    owner: int

    def left(self) -> bool:
        """Whether any of them is not proven to be gone."""
        return any(liveness.judge(rank.identity) != states.PROCESS_GONE for rank in self.ranks)


def job_processes(record: JobRecord) -> JobProcesses:
    """The processes of a job, gone or not."""
    root = jobs_dir()
    try:
        ranks = rank_processes.read(root, record.job_id) or []
    except ValueError:  # what cannot be read names nobody, and that is counted
        ranks = []
    if not any((rank.rank, rank.host, rank.pid) == (0, record.host, record.pid) for rank in ranks):
        ranks = [RankRecord.of(0, record.owner, None)]  # or it is of an earlier turn of this job
    try:
        owner = os.lstat(os.path.join(root, record.job_id)).st_uid
    except OSError:
        owner = os.geteuid()
    return JobProcesses(ranks, max(0, record.world_size - len(ranks)), owner)


# Seeing...


class RankView(NamedTuple):
    """What is known of the ranks of a job.

    Attributes:
        rows: an object for each rank, as ``ranks`` and ``stacks`` answer.
        problem: why the job did not answer, if it did not; the rows then say what can be seen from here.
    """

    rows: list[dict[str, Any]]
    processes: JobProcesses
    problem: FindError | None = None


def query(record: JobRecord, method: str, timeout: float) -> RankView:
    """Ask the job for its ranks, by ``ranks`` or ``stacks``.

    Raises:
        FindError: it does not answer, and none of its processes is left.
    """
    known = job_processes(record)
    try:
        with api.connect(record.job_id, timeout + _SLACK) as job:
            return RankView(_judged(job.call(method, timeout=timeout), known), known)
    except FindError as err:
        if not known.left():
            raise
        return RankView(_judged(_from_records(known), known), known, err)


def from_reply(rows: Any) -> RankView:
    """What a job of another host answered, whose processes cannot be looked at from here."""
    return RankView(_judged(rows, nobody := JobProcesses([], 0, os.geteuid())), nobody)


def _from_records(processes: JobProcesses) -> list[dict[str, Any]]:
    unknown = ("step", "seconds_since_step", "rss_bytes", "device", "device_memory_bytes", "stacks")
    return [
        {"rank": rank.rank, "host": rank.host, "pid": rank.pid, "state": states.RANK_SILENT, **dict.fromkeys(unknown)}
        for rank in processes.ranks
    ]


def _judged(rows: Any, processes: JobProcesses) -> list[dict[str, Any]]:
    """What was told of the ranks; a silent one whose process is proven to be gone is ``absent``.

    Raises:
        InternalError: that is no list of ranks.
    """
    if not isinstance(rows, list) or not all(isinstance(row, dict) and type(row.get("rank")) is int for row in rows):
        raise InternalError("the other side sent no ranks")
    identities = {rank.rank: rank.identity for rank in processes.ranks}
    return [{**row, "state": states.RANK_ABSENT} if _is_gone(row, identities) else row for row in rows]


def _is_gone(row: dict[str, Any], identities: dict[int, Identity]) -> bool:
    identity = identities.get(row["rank"])
    return (
        row.get("state") == states.RANK_SILENT
        and identity is not None
        and liveness.judge(identity) == states.PROCESS_GONE
    )


def read_stacks(sight: RankView) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """The rows of ``stacks`` with the stacks of the silent ranks of this host, and why those of others are missing."""
    from concurrent.futures import ThreadPoolExecutor

    known = {rank.rank: rank for rank in sight.processes.ranks}
    silent = [row["rank"] for row in sight.rows if row.get("state") == states.RANK_SILENT and not row.get("stacks")]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = dict(zip(silent, pool.map(lambda rank: _stacks_of(known.get(rank)), silent)))
    filled = []
    for row in sight.rows:
        stacks = found.get(row["rank"])
        if isinstance(stacks, str):
            row = {**row, "stacks": stacks}
        elif isinstance(stacks, JobDead):
            row = {**row, "state": states.RANK_ABSENT}
        filled.append(row)
    return filled, {rank: str(stacks) for rank, stacks in found.items() if isinstance(stacks, FindError)}


def _stacks_of(rank: RankRecord | None) -> str | FindError:
    if rank is None or rank.stack_fd is None:
        return FindError("it does not answer, and its process records no stacks")
    try:
        return stack_dump.dump_stacks(rank.identity, rank.stack_fd, Deadline(_DUMP))
    except FindError as err:
        return err


# Ending...


class AbortResult(NamedTuple):
    """How an abort that may kill has ended.

    Attributes:
        record: of the command, if it was over in time; then nothing was killed.
        problem: else, why not ...
        outcomes: ... and what became of each recorded process: ``rank host pid``, ``outcome`` (``states.KillOutcome``).
        missing: processes that are not recorded, and so were left alone.
    """

    record: dict[str, Any] | None
    problem: ControlError | None
    outcomes: list[dict[str, Any]]
    missing: int


def abort(record: JobRecord, kill_after: float) -> AbortResult:
    """Abort a job, and end its processes on this host, if they are still the same ones, when that takes too long.

    Raises:
        ControlError: as any command, where none of its processes was there to begin with.
    """
    known, deadline = job_processes(record), Deadline(kill_after)
    lived = known.left()
    try:
        with api.connect(record.job_id) as job:
            return AbortResult(job.call("abort", wait=states.COMMAND_FINISHED, timeout=kill_after), None, [], 0)
    except (DeadlinePassed, FindError) as err:
        if not lived:
            raise
        return AbortResult(None, err, _end(known, deadline.left() or 0.0), known.missing)


def _end(processes: JobProcesses, patience: float) -> list[dict[str, Any]]:
    identities = [rank.identity for rank in processes.ranks]
    outcomes = terminate(identities, GRACE, patience=patience, owner=processes.owner)
    return [
        {"rank": rank.rank, "host": rank.host, "pid": rank.pid, "outcome": outcome}
        for rank, (_, outcome) in zip(processes.ranks, outcomes)
    ]
