"""Which jobs are meant where a verb takes several: ids, names of launchers, globs and ``--all`` become targets."""

import fnmatch
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .. import states
from ..errors import FindError, InternalError, NoSuchJob
from ..jobs import registry
from ..jobs.record import JobRecord, jobs_dir
from . import limits, target
from .target import Target


class Selection(NamedTuple):
    """The jobs that some words mean."""

    targets: list[Target]  #: Each job once, in the order of the words; those of a pattern in the order of their ids.
    problems: dict[str, FindError]  #: Why a word means no job, by word.
    left_out: dict[str, str]  #: Jobs that a pattern or ``every`` may mean, and why they are not among the targets.


def select(words: Iterable[str | int], every: bool = False, ssh: str | None = None) -> Selection:
    """Return the jobs that words mean.

    Args:
        words: exact ids; what SLURM or torchrun call a job (the id of a SLURM array means all its tasks); patterns
            of ids with ``*``, ``?`` and ``[...]``, which mean all jobs whose ids match, dead ones, too.
        every: all live jobs, instead of words: those that run on this host, answering or not, and those of other
            hosts that answer.
        ssh: the host on which the jobs are found and reached.

    Raises:
        JobsDirUnusable: the jobs directory cannot be read.
        FindError: with ``every``, the other host cannot be asked for its jobs.
        InternalError: the other host sends no list of jobs.
    """
    place = _Local() if ssh is None else _Remote(ssh)
    if every:
        return place.every()
    found: dict[str, Target] = {}
    problems: dict[str, FindError] = {}
    for word in map(str, words):
        try:
            for one in place.named(word):
                found.setdefault(one.name, one)
        except FindError as err:
            problems[word] = err
    return Selection([*found.values()], problems, place.left_out)


class _Local:
    """The jobs of this jobs directory, which is read once and only if a word is no exact id."""

    def __init__(self) -> None:
        self._root = jobs_dir()
        self._records: list[JobRecord] | None = None
        self._unreadable: dict[str, str] = {}
        self.left_out: dict[str, str] = {}

    def _all(self) -> list[JobRecord]:
        if self._records is None:
            self._records, self._unreadable = registry.scan(self._root)
        return self._records

    def named(self, word: str) -> list[Target]:
        record = registry.named(self._root, word)
        if record is not None:
            return [_target(record)]
        found = _matching(word, self._all(), self._root)
        self.left_out |= {name: why for name, why in self._unreadable.items() if fnmatch.fnmatchcase(name, word)}
        return [_target(one) for one in found]

    def every(self) -> Selection:
        judged = [(record, registry.judge(record, self._root)) for record in self._all()]
        elsewhere = [record for record, state in judged if state == states.JOB_FOREIGN]
        answering = registry.answering(elsewhere, limits.LIST_TIMEOUT) if elsewhere else []
        live = [record for record, state in judged if state == states.JOB_SILENT or record in answering]
        live.sort(key=lambda record: record.job_id)
        silent = [record for record in elsewhere if record not in answering]
        left_out = {record.job_id: f"it is on {record.host} and does not answer here" for record in silent}
        return Selection([_target(one) for one in live], {}, left_out | self._unreadable)


def _target(record: JobRecord) -> Target:
    return Target(record.job_id, record.job_id, record)


class _Remote:
    """The jobs of a host that ssh reaches, which lists them once and only if a word is no exact id."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._jobs: list[registry.Job] | None = None
        self.left_out: dict[str, str] = {}

    def _all(self) -> list[registry.Job]:
        if self._jobs is None:
            from . import ssh

            rows, _ = ssh.list_jobs(self._host, limits.CALL_TIMEOUT)
            if not isinstance(rows, list):
                raise InternalError("the other side sent no list of jobs")
            self._jobs = [registry.Job.from_json(row) for row in rows]
        return self._jobs

    def named(self, word: str) -> list[Target]:
        if not target.is_pattern(word) and not word.isdecimal():  # an id or a name, which that host looks up itself
            return [self._target(word)]
        if any(job.job_id == word for job in self._all()):
            return [self._target(word)]
        return [self._target(job.job_id) for job in _matching(word, self._all(), self._host)]

    def every(self) -> Selection:
        live = [job.job_id for job in self._all() if job.state in (states.JOB_LIVE, states.JOB_SILENT)]
        elsewhere = sorted((job for job in self._all() if job.state == states.JOB_FOREIGN), key=lambda job: job.job_id)
        left_out = {job.job_id: f"it is on {job.host}, another host than {self._host}" for job in elsewhere}
        return Selection([self._target(job_id) for job_id in sorted(live)], {}, left_out)

    def _target(self, job_id: str) -> Target:
        return Target(job_id, job_id, ssh=self._host)


def _matching(word: str, jobs: Sequence[target.AnyJob], place: str) -> list[target.AnyJob]:
    """Return the jobs that a word means which is no exact id."""
    launched = target.launched(jobs, word)
    if launched:
        is_array = all(job.launch and str(job.launch.slurm_array_job_id) == word for job in launched)
        return sorted(launched, key=_task) if is_array else [target.only(launched, word)]
    if not target.is_pattern(word):
        raise target.no_such_job(word, [job.job_id for job in jobs], place)
    found = sorted((job for job in jobs if fnmatch.fnmatchcase(job.job_id, word)), key=lambda job: job.job_id)
    if not found:
        raise NoSuchJob(f"No job matches {ascii(word)[:140]} in {place}; forgather-control list shows all", job=word)
    return found


def _task(job: JobRecord | registry.Job) -> tuple[int, str]:
    task = job.launch and job.launch.slurm_array_task_id
    return (task or 0, job.job_id)
