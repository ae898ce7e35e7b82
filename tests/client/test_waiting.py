"""Waiting for a condition on a real job: what holds, what ends a wait, and what is judged from outside."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import nullcontext

import pytest

from forgather_control import CommandRefused, DeadlinePassed, InvalidParams, cleanup, connect
from forgather_control.client import limits, target
from forgather_control.client.waiting import Waiter, parse

from ..support.harness import MS, SOON, job_process, running_loop, until

pytestmark = pytest.mark.once


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Look often."""
    monkeypatch.setattr(limits, "LOOK_PERIOD", 10 * MS)


def waiter(text="ended", job="job"):
    """One for a job."""
    return Waiter(target.resolve(job), parse(text))


class Background:
    """A wait in a thread."""

    def __init__(self, text, job="job", timeout=SOON):
        self.waiter, self.timeout, self.outcome = waiter(text, job), timeout, None
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def pause(self):
        """Have it look no more."""
        looked, self.paused = threading.Event(), threading.Event()
        look = self.waiter._look

        def held():
            looked.set()
            assert self.paused.wait(SOON)
            return look()

        self.waiter._look = held
        assert looked.wait(SOON)

    def go_on(self):
        """Have it look again."""
        self.paused.set()

    def run(self):
        """Keep what it returns, or raises."""
        try:
            self.outcome = self.waiter.wait(self.timeout)
        except Exception as err:
            self.outcome = err

    def end(self):
        """The outcome, once there is one."""
        self.thread.join(SOON)
        assert not self.thread.is_alive()
        return self.outcome


@pytest.mark.parametrize(
    "text", ["step >= 5", "hours > 0 and step > 0", "loss < 0.5 for 2", "step >= 5 or loss is nan"]
)
def test_it_returns_when_the_condition_holds(jobs_dir, text):
    """While the job trains on."""
    with running_loop():
        outcome = waiter(text).wait(SOON)
        assert outcome.holds and outcome.state == "live" and outcome.step is not None


def test_every_logged_value_counts_once(jobs_dir):
    """Also those between two looks; the one that is there when the wait begins is the first."""
    with running_loop(step_seconds=1 * MS) as run:
        until(lambda: run.steps > 3)
        outcome = waiter("loss > 0 for 30").wait(SOON)
        assert outcome.holds and outcome.step >= 30


def test_the_end_of_the_job_ends_every_wait(jobs_dir):
    """With the condition, or without it."""
    with running_loop():
        waits = [Background("step < 0"), Background("ended"), Background("ended or dead"), Background("dead")]
        until(lambda: all(each.waiter.status for each in waits))
        with connect("job") as client:
            client.call("graceful_stop")
        assert [(each.end().holds, each.end().state) for each in waits] == [
            (False, "ended"), (True, "ended"), (True, "ended"), (False, "ended"),
        ]  # fmt: skip


def test_a_job_that_is_killed_is_dead(jobs_dir):
    """As its directory and its process tell; a wait that begins later sees it at once."""
    with job_process("job") as process:
        waits = [Background("ended"), Background("stalled or dead")]
        until(lambda: all(each.waiter.status for each in waits))
        process.kill()
        assert [(each.end().holds, each.end().state) for each in waits] == [(False, "dead"), (True, "dead")]
    assert waiter("dead").wait(SOON).holds


def test_a_stopped_job_has_stalled(jobs_dir, monkeypatch):
    """It does not answer, and its steps do not come; judged from here."""
    monkeypatch.setattr(limits, "STALLED_AFTER", 1.0)
    monkeypatch.setattr(limits, "LOOK_TIMEOUT", 50 * MS)
    with job_process("job") as process:
        found = Background("stalled")
        until(lambda: found.waiter.status.get("steps_per_second") and (jobs_dir / "job" / "status.json").exists())
        os.kill(process.pid, signal.SIGSTOP)
        try:
            assert found.end().holds
            later = waiter("stalled > 0.01").wait(SOON)
            assert later.holds and later.state == "silent" and later.step is not None
        finally:
            os.kill(process.pid, signal.SIGCONT)


def test_a_paused_job_has_not_stalled(jobs_dir):
    """However long it takes."""
    with running_loop():
        with connect("job") as client:
            client.call("pause", wait="finished")
            until(lambda: client.call("status")["seconds_since_step"] > 50 * MS)
            with pytest.raises(DeadlinePassed, match=r"the condition does not hold after 0\.05 s"):
                waiter("stalled > 0.01").wait(50 * MS)
            client.call("resume", wait="finished")


def test_a_save_may_take_longer(jobs_dir):
    """Ten times as long as a step."""
    found = waiter_without_job()
    found.status = {"status": "saving", "steps_per_second": 0.1}
    assert found._usual_limit() == 1000
    found.status = {"status": "training", "steps_per_second": 100.0}
    assert found._usual_limit() == 60


def waiter_without_job(text="ended"):
    """One that is not asked to wait."""
    with running_loop():
        return waiter(text)


def test_what_only_a_device_knows_cannot_be_waited_for(jobs_dir):
    """It says so at once."""
    with running_loop() as run:
        run.job.log(odd="text")
        with pytest.raises(CommandRefused, match="odd is logged as a tensor of a device, or as no number"):
            waiter("odd > 1").wait(SOON)


def test_it_gives_up(jobs_dir):
    """In time, and says how far the job is."""
    with running_loop(), pytest.raises(DeadlinePassed, match="job is at step"):
        waiter("step < 0").wait(20 * MS)


@pytest.mark.parametrize("how", ["killed", "ended"])
def test_a_job_may_end_between_two_questions(jobs_dir, how):
    """After it has answered its status, and before it is asked for its metrics."""
    with job_process("job") as process:
        found = waiter("loss < 0")
        history = found._history

        def late(client):
            if found.status["global_step"] is None:
                return history(client)
            if how == "killed":
                process.kill()
            else:
                with connect("job") as other:
                    other.call("graceful_stop", wait="finished")
                process.end()
            return history(client)

        found._history = late
        outcome = found.wait(SOON)
        assert (outcome.holds, outcome.state) == (False, "dead" if how == "killed" else "ended")


@pytest.mark.parametrize("again", [False, True], ids=["cleaned up", "started again"])
def test_a_killed_job_stays_killed(jobs_dir, again):
    """Also when what is left of it was moved away, and its id used again; as one that ended stays ended."""
    with job_process("job") as process:
        killed = [Background(text) for text in ("dead", "ended")]
        until(lambda: all(each.waiter.status for each in killed))
        for each in killed:
            each.pause()
        process.kill()
    cleanup()
    assert not (jobs_dir / "job").exists()
    with job_process("job") if again else nullcontext():
        for each in killed:
            each.go_on()
        assert [(each.end().holds, each.end().state) for each in killed] == [(True, "dead"), (False, "dead")]


def test_a_job_without_a_history(jobs_dir, monkeypatch):
    """Of an older job, a value that did not change between two looks was not logged again, as far as is known."""
    found = waiter_without_job("loss > 0 for 2")
    found._has_history = False
    told = []
    for loss in (1.0, 1.0, 1.0, 0.5):
        found.status = {"metrics": {"loss": loss, "other": 3}}
        found._points = found._history(None)
        told.append(found._feed("live"))
    assert told == [False, False, False, True]


def test_a_job_that_is_started_again_is_another_one(jobs_dir):
    """The run that was waited for is over."""
    with job_process("job") as process:
        found = Background("ended")
        until(lambda: found.waiter.status)
        process.kill()
        with job_process("job"):
            assert (found.end().holds, found.end().state) == (False, "dead")


@pytest.mark.parametrize("text", ["", "stalled >", "ended dead", "live", "paused"])
def test_wrong_conditions(text):
    """With what was expected."""
    with pytest.raises(InvalidParams, match="needs"):
        parse(text)


@pytest.mark.parametrize("text", ["ended", "stalled or dead", "stalled > 600", "dead and step > 3", "stalled for 2"])
def test_words_that_stand_alone(text):
    """Beside other terms."""
    assert parse(text).terms
