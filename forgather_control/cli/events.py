"""The verb ``events``: the event log of a job, live or ended, and on request what happens from now on."""

import argparse
import time
from collections.abc import Iterable
from typing import Any

from ..client import event_history, past, target
from ..client.target import Target
from ..errors import InvalidRequest, NoSuchJob
from ..jobs import event_log
from . import event_output, status
from .exit_codes import DONE, INTERRUPTED
from .terminal import complain, print_answer


def run(args: argparse.Namespace) -> int:
    """Run the verb; return its exit code."""
    log = _Printer(args.json, None if args.since is None else time.time() - args.since)
    try:
        where = target.resolve(args.job, args.connect, args.token, args.ssh)
    except NoSuchJob:
        job = status.of_ended(args)
        if job is None:
            raise
        try:
            log.show(event_history.of_ended(job))
        except (OSError, ValueError) as err:
            return complain(f"the events of {job.job_id} cannot be read: {err}", 1)
        return complain(f"{job.job_id} {status.ending(job)}")
    _show_file(args, where, log)
    try:
        log.show(event_history.live(where, log.seq, args.follow))
    except NoSuchJob as err:
        if not status.is_not_live_there(args, err):
            raise
        events, complaints = past.events_over_ssh(args.ssh, args.job)
        log.show(events)
        for line in complaints:
            complain(line)
    except InvalidRequest:  # control by file cannot send events, and the file had them
        if args.follow or log.seq == 0:
            raise
    except KeyboardInterrupt:
        if not args.follow:
            raise
        return INTERRUPTED
    return DONE


class _Printer:
    """Prints events once each, those since a moment."""

    def __init__(self, as_json: bool, since: float | None) -> None:
        self._as_json, self._since = as_json, since
        self.seq = 0  #: The number of the last one.

    def show(self, events: Iterable[dict[str, Any]]) -> None:
        for event in events:
            self.seq = max(self.seq, event["seq"])
            is_young = self._since is None or event["time"] >= self._since
            if event["kind"] in event_log.LOGGED and is_young:
                print_answer(self._as_json, event, event_output.line, event)


def _show_file(args: argparse.Namespace, where: Target, log: _Printer) -> None:
    """Show what the job has written: more than it remembers."""
    if args.ssh is not None or args.connect is not None:
        return
    try:
        log.show(event_history.written(where))
    except (OSError, ValueError) as err:
        complain(f"the event log of {where.name} cannot be read: {err}")
