"""The CLI's start-up in one run beside ``python -c 'import argparse, json, socket'``: ``tox -e bench``.

Aim: ``status`` at most 1.5 times that, and never torch. Runs alternate, the median counts.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time

os.environ["FORGATHER_JOBS_DIR"] = tempfile.mkdtemp(prefix="bench")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its bytecode; compiling is not start-up

from forgather_control import TrainingJob

RUNS = 40
AIM = 1.5
BASE = "python -c 'import argparse, json, socket'"
CLI = [sys.executable, "-m", "forgather_control"]
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    BASE: [sys.executable, "-c", "import argparse, json, socket"],
    "forgather control status": [*CLI, "status", "bench"],
    "forgather control list": [*CLI, "list"],
}


def main() -> None:
    with TrainingJob("bench", max_steps=1000) as job:
        stop = threading.Event()
        loop = threading.Thread(target=lambda: [job.step(1) for _ in iter(lambda: stop.wait(0.05), True)])
        loop.start()
        times: dict[str, list[float]] = {name: [] for name in COMMANDS}
        for run in range(-1, RUNS):  # the first warms up
            for name, command in COMMANDS.items():
                begin = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                if run >= 0:
                    times[name].append(time.perf_counter() - begin)
        stop.set()
        loop.join()
    base = statistics.median(times[BASE])
    print(f"{'command':42} {'median ms':>10} {'best ms':>8} {'ratio':>7} {'aim':>6}")
    for name, values in times.items():
        middle = statistics.median(values)
        aim = f"{AIM:g}" if name.endswith("status") else ""
        print(f"{name:42} {middle * 1e3:10.1f} {min(values) * 1e3:8.1f} {middle / base:7.2f} {aim:>6}")


if __name__ == "__main__":
    main()
