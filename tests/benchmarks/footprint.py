"""What control costs while it is idle: a step, a log, memory, threads, and connections open and closed.

Closing 1,000 connections at once, as when a dashboard dies, is where a thread a connection stops training: all of them
wake, and wait for the interpreter. Steps are counted from the first hang-up until the job has closed its last end.
"""

from __future__ import annotations

import itertools
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import grow
from host import CLIENT_CPU, SERVER_CPU, Host, pinned, rate
from job import allow_files
from others import Kept, connected, status_anew
from rows import Aim, Rounds, Samples, Table, each_of, seconds

from forgather_control import TrainerControlCallback, TrainingJob, connect
from forgather_control.training.limits import MAX_NAMES
from forgather_control.training.metrics_history import MetricsHistory

#: Rounds, and calls of each variant in one.
ROUNDS, CALLS = 40, 3_000
#: The Trainer passes these to each hook, and passing them is part of what a hook costs.
EXTRA = dict.fromkeys(("model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader"))
#: Processes of each kind whose growth is measured.
GROWN = 3
CONNECTIONS = (200, 1000)
#: How often 1,000 are closed at once, seconds looked at before, and at most until the last has gone.
TRIALS, BEFORE, PATIENCE = 3, 0.7, 30.0
SERVERS = {"ours": "ours", "(b) socketserver": "minimal", "(c) aiohttp": "http"}
MB, KB, MIB = 1e6, 1e3, 1 << 20
#: How often all metrics are logged, and what their history may take.
LOGS, ONE = (112, 2_000), Aim(1.0)


# A step...


def empty(**_: Any) -> None:
    """An empty hook, to subtract the cost of a call."""


def hooks(table: Table) -> None:
    """Measure steps with nothing pending, in turns."""
    callback = TrainerControlCallback("hf")
    state = SimpleNamespace(global_step=5, max_steps=1000, epoch=0.5)
    control = SimpleNamespace(should_save=False, should_evaluate=False, should_training_stop=False)
    callback.on_train_begin(SimpleNamespace(save_strategy="no"), state, control, **EXTRA)
    with TrainingJob("plain", max_steps=1000) as job, TrainingJob("full") as full, TrainingJob("ruled") as ruled:
        register(full, "step >= 1000000000")
        register(ruled, *[f"loss > {number} for 3" for number in range(10, 20)])
        variants = {
            "empty call": lambda: empty(),
            "empty hook with the Trainer's arguments": lambda: empty(args=None, state=state, control=control, **EXTRA),
            "TrainingJob.step": lambda: job.step(5),
            "TrainerControlCallback.on_step_end": lambda: step_end(callback, state, control),
            "TrainingJob.step with a setting, a command and a rule": lambda: full.step(5),
            "TrainingJob.log of two floats": lambda: job.log(loss=0.5, rate=1e-3),
            "TrainingJob.log beside ten rules": lambda: ruled.log(loss=0.5, rate=1e-3),
        }
        found = timed(variants)
    callback.on_train_end(None, state, control, **EXTRA)
    table.group("a step with nothing pending, and a log")
    for name, samples in found.items():
        table.samples(name, samples, "us")
    for name, most in OVER_AN_EMPTY_CALL.items():
        table.samples(f"{name}, over an empty call", minus(found[name], found["empty call"]), "us", Aim(most))


#: Microseconds that a call may cost.
OVER_AN_EMPTY_CALL = {
    "TrainingJob.step": 2.0,
    "TrainerControlCallback.on_step_end": 2.0,
    "TrainingJob.step with a setting, a command and a rule": 2.0,
    "TrainingJob.log beside ten rules": 20.0,
}


def step_end(callback: TrainerControlCallback, state: SimpleNamespace, control: SimpleNamespace) -> None:
    """End a step that is new: a hook that is called twice for a step does nothing the second time."""
    state.global_step += 1
    callback.on_step_end(None, state, control, **EXTRA)


def register(job: TrainingJob, *conditions: str) -> None:
    """Give a run all that clients may use, before its first step."""
    job.setting("speed", get=lambda: 1.0, set=lambda value: None)
    job.command(empty_command)
    with connect(job.job_id) as client:
        for condition in conditions:
            client.call("add_rule", when=condition, do="save_checkpoint")


def empty_command() -> None:
    """A command of the script."""


def subscriber(table: Table) -> None:
    """The same steps and logs with and without a client that subscribes to all events."""
    with TrainingJob("events") as job:
        numbers = itertools.count(1)
        variants: dict[str, Callable[[], Any]] = {
            "a step": lambda: job.step(next(numbers)),
            "a log": lambda: job.log(loss=float(next(numbers))),
        }
        found = Rounds(), Rounds()
        for _ in range(TRIALS):  # in turns
            for subscribed in (False, True):
                with connected(os.path.join(os.environ["FORGATHER_JOBS_DIR"], job.job_id, "control.sock")) as sock:
                    if subscribed:
                        sock.sendall(b'{"jsonrpc": "2.0", "id": 1, "method": "subscribe"}\n')
                        sock.recv(4096)
                    for name, samples in timed(variants).items():
                        found[subscribed][name].rounds += samples.rounds
    table.group("new steps and logs, with and without a client that subscribes to all events")
    for name in variants:
        without, beside = f"{name}, no subscriber", f"{name}, one subscriber"
        table.samples(without, found[False][name], "us")
        table.samples(beside, found[True][name], "us")
        table.compare(beside, without)


def timed(variants: dict[str, Callable[[], Any]]) -> Rounds:
    """Return microseconds per call, the mean of each round."""
    found = Rounds()
    for number in range(ROUNDS + 1):
        for name, call in variants.items():
            value = each_of(call, CALLS) * 1e6
            if number:
                found[name].add([value])
    return found


def minus(one: Samples, other: Samples) -> Samples:
    """Return the difference of each round."""
    pairs = zip(one.rounds, other.rounds, strict=True)
    return Samples([statistics.median(mine) - statistics.median(its)] for mine, its in pairs)


# Memory...


def growth(table: Table) -> None:
    """Measure what the import and the start of a server add to a process, with torch loaded and without."""
    for kind, about in (("torch", "a process with torch"), ("bare", "a bare Python")):
        table.group(f"added to {about} by importing and starting")
        for name, server in SERVERS.items():
            grown = [_grown(kind, server) for _ in range(GROWN)]
            aim = Aim(2.0) if server == "ours" and kind == "torch" else None
            table.samples(f"{name}: memory by the import", Samples([[by[0] / MB for by in grown]]), "MB")
            table.samples(f"{name}: memory by import and start", Samples([[by[1] / MB for by in grown]]), "MB", aim)
            table.figure(f"{name}: threads", grown[0][2], "")
            table.figure(f"{name}: descriptors", grown[0][3], "")


def _grown(kind: str, server: str) -> list[int]:
    with tempfile.TemporaryDirectory(prefix="bench") as home:
        command = [sys.executable, grow.__file__, kind, server, home]
        env = {**os.environ, "FORGATHER_JOBS_DIR": os.path.join(home, "jobs")}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    return [int(word) for word in done.stdout.split()]


def history(table: Table) -> None:
    """Measure the history of metrics at its fullest, as Python counts what it allocates; the peak, while it halves."""
    table.group(f"the history of metrics, {MAX_NAMES} of them")
    for logs in LOGS:
        found, names = MetricsHistory(), [f"metric_{number:03}" for number in range(MAX_NAMES)]
        tracemalloc.start()
        for step in range(logs):
            found.log(step, dict.fromkeys(names, step + 0.5))
        size, peak = (figure / MIB for figure in tracemalloc.get_traced_memory())
        tracemalloc.stop()
        table.figure(f"logged {logs:,} times: memory", size, "MiB", ONE)
        table.figure(f"logged {logs:,} times: peak", peak, "MiB", ONE)


# Connections...


def place(host: Host) -> str:
    """Return the path of its only server's socket."""
    return host.places.get("minimal", host.socket)


def held(table: Table) -> None:
    """Measure the memory of open connections, and how soon a new one is answered beside them."""
    table.group("connections that stay open, main thread idle; our budget lifted while they come")
    for name, server in (("ours", "ours"), ("(b) socketserver", "minimal")):
        with Host("idle", server, cpu=SERVER_CPU, share=1.0) as host:
            status_anew(place(host))
            alone, threads = host.resident(), host.threads()
            kept: list[Kept] = []
            for count in CONNECTIONS:
                while len(kept) < count:
                    kept.append(Kept(place(host)))
                    kept[-1].status()
                size = (host.resident() - alone) / count / KB
                table.figure(f"{name}, {count:,} open: memory of each", size, "kB")
                table.figure(f"{name}, {count:,} open: threads added", host.threads() - threads, "")
                anew = Samples([[seconds(lambda: status_anew(place(host))) * 1e6 for _ in range(50)]])
                table.samples(f"{name}, {count:,} open: status on a new connection", anew, "us")
            for each in kept:
                each.close()


def closed(table: Table, load: str) -> None:
    """Close all at once, in two jobs, ours and (b)'s, of which only the measured one trains."""
    names = {"ours": "ours", "(b) socketserver": "minimal"}
    took, gaps, slowed = Rounds(), Rounds(), Rounds()
    hosts = {name: Host(load, server, cpu=SERVER_CPU) for name, server in names.items()}
    for host in hosts.values():
        host.pause(True)
    for _ in range(TRIALS):
        for name, host in hosts.items():
            seconds_taken, gap, ratio = hang_up(host)
            took[name].add([seconds_taken])
            gaps[name].add([gap * 1e3])
            slowed[name].add([ratio])
    for host in hosts.values():
        host.__exit__()
    table.group(f"{CONNECTIONS[-1]:,} connections closed at once, main thread {load}")
    for what, found, unit in (
        ("until all are closed", took, "s"),
        ("the longest time between two steps", gaps, "ms"),
        ("steps a second, meanwhile over before", slowed, "x"),
    ):
        for name in names:
            table.samples(f"{name}: {what}", found[name], unit)
        table.compare(f"ours: {what}", f"(b) socketserver: {what}")


def hang_up(host: Host) -> tuple[float, float, float]:
    """Return seconds until all are closed, the longest time between two steps, and the speed relative to before."""
    before = host.files()
    crowd = [connected(place(host)) for _ in range(CONNECTIONS[-1])]
    wait_for(lambda: host.files() >= before + len(crowd))  # while the loop stands still: it would take long
    host.pause(False)
    time.sleep(0.3)
    quiet = _rate_over(host, BEFORE)
    host.longest_gap()
    steps, begin = host.steps(), time.perf_counter()
    _close(crowd)
    wait_for(lambda: host.files() <= before)
    end, now = time.perf_counter(), host.steps()
    gap = max(host.longest_gap(), 0.0)
    host.pause(True)
    time.sleep(0.1)
    return end - begin, gap, rate(steps, now) / quiet


def _close(crowd: list[socket.socket]) -> None:
    for sock in crowd:
        sock.close()


def _rate_over(host: Host, seconds: float) -> float:
    steps = host.steps()
    time.sleep(seconds)
    return rate(steps, host.steps())


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until the condition is true, for PATIENCE seconds at most."""
    end = time.perf_counter() + PATIENCE
    while not condition() and time.perf_counter() < end:
        time.sleep(0.005)


def measure() -> Iterator[Table]:
    """Yield one table."""
    allow_files()
    table = Table("footprint")
    hooks(table)
    subscriber(table)
    growth(table)
    history(table)
    with pinned(CLIENT_CPU):
        held(table)
        for load in ("python", "torch"):
            closed(table, load)
    yield table
