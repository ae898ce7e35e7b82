"""The controlled process: one of three loads on its main thread, with any of the servers.

Started by ``host``, which says as JSON what it is to be. ``board`` is a file of a few doubles that both map: so steps
are counted, and the loop is told what to do, without another thread in this process.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import others

#: Places on the board: steps done, the longest time between two (seconds), end now, pause, whether to be controlled,
#: and from ``ENDS`` on when each of the last ``KEPT`` steps has ended.
STEPS, GAP, END, PAUSE, PRESENT, ENDS = range(6)
KEPT = 1000
BOARD = (ENDS + KEPT) * 8
#: Descriptors for 1,000 connections and more, where the limit is the usual 1,024.
FILES = 8192
#: Steps between two calls of ``log``.
LOGS_EVERY = 10
#: Steps a second of the load that waits between two.
PACE = 100
METRICS = {"loss": 2.3026, "grad_norm": 1.25, "learning_rate": 5e-05, "epoch_loss": 2.41, "tokens": 1048576, "lr": 5e-5}


def nothing() -> None:
    """A main thread that waits in the kernel."""


def python_step() -> Callable[[], Any]:
    """Return a step of about 2 ms of bytecode that never releases the interpreter lock by itself."""

    def step() -> int:
        total = 0
        for number in range(40_000):
            total += number & 7
        return total

    return step


def paced_step() -> Callable[[], Any]:
    """Return a step of bytecode that is then over ten milliseconds after the one before: so a fifth of a core."""
    work, due = python_step(), time.perf_counter()

    def step() -> None:
        nonlocal due
        work()
        due = max(due + 1 / PACE, time.perf_counter())
        time.sleep(due - time.perf_counter() if due > time.perf_counter() else 0)

    return step


def torch_step() -> Callable[[], Any]:
    """Forward, backward and update of a small perceptron, on one thread."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = [torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 512)]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    inputs, targets = torch.randn(64, 512), torch.randn(64, 512)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()

    return step


LOADS: dict[str, Callable[[], Callable[[], Any] | None]] = {
    "idle": lambda: None,
    "python": python_step,
    "paced": paced_step,
    "torch": torch_step,
}


def threads() -> set[int]:
    """Return the thread ids of this process."""
    return {int(name) for name in os.listdir("/proc/self/task")}


class Servers:
    """The servers that are wanted, with the threads that each added."""

    def __init__(self, wanted: dict[str, Any]) -> None:
        self.threads: dict[str, list[int]] = {}
        self.places: dict[str, str] = {}
        self.job: Any = None
        status: dict[str, Any] = dict(METRICS, job_id="bench")
        if "ours" in wanted["servers"]:
            status = self._start("ours", lambda: self._ours(wanted))
        for name, serve in others.SERVERS.items():
            if name in wanted["servers"]:
                self.places[name] = self._start(name, lambda: serve(wanted["directory"], status))  # noqa: B023  now

    def _start(self, name: str, start: Callable[[], Any]) -> Any:
        before = threads()
        found = start()
        self.threads[name] = sorted(threads() - before)
        return found

    def _ours(self, wanted: dict[str, Any]) -> Any:
        from forgather_control import connect
        from forgather_control.server import limits

        if wanted["share"]:
            limits.CPU_SHARE = limits.CPU_BURST = wanted["share"]
        self.begin()
        self.job.log(**METRICS)
        self.job.step(1)
        with connect("bench") as client:
            return client.call("status")

    def begin(self) -> None:
        """Start to control the job."""
        from forgather_control import TrainingJob

        self.job = TrainingJob("bench", max_steps=10**9, quiet=True)
        self.job.__enter__()

    def end(self) -> None:
        """End the control of the job."""
        if self.job is not None:
            self.job.__exit__(None, None, None)
        self.job = None


def train(step: Callable[[], Any], servers: Servers, board: memoryview) -> None:
    """The loop; without ``PRESENT`` it continues uncontrolled."""
    number, last, present = 1, time.perf_counter(), board[PRESENT]
    while not board[END]:
        step()
        number += 1
        if servers.job is not None:
            servers.job.step(number)
            if number % LOGS_EVERY == 0:
                servers.job.log(loss=1.0 / number)
        now = board[ENDS + number % KEPT] = time.perf_counter()
        board[STEPS] = number
        if now - last > board[GAP]:
            board[GAP] = now - last
        last = now
        while board[PAUSE] and not board[END]:
            time.sleep(0.01)
            last = time.perf_counter()
        if board[PRESENT] != present:
            present = board[PRESENT]
            (servers.begin if present else servers.end)()
            last = time.perf_counter()


def allow_files() -> None:
    """Raise this process's limit of open files as far as allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < enough:
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))


def main() -> None:
    wanted = json.loads(sys.argv[1])
    allow_files()
    if wanted["cpu"] is not None:
        os.sched_setaffinity(0, {wanted["cpu"]})
    with open(wanted["board"], "r+b") as file:
        board = memoryview(mmap.mmap(file.fileno(), BOARD)).cast("d")
    step = LOADS[wanted["load"]]()
    for _ in range(3):  # torch makes its threads at the first backward
        (step or nothing)()
    servers = Servers(wanted)
    board[PRESENT] = servers.job is not None
    print(json.dumps({"threads": servers.threads, "places": servers.places}), flush=True)
    if step is None:
        sys.stdin.read()
    else:
        train(step, servers, board)
    servers.end()


if __name__ == "__main__":
    main()
