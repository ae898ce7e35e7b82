"""The end of an ssh on the job's side: bytes pass both ways, and it ends when either side does."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from forgather_control.client import stdio_proxy

from ..support.harness import SOON, Process, cli, job_process, running_loop

pytestmark = pytest.mark.once


@contextmanager
def bridged() -> Iterator[Any]:
    """A proxy in a thread, its three ends in the test; ended on exit."""

    class Ends:
        job, far = socket.socketpair()
        says, asks = os.pipe(), os.pipe()
        open_ends: set[int]

        def read(self, size: int) -> bytes:
            found = b""
            while len(found) < size and select.select([self.says[0]], [], [], SOON)[0]:
                data = os.read(self.says[0], size - len(found))
                if not data:
                    break
                found += data
            return found

        def close(self, end: int) -> None:
            self.open_ends.discard(end)
            os.close(end)

        def ended(self) -> bool:
            self.thread.join(SOON)
            return not self.thread.is_alive()

    ends = Ends()
    ends.open_ends = {ends.says[0], ends.asks[1]}
    ends.job.settimeout(SOON)
    ends.thread = threading.Thread(target=stdio_proxy.copy, args=("job", ends.far, ends.asks[0], ends.says[1]))
    ends.thread.start()
    try:
        mark = f"{stdio_proxy.MARK}job\n".encode()
        assert ends.read(len(mark)) == mark
        yield ends
    finally:
        ends.job.close()
        for end in list(ends.open_ends):
            ends.close(end)
        assert ends.ended()
        for end in (ends.asks[0], ends.says[1]):
            os.close(end)
        ends.far.close()


def test_each_byte_passes_at_once():
    """Bytes of any kind pass at once, without waiting for a newline."""
    with bridged() as ends:
        for data in (b"\x00", b"\xff" * 5000, b"{"):
            os.write(ends.asks[1], data)
            found = b""
            while len(found) < len(data):
                found += ends.job.recv(65536)
            assert found == data
            ends.job.sendall(data)
            assert ends.read(len(data)) == data


def test_the_end_of_the_input_is_handed_on_and_replies_still_come():
    """``printf | dial-stdio``: the job sees the end, and its late reply arrives."""
    with bridged() as ends:
        os.write(ends.asks[1], b"last")
        ends.close(ends.asks[1])
        assert ends.job.recv(100) == b"last" and ends.job.recv(100) == b""
        ends.job.sendall(b"late")
        assert ends.read(4) == b"late"


def test_it_ends_when_the_job_hangs_up_and_loses_nothing():
    """What the job sent last arrives, though it has gone."""
    with bridged() as ends:
        ends.job.sendall(b"x" * 200_000)
        ends.job.close()
        assert ends.read(200_000) == b"x" * 200_000
        assert ends.ended()


def test_it_ends_when_the_job_only_stops_writing():
    """A job that half-closes sends nothing more, so the proxy has nothing left to copy."""
    with bridged() as ends:
        ends.job.shutdown(socket.SHUT_WR)
        assert ends.ended()


@pytest.mark.parametrize("input_ends", [False, True])
def test_it_ends_when_nobody_reads_any_more(input_ends):
    """A silent job does not keep the proxy alive, whether the input has ended or not."""
    with bridged() as ends:
        if input_ends:
            ends.close(ends.asks[1])
            assert ends.job.recv(1) == b""
        ends.close(ends.says[0])
        assert ends.ended()


def test_neither_side_waits_for_the_other():
    """A megabyte each way at once, each side writing all before it reads: no deadlock, nothing lost."""
    with bridged() as ends:
        sent, received = b"a" * 1_000_000, bytearray()

        def job() -> None:
            ends.job.sendall(sent)
            while len(received) < len(sent):
                received.extend(ends.job.recv(65536))

        def write() -> None:
            left = sent
            while left:
                left = left[os.write(ends.asks[1], left[:65536]) :]

        threads = [threading.Thread(target=target) for target in (job, write)]
        for thread in threads:
            thread.start()
        assert ends.read(len(sent)) == sent
        for thread in threads:
            thread.join(SOON)
        assert bytes(received) == sent


def test_waiting_takes_no_time():
    """While nothing comes, or its reader takes nothing from a job that has ended, it blocks."""
    source = """
    import os, socket, threading, time
    from forgather_control.client import stdio_proxy as bridge
    job, far = socket.socketpair()
    says, asks = os.pipe(), os.pipe()
    thread = threading.Thread(target=bridge.copy, args=("job", far, asks[0], says[1]))
    thread.start()
    job.sendall(b"x" * 150_000)
    job.close()
    os.close(asks[1])
    before = time.process_time()
    thread.join(0.5)
    print(thread.is_alive(), time.process_time() - before < 0.25, flush=True)
    os.close(says[0])
    thread.join(20)
    print(thread.is_alive(), flush=True)
    """
    with Process(source) as process:
        assert (process.line(), process.line()) == ("True True", "False")


def test_it_ends_with_its_input_where_it_shall():
    """A client that was killed leaves no proxy waiting for a silent job."""
    with job_process("job", step_seconds=SOON):
        line = '{"jsonrpc":"2.0","id":1,"method":"save_checkpoint","params":{"wait":"finished"}}'
        done = cli("dial-stdio", "--until-input-ends", stdin=line + "\n")
        assert (done.returncode, done.stdout) == (0, f"{stdio_proxy.MARK}job\n")


def test_the_verb_reaches_a_job():
    """``printf '{...}' | forgather-control dial-stdio``: the mark, the reply, the end, exit code 0."""
    with running_loop():
        for words in (["job"], []):
            done = cli("dial-stdio", *words, stdin='{"jsonrpc":"2.0","id":1,"method":"ping"}')
            mark, reply = done.stdout.splitlines()
            assert (done.returncode, done.stderr, mark) == (0, "", f"{stdio_proxy.MARK}job")
            assert json.loads(reply)["result"]["job_id"] == "job"


def test_the_verb_fails_as_others_do():
    """No such job is exit code 3, and --json prints the error where the mark would be."""
    done = cli("dial-stdio", "nobody", "--json")
    assert done.returncode == 3 and json.loads(done.stdout)["error"]["code"] == -31021


def test_a_closed_output_is_the_end():
    """``dial-stdio >&-`` ends, and does not wait for a silent job."""
    with running_loop():
        line = f"{sys.executable} -m forgather_control dial-stdio job >&-"
        done = subprocess.run(line, shell=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=SOON)
        assert done.returncode == 0 and b"Traceback" not in done.stderr
