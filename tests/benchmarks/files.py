"""What request files cost the server thread: an idle tick with and without them, and ticks with many requests.

The ticks are made here, on a controller that has none of its own; its directory lies where temporary files do. Counted
is processor time, as a disk may keep a new file waiting. As a share of a core each stands for one tick every
``limits.TICK_PERIOD`` seconds, which is all there is while no client asks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from rows import Aim, Rounds, Table, each_of

from forgather_control.jobs.directory import JobDirectory
from forgather_control.server import limits
from forgather_control.server.file_requests import FileRequestServer
from forgather_control.training.controller import Controller
from forgather_control.training.loop_actions import RequestedActions
from forgather_control.training.options import ControlOptions

ROUNDS, CALLS = 40, 50
#: Per cent of one core for all housekeeping, without clients.
AIM = Aim(0.01)
WAITING = (1, 10_000)


def parts(controller: Controller) -> tuple[FileRequestServer, JobDirectory]:
    """Return what a tick works on."""
    server = controller._server
    assert server is not None and server._file_requests is not None and server._directory is not None
    return server._file_requests, server._directory


def variants(controller: Controller) -> dict[str, Callable[[], Any]]:
    """Return ticks of several kinds."""
    files, mine = parts(controller)

    def step() -> None:
        controller.beat(controller.last_step + 1)
        files._status_due = 0.0
        files.tick()

    return {
        "idle tick without control by file": mine.restore,
        "... with it, nothing new": lambda: (mine.restore(), files.tick()),
        "... and a new status.json": lambda: (mine.restore(), step()),
    }


def fill(boxes: str, count: int) -> None:
    """Make ``count`` request files."""
    for number in range(count):
        with open(os.path.join(boxes, f"{number}.json"), "w") as out:
            out.write('{"jsonrpc": "2.0", "id": 1, "method": "ping"}')


def measure() -> Iterator[Table]:
    """Yield one table."""
    tick, limits.TICK_PERIOD = limits.TICK_PERIOD, 3600.0
    table = Table("files")
    controller = Controller(ControlOptions("job"), RequestedActions(), max_steps=1000)
    controller.start()
    ways, found = variants(controller), Rounds()
    for _ in range(ROUNDS):
        for name, call in ways.items():
            found[name].add([each_of(call, CALLS, time.thread_time) * 1e6])
    for name, samples in found.items():
        table.samples(name, samples, "us")
        table.figure(f"{name}: every {tick:g} s", samples.median / tick / 1e4, "% of a core", AIM)
    full(table, controller)
    controller.close()
    yield table


def full(table: Table, controller: Controller) -> None:
    """Measure ticks that find requests."""
    files, mine = parts(controller)
    box = os.path.join(mine.path, "requests")
    for count in WAITING:
        fill(box, count)
        before = len(os.listdir(box))
        took = each_of(files.tick, 1, time.thread_time) * 1e6
        table.figure(f"a tick that finds {count:,} requests, takes {before - len(os.listdir(box))}", took, "us")
