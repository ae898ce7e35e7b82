"""What control takes from a training loop: without clients, polled, flooded.

Processor time and wake-ups are those of the server's own threads, as the kernel counts them. A wake-up is a voluntary
context switch; where the main thread runs Python, each wait for the interpreter lock is one, too. Steps a second stand
beside them, as pairs of a while with and a while without, in random order; "nothing" is the same pair with nothing in
it, and shows how far such ratios can be trusted. The job is pinned to one processor, its clients to the other.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import flood
from host import CLIENT_CPU, SERVER_CPU, Host, pinned, rate
from round_trip import HTTP, MINIMAL, PING, PLAIN, everything, variants
from rows import Aim, Samples, Table

from forgather_control import connect, get_job_status
from forgather_control.server import limits

LOADS = ("python", "torch")
#: Seconds without a client.
UNASKED = 20.0
#: Seconds of each way of asking ten times a second.
BESIDE = 5.0
#: Name, calls a second (0: none, ``None``: one after the other), seconds of one half of a pair, pairs.
PACES = (("nothing", 0, 0.5, 7), ("1 Hz", 1, 1.0, 4), ("10 Hz", 10, 1.0, 4), ("100 Hz", 100, 0.5, 7))
FLAT_OUT = ("flat out, 1 client", None, 1.0, 3)
#: Pairs of controlled and not controlled at all, and seconds of each half.
ABSENT = (6, 0.5)
#: Seconds before a flood, and of it; seconds at most until the budget has nothing saved up any more.
QUIET, FLOODED, PATIENCE = 0.7, 4.0, 5.0
#: An ordinary caller's period, and how soon it is to be answered.
EVERY, WITHIN = 0.2, 1.0

#: What the budget lets through at once, and a tenth of its savings, may fall into the window or not: % of a core.
EDGE = (limits.CPU_SLICE + limits.CPU_BURST / 10) / FLOODED * 100

CORE, WAKES = "% of a core", "a second"


# Unasked...


def unasked(table: Table) -> None:
    """Measure jobs of all kinds side by side without clients; the other servers only in idle ones."""
    jobs = [("idle", "ours", None), ("python", "ours", SERVER_CPU), ("torch", "ours", CLIENT_CPU)]
    jobs += [("idle", "minimal", None), ("idle", "http", None)]
    with ExitStack() as stack:
        hosts = [stack.enter_context(Host(load, whose, cpu=cpu)) for load, whose, cpu in jobs]
        time.sleep(1.0)
        before = [host.use(whose) for host, (_, whose, _) in zip(hosts, jobs, strict=True)]
        time.sleep(UNASKED)
        after = [host.use(whose) for host, (_, whose, _) in zip(hosts, jobs, strict=True)]
    table.group("present and unasked: the server's threads")
    for (load, whose, _), early, late in zip(jobs, before, after, strict=True):
        share, wakes = late.since(early)
        name = {"ours": "ours", "minimal": "(b) socketserver", "http": "(c) aiohttp"}[whose]
        is_ours, edge = whose == "ours", 1 / UNASKED
        table.figure(f"{name}, main thread {load}: wake-ups", wakes, WAKES, Aim(0.5, slack=edge) if is_ours else None)
        table.figure(f"{name}, main thread {load}: processor time", share, CORE, Aim(0.01) if is_ours else None)


# Polled...


def beside(table: Table) -> None:
    """Measure what an idle process spends at 10 Hz, more than without clients, with each server."""
    spent = {}
    with pinned(CLIENT_CPU), everything("idle") as host, variants(host) as ways:
        calls = {"nothing": lambda: None, **{name: ways[name] for name in (PING, MINIMAL, HTTP, PLAIN)}}
        for name, call in calls.items():
            before = host.cpu_seconds()
            poll(call, 10, BESIDE)
            spent[name] = (host.cpu_seconds() - before) / BESIDE * 100
    table.group("10 Hz, main thread idle: the process, over what it spends unasked")
    for name in (PING, MINIMAL, HTTP, PLAIN):
        table.figure(f"{name}: processor time", spent[name] - spent["nothing"], CORE)


def poll(call: Callable[[], Any], hz: float | None, seconds: float) -> int:
    """Send requests for so long; return how many."""
    end, due, calls = time.perf_counter() + seconds, time.perf_counter(), 0
    while (now := time.perf_counter()) < end:
        if hz == 0 or (hz is not None and now < due):
            time.sleep(min(end, due if hz else end) - now)
            continue
        due += 1 / hz if hz else 0.0
        call()
        calls += 1
    return calls


class Pairs:
    """Measurements in pairs: a while with, and a while without."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.share: list[float] = []
        self.wakes: list[float] = []
        self.calls: list[float] = []

    def one(self, host: Host, with_it: Callable[[], float], seconds: float) -> None:
        """Measure one pair, in random order."""
        rates = {}
        for is_on in random.sample((True, False), 2):
            steps, use, begin = host.steps(), host.use(), time.perf_counter()
            if is_on:
                calls = with_it()
                share, wakes = host.use().since(use)
                self.share.append(share)
                self.wakes.append(wakes)
                self.calls.append(calls / (time.perf_counter() - begin))
            else:
                time.sleep(seconds)
            rates[is_on] = rate(steps, host.steps())
        self.steps.append(rates[True] / rates[False])


def polled(table: Table, host: Host, load: str) -> None:
    """Measure one client on one connection, at several rates."""
    found: dict[str, Pairs] = {}
    with connect("bench") as client:
        for name, hz, seconds, pairs in (*PACES, FLAT_OUT):
            found[name] = Pairs()
            for _ in range(pairs):
                found[name].one(host, lambda: poll(lambda: client.call("status"), hz, seconds), seconds)  # noqa: B023
    table.group(f"polled, main thread {load}; flat out with what the budget had saved up")
    for name, pairs in found.items():
        aim = Aim(0.2) if name == "10 Hz" else None
        table.figure(f"{name}: processor time", statistics.mean(pairs.share), CORE, aim, count=len(pairs.share))
        table.figure(f"{name}: wake-ups", statistics.mean(pairs.wakes), WAKES)
        if pairs.calls and statistics.mean(pairs.calls):
            table.figure(f"{name}: answered", statistics.mean(pairs.calls), "calls a second")
        _steps(table, f"{name}: steps a second, with over without", pairs.steps)


def _steps(table: Table, name: str, ratios: list[float]) -> None:
    table.samples(name, Samples([ratios]), "x")


def absent(table: Table, host: Host, load: str) -> None:
    """Measure the speed of the same process, controlled over uncontrolled."""
    ratios = []
    for _ in range(ABSENT[0]):
        rates = {}
        for present in random.sample((True, False), 2):
            host.be_present(present)
            steps = host.steps()
            time.sleep(ABSENT[1])
            rates[present] = rate(steps, host.steps())
        ratios.append(rates[True] / rates[False])
    host.be_present(True)
    table.group(f"present, main thread {load}")
    _steps(table, "steps a second, controlled over not controlled", ratios)


# Flooded...


@contextmanager
def flooding(host: Host, kind: str) -> Iterator[None]:
    """Run processes that send requests as fast as they can."""
    kinds = flood.KINDS[kind]
    command = [sys.executable, flood.__file__, host.socket, kind]
    processes = [subprocess.Popen(command) for _ in range(kinds.processes)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def drain(host: Host) -> None:
    """Wait until the flood has used up what the budget had saved."""
    begin = now = host.use()
    while now.at - begin.at < PATIENCE:
        time.sleep(0.02)
        now = host.use()
        if now.seconds - begin.seconds >= 0.9 * limits.CPU_BURST + limits.CPU_SHARE * (now.at - begin.at):
            return


class Caller:
    """A client outside of the flood: it sends requests on a kept connection and on new ones."""

    def __init__(self) -> None:
        self.kept: list[float] = []
        self.anew: list[float] = []

    def ask(self, client: Any, seconds: float) -> None:
        """Send requests at its period for so long."""
        end = time.perf_counter() + seconds
        while (due := time.perf_counter()) < end:
            for times, call in (
                (self.kept, lambda: client.call("status")),
                (self.anew, lambda: get_job_status("bench")),
            ):
                begin = time.perf_counter()
                call()
                times.append((time.perf_counter() - begin) * 1e3)
            time.sleep(max(0.0, due + EVERY - time.perf_counter()))


def flooded(table: Table, host: Host, load: str, kind: str) -> None:
    """Measure what a flood takes once the budget's savings are used up, and how soon an ordinary client is answered."""
    caller = Caller()
    with connect("bench") as client:
        steps = host.steps()
        time.sleep(QUIET)
        quiet = rate(steps, host.steps())
        with flooding(host, kind):
            with flooding(host, "many"):
                drain(host)
            steps, use = host.steps(), host.use()
            caller.ask(client, FLOODED)
            during, (share, wakes) = rate(steps, host.steps()), host.use().since(use)
    table.group(f"flood, main thread {load}: {flood.KINDS[kind].about}")
    table.figure("processor time", share, CORE, Aim(5.0, slack=EDGE))
    table.figure("wake-ups", wakes, WAKES)
    table.figure("steps a second, meanwhile over before", during / quiet, "x")
    for name, times in (("its kept connection", caller.kept), ("a new connection", caller.anew)):
        table.samples(f"an ordinary caller, {name}", Samples([times]), "ms")
        table.figure(f"an ordinary caller, {name}: the slowest", max(times), "ms", Aim(WITHIN * 1e3))


def measure() -> Iterator[Table]:
    """Yield two tables: without clients and polled, flooded."""
    table, floods = Table("training"), Table("training, flooded")
    with pinned(CLIENT_CPU):
        unasked(table)
    beside(table)
    for load in LOADS:
        with pinned(CLIENT_CPU), Host(load, "ours", cpu=SERVER_CPU) as host:
            polled(table, host, load)
            for kind in flood.KINDS:
                flooded(floods, host, load, kind)
            absent(table, host, load)
    yield table
    yield floods
