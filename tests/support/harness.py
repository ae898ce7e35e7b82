"""What the tests share: real sockets, real processes, one unit of time, and a strict parser."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from . import answers

ROOT = Path(__file__).resolve().parent.parent.parent
#: All time-outs are multiples of one unit, so that a slow machine needs one setting.
MS = float(os.environ.get("FORGATHER_TEST_MS", "0.001"))
#: A deadline, in seconds, for what should happen at once; long, because no test waits for it to pass.
SOON = 20_000 * MS

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
needs_lightning = pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed")
needs_mcp = pytest.mark.skipif(importlib.util.find_spec("mcp_types") is None, reason="mcp is not installed")


def needs(program: str) -> pytest.MarkDecorator:
    """Return the mark that skips a test where a program is not installed."""
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


def needs_version(package: str, version: str, reason: str) -> pytest.MarkDecorator:
    """Return the mark that skips a test where an older version of a package is installed, which cannot do it."""
    try:
        installed = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return pytest.mark.skipif(False, reason="other marks say that it is not installed")
    is_older = [int(part) for part in re.findall(r"\d+", installed)[:2]] < [int(part) for part in version.split(".")]
    return pytest.mark.skipif(is_older, reason=f"{package} {installed}: {reason}")


def needs_success(reason: str, command: str) -> pytest.MarkDecorator:
    """Return the mark that skips a test where a harmless shell command fails, for want of rights."""
    done = subprocess.run(["sh", "-c", command], capture_output=True)
    return pytest.mark.skipif(done.returncode != 0, reason=reason)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount, and run as another user")


def descriptors() -> int:
    """Return how many file descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


def until(condition: Callable[[], Any], seconds: float = SOON) -> Any:
    """Return the first true value of ``condition``; fail the test at the deadline."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"still waiting for {condition} after {seconds} s"
        time.sleep(2 * MS)
    return value


def remove_folder(path: Path) -> None:
    """Remove a folder in which a job may be writing, at once: nothing is written into what is left of it."""
    gone = Path(tempfile.mkdtemp(dir=Path(os.environ["FORGATHER_JOBS_DIR"]).parent)) / "gone"
    path.rename(gone)
    shutil.rmtree(gone.parent, ignore_errors=True)


def strict(line: bytes) -> Any:
    """Parse one line as a parser in another language does: ASCII, no NaN, exactly one newline."""

    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} on the wire")

    assert line.endswith(b"\n") and line.count(b"\n") == 1, line
    return json.loads(line.decode("ascii"), parse_constant=refuse)


#: The token of the servers that ``serving_tcp`` starts.
TOKEN = "0123456789abcdef" * 2


class Wire:
    """A raw client: bytes in, lines out. To a path, to host and port, or over a socket that is connected already.

    Every successful reply that it parses must fit the schema of the method's result, unless a test made it up.
    """

    def __init__(
        self, where: str | os.PathLike[str] | tuple[str, int] | socket.socket, *, made_up: bool = False
    ) -> None:
        self.sock = where if isinstance(where, socket.socket) else self._connected(where)
        self._promised = answers.Promised(self.sock, made_up)
        self.file = self.sock.makefile("rb")

    @staticmethod
    def _connected(where: str | os.PathLike[str] | tuple[str, int]) -> socket.socket:
        if isinstance(where, tuple):
            return socket.create_connection(where, SOON)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(SOON)
        try:
            sock.connect(os.fspath(where))
        except OSError:
            sock.close()
            raise
        return sock

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.file.close()
        self.sock.close()

    def send(self, data: bytes) -> None:
        self._promised.sent(data)
        self.sock.sendall(data)

    def line(self) -> bytes:
        """Return the next line; empty at the end of the stream."""
        return self.file.readline()

    def reply(self) -> Any:
        """Return the next line, parsed strictly."""
        message = strict(self.line())
        self._promised.check(message)
        return message

    def call(self, method: str, params: Any = None, id: Any = 1) -> Any:
        """Send one request and return its response object."""
        message = {"jsonrpc": "2.0", "id": id, "method": method}
        if params is not None:
            message["params"] = params
        self.send(json.dumps(message).encode() + b"\n")
        return self.reply()

    def authenticate(self, token: str = TOKEN) -> Any:
        """Send the token and return the response object."""
        return self.call("authenticate", {"token": token}, id="auth")

    def is_closed(self) -> bool:
        """Return whether the other side closed the connection, or reset it."""
        try:
            return self.line() == b""
        except ConnectionResetError:
            return True

    def still_answers(self) -> None:
        """Assert that the connection answers a valid request; earlier replies and events are skipped."""
        mark = f"mark-{time.monotonic_ns()}"
        self.send(json.dumps({"jsonrpc": "2.0", "id": mark, "method": "ping"}).encode() + b"\n")
        while True:
            line = self.line()
            assert line, "the connection was closed"
            reply = strict(line)
            if isinstance(reply, dict) and reply.get("id") == mark:
                assert "result" in reply, reply
                return


@contextmanager
def running_loop(
    job_id: str = "job", *, step_seconds: float = 5 * MS, max_steps: int = 10**9, **options: Any
) -> Iterator[Any]:
    """Run a real ``TrainingJob`` in a thread of this process, saving to real files; it ends on exit.

    Yields an object with ``job``, ``steps`` (those done), ``saves`` (paths) and ``thread``.
    """
    from forgather_control import TrainingJob

    class Run:
        job: Any = None
        steps: int = 0
        saves: list[str] = []

    run = Run()
    run.saves = []
    ready, stop = threading.Event(), threading.Event()
    folder = Path(os.environ["FORGATHER_JOBS_DIR"]).parent / f"checkpoints-{job_id}"

    def loop() -> None:
        with TrainingJob(job_id=job_id, max_steps=max_steps, **options) as job:
            run.job = job
            ready.set()
            for step in range(1, max_steps + 1):
                time.sleep(step_seconds)
                job.log(loss=1.0 / step)
                job.step(step)
                run.steps = step
                if job.should_save:
                    path = folder / f"checkpoint-{step}"
                    path.mkdir(parents=True, exist_ok=True)
                    run.saves.append(str(path))  # first: a test that waits for the checkpoint reads it at once
                    job.saved(path)
                if job.should_stop or stop.is_set():
                    break

    run.thread = threading.Thread(target=loop, name=f"loop-{job_id}")
    run.thread.start()
    try:
        assert ready.wait(SOON)
        yield run
    finally:
        stop.set()
        run.thread.join(SOON)
        assert not run.thread.is_alive()


@contextmanager
def serving(
    path: str | os.PathLike[str], answer: Callable[[Any], Any], tick: Callable[[], None] = lambda: None
) -> Iterator[Any]:
    """Run a real ``Server`` at ``path``; it is closed on exit."""
    from forgather_control.server.server import Server

    server = Server(answer, tick)
    server.listen(os.fspath(path))
    server.start()
    answers.MADE_UP.add(os.fspath(path))
    try:
        yield server
    finally:
        answers.MADE_UP.discard(os.fspath(path))
        server.close(SOON)


@contextmanager
def serving_tcp(
    answer: Callable[[Any], Any], tls: Any = None, path: str | os.PathLike[str] | None = None
) -> Iterator[Any]:
    """Run a real ``Server`` at a port of this host (see ``at``), with the token ``TOKEN``; also at ``path``."""
    from forgather_control.server.server import Server

    server = Server(answer, lambda: None)
    if path is not None:
        server.listen(os.fspath(path))
    server.at = server.listen_tcp("127.0.0.1", 0, TOKEN, tls)  # type: ignore[attr-defined]
    server.start()
    made_up = {server.at, path and os.fspath(path)}
    answers.MADE_UP.update(made_up)
    try:
        yield server
    finally:
        answers.MADE_UP.difference_update(made_up)
        server.close(SOON)


class Process:
    """A Python program in a separate process, whose standard output is read line by line."""

    def __init__(self, source: str, *args: str, env: dict[str, str] | None = None, **options: Any) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-u", "-c", textwrap.dedent(source), *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
            **options,
        )
        self.errors: list[str] = []
        self._drain = threading.Thread(target=self._read_errors, daemon=True)
        self._drain.start()

    def _read_errors(self) -> None:
        assert self.popen.stderr is not None
        self.errors.extend(self.popen.stderr)

    @property
    def pid(self) -> int:
        return self.popen.pid

    def line(self) -> str:
        """Return the next line of its output; blocks until there is one, or until the test times out."""
        assert self.popen.stdout is not None
        return self.popen.stdout.readline().rstrip("\n")

    def say(self, text: str) -> None:
        """Write a line to its standard input."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(text + "\n")
        self.popen.stdin.flush()

    def end(self, seconds: float = SOON) -> int:
        """Wait until it ends by itself; return its exit code."""
        code = self.popen.wait(seconds)
        self._drain.join(SOON)
        return code

    def kill(self) -> None:
        """``kill -9``, and wait for it."""
        self.popen.kill()
        self.popen.wait(SOON)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *error: object) -> None:
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait(SOON)
        self._drain.join(SOON)
        for stream in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            if stream is not None:
                stream.close()


#: A job as a program: python -c JOB ID [STEP_SECONDS]; prints "ready", then "ended STEP ABORTED".
JOB = """
import logging, os, sys, time
from pathlib import Path
from forgather_control import TrainingJob

logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
folder = Path(os.environ["FORGATHER_JOBS_DIR"]).parent / "checkpoints"
step = 0
with TrainingJob(job_id=sys.argv[1] or None, max_steps=100_000) as job:
    print("ready", flush=True)
    for step in range(1, 100_001):
        time.sleep(float(sys.argv[2]) if len(sys.argv) > 2 else 0.01)
        job.log(loss=1 / step)
        job.step(step)
        if job.should_save:
            path = folder / f"checkpoint-{step}"
            path.mkdir(parents=True, exist_ok=True)
            job.saved(path)
        if job.should_stop:
            break
print("ended", step, job.aborted, flush=True)
"""


@contextmanager
def job_process(job_id: str = "job", step_seconds: float = 10 * MS, **options: Any) -> Iterator[Process]:
    """Run a job in a separate process; yields once it is published, and kills it on exit if it still runs."""
    with Process(JOB, job_id, str(step_seconds), **options) as process:
        assert process.line() == "ready", "".join(process.errors)
        yield process


def cli(*args: str, stdin: str | None = None, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``python -m forgather_control ARGS`` without a terminal."""
    return subprocess.run(
        [sys.executable, "-m", "forgather_control", *args],
        input=stdin,
        stdin=None if stdin is not None else subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SOON * 3,
        env={**os.environ, **(env or {})},
    )
