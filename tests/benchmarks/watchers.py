"""What ``watch`` takes from a job that does 100 steps a second, and how soon a step is seen.

The watchers are the followers behind the screen of ``watch``: each subscribes to all events, and asks for the status
and the curves every few seconds. One of them is timed: how long after its end each step is known to it, by its own
number or a later one. The job has one processor, all watchers share the other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import job
from host import CLIENT_CPU, SERVER_CPU, Host, pinned, rate
from rows import Aim, Samples, Table

from forgather_control.client import target
from forgather_control.client.following import Follower

WATCHERS = (0, 1, 20)
#: Seconds until all watchers are connected, and of each measurement.
BEGIN, MEASURED = 2.0, 10.0
#: Per cent of a core that training pays, and seconds until a step is seen: events come at most five times a second.
PAYS, SEEN = Aim(5.0), Aim(0.2)


@contextmanager
def watching(count: int) -> Iterator[list[tuple[Follower, threading.Event]]]:
    """Run so many watchers, each with the event that it sets after a change."""
    events = [threading.Event() for _ in range(count)]
    found = [(Follower(lambda: target.resolve("bench"), changed).start(), changed) for changed in events]
    try:
        yield found
    finally:
        for follower, _ in found:
            follower.stop()


def delays(host: Host, watcher: Follower, changed: threading.Event) -> Iterator[float]:
    """Yield, for a while, how many seconds after its end the watcher knew each step."""
    end, last = time.perf_counter() + MEASURED, watcher.status["global_step"]
    while time.perf_counter() < end:
        changed.wait(1.0)
        changed.clear()
        now, step = time.perf_counter(), watcher.status["global_step"]
        for number in range(last + 1, step + 1):
            yield now - host.ended_at(number)
        last = step


def watched(table: Table, count: int) -> None:
    """Measure one job with so many watchers."""
    seen: list[float] = []
    with pinned(CLIENT_CPU), Host("paced", "ours", cpu=SERVER_CPU) as host, watching(count) as watchers:
        time.sleep(BEGIN)
        use, steps = host.use(), host.steps()
        if watchers:
            seen += delays(host, *watchers[0])
        else:
            time.sleep(MEASURED)
        (share, wakes), done = host.use().since(use), rate(steps, host.steps())
    table.group(f"{count or 'no'} watcher{'s' * (count != 1)}, {job.PACE} steps a second")
    table.figure("steps done", done, "a second")
    table.figure("the server's thread: processor time", share, "% of a core", PAYS)
    table.figure("the server's thread: wake-ups", wakes, "a second")
    if seen:
        table.samples("until a step is seen", Samples([seen]), "s", SEEN)


def measure() -> Iterator[Table]:
    """Yield one table."""
    table = Table("watchers")
    for count in WATCHERS:
        watched(table, count)
    yield table
