"""Following a real job on a thread: what it says of a job that ended, was killed, or began again."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest

from forgather_control import cleanup, connect
from forgather_control.client import limits, target
from forgather_control.client.following import Follower

from ..support.harness import MS, job_process, running_loop, until

pytestmark = pytest.mark.once


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Look often."""
    monkeypatch.setattr(limits, "FOLLOW_PERIOD", 20 * MS)


@contextmanager
def following():
    """Follow the job ``job``, once it has been seen at a step."""
    follower = Follower(lambda: target.resolve("job"), threading.Event()).start()
    try:
        until(lambda: follower.state == "live" and follower.status.get("global_step"))
        yield follower
    finally:
        follower.stop()
        follower._thread.join()


def test_a_job_that_ends_has_ended(jobs_dir):
    """And stays so."""
    with running_loop(), following() as follower:
        with connect("job") as client:
            client.call("graceful_stop", wait="finished")
        until(lambda: follower.state == "ended")
        assert follower.problem == "training has ended"


def test_a_killed_job_is_dead_until_it_begins_again(jobs_dir):
    """Also once it was cleaned up; its last status stays."""
    with job_process("job") as process, following() as follower:
        process.kill()
        until(lambda: follower.state == "dead")
        cleanup()
        until(lambda: not (jobs_dir / "job").exists())
        assert follower.state == "dead" and follower.status["global_step"] and "pid" in follower.problem
        with job_process("job"):
            until(lambda: follower.state == "live" and follower.problem is None)
