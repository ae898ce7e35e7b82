"""Following a real job on a thread: what it says of a job that ended, was killed, or began again."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from forgather_control import cleanup, connect
from forgather_control.client import following as following_module
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
        assert follower.status["global_step"] == follower.events[-1]["step"]


def test_the_last_step_is_known_though_no_progress_told_of_it():
    """A job that has done all of its steps is not shown as one that lacks the last ones."""
    follower = Follower(lambda: None, threading.Event())
    follower.status = {"global_step": 98, "max_steps": 100, "progress": 0.98}
    follower._apply({"kind": "ended", "step": 100, "reason": None})
    assert follower.status == {"global_step": 100, "max_steps": 100, "progress": 1.0}


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


def test_a_value_that_was_not_logged_anew_is_no_point():
    """An event of metrics has the last values of all of them."""
    follower = Follower(lambda: None, threading.Event())
    for step, loss in ((1, 0.5), (2, 0.25)):
        follower._apply({"kind": "metrics", "time": 0.0, "step": step, "metrics": {"loss": loss, "eval_loss": 1.0}})
    assert follower.history == {"loss": [[1, 0.0, 0.5], [2, 0.0, 0.25]], "eval_loss": [[1, 0.0, 1.0]]}


def test_times_advance_between_events(monkeypatch):
    """Of the last step and of an evaluation: a batch of it is no step, and the next phase ends it."""
    now = [100.0]
    monkeypatch.setattr(following_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    follower = Follower(lambda: None, threading.Event())
    follower._apply({"kind": "progress", "step": 5})
    now[0] += 3
    follower._apply({"kind": "phase", "phase": "evaluating"})
    now[0] += 4
    assert follower.present()["evaluation"]["seconds"] == 4
    evaluation = {"seconds": 4.0, "batches": 1, "total_batches": 2, "eta_seconds": 4.0}
    follower._apply({"kind": "progress", "step": 5, "evaluation": evaluation})
    now[0] += 1
    assert follower.present()["evaluation"] == {**evaluation, "seconds": 5, "eta_seconds": 3}
    assert follower.present()["seconds_since_step"] == 8
    now[0] += 9
    assert follower.present()["evaluation"]["eta_seconds"] == 0
    follower._apply({"kind": "phase", "phase": "training"})
    assert not follower.present()["evaluation"] and follower.present()["seconds_since_step"] == 17
