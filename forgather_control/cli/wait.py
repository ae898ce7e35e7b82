"""The verb ``wait``: return when a condition on a job holds, with an exit code that scripts can test."""

from __future__ import annotations

import argparse

from ..client import target
from ..client.waiting import Waiter, parse
from . import exit_codes
from .terminal import complain, print_answer


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    where = target.resolve(args.job, args.connect, args.token, args.ssh)
    outcome = Waiter(where, parse(args.until)).wait(args.timeout)
    at = "" if outcome.step is None else f" at step {outcome.step}"
    ends = {"ended": "has ended", "dead": "died"}
    told = {"job_id": where.name, "until": args.until, **outcome._asdict()}
    if outcome.holds:
        text = f"{where.name}: {args.until}{at}"
        print_answer(args.json, told, str, text)
        return exit_codes.DONE
    print_answer(args.json, told, str, "") if args.json else None
    complain(f"{where.name} {ends[outcome.state]}{at}, and {args.until} did not hold")
    return exit_codes.REFUSED if outcome.state == "ended" else exit_codes.NO_ANSWER
