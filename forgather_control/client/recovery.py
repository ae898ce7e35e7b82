"""What can be done from outside for a job that does not answer: list its ranks, read their stacks, end its processes.

Runs on the caller's thread; loaded only by the verbs that need it. It covers the processes of this host, as the job
recorded them. The launcher (torchrun, srun) is not among them, and is left alone.
"""

import os
import time
from typing import Any, Final, NamedTuple

from .. import states
from ..deadline import Deadline
from ..errors import ControlError, FindError, InternalError, JobDead
from ..jobs import rank_processes
from ..jobs.rank_processes import RankRecord
from ..jobs.record import JobRecord, jobs_dir, read_record
from ..processes import liveness, stack_dump, stacks
from ..processes.terminate import terminate
from . import api, limits

#: Seconds beyond its own time-out in which a job reports which of its ranks did not answer.
_SLACK: Final = 3.0
#: Seconds for the stacks of one rank: see ``stack_dump.dump_stacks``.
_DUMP_TIMEOUT: Final = 6.0

#: States of ranks that may run or not.
_UNPROVEN: Final = (states.RANK_SILENT, states.RANK_UNKNOWN)


class JobProcesses(NamedTuple):
    """The processes of a job, as it recorded them."""

    ranks: list[RankRecord]  #: All ranks, or rank 0 alone where no others are recorded.
    missing: int  #: Number of ranks that are not recorded.
    owner: int  #: The job's user. A record may name any process: root ends only those of this user.

    def left(self) -> bool:
        """Whether any process is not proven to be gone."""
        return any(liveness.judge(rank.identity) != states.PROCESS_GONE for rank in self.ranks)


def job_processes(record: JobRecord) -> JobProcesses:
    """Return the processes of a job, gone or not."""
    root = jobs_dir()
    try:
        ranks = rank_processes.read(root, record.job_id) or []
    except ValueError:  # an unreadable file names no processes; they count as missing
        ranks = []
    if not any((rank.rank, rank.host, rank.pid) == (0, record.host, record.pid) for rank in ranks):
        ranks = [RankRecord.of(0, record.owner, None)]  # no file, or one from before a restart of the job
    try:
        owner = os.lstat(os.path.join(root, record.job_id)).st_uid
    except OSError:
        owner = os.geteuid()
    return JobProcesses(ranks, max(0, record.world_size - len(ranks)), owner)


class RankView(NamedTuple):
    """What is known of the ranks of a job."""

    rows: list[dict[str, Any]]  #: An object for each rank, as ``ranks`` and ``stacks`` answer.
    processes: JobProcesses
    problem: FindError | None = None  #: Why the job did not answer, if so; ``rows`` then come from its records.


def query(record: JobRecord, method: str, timeout: float, **params: Any) -> RankView:
    """Ask the job for its ranks, by ``ranks`` or ``stacks``; FindError: no answer, and no process is left."""
    known = job_processes(record)
    try:
        with api.connect(record.job_id, timeout + _SLACK) as job:
            return from_reply(job.call(method, timeout=timeout, **params), known)
    except FindError as err:
        if not known.left():
            raise
        unknown = ("step", "seconds_since_step", "rss_bytes", "device", "device_memory_bytes", "stacks")
        rows = [{**_row(rank), "state": states.RANK_SILENT, **dict.fromkeys(unknown)} for rank in known.ranks]
        return from_reply(rows, known)._replace(problem=err)


def _row(rank: RankRecord) -> dict[str, Any]:
    return {"rank": rank.rank, "host": rank.host, "pid": rank.pid}


def from_reply(rows: Any, processes: JobProcesses | None = None) -> RankView:
    """Return the view that a job's answer gives; unknown ranks whose process is proven to be gone are absent.

    InternalError: the answer is no list of ranks.
    """
    if not isinstance(rows, list) or not all(isinstance(row, dict) and type(row.get("rank")) is int for row in rows):
        raise InternalError("the job's answer is no list of ranks; is its version another one?")
    known = processes or JobProcesses([], 0, os.geteuid())  # none, of a job of another host
    silent = {row["rank"] for row in rows if row.get("state") in _UNPROVEN}
    gone = {
        one.rank for one in known.ranks if one.rank in silent and liveness.judge(one.identity) == states.PROCESS_GONE
    }
    return RankView([{**row, "state": states.RANK_ABSENT} if row["rank"] in gone else row for row in rows], known)


def read_stacks(view: RankView, internal: bool = False) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Return the rows with the stacks of silent and unknown ranks of this host, and for others why there are none.

    Args:
        internal: whether to show the threads of this package, too.
    """
    from concurrent.futures import ThreadPoolExecutor

    known = {rank.rank: rank for rank in view.processes.ranks}
    silent = [row["rank"] for row in view.rows if row.get("state") in _UNPROVEN and not row.get("stacks")]
    with ThreadPoolExecutor(32) as pool:
        found = dict(zip(silent, pool.map(lambda rank: _stacks_of(known.get(rank)), silent)))
    rows = []
    for row in view.rows:
        text = found.get(row["rank"])
        if isinstance(text, str):
            row = {**row, "stacks": text if internal else stacks.without_internal(text)}
        elif isinstance(text, JobDead):
            row = {**row, "state": states.RANK_ABSENT}
        rows.append(row)
    return rows, {rank: str(why) for rank, why in found.items() if isinstance(why, FindError)}


def _stacks_of(rank: RankRecord | None) -> str | FindError:
    if rank is None or rank.stack_fd is None:
        return FindError("it does not answer, and its process has no stack dumper")
    try:
        return stack_dump.dump_stacks(rank.identity, rank.stack_fd, Deadline(_DUMP_TIMEOUT))
    except FindError as err:
        return err


class AbortResult(NamedTuple):
    """How an abort ended."""

    record: dict[str, Any] | None  #: Of the command, if the job finished it; then no process was killed.
    problem: ControlError | None = None  #: Else why not: the job refused or failed it, or did not answer in time.
    #: What became of each recorded process then: ``rank host pid outcome``, see ``states.KillOutcome``.
    outcomes: list[dict[str, Any]] = []
    missing: int = 0  #: Number of processes that are not recorded, and were left alone.


def abort(record: JobRecord, kill_after: float) -> AbortResult:
    """Abort a job; whatever it answers, end its processes on this host unless it ends within ``kill_after`` seconds.

    Raises as any command does where the job has ended, or had no processes left to begin with.
    """
    known, deadline = job_processes(record), Deadline(kill_after)
    had_processes = known.left()
    try:
        with api.connect(record.job_id) as job:
            return AbortResult(job.command("abort", wait=states.COMMAND_FINISHED, timeout=kill_after).to_json())
    except ControlError as err:
        if not had_processes or _ends(record, known, deadline):
            raise
        found = terminate([rank.identity for rank in known.ranks], limits.KILL_GRACE, owner=known.owner)
        outcomes = [{**_row(rank), "outcome": outcome} for rank, (_, outcome) in zip(known.ranks, found)]
        return AbortResult(None, err, outcomes, known.missing)


def _ends(record: JobRecord, processes: JobProcesses, deadline: Deadline) -> bool:
    """Wait for processes to end; whether the job ended in an orderly way: its process may have other work to do."""
    while True:
        try:  # it then removed its record, or another process has taken its id
            now = read_record(jobs_dir(), record.job_id)
        except ValueError:
            now = record
        if now is None or not now.is_same_run(record):
            return True
        if not processes.left() or deadline.passed():
            return False
        time.sleep(min(0.1, deadline.left() or 0.0))
