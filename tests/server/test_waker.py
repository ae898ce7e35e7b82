"""The pipe that wakes the server thread: it never blocks, and never writes into another file."""

from __future__ import annotations

import os
import select
import threading

import pytest

from forgather_control.server.waker import Waker

from ..support.harness import MS, SOON, descriptors


@pytest.fixture
def waker():
    """A waker that is closed after the test."""
    waker = Waker()
    yield waker
    waker.close()


def is_readable(waker):
    return bool(select.select([waker], [], [], 0)[0])


def test_a_wake_makes_it_readable_until_it_is_drained(waker):
    """However many wakes there were, also more than the pipe holds."""
    for count in (1, 2, 100_000):
        assert not is_readable(waker)
        for _ in range(count):
            waker.wake()
        while is_readable(waker):
            assert waker.wait(0)


def test_waiting_ends_with_a_wake_from_another_thread(waker):
    """And says so; without one it ends with the time."""
    timer = threading.Timer(20 * MS, waker.wake)
    timer.start()
    assert waker.wait(SOON) and not waker.wait(0) and not waker.wait(10 * MS)
    timer.join()


def test_a_wake_after_closing_writes_into_no_other_file(waker):
    """Its descriptor may be a checkpoint's by then."""
    before = descriptors()
    out, into = waker._out, waker._in
    waker.close()
    assert descriptors() == before - 2
    reader, writer = os.pipe()
    assert {reader, writer} == {out.number, into.number}, "the kernel gives the lowest free descriptors"
    waker.wake()
    waker.close()
    os.set_blocking(reader, False)
    with pytest.raises(BlockingIOError):
        os.read(reader, 1)
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("end", ["_out", "_in"])
def test_an_end_that_other_code_closed(waker, end, tmp_path):
    """The file that has its number is neither written, nor read, nor closed; no wait blocks or raises."""
    assert waker.is_whole()
    number = getattr(waker, end).number
    waker.wake()
    with open(tmp_path / "file", "w+b", buffering=0) as file:
        file.write(b"data")
        file.seek(0)
        os.dup2(file.fileno(), number)
    waker.wake()
    assert not waker.is_whole() and waker.wait(0) == (end == "_in")
    waker.close()
    assert os.read(number, 10) == b"data" and (tmp_path / "file").read_bytes() == b"data"
    os.close(number)
    assert not waker.wait(0)


def test_wakes_race_with_closing():
    """Threads that wake while another one closes write into nothing else."""
    for _ in range(50):
        waker, stop = Waker(), threading.Event()

        def wake(waker=waker, stop=stop):
            while not stop.is_set():
                waker.wake()

        threads = [threading.Thread(target=wake) for _ in range(2)]
        for thread in threads:
            thread.start()
        waker.close()
        reader, writer = os.pipe()
        stop.set()
        for thread in threads:
            thread.join(SOON)
        os.set_blocking(reader, False)
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
        os.close(reader)
        os.close(writer)


def test_a_forked_child_lets_go_though_a_thread_of_the_parent_holds_the_lock(waker):
    """The child has no such thread, so it must not wait for it."""
    with waker._lock:
        holder = threading.Thread(target=waker.wake)
        holder.start()
        child = os.fork()
        if child == 0:
            waker._lock = type("Held", (), {"__enter__": lambda self: os._exit(1)})()
            waker.abandon()
            waker.wake()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    holder.join(SOON)
    assert is_readable(waker)
