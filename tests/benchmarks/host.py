"""A job's process, started, measured from outside through /proc, and ended.

What a thread used of the processor and how often it woke is the kernel's own count, exact whatever else runs; reading
it costs the job nothing, as no thread of the job takes part.
"""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import job

#: The processors of the job and its client where both are pinned; with one processor only, neither is.
SERVER_CPU, CLIENT_CPU = (0, 1) if {0, 1} <= os.sched_getaffinity(0) else (None, None)


@contextmanager
def pinned(cpu: int | None) -> Iterator[None]:
    """Pin this process to one processor meanwhile. Children inherit that unless they are pinned themselves."""
    before = os.sched_getaffinity(0)
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Use(NamedTuple):
    """What threads have used since they started: processor seconds, and voluntary context switches."""

    seconds: float
    wakes: int
    at: float

    def since(self, before: Use) -> tuple[float, float]:
        """Return per cent of a core, and wake-ups per second."""
        clock = self.at - before.at
        return (self.seconds - before.seconds) / clock * 100, (self.wakes - before.wakes) / clock


class Host:
    """One job process.

    Args:
        load: of its main thread: ``idle``, ``python``, ``paced`` or ``torch``.
        servers: which it has: ``ours``, ``ping``, ``minimal``, ``http``.
        cpu: the processor that it is held on.
        share: the share of a core that our server may take, if not its own.
    """

    def __init__(self, load: str, *servers: str, cpu: int | None = None, share: float | None = None) -> None:
        self._home = tempfile.TemporaryDirectory(prefix="bench")
        board = Path(self._home.name, "board")
        board.write_bytes(bytes(job.BOARD))
        wanted = {"load": load, "servers": servers, "cpu": cpu, "share": share}
        wanted.update(board=str(board), directory=self._home.name)
        self.jobs_dir = os.path.join(self._home.name, "jobs")
        self._process = subprocess.Popen(
            [sys.executable, job.__file__, json.dumps(wanted)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "FORGATHER_JOBS_DIR": self.jobs_dir},
        )
        assert self._process.stdout is not None
        with open(board, "r+b") as file:
            self.board = memoryview(mmap.mmap(file.fileno(), job.BOARD)).cast("d")
        hello = json.loads(self._process.stdout.readline())
        self.pid, self.places = self._process.pid, hello["places"]
        self._threads = hello["threads"]

    def __enter__(self) -> Host:
        os.environ["FORGATHER_JOBS_DIR"] = self.jobs_dir
        return self

    def __exit__(self, *error: object) -> None:
        self.board[job.END] = 1
        try:
            self._process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._home.cleanup()

    @property
    def socket(self) -> str:
        """Ours."""
        return os.path.join(self.jobs_dir, "bench", "control.sock")

    def use(self, server: str = "ours") -> Use:
        """Return what the threads of a server have used."""
        return use_of(self.pid, self._threads[server])

    def cpu_seconds(self) -> float:
        """Return the processor time of all its threads, ended ones included (clock_getcpuclockid(3))."""
        return time.clock_gettime((~self.pid << 3) | 2)

    def steps(self) -> tuple[float, float]:
        """Return how many steps it has done, and the time of the question."""
        return self.board[job.STEPS], time.perf_counter()

    def ended_at(self, step: int) -> float:
        """Return when one of its last steps ended, in ``time.perf_counter()`` seconds."""
        return self.board[job.ENDS + step % job.KEPT]

    def longest_gap(self) -> float:
        """Return the longest time between two steps, in seconds, since the last call."""
        found, self.board[job.GAP] = self.board[job.GAP], 0.0
        return found

    def be_present(self, present: bool) -> None:
        """Start or end control in it, between two steps, and wait until that is done."""
        self.board[job.PRESENT] = present
        time.sleep(0.05)
        done = self.board[job.STEPS] + 2
        while self.board[job.STEPS] < done:
            time.sleep(0.005)

    def pause(self, paused: bool) -> None:
        """Pause the loop, or let it continue."""
        self.board[job.PAUSE] = paused

    def resident(self) -> int:
        """Return resident memory in bytes (statm of proc(5))."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def threads(self) -> int:
        """Return how many it has."""
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def files(self) -> int:
        """Return how many descriptors it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))


def use_of(pid: int, threads: list[int]) -> Use:
    """Return what these threads of a process have used; ended ones are left out."""
    seconds, wakes = 0.0, 0
    for thread in threads:
        task = Path(f"/proc/{pid}/task/{thread}")
        if not task.exists():
            continue
        seconds += int((task / "schedstat").read_text().split()[0]) / 1e9
        status = (task / "status").read_text()
        wakes += int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])
    return Use(seconds, wakes, time.perf_counter())


def rate(before: tuple[float, float], after: tuple[float, float]) -> float:
    """Return steps per second between two readings."""
    return (after[0] - before[0]) / (after[1] - before[1])
