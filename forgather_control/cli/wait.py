"""The verb ``wait``: return when a condition on a job holds, with an exit code that scripts can test."""

from __future__ import annotations

import argparse

from ..client import target
from ..client.waiting import Waiter, of_ended, parse
from ..errors import NoSuchJob
from . import exit_codes, status
from .terminal import complain, print_answer


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    condition = parse(args.until)
    try:
        where = target.resolve(args.job, args.connect, args.token, args.ssh)
        job, outcome = where.name, Waiter(where, condition).wait(args.timeout)
    except NoSuchJob:
        past = status.of_ended(args)
        if past is None:
            raise
        job, outcome = past.job_id, of_ended(past, condition)
    at = "" if outcome.step is None else f" at step {outcome.step}"
    ends = {"ended": "has ended", "dead": "died"}
    told = {"job_id": job, "until": args.until, **outcome._asdict()}
    if outcome.holds:
        text = f"{job}: {args.until}{at}"
        print_answer(args.json, told, str, text)
        return exit_codes.DONE
    print_answer(args.json, told, str, "") if args.json else None
    complain(f"{job} {ends[outcome.state]}{at}, and {args.until} did not hold")
    return exit_codes.REFUSED if outcome.state == "ended" else exit_codes.NO_ANSWER
