"""The verb ``status``: of a live job its answer; of one that does not answer, or has ended, what it wrote last."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

from ..client import target
from ..client.connection import Client
from ..errors import ControlError, JobDead, JobNotAnswering, NoSuchJob
from ..jobs import ended, last_status
from ..jobs.ended import EndedJob
from ..jobs.record import jobs_dir
from ..wire import jsonrpc
from . import output, terminal
from .exit_codes import DONE, exit_code
from .terminal import complain, print_answer


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    try:
        with Client(target.resolve(args.job, args.connect, args.token, args.ssh)) as job:
            answer = job.call("status")
    except (NoSuchJob, JobDead, JobNotAnswering) as err:
        return _past(args, err)
    print_answer(args.json, answer, output.status_screen, answer, terminal.has_unicode())
    return DONE


def of_ended(args: argparse.Namespace) -> EndedJob | None:
    """Return the last run of JOB that has ended, unless the job is elsewhere or none is named."""
    is_here = args.ssh is None and args.connect is None
    return ended.find(jobs_dir(), args.job) if is_here and args.job is not None else None


def past(job: EndedJob) -> str:
    """Say in a few words how and when a job has ended."""
    reason = f" ({job.reason})" if job.reason else ""
    return f"has ended: {job.how}{reason} at {output.moment(job.ended_at)}"


def _past(args: argparse.Namespace, err: ControlError) -> int:
    """Show what is left of a job that did not answer; raise the error if nothing is."""
    job_id = err.data.get("job") or args.job
    last = None
    if args.ssh is None and args.connect is None and not isinstance(err, NoSuchJob):
        last = last_status.read(jobs_dir(), str(job_id))
    if last is not None:
        told = {**last_known(last), "error": jsonrpc.error_object(err)}
        was = was_last(last, err)
        print_answer(args.json, told, output.status_screen, last.status, terminal.has_unicode(), was)
        return complain(output.in_verbs(str(err)), exit_code(err))
    job = of_ended(args)
    if job is None:
        raise err
    print_answer(args.json, {**(job.status or {}), "ended": job.to_json()}, _screen, job)
    return DONE


class Past(NamedTuple):
    """What is left of one of several jobs that does not answer."""

    json: dict[str, Any]  #: What a line of JSON has instead of, or beside, the answer.
    line: Callable[[], str]
    #: Whether it ended in an orderly way or was cleaned up, which is an answer; else it is dead or silent.
    is_ended: bool


def one_of_many(name: str, err: ControlError) -> Past | None:
    """Return what is left of a job of this host that does not answer; ``None`` if nothing is."""
    last = None if isinstance(err, NoSuchJob) else last_status.read(jobs_dir(), name)
    if last is not None:
        was = was_last(last, err)
        return Past({"last_status": last_known(last)}, lambda: output.status_line(name, last.status, was), False)
    job = ended.find(jobs_dir(), name)
    if job is None:
        return None
    known = {**(job.status or {}), "global_step": job.global_step}
    told = {"result": {**(job.status or {}), "ended": job.to_json()}}
    return Past(told, lambda: output.status_line(name, known, past(job)), True)


def last_known(last: last_status.LastStatus) -> dict[str, Any]:
    """Return what a job wrote last, with the time of that."""
    return {**last.status, "last_known_at": last.written_at}


def was_last(last: last_status.LastStatus, err: ControlError) -> str:
    """Say what became of a job that does not answer, and what it was doing when it wrote its status."""
    now = "is dead" if isinstance(err, JobDead) else "does not answer"
    return f"{now}; it was {last.status.get('status')} {output.duration(last.age)} ago"


def _screen(job: EndedJob) -> str:
    if job.status is None:
        shown = output.safe(f"{job.job_id}  {past(job)}")
    else:
        shown = output.status_screen(job.status, terminal.has_unicode(), past(job))
    saved = "" if job.checkpoint is None else f"last checkpoint: {job.checkpoint}"
    return "\n".join(line for line in (shown, output.safe(saved)) if line)
