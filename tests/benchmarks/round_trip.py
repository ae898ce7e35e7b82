"""How long ``status`` takes there and back: ours beside (a) a bare ping, (b) a minimal socketserver, (c) aiohttp and
``requests``, which all stand in one job process, whose main thread idles, runs Python, or trains with torch.

Back to back, the job is held on one processor and the client on the other ("split" in anchors/perf.md: unpinned, the
scheduler moves a ping between 10 and 80 us). Each round has a few calls of each variant in turn, and lasts as long as
our server's budget needs to fill again: so these are the calls of a person or a script, not of a flood; the rows that
say "budget lifted" have ``limits.CPU_SHARE`` at a whole core and no such pauses. Paced at 20 Hz nothing is pinned.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import requests
from host import CLIENT_CPU, SERVER_CPU, Host, pinned
from others import Kept, ping_anew, status_anew
from rows import Aim, Rounds, Table, in_turns, seconds

from forgather_control import Client, connect, get_job_status
from forgather_control.client.target import Target
from forgather_control.wire.addresses import UnixEndpoint

LOADS = ("idle", "python", "torch")
#: Rounds, calls of each variant in one, seconds that one lasts at least, by load.
BACK_TO_BACK = {"idle": (60, 8, 0.25), "python": (12, 10, 0.0), "torch": (40, 8, 0.25)}
LIFTED = (15, 100)
#: Paced: rounds, and calls of each variant in one.
PACED = (2, 20)
PERIOD = 1 / 20

PING, PING_NEW = "(a) ping, kept", "(a) ping, new connection"
MINIMAL, MINIMAL_NEW = "(b) socketserver, kept", "(b) socketserver, new connection"
HTTP, HTTP_NEW = "(c) aiohttp + requests, Session", "(c) aiohttp + requests, fresh"
OURS, OURS_NEW = "ours, kept", "ours, new connection"
PLAIN, FOUND = "ours, kept, asked by (b)'s client", "ours, get_job_status(id)"


@contextmanager
def variants(host: Host) -> Iterator[dict[str, Callable[[], Any]]]:
    """Return a call of each variant, with the connections that they keep open."""

    def ours_anew() -> Any:
        with Client(Target("bench", endpoint=UnixEndpoint(host.socket))) as client:
            return client.call("status")

    with ExitStack() as stack:
        ping = Kept(host.places["ping"] + "-kept")
        minimal, plain = Kept(host.places["minimal"]), Kept(host.socket)
        for kept in (ping, minimal, plain):
            stack.callback(kept.close)
        ours, session = stack.enter_context(connect("bench")), stack.enter_context(requests.Session())
        yield {
            PING: ping.ping,
            PING_NEW: lambda: ping_anew(host.places["ping"] + "-new"),
            MINIMAL: minimal.status,
            MINIMAL_NEW: lambda: status_anew(host.places["minimal"]),
            HTTP: lambda: session.get(host.places["http"], timeout=30).json(),
            HTTP_NEW: lambda: requests.get(host.places["http"], timeout=30).json(),
            PLAIN: plain.status,
            OURS: lambda: ours.call("status"),
            OURS_NEW: ours_anew,
            FOUND: lambda: get_job_status("bench"),
        }


def check(calls: dict[str, Callable[[], Any]]) -> None:
    """Assert that all answer the same."""
    members = [set(calls[name]()) for name in (MINIMAL, MINIMAL_NEW, HTTP, HTTP_NEW, OURS, OURS_NEW, PLAIN, FOUND)]
    assert all(each == members[0] for each in members), members


def everything(load: str, share: float | None = None) -> Host:
    """Start a job with all servers."""
    return Host(load, "ours", "ping", "minimal", "http", cpu=SERVER_CPU, share=share)


def back_to_back(table: Table, load: str) -> None:
    """Measure calls one after the other, within the budget."""
    rounds, calls, pause = BACK_TO_BACK[load]
    with pinned(CLIENT_CPU), everything(load) as host, variants(host) as ways:
        check(ways)
        found = in_turns(ways, rounds, calls, pause)
    table.group(f"main thread: {load}")
    report(table, load, found)


def lifted(table: Table) -> None:
    """Measure the pure cost, with the budget lifted, and the processor time of a call in the job's process."""
    with pinned(CLIENT_CPU), everything("idle", share=1.0) as host, variants(host) as ways:
        ways = {name: ways[name] for name in (MINIMAL, MINIMAL_NEW, HTTP, HTTP_NEW, PLAIN, OURS, OURS_NEW)}
        times, work = Rounds(), Rounds()
        for number in range(LIFTED[0] + 1):
            for name, call in ways.items():
                spent = host.cpu_seconds()
                values = [seconds(call) * 1e6 for _ in range(LIFTED[1])]
                if number:
                    times[name].add(values)
                    work[name].add([(host.cpu_seconds() - spent) * 1e6 / LIFTED[1]])
    table.group("main thread: idle; our budget lifted")
    report(table, "lifted", times)
    table.group("the same, processor time in the job's process")
    report(table, "lifted", work)


def paced(table: Table, load: str) -> None:
    """Measure twenty calls per second of each variant in turns, nothing pinned."""
    found = Rounds()
    with Host(load, "ours", "ping", "minimal", "http") as host, variants(host) as ways:
        del ways[PLAIN]
        for _ in range(PACED[0]):
            for name, call in ways.items():
                found[name].add(at_pace(call, PACED[1]))
    table.group(f"main thread: {load}")
    report(table, f"{load}, paced", found)


def at_pace(call: Callable[[], Any], calls: int) -> Iterator[float]:
    """Return the microseconds of each call; a late call does not hurry the next one."""
    due = time.perf_counter()
    for _ in range(calls):
        time.sleep(max(0.0, due - time.perf_counter()))
        due = max(due + PERIOD, time.perf_counter())
        yield seconds(call) * 1e6


def report(table: Table, load: str, found: Rounds) -> None:
    """Add the rows of one load."""
    for name, samples in found.items():
        table.samples(name, samples, "us")
        for than, aim, faster in comparisons(name, load):
            if than in found:
                table.compare(name, than, aim, faster)


def comparisons(name: str, load: str) -> list[tuple[str, Aim | None, bool]]:
    """With what a row of ours is compared, and what is aimed at: with an idle main thread by calls back to back, with
    a pure-Python one always. There the ping takes one wait for the interpreter lock, and two would be twice that.
    """
    idle = load == "idle"
    one_wait = Aim(1.5) if load.startswith("python") else None
    if name in (OURS, PLAIN):
        beside_b = Aim(1.3) if idle and name == OURS else None
        return [(PING, one_wait, False), (MINIMAL, beside_b, False), (HTTP, Aim(5, True) if idle else None, True)]
    if name in (OURS_NEW, FOUND):
        beside_kept = Aim(1.5) if idle and name == OURS_NEW else None
        ways = [(PING, one_wait, False), (OURS, beside_kept, False), (MINIMAL_NEW, None, False)]
        return [*ways, (HTTP_NEW, Aim(4, True) if idle else None, True)]
    return []


def measure() -> Iterator[Table]:
    """Yield two tables: back to back, and paced."""
    table = Table("round trip of status")
    for load in LOADS:
        back_to_back(table, load)
    lifted(table)
    yield table
    table = Table("round trip of status, paced at 20 Hz")
    for load in LOADS:
        paced(table, load)
    yield table
