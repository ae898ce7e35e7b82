"""What the agreement of ranks costs, and how long a command takes until all ranks have applied it.

Worlds of 1, 2, 4 and 8 ranks under gloo, forked from this process, which is also the client. In each:

* an idle ``TrainingJob.step`` back to back, beside an empty call, one bare 8-byte broadcast, and two of them with
  ``.item()``, which is what asking all ranks at every log costs. The first two on one rank at a time, while the
  others wait, so that ranks which share a core do not count as cost;
* the time from sending a save to its being applied on all ranks, at steps of some length, by the rounds and by asking
  every 50 steps. A step here is ``time.sleep`` and one 8-byte all-reduce, which keeps ranks together as gradients do;
* how much longer the end of a step takes when it has a round, on each rank.

A command is to be applied, at the median, within one step plus 50 ms. The worlds take turns. Of ranks that measured
the same, the slowest rank's median stands. More ranks than cores wait for their turns, and all their figures show it.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from rows import Aim, Samples, Table

from forgather_control import ControlError, TrainingJob, connect

SIZES = (1, 2, 4, 8)
TURNS = 2
#: In one turn: rounds of the idle variants, and calls in each of them.
ROUNDS, CALLS, COLLECTIVES = 5, 5_000, 100
POLL_STEPS = 50
#: Milliseconds a step: commands in one turn, by rounds and by asking; asking at 100 ms would take 2.5 s a command.
COMMANDS = {1: (20, 6), 10: (12, 3), 100: (6, 0)}
AIM_US, AIM_MS = 2.0, 50.0

Figures = defaultdict[Any, list[float]]


def empty(step: int) -> None:
    """An empty method, to subtract the cost of a call."""


# In each rank...


class Rank:
    """One rank of a group; it sends its figures through ``report``."""

    def __init__(self, rank: int, size: int, port: int) -> None:
        torch.set_num_threads(1)
        store = dist.TCPStore("127.0.0.1", port, size, rank == 0, timedelta(seconds=60))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        self.rank, self.size = rank, size
        self.figures: Figures = defaultdict(list)
        self.word = torch.zeros(1, dtype=torch.int64)

    def broadcast(self, step: int) -> None:
        """Broadcast 8 bytes."""
        dist.broadcast(self.word, src=0)

    def ask(self, step: int) -> None:
        """Broadcast 8 bytes twice, and read the values."""
        for _ in range(2):
            dist.broadcast(self.word, src=0)
            self.word.item()

    def timed(self, call: Callable[[int], Any], times: int) -> float:
        """Return microseconds per call."""
        begin = time.perf_counter()
        for step in range(times):
            call(step)
        return (time.perf_counter() - begin) / times * 1e6

    def idle(self) -> None:
        """Measure the variants in turns: ours on rank 0 and on the last rank, collectives on all."""
        with TrainingJob(f"idle-{self.size}") as job:
            for _ in range(ROUNDS):
                for name, call in (("empty", empty), ("step", job.step)):
                    for turn in {0, self.size - 1}:
                        dist.barrier()
                        if turn == self.rank:
                            self.figures[name].append(self.timed(call, CALLS))
                for name, collective in (("broadcast", self.broadcast), ("ask", self.ask)):
                    dist.barrier()
                    self.figures[name].append(self.timed(collective, COLLECTIVES))

    def train(self, milliseconds: int, poll_steps: int | None) -> None:
        """Train until the client stops it."""
        key = milliseconds, poll_steps
        with TrainingJob(name_of(self.size, *key), max_steps=10**6, poll_steps=poll_steps) as job:
            heard = listen(job)
            for step in range(1, 10**6):
                begin = time.perf_counter()
                time.sleep(milliseconds / 1e3)
                dist.all_reduce(self.word)
                trained = time.perf_counter()
                job.step(step)
                seconds = time.perf_counter() - trained
                self.figures[("round", key) if heard else "no round"].append(seconds * 1e6)
                self.figures["length", key].append((trained - begin) * 1e3)
                heard.clear()
                if job.should_save:
                    job.saved(os.curdir)
                if job.should_stop:
                    break


def listen(job: Any) -> list[int]:
    """A list that a step fills if its end had a command, or a question."""
    group, heard = job._controller._group, []
    receive = group.receive

    def noted(step: int) -> Any:
        heard.append(step)
        return receive(step)

    group.receive = noted
    return heard


def name_of(size: int, milliseconds: int, poll_steps: int | None) -> str:
    """Return the job id of one group."""
    return f"of-{size}-{milliseconds}-{poll_steps}"


def jobs_of(size: int) -> list[tuple[int, int | None, int]]:
    """Length of a step, steps between two questions, commands: the same for ranks and client."""
    found: list[tuple[int, int | None, int]] = []
    for milliseconds, (by_rounds, by_asking) in COMMANDS.items():
        found.append((milliseconds, None, by_rounds))
        if by_asking and size > 1:
            found.append((milliseconds, POLL_STEPS, by_asking))
    return found


def run(rank: int, size: int, port: int, report: Any) -> None:
    """A rank, in its process."""
    me = Rank(rank, size, port)
    me.idle()
    for milliseconds, poll_steps, _ in jobs_of(size):
        dist.barrier()
        me.train(milliseconds, poll_steps)
    report.send(
        {key: values if len(values) < 100 else [statistics.median(values)] for key, values in me.figures.items()}
    )
    dist.barrier()
    dist.destroy_process_group()


# The client...


def command(size: int, milliseconds: int, poll_steps: int | None, times: int) -> list[float]:
    """Milliseconds from sending a save to hearing that all ranks applied it, at random moments of a step."""
    job = name_of(size, milliseconds, poll_steps)
    found = []
    with published(job) as client:
        for _ in range(times):
            time.sleep(0.02 + random.random() * milliseconds / 1e3)
            begin = time.perf_counter()
            client.call("save_checkpoint", wait="applied")
            found.append((time.perf_counter() - begin) * 1e3)
        client.call("graceful_stop", wait="finished")
    return found


def published(job: str) -> Any:
    """Connect, once the job is there."""
    end = time.monotonic() + 60
    while True:
        try:
            return connect(job)
        except ControlError:
            if time.monotonic() > end:
                raise
            time.sleep(0.005)


def turn(size: int, latencies: Figures, figures: list[Figures]) -> None:
    """Measure one group."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    pipes = [fork.Pipe(duplex=False) for _ in range(size)]
    ranks = [fork.Process(target=run, args=(rank, size, port, pipes[rank][1]), daemon=True) for rank in range(size)]
    for rank in ranks:
        rank.start()
    for milliseconds, poll_steps, times in jobs_of(size):
        latencies[size, (milliseconds, poll_steps)] += command(size, milliseconds, poll_steps, times)
    for rank, (receiver, _) in enumerate(pipes):
        for key, values in receiver.recv().items():
            figures[rank][key] += values
    for process in ranks:
        process.join(60)


# The rows...


def slowest(ranks: list[Figures], key: Any) -> float:
    """Return the largest of the ranks' medians."""
    return max(statistics.median(rank[key]) for rank in ranks if rank[key])


def holding(ranks: list[Figures], key: tuple[int, int | None]) -> list[float]:
    """Return each rank's extra microseconds at the end of a step that has a command, or a question."""
    return [
        statistics.median(rank["round", key]) - statistics.median(rank["no round"])
        for rank in ranks
        if rank["round", key]
    ]


def show_idle(table: Table, ranks: list[Figures]) -> None:
    """Add what a step costs with nothing pending, on the slower of rank 0 and the last."""
    for name, key in (
        ("nothing pending: empty call", "empty"),
        ("nothing pending: TrainingJob.step", "step"),
        ("one broadcast of 8 bytes", "broadcast"),
        ("two broadcasts of 8 bytes, each with .item()", "ask"),
    ):
        table.figure(name, slowest(ranks, key), "us")
    over = slowest(ranks, "step") - slowest(ranks, "empty")
    table.figure("nothing pending: TrainingJob.step over an empty call", over, "us", Aim(AIM_US))


def show_commands(table: Table, size: int, ranks: list[Figures], latencies: Figures) -> None:
    """Add how soon a command is applied, and what it costs training."""
    for milliseconds, poll_steps, _ in jobs_of(size):
        key = milliseconds, poll_steps
        length = slowest(ranks, ("length", key))
        how = f"steps of {milliseconds} ms" + (f", asking every {poll_steps}" if poll_steps else "")
        table.figure(f"{how}: the step itself", length, "ms")
        aim = None if poll_steps else Aim(round(length + AIM_MS, 1))
        table.samples(f"{how}: from sent to applied on all", Samples([latencies[size, key]]), "ms", aim)
        extra = holding(ranks, key)
        if extra:
            table.figure(f"{how}: end of a step with a command over one without", statistics.median(extra), "us")


def measure() -> Iterator[Table]:
    """Yield one table, with a group of rows for each group of ranks."""
    figures: dict[int, list[Figures]] = {size: [defaultdict(list) for _ in range(size)] for size in SIZES}
    latencies: Figures = defaultdict(list)
    for _ in range(TURNS):
        for size in SIZES:
            turn(size, latencies, figures[size])
    table, cores = Table("ranks"), len(os.sched_getaffinity(0))
    for size, ranks in figures.items():
        table.group(f"{size} rank{'s' if size > 1 else ''}" + (f" on {cores} cores" if size > cores else ""))
        show_idle(table, ranks)
        show_commands(table, size, ranks, latencies)
    yield table
