"""Your own loop: its flags, its reports, and that nothing raises into it."""

from __future__ import annotations

import asyncio
import copy
import gc
import logging
import os
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import forgather_control
from forgather_control import TrainingJob, connect, errors
from forgather_control.server import limits
from forgather_control.training.limits import MAX_NAMES

from ..support.harness import MS, SOON, Process, Wire, needs_torch, running_loop, until


def give(job: TrainingJob, name: str, **params) -> forgather_control.CommandRecord:
    """Send a command to a job whose loop stands still in this very thread, and return its record."""
    with forgather_control.connect(job.job_id) as client:
        return forgather_control.CommandRecord.from_json(client.call(name, **params))


def state(job: TrainingJob, record: forgather_control.CommandRecord) -> forgather_control.CommandRecord:
    return forgather_control.get_command(job.job_id, record.command_id)


def test_flags_are_down_until_a_step_has_ended():
    """A command is applied at the end of a step, never in between, and names that step."""
    with TrainingJob("job") as job:
        record = give(job, "save_and_stop")
        assert not (job.should_save or job.should_stop or job.aborted)
        job.step(1)
        assert job.should_save and job.should_stop and not job.aborted
        assert state(job, record).applied_at_step == 1


def test_commands_before_the_first_step_are_kept():
    """From the moment the job can be found a command is accepted, and the first step applies it."""
    with TrainingJob("job") as job:
        records = [give(job, name) for name in ("save_checkpoint", "graceful_stop")]
        job.step(1)
        assert [state(job, record).applied_at_step for record in records] == [1, 1]


def test_a_stop_asks_for_one_save_of_its_last_step(tmp_path):
    """should_save comes with should_stop, once; the stop names the checkpoint, or fails where it was not written."""
    for path, state_wanted in ((tmp_path, "finished"), (tmp_path / "missing", "failed")):
        with TrainingJob("job") as job:
            record = give(job, "graceful_stop")
            assert not job.should_save and forgather_control.get_job_status("job")["stop_saves"]
            job.step(5)
            assert job.should_save and job.should_stop
            job.saved(path)
            assert not job.should_save and job.should_stop
            job.step(6)  # a loop that does not end at once
            assert not job.should_save and job.should_stop
            with forgather_control.connect("job") as client:
                events = client.events(kinds=["command"])
                job.__exit__(None, None, None)
                last = [event for event in events if event["kind"] == "command"][-1]
        assert (last["command_id"], last["state"]) == (record.command_id, state_wanted), last
        assert last["result"]["path"] == (str(tmp_path) if state_wanted == "finished" else None)


def test_a_stop_that_saves_nothing_says_so_before():
    """With save_on_stop=False there is no save; status and the answer say so, but not those of save_and_stop."""
    with TrainingJob("job", save_on_stop=False) as job, forgather_control.connect("job") as client:
        assert client.call("status")["stop_saves"] is False
        why = "nothing will be saved: this loop has save_on_stop=False"
        assert client.call("graceful_stop")["note"] == why
        assert "note" not in client.call("save_and_stop", command_id="both")
        assert client.call("cancel_command", command_id="both")["state"] == "cancelled"
        job.step(1)
        assert job.should_stop and not job.should_save


@pytest.mark.parametrize("both", [["abort"], ["graceful_stop", "abort"]])
def test_an_abort_asks_for_no_save(both):
    """Neither alone nor with a stop."""
    with TrainingJob("job") as job:
        for name in both:
            give(job, name)
        job.step(1)
        assert job.should_stop and not job.should_save


def test_a_save_is_finished_when_the_loop_says_where(tmp_path):
    """saved(path) finishes the save with step, absolute path and seconds, and takes the flag down."""
    with TrainingJob("job") as job:
        record = give(job, "save_checkpoint")
        job.step(7)
        assert job.should_save
        job.saved(tmp_path)
        assert not job.should_save
        done = state(job, record)
        assert done.state == "finished" and done.result["step"] == 7 and done.result["path"] == str(tmp_path)


@pytest.mark.parametrize("path", ["/nowhere/at/all", None, 17.5, "a\0b", object()])
def test_a_save_that_is_not_there_fails(path):
    """A path that does not exist, or is none, fails the command and raises nothing into the loop."""
    with TrainingJob("job") as job:
        record = give(job, "save_checkpoint")
        job.step(1)
        assert job.should_save
        job.saved(path)
        assert state(job, record).state == "failed" and "there is none" in state(job, record).error["message"]


def test_a_save_in_the_background(tmp_path):
    """Training continues; the save is finished when its future is, on whatever thread, and names its own step."""
    with TrainingJob("job") as job:
        record = give(job, "save_checkpoint")
        job.step(7)
        future, path = Future(), tmp_path / "later"
        job.saved(path, step=7, future=future)
        assert not job.should_save
        for step in (8, 9):
            job.step(step)
        assert state(job, record).state == "applied"
        path.mkdir()
        thread = threading.Thread(target=future.set_result, args=(None,))
        thread.start()
        thread.join(SOON)
        done = state(job, record)
        assert (done.state, done.result["step"], done.result["path"]) == ("finished", 7, str(path))


def test_an_older_checkpoint_finishes_no_newer_command(tmp_path):
    """A scheduled one that is reported late, or completed late, is another one; the newer command gets its own."""
    with TrainingJob("job") as job:
        job.step(30)
        old, new = Future(), Future()
        job.saved(tmp_path, step=30, future=old)
        job.step(39)
        record = give(job, "save_checkpoint")
        job.step(40)
        job.saved(tmp_path, step=39)
        old.set_result(None)
        assert job.should_save and state(job, record).state == "applied"
        job.saved(tmp_path, step=40, future=new)
        job.step(50)
        job.saved(tmp_path)
        assert not job.should_save and state(job, record).state == "applied"
        new.set_result(None)
        done = state(job, record)
        assert (done.state, done.result["step"]) == ("finished", 40)


def test_each_save_in_the_background_finishes_its_own_commands(tmp_path):
    """Two are under way: the second one ends first, the first one fails."""
    with TrainingJob("job") as job:
        records, futures = [], [Future(), Future()]
        for step, future in enumerate(futures, 1):
            records.append(give(job, "save_checkpoint"))
            job.step(step)
            job.saved(tmp_path, future=future)
        futures[1].set_result(None)
        assert [state(job, record).state for record in records] == ["applied", "finished"]
        futures[0].set_exception(OSError(28, "No space left on device"))
        assert state(job, records[0]).error["message"] == "OSError: [Errno 28] No space left on device"


def cancelled() -> Future:
    future = Future()
    future.cancel()
    future.set_running_or_notify_cancel()
    return future


def of_asyncio() -> asyncio.Future:
    loop = asyncio.new_event_loop()
    future = loop.create_future()
    future.cancel()
    future.add_done_callback = lambda call: call(future)  # as its loop would
    loop.close()
    return future


def of_torch() -> Any:
    import torch

    future = torch.futures.Future()
    future.set_exception(ValueError("no"))
    return future


def missing() -> Future:
    future = Future()
    future.set_result(None)
    return future


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (cancelled, "CancelledError"),
        (of_asyncio, "CancelledError"),
        pytest.param(of_torch, "ValueError: no", marks=needs_torch),
        (missing, "there is none"),
    ],
)
def test_a_save_in_the_background_that_fails(make, why, tmp_path):
    """The command fails with that reason, for any kind of future; control continues."""
    with TrainingJob("job") as job:
        record = give(job, "save_checkpoint")
        job.step(1)
        job.saved(tmp_path / "none", future=make())
        assert state(job, record).state == "failed" and why in state(job, record).error["message"]
        assert not job.should_save


@needs_torch
@pytest.mark.parametrize("wrapped", [False, True])
def test_futures_of_torch(wrapped, tmp_path):
    """That of torch.futures, and what dcp.async_save returns where it also reports the staging."""
    import torch

    future = torch.futures.Future()
    with TrainingJob("job") as job:
        record = give(job, "save_checkpoint")
        job.step(1)
        job.saved(tmp_path, future=SimpleNamespace(upload_completion=future) if wrapped else future)
        assert state(job, record).state == "applied"
        future.set_result(None)
        assert state(job, record).state == "finished"


@pytest.mark.parametrize("arguments", [{"step": "seven"}, {"step": 1.5}, {"future": 7}, {"future": object}])
def test_a_save_with_a_wrong_argument_fails(arguments, tmp_path, caplog):
    """Each command with the reason, and one warning in all; nothing is raised into the loop, and control continues."""
    with TrainingJob("job") as job:
        for step in (1, 2):
            record = give(job, "save_checkpoint")
            job.step(step)
            job.saved(tmp_path, **arguments)
            assert not job.should_save and "wrong argument" in state(job, record).error["message"]
    (warning,) = [entry for entry in caplog.records if entry.levelno >= logging.WARNING]
    assert "wrong argument" in warning.getMessage()


@pytest.mark.parametrize("fault", [None, OSError(28, "No space left on device")])
@pytest.mark.parametrize("leaves", ["the loop", "by an exception"])
def test_training_ends_while_a_save_is_under_way(fault, leaves, tmp_path):
    """The end of training waits for it, and the job can be reached meanwhile; its record tells what became of it."""
    future = Future()

    def complete() -> None:
        until(lambda: forgather_control.get_job_status("job")["commands"][0]["state"] == "applied")
        until(lambda: closing.is_set())
        with pytest.raises(errors.JobEnding):
            forgather_control.graceful_stop("job")
        future.set_result(None) if fault is None else future.set_exception(fault)

    closing, thread = threading.Event(), threading.Thread(target=complete)
    with pytest.raises(ZeroDivisionError) if "exception" in leaves else threading.Lock():
        with TrainingJob("job") as job:
            waiter, heard = last_words(job, "save_checkpoint")
            job.step(1)
            job.saved(tmp_path, future=future)
            thread.start()
            queue = job._controller._queue
            queue.close, close = lambda *args, **named: (close(*args, **named), closing.set()), queue.close
            if "exception" in leaves:
                raise ZeroDivisionError
    for each in (thread, waiter):
        each.join(SOON)
    assert heard[0]["state"] == ("finished" if fault is None else "failed")
    assert fault is None or "No space left" in heard[0]["error"]["message"]


@pytest.mark.parametrize("name", ["save_checkpoint", "save_and_stop"])
def test_a_save_that_never_ends(name, tmp_path):
    """After close_timeout the command has failed, and the record does not say that the checkpoint was not written."""
    with TrainingJob("job", close_timeout=50 * MS) as job:
        waiter, heard = last_words(job, name)
        job.step(1)
        job.saved(tmp_path, future=Future())
    waiter.join(SOON)
    assert heard[0]["state"] == "failed"
    assert "it is unknown whether the checkpoint was completed" in heard[0]["error"]["message"]


def test_nobody_waits_for_a_save_that_was_not_requested(tmp_path):
    """The end of training does not wait for it, and it may end later."""
    future = Future()
    with TrainingJob("job", close_timeout=10 * SOON) as job:
        job.step(1)
        job.saved(tmp_path, future=future)
        began = time.monotonic()
    assert time.monotonic() - began < SOON
    future.set_result(None)


def test_an_abort_waits_for_no_save(tmp_path):
    """What becomes of the checkpoint is unknown, and the record says so."""
    with TrainingJob("job", close_timeout=10 * SOON) as job:
        record = give(job, "save_checkpoint")
        job.step(1)
        future = Future()
        job.saved(tmp_path, future=future)
        give(job, "abort")
        job.step(2)
        assert "it is unknown" in state(job, record).error["message"]
        began = time.monotonic()
    assert time.monotonic() - began < SOON
    future.set_result(None)


def test_a_loop_that_never_reports_does_not_save_for_ever():
    """Seen and not reported by the next step: the command failed, the flag is down."""
    with TrainingJob("job") as job:
        record = give(job, "save_checkpoint")
        job.step(1)
        assert job.should_save
        job.step(2)
        assert not job.should_save
        assert "saved()" in state(job, record).error["message"]


def test_a_loop_that_looks_seldom_still_saves(tmp_path):
    """The flag waits for a loop that asks only every tenth step."""
    with TrainingJob("job") as job:
        record = give(job, "save_checkpoint")
        for step in range(1, 11):
            job.step(step)
        assert job.should_save
        job.saved(tmp_path)
        done = state(job, record)
        assert (done.applied_at_step, done.result["step"]) == (1, 10)


def test_a_save_that_is_to_evaluate_first(tmp_path):
    """should_evaluate is set with should_save; the result says whether the loop evaluated."""
    with TrainingJob("job") as job:
        for step, obeys in ((1, True), (2, False)):
            record = give(job, "save_checkpoint", evaluate=True)
            job.step(step)
            assert job.should_evaluate and job.should_save
            if obeys:
                job.evaluated({"loss": 1.0})
                assert not job.should_evaluate
            job.saved(tmp_path)
            assert not job.should_evaluate and not job.should_save
            assert state(job, record).result["evaluated"] is obeys


@pytest.mark.parametrize("evaluate", ["auto", False])
def test_a_save_that_need_not_evaluate(tmp_path, evaluate):
    """A plain loop has no best model to choose, so only evaluate=true asks for it."""
    with TrainingJob("job") as job:
        give(job, "save_checkpoint", evaluate=evaluate)
        job.step(1)
        assert job.should_save and not job.should_evaluate


def test_a_loop_that_cannot_evaluate():
    """Two steps without a look at should_evaluate, and it is not asked for; one look, and it is."""
    with TrainingJob("job") as job:
        job.step(1)
        job.step(2)
        for name, params in (("save_checkpoint", {"evaluate": True}), ("evaluate", {})):
            with pytest.raises(errors.CommandRefused, match="does not read job"):
                give(job, name, **params)
        assert not job.should_evaluate
        job.step(3)
        give(job, "save_checkpoint", evaluate=True)
        job.step(4)
        assert job.should_evaluate and job.should_save


def test_an_evaluation():
    """It is finished when the loop reports it, with the numbers of its metrics; nothing is saved for it."""
    with TrainingJob("job") as job:
        job.step(1)
        assert not job.should_evaluate
        record = give(job, "evaluate")
        job.step(2)
        assert job.should_evaluate and not job.should_save and not job.should_stop
        job.evaluated({"loss": 0.5, "count": 3, "text": "x"})
        assert not job.should_evaluate
        done = state(job, record)
        assert done.state == "finished" and done.applied_at_step == 2
        assert done.result == {
            "step": 2,
            "metrics": {"loss": 0.5, "count": 3, "text": "x"},
            "seconds": done.result["seconds"],
        }


def test_an_evaluation_with_many_metrics():
    """Its record, which status and events show, has as many as status has of those that are logged."""
    with TrainingJob("job") as job:
        record = give(job, "evaluate")
        job.step(1)
        assert job.should_evaluate
        job.evaluated({f"m{number}": number for number in range(1000)})
        assert len(state(job, record).result["metrics"]) == MAX_NAMES


def test_an_evaluation_and_a_save_at_one_step(tmp_path):
    """The loop evaluates and saves; the save's result says that it was evaluated."""
    with TrainingJob("job") as job:
        records = [give(job, name) for name in ("save_checkpoint", "evaluate")]
        job.step(1)
        assert job.should_evaluate and job.should_save
        job.evaluated({})
        job.saved(tmp_path)
        saved, evaluated = (state(job, record) for record in records)
        assert saved.state == evaluated.state == "finished" and saved.result["evaluated"] is True


def test_a_loop_that_never_reports_an_evaluation():
    """Seen and not reported by the next step: the command failed, the flag is down."""
    with TrainingJob("job") as job:
        record = give(job, "evaluate")
        job.step(1)
        assert job.should_evaluate
        job.step(2)
        assert not job.should_evaluate and "evaluated()" in state(job, record).error["message"]


def test_a_loop_that_looks_seldom_still_evaluates():
    """The flag waits for a loop that looks every tenth step; one that never looks fails the command at its end."""
    for looks in (True, False):
        with TrainingJob("job") as job:
            record = give(job, "evaluate")
            for step in range(1, 11):
                job.step(step)
            if looks:
                assert job.should_evaluate
                job.evaluated({})
                assert state(job, record).result["step"] == 10
            else:
                assert state(job, record).state == "applied"


def test_an_abort_takes_back_an_evaluation():
    """After an abort nothing is evaluated; the command fails, and says why."""
    with TrainingJob("job") as job:
        record = give(job, "evaluate")
        job.step(1)
        give(job, "abort")
        job.step(2)
        assert not job.should_evaluate and "abort" in state(job, record).error["message"]


def test_a_rank_that_leaves_the_evaluation_to_rank_0(monkeypatch):
    """It never looks at should_evaluate: its part is nothing, which it reports with its next step."""
    with TrainingJob("job") as job:
        job.step(1)
        monkeypatch.setattr(type(job._controller), "is_main", False)
        job.step(2)
        record = give(job, "evaluate")
        job.step(3)
        assert state(job, record).state == "applied"
        job.step(4)
        assert state(job, record).state == "finished"


def test_an_evaluation_that_was_not_asked_for():
    """The loop may report each of its own; outside a run nothing happens."""
    job = TrainingJob("job")
    job.evaluated({"loss": 1.0})
    assert not job.should_evaluate
    with job:
        job.step(1)
        job.evaluated({"loss": 1.0})
        job.step(2)
        assert forgather_control.get_job_status("job")["status"] == "training"


@pytest.mark.parametrize("enabled", [True, False])
def test_a_loop_outside_the_with_statement(caplog, enabled):
    """Nothing is controllable then: one warning says so and what to do, unless control is switched off."""
    job = TrainingJob("job", enabled=enabled)
    for step in range(1, 4):
        job.step(step)
        assert not (job.should_save or job.should_evaluate or job.should_stop)
    said = [line.getMessage() for line in caplog.records if line.levelno >= logging.WARNING]
    assert len(said) == enabled and all("with TrainingJob(...) as job:" in line for line in said)
    with job:
        job.step(4)
    job.step(5)
    assert len([line for line in caplog.records if line.levelno >= logging.WARNING]) == enabled


def test_flags_are_down_once_control_is_off(monkeypatch):
    """A save or an evaluation that was requested is not made after its clients were told that it failed."""
    with TrainingJob("job") as job:
        for name in ("save_checkpoint", "evaluate"):
            give(job, name)
        job.step(1)
        assert job.should_save and job.should_evaluate
        monkeypatch.setattr(job._controller, "log", lambda logs: 1 / 0)
        job.log(loss=1.0)
        assert not job.should_save and not job.should_evaluate


def test_an_abort_takes_back_a_save():
    """After an abort nothing is to be saved; a save that was applied and not done fails, and says why."""
    with TrainingJob("job") as job:
        save = give(job, "save_checkpoint")
        job.step(1)
        give(job, "abort")
        job.step(2)
        assert job.aborted and job.should_stop and not job.should_save
        assert "abort" in state(job, save).error["message"]


@pytest.mark.parametrize("order", [("save_checkpoint", "abort"), ("abort", "save_checkpoint")])
def test_an_abort_wins_in_any_order(order):
    """In one step, whichever came first."""
    with TrainingJob("job") as job:
        for name in order:
            give(job, name)
        job.step(1)
        assert job.aborted and not job.should_save


def last_words(job: TrainingJob, name: str) -> tuple[threading.Thread, list]:
    """A client that waits for a command to be over, and what it hears."""
    heard: list = []
    wire = Wire(Path(os.environ["FORGATHER_JOBS_DIR"]) / job.job_id / "control.sock")

    def wait() -> None:
        with wire:
            heard.append(wire.call(name, {"wait": "finished"})["result"])

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: any(r["command"] == name for r in forgather_control.get_job_status(job.job_id)["commands"]))
    return thread, heard


@pytest.mark.parametrize("name", ["save_checkpoint", "graceful_stop", "save_and_stop", "abort"])
@pytest.mark.parametrize("how", ["pending at the end", "pending at an exception", "applied, then an exception"])
def test_whoever_waits_is_told_how_it_ended(name, how):
    """Each command ends in one known state, also when the loop ends without applying it, or raises."""
    with pytest.raises(ZeroDivisionError) if "exception" in how else threading.Lock():
        with TrainingJob("job") as job:
            thread, heard = last_words(job, name)
            if how.startswith("applied"):
                job.step(1)
            if "exception" in how:
                raise ZeroDivisionError
    thread.join(SOON)
    assert heard[0]["state"] == "failed"
    assert ("ZeroDivisionError" if "exception" in how else "training ended") in heard[0]["error"]["message"]


def test_a_loop_that_ignores_the_save_of_a_save_and_stop_is_told_so():
    """Stopped without saving: a failed save_and_stop, not a finished one."""
    with TrainingJob("job") as job:
        thread, heard = last_words(job, "save_and_stop")
        job.step(1)
    thread.join(SOON)
    assert heard[0]["state"] == "failed" and "before the checkpoint" in heard[0]["error"]["message"]


def test_a_final_save_belongs_to_the_stop(tmp_path):
    """A stop's result names the last checkpoint that was written before the end."""
    with TrainingJob("job") as job:
        thread, heard = last_words(job, "graceful_stop")
        job.step(3)
        job.saved(tmp_path)
    thread.join(SOON)
    assert heard[0]["result"]["path"] == str(tmp_path) and heard[0]["result"]["step"] == 3


def test_nothing_is_left_behind(jobs_dir):
    """After the end the directory is gone, and so are thread and descriptors."""
    with TrainingJob("warm-up"):
        pass
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with running_loop():
        assert (jobs_dir / "job").is_dir()
    assert sorted(path.name for path in jobs_dir.iterdir()) == [".ended", ".lock"]
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, files)


def test_one_job_after_the_other_under_one_name():
    """The same object, and the same id, can be used again."""
    job = TrainingJob("job")
    for _ in range(3):
        with job:
            give(job, "abort")
            job.step(1)
            assert job.aborted
    with job:
        assert not job.aborted and not job.should_stop


def test_switched_off_it_is_not_there(jobs_dir):
    """enabled=False: no directory, no flags, no errors."""
    with TrainingJob("job", enabled=False) as job:
        job.log(loss=1.0)
        job.step(1)
        job.saved("/nowhere")
        assert not (job.should_save or job.should_stop or job.aborted)
        assert not jobs_dir.exists()


@pytest.mark.parametrize("job_id", ["", "../x", "a b", ".hidden", "-dash", "x" * 129, "é", 7])
def test_a_bad_job_id_is_refused_when_it_is_given(job_id):
    """Not hours later, and as a ValueError that says what was expected."""
    with pytest.raises(errors.BadJobId, match="1 to 128") as caught:
        TrainingJob(job_id)
    assert isinstance(caught.value, ValueError)


def test_the_id_that_is_taken_is_named_in_one_warning(caplog):
    """The second job trains on, uncontrolled; its one warning names the pid that has the id."""
    with running_loop("job"), caplog.at_level(logging.WARNING), TrainingJob("job") as second:
        second.step(1)
        assert not second.should_stop
    (warning,) = caplog.records
    assert str(os.getpid()) in warning.getMessage() and "Control is off" in warning.getMessage()


def test_generated_ids_never_collide():
    """Two jobs without a name, of one process in one second: two ids, both live."""
    with TrainingJob() as one, TrainingJob() as two:
        assert one.job_id != two.job_id
        assert {job.job_id for job in forgather_control.list_jobs()} == {one.job_id, two.job_id}


@pytest.mark.parametrize("method, arguments", [("step", ("one",)), ("log", ()), ("step", (None,))])
def test_nonsense_from_the_loop_is_not_raised_back(method, arguments):
    """Whatever the loop passes, it trains on."""
    with TrainingJob("job") as job:
        getattr(job, method)(*arguments)
        job.step(1)


def test_an_exception_inside_is_one_warning_and_the_end_of_control(monkeypatch, caplog, jobs_dir):
    """An error of control is logged once with its traceback, clients are told, training continues."""
    with TrainingJob("job") as job:
        thread, heard = last_words(job, "graceful_stop")
        monkeypatch.setattr(job._controller._tracker, "apply", lambda *_: 1 / 0)
        for step in range(1, 4):
            job.step(step)
        thread.join(SOON)
        assert heard[0]["state"] == "failed"
        assert not (jobs_dir / "job").exists()
    assert [record.exc_info is not None for record in caplog.records if record.levelno >= logging.WARNING] == [True]


def test_the_interpreter_ends_with_a_job_open():
    """sys.exit in the middle of a loop without "with": a waiting client is answered, nothing stays."""
    source = """
    import sys
    from forgather_control import TrainingJob
    job = TrainingJob("job").__enter__()
    print("ready", flush=True)
    sys.stdin.readline()
    sys.exit(3)
    """
    with Process(source) as process:
        assert process.line() == "ready"
        jobs = Path(os.environ["FORGATHER_JOBS_DIR"])
        with Wire(jobs / "job" / "control.sock") as wire:
            wire.send(b'{"jsonrpc":"2.0","id":1,"method":"graceful_stop","params":{"wait":"finished"}}\n')
            wire.still_answers()
            process.say("")
            assert wire.reply()["result"]["state"] == "failed"
        assert process.end() == 3, process.errors
        assert not (jobs / "job").exists()


def test_a_training_thread_that_vanishes_ends_the_job(jobs_dir, monkeypatch):
    """A loop whose thread ends without saying so is noticed, and its clients are told."""
    monkeypatch.setattr(limits, "TICK_PERIOD", 100 * MS)
    job = TrainingJob("job")
    opened = threading.Thread(target=job.__enter__)
    opened.start()
    opened.join(SOON)
    with Wire(jobs_dir / "job" / "control.sock") as wire:
        reply = wire.call("graceful_stop", {"wait": "finished"})
    assert reply["result"]["state"] == "failed" and "thread" in reply["result"]["error"]["message"]
    until(lambda: not (jobs_dir / "job").exists())


def test_numbers_of_other_libraries_are_numbers():
    """Steps, epochs and ends that are no plain int or float: records and status stay JSON."""

    class Index:
        def __index__(self) -> int:
            return 3

        def __float__(self) -> float:
            return 0.5

    with TrainingJob("job", max_steps=Index(), start_step=Index()) as job:
        record = give(job, "graceful_stop")
        job.step(Index(), epoch=Index())
        status = forgather_control.get_job_status("job")
        assert (status["global_step"], status["max_steps"], status["epoch"]) == (3, 3, 0.5)
        assert state(job, record).applied_at_step == 3


@pytest.mark.parametrize("options", [{"max_steps": "many"}, {"start_step": 1.5}, {"max_steps": []}])
def test_ends_that_are_no_numbers_are_refused_when_they_are_given(options):
    """A clear error before training begins."""
    with pytest.raises(errors.InvalidParams, match="must be a whole number"):
        TrainingJob("job", **options)


def test_an_output_directory_that_is_no_path_is_refused_when_it_is_given():
    """As above; a path may be of bytes."""
    with pytest.raises(errors.InvalidParams, match="output_dir must be a path, not 5"):
        TrainingJob("job", output_dir=5)
    TrainingJob("job", output_dir=b"out")


@pytest.mark.parametrize(("end", "count"), [(-1, 1), (0, 0), (None, 0)])
def test_a_negative_end_is_one_warning(end, count, caplog):
    """The run is controlled, and its end is unknown."""
    with TrainingJob("job", max_steps=end) as job:
        job.step(1)
        job.step(2)
        assert forgather_control.get_job_status("job")["max_steps"] is None
    said = [line.getMessage() for line in caplog.records if line.levelno >= logging.WARNING]
    assert said == ["Ignored max_steps=-1, which is negative: progress is unknown."] * count


def test_a_path_of_bytes_is_a_path(tmp_path):
    """os.PathLike, str or bytes; what is no UTF-8 is shown escaped, never as another name."""
    odd = os.fsencode(tmp_path) + b"/ck\xff"
    os.mkdir(odd)
    with TrainingJob("job") as job:
        for path, shown in ((os.fsencode(tmp_path), str(tmp_path)), (odd, f"{tmp_path}/ck\\udcff")):
            record = give(job, "save_checkpoint")
            job.step(1)
            job.saved(path)
            assert state(job, record).result["path"] == shown


def test_a_jobs_directory_that_is_no_utf8_is_reached(monkeypatch, jobs_dir):
    """JSON cannot say where its socket is, so the socket lies where it can."""
    monkeypatch.setenv("FORGATHER_JOBS_DIR", os.fsdecode(os.fsencode(jobs_dir) + b"\xff"))
    with TrainingJob("job"):
        assert forgather_control.get_job_status("job")["pid"] == os.getpid()


def test_any_name_can_be_logged():
    """Also "self", and values whose own methods raise, or end the interpreter."""

    class Text(str):
        def __getitem__(self, place):
            raise ValueError

        def __str__(self) -> str:
            raise ValueError

    class Exit:
        def item(self):
            raise SystemExit

    with TrainingJob("job") as job:
        job.log(self=1, text=Text("x" * 999), end=Exit())
        assert forgather_control.get_job_status("job")["metrics"] == {"self": 1, "text": "Text", "end": "Exit"}


def test_a_job_inside_itself_is_one_job():
    """Entered twice, it ends with the outer one."""
    job = TrainingJob("job")
    with job:
        with job:
            pass
        assert forgather_control.get_job_status("job")["pid"] == os.getpid()
    assert forgather_control.list_jobs() == []


def test_begun_on_one_thread_trained_on_another():
    """A helper that opens the job and ends takes nothing with it, once another thread trains."""
    job = TrainingJob("job")
    helper = threading.Thread(target=job.__enter__)
    helper.start()
    helper.join(SOON)
    job.step(1)
    job._controller._server._tick()
    assert forgather_control.get_job_status("job")["global_step"] == 1
    job.__exit__(None, None, None)


def test_a_copy_controls_nothing(jobs_dir):
    """Deep copies and pickles of a job in its run are made, are inert, and disturb nothing."""
    with TrainingJob("job") as job:
        for copied in (copy.deepcopy(job), pickle.loads(pickle.dumps(job))):
            copied.step(5)
            del copied
        gc.collect()
        assert forgather_control.get_job_status("job")["global_step"] == 0


# The script's own commands...


def test_own_commands_run_at_the_end_of_a_step():
    """Applied at that step on the training thread, with the last step in the context; the value is the result."""
    with TrainingJob("job") as job:
        here = threading.get_ident()

        @job.command
        def where(context, text: str = "x") -> list[Any]:
            return [context.step, threading.get_ident() == here, text]

        record = give(job, "user.where", text="y")
        assert state(job, record).state == "accepted"
        job.step(4)
        done = state(job, record)
        assert (done.state, done.applied_at_step, done.result) == ("finished", 4, {"value": [4, True, "y"]})
        assert done.params == {"text": "y"} and done.requested_by["pid"] == os.getpid()


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda: (_ for _ in ()).throw(SystemExit(3)), "called sys.exit(3); training continues"),
        (lambda: os.environ, "not JSON"),
        (lambda: "x" * (1 << 18), "more than 262144"),
        (lambda: 10**400, "beyond the range"),
    ],
)
def test_own_commands_that_fail_leave_training_alone(function, why):
    """Each failure is that of its command; the next command works."""
    with TrainingJob("job") as job:
        job.command(name="bad")(function)
        job.command(name="good")(lambda: 5)
        bad, good, save = (give(job, name) for name in ("user.bad", "user.good", "save_checkpoint"))
        job.step(1)
        assert state(job, bad).state == "failed" and why in state(job, bad).error["message"]
        assert state(job, good).result == {"value": 5} and state(job, save).state == "applied" and job.should_save


def test_ctrl_c_in_an_own_command_reaches_training():
    """The commands beside it are told; a loop that goes on can be controlled as before."""

    def interrupted() -> None:
        raise KeyboardInterrupt

    with TrainingJob("job", commands=[interrupted]) as job:
        before, record, after = (give(job, name) for name in ("save_checkpoint", "user.interrupted", "graceful_stop"))
        with pytest.raises(KeyboardInterrupt):
            job.step(1)
        assert job.should_save and not job.should_stop and state(job, before).state == "applied"
        for each in (record, after):
            assert state(job, each).error["message"] == "interrupted on this rank by KeyboardInterrupt"
        stop = give(job, "graceful_stop")
        job.step(2)
        assert job.should_stop and state(job, stop).applied_at_step == 2


def test_own_commands_that_hang_are_shown(jobs_dir):
    """status names the command, the rank and the seconds while it runs, and nothing once it is done."""
    go = threading.Event()
    with running_loop(commands=[lambda_named(go.wait, "hang")]), forgather_control.connect("job") as client:
        record = client.call("user.hang")
        (running,) = until(lambda: client.call("status").get("running"))
        assert (running["command"], running["ranks"]) == ("user.hang", [0])
        assert running["command_id"] == record["command_id"] and running["seconds"] >= 0
        until(lambda: client.call("status")["running"][0]["seconds"] > running["seconds"])
        stacks = client.call("stacks")[0]["stacks"]
        assert "hang" in stacks
        go.set()
        until(lambda: "running" not in client.call("status"))
        assert client.call("get_command", command_id=record["command_id"])["state"] == "finished"


def lambda_named(call: Any, name: str) -> Any:
    def f() -> None:
        call(SOON)

    f.__name__ = name
    return f


def test_a_thousand_own_commands_in_a_row(monkeypatch):
    """Each is run once, in order, with its own value; memory of records stays bounded."""
    monkeypatch.setattr(limits, "CPU_SHARE", 1.0)  # else the server would take its time
    ran = []

    def count(number: int) -> int:
        ran.append(number)
        return number * number

    with running_loop(step_seconds=MS, commands=[count]), forgather_control.connect("job") as client:
        for number in range(1000):
            record = client.call("user.count", number=number, wait="finished")
            assert record["result"] == {"value": number * number}
        assert ran == list(range(1000))
        assert len(client.call("list_commands")) <= 256 and "running" not in client.call("status")


def test_own_commands_at_one_step_run_in_order():
    """Also equal ones, where they have ids; without ids equal ones share a record."""
    ran: list[int] = []
    with TrainingJob("job") as job:

        @job.command
        def note(number: int) -> int:
            ran.append(number)
            return len(ran)

        records = [give(job, "user.note", number=n, command_id=str(i)) for i, n in enumerate([3, 1, 1, 2])]
        same = [give(job, "user.note", number=7).command_id for _ in range(3)]
        job.step(1)
        assert ran == [3, 1, 1, 2, 7] and len(set(same)) == 1
        assert [state(job, record).result["value"] for record in records] == [1, 2, 3, 4]


def test_long_values_stay_out_of_status():
    """The caller gets the value; status, the list and events say that it is left out."""
    text = "x" * 200_000
    with TrainingJob("job") as job, forgather_control.connect("job") as client:
        job.command(name="long")(lambda: text)
        events = client.events(kinds=["command"])
        records = [client.call("user.long", command_id=str(number)) for number in range(10)]
        job.step(1)
        assert client.call("get_command", command_id=records[0]["command_id"])["result"] == {"value": text}
        status = client.call("status")
        assert len(str(status)) < 20_000 and status["commands"][0]["result"] == {"value_omitted": True}
        assert {str(record["result"]) for record in client.call("list_commands")} == {"{'value_omitted': True}"}
        last = next(event for event in events if event["state"] == "finished")
        assert last["result"] == {"value_omitted": True}


def test_wrong_parameters_of_own_commands():
    """Refused before anything is queued, by name and by position."""
    with TrainingJob("job") as job, forgather_control.connect("job") as client:

        @job.command
        def f(n: int, names: list[str] = ()) -> int:
            return n

        for params in ({}, {"n": "1"}, {"n": 1.5}, {"n": 1, "names": "a"}, {"n": 1, "names": [1]}, {"n": 1, "m": 2}):
            with pytest.raises(errors.InvalidParams):
                client.call("user.f", **params)
        with pytest.raises(errors.InvalidParams):
            client.call_raw("user.f", ["accepted", None, None, None, None, 1, [], 2])
        with pytest.raises(errors.MethodNotFound):
            client.call("user.g")
        assert client.call("list_commands") == []
        assert client.call_raw("user.f", ["accepted", None, None, None, None, 1])["params"] == {"n": 1, "names": []}


def test_own_commands_run_while_paused():
    """At the step of the pause, on the training thread; the job stays paused."""

    def where(context: Any) -> list[Any]:
        return [context.step, threading.current_thread().name]

    with running_loop(commands=[where]) as run, forgather_control.connect("job") as client:
        step = client.command("pause", wait="finished", timeout=SOON).applied_at_step
        for _ in range(3):
            record = client.command("user.where", wait="finished", timeout=SOON)
            assert record.result == {"value": [step, run.thread.name]} and record.applied_at_step == step
            assert client.call("status")["status"] == "paused"
        client.command("resume", wait="finished", timeout=SOON)
        until(lambda: run.steps > step)


def test_own_commands_by_file(monkeypatch, jobs_dir):
    """An empty file named after one is a request."""
    monkeypatch.setattr(limits, "TICK_PERIOD", 20 * MS)
    with running_loop(commands=[lambda_named(lambda seconds: None, "hello")]):
        (jobs_dir / "job" / "requests" / "user.hello").touch()
        until((jobs_dir / "job" / "replies" / "user.hello.json").exists)


def test_an_own_command_may_control_its_own_job():
    """It sets flags through the client, as any other program; what it asks for is applied at a later step."""

    with TrainingJob("job") as job:

        @job.command
        def stop_soon() -> str:
            return forgather_control.graceful_stop("job").state

        record = give(job, "user.stop_soon")
        job.step(1)
        assert state(job, record).result == {"value": "accepted"} and not job.should_stop
        job.step(2)
        assert job.should_stop


def test_an_own_command_that_reports_steps(caplog):
    """It calls the loop's own methods, also step, in which it runs."""
    with TrainingJob("job") as job:

        @job.command
        def odd() -> None:
            job.log(loss=1.0)
            job.step(50)
            job.command(odd)

        record = give(job, "user.odd")
        job.step(1)
        assert state(job, record).state == "finished"
        job.step(51)
        assert forgather_control.get_job_status("job")["metrics"] == {"loss": 1.0}


# Settings...


class Trained:
    """A small real model that a plain loop trains; the rate is changed by a client, or by the loop itself."""

    def __init__(self, scheduler: Callable[[Any], Any] | None = None) -> None:
        import torch

        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
        first, second = (list(layer.parameters()) for layer in self.model)
        groups = [{"params": first, "lr": 0.1}, {"params": second, "lr": 0.02, "weight_decay": 0.3}]
        self.optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        self.scheduler = None if scheduler is None else scheduler(self.optimizer)
        self.data = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(self.data).pow(2).mean().backward()
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()

    def multiply(self, factor: float, decay: float) -> None:
        """Do to an optimizer with a StepLR what a client asks for."""
        for group in self.optimizer.param_groups:
            group["lr"] *= factor
            group["initial_lr"] *= factor
            group["weight_decay"] *= decay
        self.scheduler.base_lrs = [rate * factor for rate in self.scheduler.base_lrs]

    def load(self, state: Any) -> None:
        for name, value in state.items():
            getattr(self, name).load_state_dict(value)

    def state(self) -> Any:
        names = ("model", "optimizer", "scheduler")
        return copy.deepcopy({name: getattr(self, name).state_dict() for name in names})

    def weights(self) -> list[list[float]]:
        return [weight.tolist() for weight in self.model.parameters()]


def steps_of(optimizer: Any) -> Any:
    import torch

    return torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.5)


@needs_torch
def test_settings_of_an_optimizer_change_training_as_if_built_in(jobs_dir):
    """Weights are those of a loop that had the change in its code; also of one that was resumed after it."""
    one, built_in = Trained(steps_of), Trained(steps_of)
    with TrainingJob("job", max_steps=20) as job, connect("job") as client:
        job.optimizer(one.optimizer, one.scheduler)
        for step in range(1, 21):
            one.step()
            built_in.step()
            if step == 7:
                record = client.command("change_settings", changes={"learning_rate": 0.2, "weight_decay": "x0.5"})
                built_in.multiply(0.2 / 0.05, 0.5)
            job.step(step)
            if step == 12:
                saved = one.state()
        found = state(job, record).result
    assert found == {
        "learning_rate": {"old": 0.05, "new": 0.2, "effective": 0.2},
        "weight_decay": {"old": 0.3, "new": 0.15, "effective": 0.15},
    }
    assert one.weights() == built_in.weights()
    resumed = Trained(steps_of)
    resumed.load(saved)
    for _ in range(13, 21):
        resumed.step()
    assert resumed.weights() == one.weights()
    assert [group["lr"] for group in resumed.optimizer.param_groups] == [
        group["lr"] for group in one.optimizer.param_groups
    ]


@needs_torch
def test_an_optimizer_is_told_before_or_inside(jobs_dir, caplog):
    """The script's own settings come first."""
    one = Trained()
    before = TrainingJob("job", settings={"weight_decay": {"get": lambda: 7.0, "set": lambda value: None}})
    before.optimizer(one.optimizer)
    assert [line.getMessage() for line in caplog.records] == [
        "Ignored the optimizer: the setting weight_decay is declared twice"
    ]
    with before as job, connect("job") as client:
        listed = {found["name"]: found["value"] for found in client.call("list_settings")}
    assert listed == {"learning_rate": 0.1, "weight_decay": 7.0}
    with TrainingJob("job") as job:
        job.optimizer(one.optimizer)
        job.optimizer(one.optimizer)
    assert "the setting learning_rate is declared twice" in caplog.text


@needs_torch
@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda one: ("adam",), "an optimizer must have param_groups"),
        (lambda one: (one.scheduler, one.optimizer), "an optimizer must have param_groups"),
        (lambda one: (one.optimizer, "cosine"), "a scheduler must have step()"),
        (lambda one: ([],), "no optimizer is given"),
        (lambda one: (None,), "no optimizer is given"),
    ],
)
def test_what_is_no_optimizer_is_one_warning(given, words, caplog):
    """Training continues, and so does control."""
    with TrainingJob("job") as job:
        job.optimizer(*given(Trained(steps_of)))
        job.step(1)
        assert words in caplog.text and job._controller is not None


@needs_torch
def test_own_commands_find_the_optimizer_that_the_job_was_told_of():
    """By the names that other frameworks have for them."""

    def rate(context) -> float:
        return context.optimizer.param_groups[0]["lr"] * (context.lr_scheduler is None)

    one = Trained()
    with TrainingJob("job", commands=[rate]) as job:
        job.optimizer(one.optimizer)
        record = give(job, "user.rate")
        job.step(1)
        assert until(lambda: state(job, record).result) == {"value": 0.1}
