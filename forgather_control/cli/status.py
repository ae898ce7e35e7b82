"""The verb ``status``: of a live job its answer; of one that does not answer, or has ended, what it wrote last."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

from ..client import past, target
from ..client.connection import Client
from ..errors import ControlError, JobDead, JobNotAnswering, NoSuchJob
from ..jobs.ended import EndedJob
from ..jobs.last_status import LastStatus
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
    return past.find_ended(args.job) if _is_here(args) else None


def _is_here(args: argparse.Namespace) -> bool:
    return args.ssh is None and args.connect is None


def is_not_live_there(args: argparse.Namespace, err: ControlError) -> bool:
    """Return whether JOB may have ended on the host that ssh reaches, so that what is left of it is there."""
    return args.ssh is not None and args.job is not None and isinstance(err, NoSuchJob)


def ending(job: EndedJob) -> str:
    """Say in a few words how and when a job has ended."""
    reason = f" ({job.reason})" if job.reason else ""
    return f"has ended: {job.how}{reason} at {output.moment(job.ended_at)}"


def _past(args: argparse.Namespace, err: ControlError) -> int:
    """Show what is left of a job that did not answer; raise the error if nothing is."""
    found: LastStatus | EndedJob | None = None
    if _is_here(args):
        found = past.find(args.job, err)
    elif is_not_live_there(args, err):
        found = past.find_ended_over_ssh(args.ssh, args.job)
    if found is None:
        raise err
    told = past.to_json(found, err)
    if isinstance(found, EndedJob):
        print_answer(args.json, told, _screen, found)
        return DONE
    was = was_last(found, err)
    print_answer(args.json, told, output.status_screen, found.status, terminal.has_unicode(), was)
    return complain(output.in_verbs(str(err)), exit_code(err))


class Past(NamedTuple):
    """What is left of one of several jobs that does not answer."""

    json: dict[str, Any]  #: What a line of JSON has instead of, or beside, the answer.
    line: Callable[[], str]
    #: Whether it ended in an orderly way or was cleaned up, which is an answer; else it is dead or silent.
    is_ended: bool


def one_of_many(name: str, err: ControlError) -> Past | None:
    """Return what is left of a job of this host that does not answer; ``None`` if nothing is."""
    found = past.find(name, err)
    if isinstance(found, EndedJob):
        known = {**(found.status or {}), "global_step": found.global_step}
        return Past({"result": past.to_json(found, err)}, lambda: output.status_line(name, known, ending(found)), True)
    if found is None:
        return None
    was = was_last(found, err)
    return Past({"last_status": past.last_known(found)}, lambda: output.status_line(name, found.status, was), False)


def was_last(last: LastStatus, err: ControlError) -> str:
    """Say what became of a job that does not answer, and what it was doing when it wrote its status."""
    now = "is dead" if isinstance(err, JobDead) else "does not answer"
    return f"{now}; it was {last.status.get('status')} {output.duration(last.age)} ago"


def _screen(job: EndedJob) -> str:
    if job.status is None:
        shown = output.safe(f"{job.job_id}  {ending(job)}")
    else:
        shown = output.status_screen(job.status, terminal.has_unicode(), ending(job))
    saved = "" if job.checkpoint is None else f"last checkpoint: {job.checkpoint}"
    return "\n".join(line for line in (shown, output.safe(saved)) if line)
