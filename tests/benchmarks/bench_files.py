"""What control by file costs the server thread: an idle tick beside one without it, and full ones.

Aim: while nobody asks, less than a thousandth of a core. Rounds of the variants alternate, the median counts.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from typing import Any

os.environ["FORGATHER_JOBS_DIR"] = tempfile.mkdtemp(prefix="bench")

from forgather_control import server
from forgather_control.controller import Controller

TICK, server.TICK = server.TICK, 3600.0  # the ticks are made here
ROUNDS, CALLS = 40, 50
#: Of one core.
AIM = 0.001


def timed(call: Any, calls: int = CALLS) -> float:
    """Microseconds a call, over one round."""
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls * 1e6


def main() -> None:
    controller = Controller("job", max_steps=1000)
    controller.start()
    files, mine = controller._files, controller._directory
    assert files is not None and mine is not None

    def step() -> None:
        controller._progress.beat(controller.last_step + 1, None)
        files._status_due = 0.0
        files.tick()

    def fill(count: int) -> None:
        for number in range(count):
            with open(os.path.join(mine.path, "requests", f"{number}.json"), "w") as out:
                out.write('{"jsonrpc": "2.0", "id": 1, "method": "ping"}')

    variants = {
        "idle tick without control by file": mine.restore,
        "... with it, nothing new": lambda: (mine.restore(), files.tick()),
        "... and a new status.json": lambda: (mine.restore(), step()),
    }
    rounds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(ROUNDS):
        for name, call in variants.items():
            rounds[name].append(timed(call))
    print(f"{'every ' + format(TICK, 'g') + ' s':45} {'median us':>10} {'best us':>8} {'of a core':>10} {'aim':>6}")
    for name, values in rounds.items():
        middle = statistics.median(values)
        print(f"{name:45} {middle:10.1f} {min(values):8.1f} {middle / TICK / 1e6:10.5%} {AIM:6.1%}")
    for count in (1, 10_000):
        fill(count)
        lying = len(os.listdir(os.path.join(mine.path, "requests")))
        took = timed(files.tick, 1)
        taken = lying - len(os.listdir(os.path.join(mine.path, "requests")))
        print(
            f"{f'a tick that finds {count} requests, takes {taken}':45} {took:10.1f} {'':8} {took / TICK / 1e6:10.5%}"
        )
    controller.close()


if __name__ == "__main__":
    main()
