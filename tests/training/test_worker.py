"""The thread for calls that may block for long."""

from __future__ import annotations

import threading

import pytest

from forgather_control.training.worker import Worker

from ..support.harness import SOON


def test_calls_run_in_order_on_one_daemon_thread():
    """Each task has the value of its call, and the interpreter does not wait for the thread."""
    worker, seen = Worker("forgather-test"), []
    tasks = [
        worker.submit(lambda number=number: seen.append(number) or threading.current_thread()) for number in range(9)
    ]
    assert all(task.wait(SOON) for task in tasks)
    (thread,) = {task.result() for task in tasks}
    assert seen == list(range(9)) and thread.daemon and thread.name == "forgather-test"
    worker.close()
    thread.join(SOON)
    assert not thread.is_alive()


@pytest.mark.parametrize("error", [OSError("EIO"), SystemExit(1)])
def test_a_call_that_raises_ends_itself_only(error):
    """The error is that of its task; the next call runs."""

    def fail():
        raise error

    worker = Worker("forgather-test")
    failed, later = worker.submit(fail), worker.submit(lambda: 1)
    assert later.wait(SOON) and later.result() == 1 and failed.error is error
    with pytest.raises(type(error)):
        failed.result()
    worker.close()


def test_a_call_that_blocks_delays_only_those_behind_it():
    """The caller does not wait; what was asked before ``close`` is still done."""
    worker, gate = Worker("forgather-test"), threading.Event()
    blocked, behind = worker.submit(lambda: gate.wait(SOON)), worker.submit(lambda: 2)
    worker.close()
    assert not blocked.wait(0.01) and not behind.wait()
    gate.set()
    assert behind.wait(SOON) and blocked.result() and behind.result() == 2
