"""The controller: when a command is over, what status tells, what happens at the end, after a fork, after damage."""

from __future__ import annotations

import gc
import logging
import os
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

import forgather_control
from forgather_control import errors
from forgather_control.ranks import limits as rank_limits
from forgather_control.server import limits
from forgather_control.training import limits as training_limits
from forgather_control.training.controller import Controller
from forgather_control.training.loop_actions import RequestedActions
from forgather_control.training.options import ControlOptions
from forgather_control.wire.methods import COMMON, Method

from ..support.harness import MS, SOON, Process, Wire, needs_torch, remove_folder, running_loop, until
from ..support.ranks_groups import one_of_two


@pytest.fixture
def job():
    """A published controller whose training thread is this one."""
    controller = Controller(ControlOptions("job"), RequestedActions(), step=0, max_steps=100)
    controller.start()
    yield controller
    controller.close()


@pytest.fixture
def wire(job, jobs_dir):
    with Wire(jobs_dir / "job" / "control.sock") as wire:
        yield wire


def give(wire: Wire, method: str, **params) -> dict:
    return wire.call(method, params)["result"]


def test_status_has_what_the_contract_names(job, wire):
    """Before the first step: starting, and nothing invented."""
    status = give(wire, "status")
    assert status.keys() >= {
        "job_id", "status", "global_step", "epoch", "max_steps", "metrics", "progress", "steps_per_second",
        "eta_seconds", "seconds_since_step", "host", "pid", "world_size", "started_at", "commands", "rss_bytes",
        "cpu_percent", "device", "device_memory_bytes", "device_memory_reserved_bytes",
    }  # fmt: skip
    assert (status["job_id"], status["status"], status["global_step"]) == ("job", "starting", 0)
    assert (status["host"], status["pid"], status["world_size"]) == (socket.gethostname(), os.getpid(), 1)
    assert status["steps_per_second"] is status["eta_seconds"] is status["seconds_since_step"] is None
    assert abs(status["rss_bytes"] - psutil.Process().memory_info().rss) < 64 << 20


def test_status_follows_the_steps(job, wire):
    """Progress between 0 and 1, speed and time left from the recent steps, the age of the last one."""
    begin = time.monotonic()
    for step in range(1, 11):
        job.phase = "training"
        time.sleep(10 * MS)
        job.step(step, epoch=step / 5)
    status = give(wire, "status")
    took = time.monotonic() - begin
    assert (status["global_step"], status["epoch"], status["progress"]) == (10, 2.0, 0.1)
    assert 9 / took * 0.9 < status["steps_per_second"] < 1 / (10 * MS)
    assert status["eta_seconds"] == pytest.approx(90 / status["steps_per_second"])
    assert 0 <= status["seconds_since_step"] < SOON


def test_logged_names_never_overwrite_ours(job, wire):
    """ "status" and "job_id" as metrics stay metrics; NaN travels as a string."""
    job.log({"job_id": 1, "status": float("nan"), "loss": float("-inf")})
    job.log({"eval_loss": 0.5})
    status = give(wire, "status")
    assert (status["job_id"], status["status"]) == ("job", "starting")
    assert status["metrics"] == {"job_id": 1, "status": "NaN", "loss": "-Infinity", "eval_loss": 0.5}


@pytest.mark.parametrize("phase", ["starting", "training", "evaluating", "saving"])
def test_the_word_is_stopping_only_between_the_steps(job, wire, phase):
    """While a stop is applied a save or an evaluation is still called by its name."""
    give(wire, "graceful_stop")
    job.phase = phase
    assert give(wire, "status")["status"] == phase
    job.step(1)
    assert give(wire, "status")["status"] == ("stopping" if phase == "training" else phase)


def test_all_pending_commands_are_applied_at_one_step_in_order(job, wire):
    """Ten saves are one, a stop comes after it, and each record names the step."""
    ids = {give(wire, "save_checkpoint")["command_id"] for _ in range(10)}
    give(wire, "save_checkpoint", command_id="mine")
    give(wire, "graceful_stop")
    job.step(5)
    assert len(ids) == 1 and job._loop.save and job._loop.stop
    records = give(wire, "list_commands")
    assert [record["command"] for record in records] == ["save_checkpoint", "save_checkpoint", "graceful_stop"]
    assert {record["applied_at_step"] for record in records} == {5}


def test_one_save_finishes_all_that_wait_for_it(job, wire, tmp_path):
    """Two saves of one step share the checkpoint; a later one waits for its own."""
    give(wire, "save_checkpoint", command_id="a")
    give(wire, "save_checkpoint", command_id="b")
    job.step(1)
    give(wire, "save_checkpoint", command_id="late")
    job.saved(1, str(tmp_path))
    states = {record["command_id"]: record["state"] for record in give(wire, "list_commands")}
    assert states == {"a": "finished", "b": "finished", "late": "accepted"}


def test_status_shows_what_is_pending_and_the_last_few(job, wire, tmp_path):
    """A hundred finished commands do not make status a hundred records long."""
    for step in range(1, 101):
        give(wire, "save_checkpoint", command_id=f"save-{step}")
        job.step(step)
        job.saved(step, str(tmp_path))
    give(wire, "graceful_stop")
    shown = give(wire, "status")["commands"]
    assert [record["command_id"] for record in shown[:-1]] == [f"save-{step}" for step in range(96, 101)]
    assert shown[-1]["state"] == "accepted"


def test_requests_in_the_last_moment_are_answered(job, jobs_dir):
    """Waiting, just sent, and still in the backlog: each gets an answer when training ends."""
    path = jobs_dir / "job" / "control.sock"
    waiting, late = Wire(path), [Wire(path) for _ in range(20)]
    waiting.send(b'{"jsonrpc":"2.0","id":1,"method":"save_checkpoint","params":{"wait":"finished"}}\n')
    until(lambda: job.state.events.next_seq > 3)
    for client in late:
        client.send(b'{"jsonrpc":"2.0","id":1,"method":"save_checkpoint","params":{"wait":"applied"}}\n')
    job.close()
    assert waiting.reply()["result"]["state"] == "failed"
    for client in late:
        answer = client.reply()
        known = answer["result"]["state"] == "failed" if "result" in answer else answer["error"]["code"] == -32006
        assert known, answer
        assert client.line() == b""
        client.close()
    waiting.close()


@pytest.mark.parametrize(
    ("fault", "other_thread", "seconds"), [(None, False, 7.0), ("broken", False, 3.0), (None, True, 3.0)]
)
def test_how_long_the_end_waits_for_other_ranks(jobs_dir, fault, other_thread, seconds):
    """As long as close_timeout says; less where training continues, or on the server thread. The job stays listed."""
    job = Controller(ControlOptions("job", close_timeout=7.0), RequestedActions())
    job.start()
    waits = []

    def close(seconds, fault):
        waits.append((round(seconds), (jobs_dir / "job" / "endpoint.json").exists(), job.state.status))

    job._group.close = close
    closing = threading.Thread(target=job.close, args=(None, fault))
    if other_thread:
        closing.start()
        closing.join(SOON)
    else:
        closing.run()
    assert waits == [(seconds, True, "starting")] and not (jobs_dir / "job").exists()


def test_ctrl_c_ends_the_wait(job, jobs_dir):
    """It is raised, after every command has its last state and the directory is gone."""

    def close(seconds, fault):
        raise KeyboardInterrupt

    job._group.close = close
    with Wire(jobs_dir / "job" / "control.sock") as wire:
        wire.send(b'{"jsonrpc":"2.0","id":1,"method":"save_and_stop","params":{"wait":"finished"}}\n')
        until(lambda: job.pending)
        job.step(1)
        with pytest.raises(KeyboardInterrupt):
            job.close()
        assert wire.reply()["result"]["state"] == "failed" and not (jobs_dir / "job").exists()


def test_an_idle_client_does_not_delay_the_end(job, jobs_dir, monkeypatch):
    """200 connections that send nothing, and one that reads nothing, do not delay the end of training."""
    monkeypatch.setattr(training_limits, "CLOSE_TIMEOUT", SOON)  # else that would end a wait for them
    with ExitStack() as stack:
        clients = [stack.enter_context(Wire(jobs_dir / "job" / "control.sock")) for _ in range(200)]
        clients[0].send(b'{"jsonrpc":"2.0","id":1,"method":"rpc.discover"}\n' * 200)
        begin = time.monotonic()
        job.close()
        assert time.monotonic() - begin < SOON / 2


@pytest.mark.once
@pytest.mark.parametrize("victim", ["control.sock", "endpoint.json", "."])
def test_what_is_deleted_under_a_live_job_comes_back(victim, jobs_dir, caplog):
    """The socket, the record, or the whole directory: restored within seconds, and found again."""
    with running_loop() as run, Wire(jobs_dir / "job" / "control.sock") as old:
        path = jobs_dir / "job" / victim
        remove_folder(path) if victim == "." else path.unlink()
        until(lambda: [job.state for job in forgather_control.list_jobs()] == ["live"], 5 * limits.TICK_PERIOD)
        assert forgather_control.get_job_status("job")["pid"] == os.getpid()
        old.still_answers()
        assert run.thread.is_alive()
    assert sorted(path.name for path in jobs_dir.iterdir()) == [".ended", ".lock"]
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "Restored the job directory, which was damaged."
    ]


@pytest.mark.once
def test_an_id_that_was_taken_over_is_left_to_the_other(jobs_dir, caplog):
    """The first job logs once that its id is taken, and removes nothing when it ends."""
    with running_loop():
        remove_folder(jobs_dir / "job")
        source = """
        import sys
        from forgather_control import TrainingJob
        with TrainingJob("job") as job:
            print(job._controller is not None, flush=True)
            sys.stdin.readline()
        """
        with Process(source) as other:
            if other.line() != "True":
                pytest.skip("the first job was faster, and restored its directory")
            until(
                lambda: any("is in use by pid" in record.getMessage() for record in caplog.records),
                5 * limits.TICK_PERIOD,
            )
            assert forgather_control.get_job_status("job")["pid"] == other.pid
            other.say("")
            assert other.end() == 0


def test_a_forked_child_is_no_part_of_it(jobs_dir):
    """A child neither keeps the socket open after its parent's death, nor removes the job when it exits."""
    source = """
    import os, sys, time
    from forgather_control import TrainingJob
    with TrainingJob("job") as job:
        leaves = os.fork()
        if leaves == 0:
            job.step(1)
            sys.exit(0)
        os.waitpid(leaves, 0)
        stays = os.fork()
        if stays == 0:
            os.set_inheritable(1, False)
            time.sleep(600)
            os._exit(0)
        print(stays, flush=True)
        time.sleep(600)
    """
    with Process(source) as parent:
        child = int(parent.line())
        try:
            assert forgather_control.get_job_status("job")["pid"] == parent.pid
            parent.kill()
            assert [job.state for job in forgather_control.list_jobs()] == ["dead"]
            with pytest.raises(ConnectionRefusedError):
                Wire(jobs_dir / "job" / "control.sock")
            assert psutil.pid_exists(child)
        finally:
            os.kill(child, 9)


def test_a_forked_child_needs_no_lock_that_another_thread_held():
    """Such a lock stays locked in the child for ever: its steps, phases and signals do without."""
    source = """
    import os
    from forgather_control import TrainingJob
    with TrainingJob("job") as job:
        controller = job._controller
        with controller._queue._lock, controller.state.events._lock:
            child = os.fork()
            if child == 0:
                controller.request("abort")
                controller.phase = "saving"
                job.step(1)
                os._exit(0)
        print(os.waitpid(child, 0)[1], flush=True)
    """
    with Process(source) as parent:
        assert parent.line() == "0"


@needs_torch
def test_a_dataloader_with_workers_trains_beside_it():
    """Workers come and go by fork; the job stays live, and stays theirs not."""
    source = """
    import torch
    from forgather_control import TrainingJob, get_job_status
    with TrainingJob("job") as job:
        for epoch in range(2):
            for step, batch in enumerate(torch.utils.data.DataLoader(torch.arange(64.0), 8, num_workers=2), 1):
                job.step(step)
            print(get_job_status("job")["global_step"], flush=True)
    """
    with Process(source) as process:
        assert [process.line(), process.line()] == ["8", "8"], process.errors
        assert process.end() == 0


def test_a_controller_that_is_forgotten_ends(jobs_dir):
    """A training object that is dropped without a word takes its job with it."""
    job = forgather_control.TrainingJob("job").__enter__()
    assert (jobs_dir / "job").exists()
    del job
    gc.collect()
    assert not (jobs_dir / "job").exists()


def test_a_start_that_fails_leaves_nothing(monkeypatch, jobs_dir):
    """No thread to be had: the directory goes again, and the descriptors do."""
    Controller(ControlOptions("warm-up"), RequestedActions())
    files = len(os.listdir("/proc/self/fd"))

    start = threading.Thread.start

    def no_thread(self) -> None:
        if self.name == refused:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    for refused in ("forgather-disk", "forgather-control"):  # noqa: B007 - read by no_thread
        with pytest.raises(RuntimeError):
            Controller(ControlOptions("job"), RequestedActions()).start()
        assert not (jobs_dir / "job").exists()
        assert len(os.listdir("/proc/self/fd")) == files


@needs_torch
def test_a_rank_that_never_joins(monkeypatch, jobs_dir, caplog):
    """It is named, commands fail and are refused with that reason, one warning says so; training continues."""
    monkeypatch.setattr(rank_limits, "JOIN_TIMEOUT", 0.2)
    with one_of_two(), caplog.at_level(logging.WARNING), forgather_control.TrainingJob("job") as job:
        with Wire(jobs_dir / "job" / "control.sock") as wire:
            record = give(wire, "graceful_stop")
            assert record["state"] == "accepted" and give(wire, "status")["ranks_not_joined"] == [1]
            assert [row["state"] for row in give(wire, "ranks")] == ["answering", "never joined"]
            until(lambda: give(wire, "list_commands")[0]["state"] == "failed")
            failed = give(wire, "get_command", command_id=record["command_id"])
            assert "rank 1 never joined" in failed["error"]["message"]
            refused = wire.call("abort")["error"]
            assert refused["code"] == errors.CommandRefused.code and "rank 1 never joined" in refused["message"]
        job._controller.submit("save_checkpoint")
        for step in range(1, 5):
            job.step(step)
        assert not job.should_stop and not job.should_save
    warnings = [entry.getMessage() for entry in caplog.records]
    assert len(warnings) == 2 and "rank 1 never joined" in warnings[0]
    assert warnings[1].startswith("Ignored the signal for save_checkpoint: rank 1 never joined")


@needs_torch
def test_a_job_that_is_opened_before_the_process_group(jobs_dir, caplog):
    """Its first step ends control with one warning, before it applies a command to this rank alone."""
    with caplog.at_level(logging.WARNING), forgather_control.TrainingJob("job") as job:
        path = jobs_dir / "job" / "control.sock"
        with one_of_two(), Wire(path) as wire:
            wire.send(b'{"jsonrpc":"2.0","id":1,"method":"graceful_stop","params":{"wait":"finished"}}\n')
            until(lambda: job._controller._queue.pending)
            job.step(1)
            error = wire.reply()["result"]["error"]
            assert "init_process_group was not called before" in error["message"]
        job.step(2)
        assert not job.should_stop and not (jobs_dir / "job").exists()
    (warning,) = caplog.records
    assert "this process is one of 2 ranks, but torch.distributed.init_process_group" in warning.getMessage()
    assert warning.exc_info is None


def test_closing_twice_is_closing_once(job, jobs_dir):
    """And a closed controller refuses, calmly."""
    job.close()
    job.close("again")
    with pytest.raises(errors.JobEnding):
        job._queue.submit("abort")


def test_a_start_in_an_unusable_place_is_one_sentence(monkeypatch):
    """A file where the jobs directory should be, and a place that cannot be made."""
    for place in ("/dev/null/jobs", str(Path(__file__) / "jobs"), "/proc/nowhere"):
        monkeypatch.setenv("FORGATHER_JOBS_DIR", place)
        with pytest.raises(errors.JobsDirUnusable, match=place.split("/")[1]):
            Controller(ControlOptions("job"), RequestedActions()).start()


def test_methods_are_fixed_at_the_first_step(job):
    """Before it a method can be added, after it no more."""
    job.methods.add(Method("user.one", "One.", COMMON, "CommandRecord", lambda loop: None, frozenset({"applied"})))
    job.step(1)
    with pytest.raises(ValueError, match="fixed at the first step"):
        job.methods.add(Method("user.two", "Two.", COMMON, "CommandRecord", lambda loop: None, frozenset({"applied"})))


def _start(job_id="job"):
    controller = Controller(ControlOptions(job_id), RequestedActions(), step=0, max_steps=100)
    controller.start()
    return controller


def test_a_run_begun_again_on_its_thread_ends_the_earlier_one(job, jobs_dir):
    """A cell of a notebook was interrupted and is run again: what waits for the old run fails with that reason."""
    with Wire(jobs_dir / "job" / "control.sock") as wire:
        wire.send(b'{"jsonrpc":"2.0","id":1,"method":"save_checkpoint","params":{"wait":"applied"}}\n')
        until(lambda: job.pending)
        again = _start()
        assert "training was started again under this job id" in wire.reply()["result"]["error"]["message"]
    with Wire(jobs_dir / "job" / "control.sock") as wire:
        assert give(wire, "save_checkpoint")["state"] == "accepted" and again.pending
    job.close()
    assert (jobs_dir / "job" / "endpoint.json").exists(), "the earlier run removes nothing of the later one"
    again.close()
    assert not (jobs_dir / "job").exists()


def test_a_run_whose_thread_is_dead_gives_its_id_away(jobs_dir):
    """Also before the tick that notices it; a run of another id, or of a thread that lives, is left alone."""
    started = []
    thread = threading.Thread(target=lambda: started.append(_start()))
    thread.start()
    thread.join(SOON)
    other, again = _start("other"), _start()
    assert not other.closed and started[0].closed
    leave, taken = threading.Event(), threading.Event()

    def hold():
        mine = _start("held")
        taken.set()
        leave.wait(SOON)
        mine.close()

    holder = threading.Thread(target=hold)
    holder.start()
    assert taken.wait(SOON)
    with pytest.raises(errors.JobIdTaken):
        _start("held")
    leave.set()
    holder.join(SOON)
    for one in (other, again):
        one.close()


@pytest.mark.once
def test_when_the_trainers_call_has_gone_the_run_has_ended(jobs_dir):
    """Whatever still refers to the trainer: status says it at once, commands are refused, and the id is free soon."""
    space = {"__name__": "transformers.trainer", "start": _start}
    exec("def train(then):\n    job = start()\n    then(job)\n    return job", space)
    during = []

    def ask(job):
        with Wire(jobs_dir / "job" / "control.sock") as wire:
            during.append(give(wire, "status")["status"])

    job = space["train"](ask)
    assert during == ["starting"]
    with Wire(jobs_dir / "job" / "control.sock") as wire:
        assert give(wire, "status")["status"] == "ended"
        assert "training ended by an exception" in wire.call("save_checkpoint")["error"]["message"]
    until(lambda: job.closed and not (jobs_dir / "job").exists())


def test_a_training_inside_another_does_not_end_it(jobs_dir):
    """The outer trainer's call is executed: the inner run of the same id is refused, on the same thread, too."""
    space = {"__name__": "transformers.trainer", "start": _start}
    exec("def train(then):\n    job = start()\n    then()\n    return job", space)

    def inner():
        with pytest.raises(errors.JobIdTaken):
            _start()

    job = space["train"](inner)
    assert not job.closed
    job.close()
