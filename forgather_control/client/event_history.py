"""The events of a job so far: first those that it has written, then those that it still remembers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from ..errors import FindError, InternalError, InvalidRequest
from ..jobs import ended, event_log
from ..jobs.ended import EndedJob
from ..jobs.record import jobs_dir
from .connection import Client
from .reading import reading
from .target import Target

Event = dict[str, Any]


def written(where: Target) -> list[Event]:
    """Return what a job of this host, or of a file system that is shared with it, has written, oldest first.

    Raises:
        OSError, ValueError: it cannot be read.
    """
    return [] if where.record is None else event_log.read(f"{jobs_dir()}/{where.record.job_id}")


def of_ended(job: EndedJob) -> list[Event]:
    """Return the events that are kept of a run that has ended; OSError, ValueError: they cannot be read."""
    return ended.read_events(jobs_dir(), job)


def live(where: Target, since: int, follow: bool = False) -> Iterator[Event]:
    """Yield the events after the number ``since``: those so far, or all until the job ends."""
    with Client(where) as job, reading():
        last = job.call("subscribe", kinds=["ended"])["next"] - 1
        if not follow and since >= last:
            return
        for event in job.events(since=since, kinds=event_log.LOGGED if follow else None):
            if not event_log.is_event(event):
                raise InternalError("the other side sent an event without a number or a time")
            yield event
            if not follow and event["seq"] >= last:
                return


def so_far(where: Target) -> list[Event]:
    """Return all events that are known of a job of this jobs directory, without those that are sampled.

    Raises:
        FindError, InvalidRequest: it does not answer, or is controlled by files, and has written none.
    """
    found: list[Event] = []
    with suppress(OSError, ValueError):  # the job itself knows the last ones
        found = written(where)
    try:
        rest = [*live(where, found[-1]["seq"] if found else 0)]
    except (FindError, InvalidRequest):
        if not found:
            raise
        return found
    return [*found, *(event for event in rest if event["kind"] in event_log.LOGGED)]
