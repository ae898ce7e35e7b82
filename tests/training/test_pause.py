"""A pause of a real loop: it holds at one step, carries out commands, and ends as it should."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from forgather_control import TrainingJob, connect
from forgather_control.errors import CommandRefused

from ..support.harness import MS, SOON, until

JOB = "held"


class Loop:
    """A plain loop on a thread of its own."""

    def __init__(self, tmp_path, **options):
        self.path, self.step, self.options, self.error = tmp_path / "checkpoint", 0, options, None
        self.changed = threading.Event()
        self.thread = threading.Thread(target=self.train)
        self.ready = threading.Event()

    def train(self):
        """Train until a client says stop."""
        with TrainingJob(JOB, **self.options) as job:
            job.setting("speed", get=lambda: 1.0, set=lambda value: None)
            job.setting("twice", get=lambda: 2 * self.step, set=lambda value: None)
            self.ready.set()
            while not job.should_stop:
                self.changed.wait(1 * MS)
                self.step += 1
                job.step(self.step)
                if job.should_evaluate:
                    job.evaluated({"loss": 1.0})
                if job.should_save:
                    self.path.touch()
                    job.saved(self.path)

    def __enter__(self):
        self.thread.start()
        assert self.ready.wait(SOON)
        return self

    def __exit__(self, *exc):
        with connect(JOB) as client:
            client.call("abort")
        self.thread.join(SOON)
        assert not self.thread.is_alive()


@pytest.fixture
def loop(tmp_path, jobs_dir):
    """A loop that trains."""
    with Loop(tmp_path) as loop:
        yield loop


@pytest.fixture
def client(loop):
    """A client of it."""
    with connect(JOB) as client:
        yield client


def pause(client, **params):
    """Pause, and return the step at which the job holds."""
    record = client.call("pause", wait="finished", **params)
    until(lambda: client.call("status")["status"] == "paused")
    return record["applied_at_step"]


def test_training_holds_until_it_is_resumed(loop, client):
    """At the step of the record; pausing again changes nothing."""
    step = pause(client)
    assert loop.step == step == client.call("status")["global_step"]
    assert client.call("pause", wait="finished")["state"] == "finished" and loop.step == step
    assert client.call("resume", wait="finished")["state"] == "finished"
    until(lambda: loop.step > step + 3)
    assert client.call("resume", wait="finished")["state"] == "finished"
    assert client.call("status")["status"] == "training"


def test_commands_work_meanwhile_and_leave_it_paused(loop, client):
    """A save and an evaluation take at most one step each."""
    step = pause(client)
    assert client.call("save_checkpoint", wait="finished")["result"]["path"] == str(loop.path)
    until(lambda: client.call("status")["status"] == "paused")
    assert client.call("evaluate", wait="finished")["result"]["metrics"] == {"loss": 1.0}
    until(lambda: client.call("status")["status"] == "paused")
    changed = client.call("change_settings", changes={"speed": 2}, wait="finished")
    assert changed["result"]["speed"]["new"] == 2.0 and loop.step <= step + 2
    assert client.call("list_settings")[0]["value"] == 1.0


def test_settings_are_those_of_the_step_at_which_it_holds(loop, client):
    """Though no step ends that would read them."""
    step = pause(client)
    assert client.call("list_settings")[1]["value"] == 2 * step


@pytest.mark.parametrize("command", ["graceful_stop", "save_and_stop", "abort"])
def test_a_paused_job_can_be_ended(tmp_path, jobs_dir, command):
    """Without a further step."""
    loop = Loop(tmp_path, save_on_stop=False)
    loop.thread.start()
    assert loop.ready.wait(SOON)
    with connect(JOB) as client:
        step = pause(client)
        assert client.call(command, wait="finished")["state"] == "finished"
    loop.thread.join(SOON)
    assert not loop.thread.is_alive() and loop.step == step


def test_it_resumes_by_itself(loop, client):
    """After the given time; the record of that resume is listed."""
    step = client.call("pause", seconds=30 * MS, wait="finished")["applied_at_step"]
    until(lambda: loop.step > step)
    *_, pause, resume = client.call("list_commands")
    assert (pause["command"], resume["command"], resume["reason"]) == (
        *("pause", "resume"),
        "the time of the pause is over",
    )
    assert resume["requested_by"] == {"via": "rule", "uid": None, "user": None, "pid": None, "program": None}


def test_a_later_pause_sets_the_time_anew(loop, client):
    """Without one it holds for as long as it takes."""
    client.call("pause", seconds=3600, wait="finished")
    step = pause(client, seconds=20 * MS)
    until(lambda: loop.step > step)


def test_speed_and_time_left_ignore_it(loop, client):
    """The pause is not part of them."""
    until(lambda: client.call("status")["steps_per_second"] is not None and loop.step > 20)
    pause(client)
    before = client.call("status")["steps_per_second"]
    until(lambda: client.call("status")["seconds_since_step"] > 300 * MS)
    assert client.call("status")["steps_per_second"] == before
    client.call("resume", wait="finished")
    step = loop.step
    until(lambda: loop.step > step + 2)
    assert client.call("status")["steps_per_second"] > before / 2


def test_events_tell_of_it(loop, client):
    """The phase is published, and the last one is training again."""
    pause(client)
    client.call("resume", wait="finished")
    until(lambda: client.call("status")["status"] == "training")
    with connect(JOB) as other:
        phases = []
        for event in other.events(since=0, kinds=["phase"]):
            phases.append(event["phase"])
            if phases[-2:] == ["paused", "training"]:
                break


def test_a_signal_ends_it(tmp_path, jobs_dir, monkeypatch):
    """A signal handler takes no lock, so its command is found within a fraction of a second."""
    steps = []
    with TrainingJob(JOB, signals={"SIGUSR1": "graceful_stop"}, save_on_stop=False) as job:
        held = threading.Event()

        def act():
            with connect(JOB) as client:
                pause(client)
                held.set()
                os.kill(os.getpid(), signal.SIGUSR1)

        thread = threading.Thread(target=act)
        thread.start()
        while not job.should_stop:
            held.wait(1 * MS)
            steps.append(len(steps) + 1)
            job.step(steps[-1])
    thread.join(SOON)
    assert held.is_set() and steps


def test_ctrl_c_ends_it(jobs_dir):
    """As it ends training."""
    with pytest.raises(KeyboardInterrupt), TrainingJob(JOB) as job:

        def act():
            with connect(JOB) as client:
                pause(client)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=act)
        thread.start()
        step = 0
        while True:
            thread.join(1 * MS)
            step += 1
            job.step(step)
    thread.join(SOON)


def test_a_run_that_cannot_be_paused_refuses_it():
    """Where ranks poll; also the pause of a signal, which nothing has checked before."""
    from forgather_control.training.loop_actions import RequestedActions

    loop = RequestedActions(no_pause="the ranks poll")
    assert loop.cannot("pause", {}) == "the ranks poll"
    with pytest.raises(CommandRefused, match="the ranks poll"):
        loop.request_pause()
    assert not loop.paused
