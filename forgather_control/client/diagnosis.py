"""Why a job did not answer, as its directory and the operating system tell it.

psutil is imported only where a process has to be judged.
"""

import time
from contextlib import suppress

from .. import states
from ..deadline import Deadline
from ..errors import ControlError, JobDead, JobNotAnswering, NoSuchJob
from ..jobs import ended, registry
from ..jobs.record import JobRecord, jobs_dir
from . import limits


def connection_lost(record: JobRecord, note: str) -> ControlError:
    """Explain a connection that ended without an answer; ``note`` says what this means, to append to a sentence."""
    now, state = _after_exit(record)
    job, process = record.job_id, f"pid {record.pid} on {record.host}"
    if now is not None and not now.is_same_run(record):
        return _restarted(now, note)
    if state == states.JOB_DEAD:
        text = f"The process of job {job}, {process}, ended before it answered{note}"
    elif now is None:
        text = f"Job {job} ended before it answered{note}"
    elif state == states.JOB_SILENT:
        text = f"Job {job} closed the connection before it answered, though {process} still runs{note}"
        return JobNotAnswering(text, job=job)
    else:
        text = f"Job {job} ({process}) closed the connection before it answered{note}"
    return JobDead(text, job=job)


def _after_exit(record: JobRecord) -> tuple[JobRecord | None, str]:
    """Return the record that has the job's id now, and the state of ``record``'s process once it had time to exit."""
    deadline = Deadline(limits.EXIT_TIME)
    while True:
        try:
            now = registry.named(jobs_dir(), record.job_id)
        except ControlError:
            now = record  # an unreadable record does not prove that another job has the id
        state = registry.judge(record)
        if state != states.JOB_SILENT or now is None or not now.is_same_run(record) or deadline.passed():
            return now, state
        time.sleep(0.02)


def unreachable(record: JobRecord) -> ControlError:
    """Explain a socket that nothing listens at."""
    now = registry.named(jobs_dir(), record.job_id)
    job, process = record.job_id, f"pid {record.pid} on {record.host}"
    if now is None:
        return NoSuchJob(f"Job {job} has just ended", job=job)
    if not now.is_same_run(record):
        return _restarted(now, "")
    state = registry.judge(record)
    if state == states.JOB_DEAD:
        text = f"Job {job} is dead: {process} is gone. Remove what it left: forgather-control cleanup"
        return JobDead(text, job=job)
    if state == states.JOB_FOREIGN:
        text = f"Job {job} runs on another host ({process}) and cannot be reached from here. Use --ssh or its TCP port"
    else:
        text = f"Job {job} runs ({process}), but nothing listens at its socket"
    return JobNotAnswering(text, job=job)


def judge(record: JobRecord | None, err: ControlError, last_status: object) -> str:
    """Return "ended", "dead" or "silent": what became of a job that does not answer.

    Args:
        record: its record; ``None`` if it is on another host.
        err: why it does not answer.
        last_status: the last ``status`` that it told.
    """
    was_ending = last_status in (states.STATUS_STOPPING, states.STATUS_ENDED)
    if record is None:
        is_over = isinstance(err, (JobDead, NoSuchJob))
        return "silent" if not is_over else "ended" if was_ending else "dead"
    with suppress(ControlError):  # an unreadable record proves nothing
        now = registry.named(jobs_dir(), record.job_id)
        if now is None or not now.is_same_run(record):
            left = ended.find(jobs_dir(), record.job_id, record.started_at)
            died = now is not None and not was_ending if left is None else left.how == states.ENDING_DIED
            return "dead" if died else "ended"
    return "dead" if registry.judge(record) == states.JOB_DEAD else "silent"


def _restarted(now: JobRecord, note: str) -> JobDead:
    count = now.launch and (now.launch.restart_count or now.launch.slurm_restart_count)
    which = f", restart {count}" if count else ""
    where = f"as pid {now.pid} on {now.host}{which}"
    text = f"Job {now.job_id} was restarted {where}, before it answered{note}. Repeat the request"
    return JobDead(text, job=now.job_id, pid=now.pid, host=now.host)
