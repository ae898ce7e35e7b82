"""How long the command line takes to start, and how ``list`` grows with the jobs directory.

Beside ``python -c pass``, the import of what any such program needs, and the bare reading of the same files. The jobs
are a live one; dead ones, as ``kill -9`` leaves them, each with its record, a free lock and a dead socket; live ones,
for which a single process answers at as many sockets; and silent ones, at whose sockets nothing answers. Bytecode is
there, as an installation leaves it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import answer
import psutil
from host import Host
from rows import Aim, Rounds, Table, in_turns, seconds

from forgather_control import list_jobs, states
from forgather_control.client import limits

PASS, BASE = "python -c pass", "python -c 'import argparse, json, socket'"
STATUS, LIST = "forgather control status JOB", "forgather control list"
#: Runs of each command.
RUNS = 25
#: Job directories, and runs of each variant: of dead jobs, and of live ones.
DEAD = {1: 15, 100: 15, 1_000: 9, 10_000: 5}
LIVE = {1: 15, 100: 15, 1_000: 5}
SILENT = {50: 3}
#: Milliseconds that a list may take: of so many jobs of a state. All silent ones together have one time-out.
MOST = {(1_000, states.JOB_LIVE): Aim(3e3), (50, states.JOB_SILENT): Aim(limits.LIST_TIMEOUT * 1e3 + 500)}
#: The bare limit: find the records and parse them.
SCAN = """
import json, os, sys
for entry in os.scandir(sys.argv[1]):
    if entry.is_dir():
        with open(os.path.join(entry.path, "endpoint.json")) as file:
            json.load(file)
"""
#: Above every pid of Linux (PID_MAX_LIMIT of 64 bits, 2**22).
FREE_PID = 1 << 23


def control(*words: str) -> list[str]:
    """Return the installed script or, where it is missing, the module."""
    script = Path(sys.executable).with_name("forgather")
    return [str(script), "control", *words] if script.exists() else [sys.executable, "-m", "forgather_control", *words]


def run(command: list[str]) -> None:
    """Run a program outside of the working tree, where ``python -m`` and ``-c`` would look first."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/")


def start_up(table: Table) -> None:
    """Measure the start with one live job, in turns."""
    commands = {
        PASS: [sys.executable, "-c", "pass"],
        BASE: [sys.executable, "-c", "import argparse, json, socket"],
        STATUS: control("status", "bench"),
        LIST: control("list"),
    }
    with Host("idle", "ours"):
        ways = {name: partial(run, words) for name, words in commands.items()}
        found = in_turns(ways, RUNS, 1, unit=1e3)
    table.group("start-up of the command line, one live job")
    for name, samples in found.items():
        table.samples(name, samples, "ms")
    table.compare(STATUS, BASE, Aim(1.5))
    table.compare(LIST, BASE)


# Many jobs...


def record() -> dict[str, Any]:
    """Return the record of a job of this host."""
    with Host("idle", "ours") as host:
        found: dict[str, Any] = json.loads(Path(host.jobs_dir, "bench", "endpoint.json").read_text())
    return found


def fill(root: Path, count: int, like: dict[str, Any], **changes: Any) -> list[str]:
    """Make ``count`` job directories; return the paths of their sockets, which are missing."""
    missing = []
    for number in range(len(os.listdir(root)), count):
        name = f"job_{number:05}"
        (root / name).mkdir(mode=0o700)
        path = str(root / name / "control.sock")
        facts = {**like, "job_id": name, "socket": path, "pid": FREE_PID + number, "started_at": 1.8e9 + number}
        (root / name / "endpoint.json").write_text(json.dumps({**facts, **changes}))
        (root / name / "lock").write_text(f"{facts['started_at']!r}\n")
        missing.append(path)
    return missing


@contextmanager
def listening(paths: list[str]) -> Iterator[None]:
    """Listen at sockets, and answer nothing, as a job does whose process is stopped."""
    with ExitStack() as stack:
        for path in paths:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.bind(path)
            sock.listen()
            os.unlink(os.path.join(os.path.dirname(path), "lock"))  # a free one would prove death
        yield


def bind(paths: list[str]) -> None:
    """Make sockets without a listener, as dead jobs leave them."""
    for path in paths:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path)


@contextmanager
def answering(root: Path) -> Iterator[None]:
    """Run one process that answers for all jobs of a directory."""
    command = [sys.executable, answer.__file__, str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()
        yield
        process.stdin.close()


def lists(table: Table, root: Path, count: int, kind: str, runs: int) -> None:
    """Measure ``list_jobs`` in a Python program, and ``list`` as a command."""
    assert {job.state for job in list_jobs()} == {kind}
    ways: dict[str, Callable[[], Any]] = {
        "scandir and json.load": lambda: scan(root),
        "list_jobs()": list_jobs,
        "python -c 'scandir and json.load'": lambda: run([sys.executable, "-c", SCAN, str(root)]),
        LIST: lambda: run(control("list")),
    }
    found = Rounds()
    for number in range(runs + 1):
        for name, call in ways.items():
            value = seconds(call) * 1e3
            if number:
                found[name].add([value])
    aim = Aim(2.0) if count == 10_000 else None
    table.group(f"list, {count:,} {kind}")
    for name, samples in found.items():
        table.samples(name, samples, "ms", MOST.get((count, kind)) if name == LIST else None)
    table.compare("list_jobs()", "scandir and json.load", aim)
    table.compare(LIST, "python -c 'scandir and json.load'", aim)


def scan(root: Path) -> None:
    """The same as ``SCAN``, here."""
    for entry in os.scandir(root):
        if entry.is_dir():
            with open(os.path.join(entry.path, "endpoint.json")) as file:
                json.load(file)


def many(table: Table) -> None:
    """Measure lists of dead jobs, then of live ones, then of silent ones."""
    like = record()
    with tempfile.TemporaryDirectory(prefix="bench") as home:
        root = Path(home)
        os.environ["FORGATHER_JOBS_DIR"] = home
        for count, runs in DEAD.items():
            bind(fill(root, count, like))
            lists(table, root, count, states.JOB_DEAD, runs)
    for count, runs in LIVE.items():
        with tempfile.TemporaryDirectory(prefix="bench") as home:
            os.environ["FORGATHER_JOBS_DIR"] = home
            fill(Path(home), count, like, pid=os.getpid())  # a live process: dead ones are not asked
            with answering(Path(home)):
                lists(table, Path(home), count, states.JOB_LIVE, runs)
    for count, runs in SILENT.items():
        with tempfile.TemporaryDirectory(prefix="bench") as home:
            os.environ["FORGATHER_JOBS_DIR"] = home
            began = psutil.Process().create_time()  # of another process this one would prove the job's death
            with listening(fill(Path(home), count, like, pid=os.getpid(), process_started_at=began)):
                lists(table, Path(home), count, states.JOB_SILENT, runs)


def measure() -> Iterator[Table]:
    """Yield one table."""
    table = Table("start")
    start_up(table)
    many(table)
    yield table
