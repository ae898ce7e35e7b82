"""Several jobs at once from Python: one record or error for each."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

import forgather_control
from forgather_control import CommandRecord, ControlError, errors, jobs
from forgather_control.client.many import Calls
from forgather_control.client.target import Target

from ..support.harness import SOON, job_process, running_loop, until

TARGETS = [Target(f"run{number}") for number in range(20)]


def test_calls_run_some_at_a_time():
    """Never more than asked for; all of them are answered."""
    lock, running, most = threading.Lock(), 0, 0
    both = threading.Barrier(4)

    def ask(target):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        both.wait(SOON)  # four at a time: fewer would wait for ever
        with lock:
            running -= 1
        return target.name

    answers = dict(Calls(TARGETS, ask, 4))
    assert most <= 4 and answers == {target: target.name for target in TARGETS}


def test_an_error_is_the_answer_of_its_job():
    """Ours as they are, those of the operating system as ours; others are faults, and raised."""

    def ask(target):
        number = int(target.name[3:])
        if number == 1:
            raise errors.JobNotAnswering("no answer")
        if number == 2:
            raise OSError(24, "Too many open files")
        return number

    answers = {target.name: answer for target, answer in Calls(TARGETS[:4], ask, 2)}
    assert (answers["run0"], answers["run3"]) == (0, 3)
    assert type(answers["run1"]) is errors.JobNotAnswering
    assert type(answers["run2"]) is ControlError and "Too many open files" in str(answers["run2"])

    def fail(target):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(Calls(TARGETS, fail, 2))


def test_what_is_left_early_begins_no_call():
    """Calls that have begun go on; ``not_begun`` has the others."""
    begun, go = [], threading.Event()

    def ask(target):
        begun.append(target)
        if target is not TARGETS[0]:
            assert go.wait(SOON)
        return target

    calls = Calls(TARGETS, ask, 3)
    for _target, _answer in calls:
        break
    waiting = list(calls.not_begun)
    go.set()
    until(lambda: not any(thread.name.startswith("forgather-call") for thread in threading.enumerate()))
    assert list(calls.not_begun) == waiting and begun and [*begun, *waiting] == TARGETS


def test_no_targets():
    """No thread, no answer."""
    assert list(Calls([], lambda target: None, 8)) == []


@pytest.mark.once
def test_a_list_of_jobs_gives_a_record_or_an_error_for_each():
    """Real jobs: two that save, one that is dead, one that is not there, one that does not answer."""
    with ExitStack() as stack:
        found = {name: stack.enter_context(job_process(name)) for name in ("run1", "run2", "gone", "stuck")}
        found["gone"].kill()
        os.kill(found["stuck"].pid, signal.SIGSTOP)
        words = ["run*", "gone", "no-such", "stuck"]
        results = forgather_control.save_checkpoint(words, wait="finished", timeout=1.0, reason="all")
        os.kill(found["stuck"].pid, signal.SIGCONT)
        assert list(results) == ["run1", "run2", "gone", "stuck", "no-such"]
        for name in ("run1", "run2"):
            record = results[name]
            assert isinstance(record, CommandRecord) and record.state == "finished" and record.reason == "all"
            assert Path(record.result["path"]).is_dir()
        expected = {"gone": errors.JobDead, "stuck": errors.JobNotAnswering, "no-such": errors.NoSuchJob}
        assert {name: type(results[name]) for name in expected} == expected


def test_no_jobs_are_not_all_jobs():
    """An empty list does nothing, and ``jobs()`` says that it needs words."""
    with running_loop("run1") as run:
        for function in ("save_checkpoint", "graceful_stop", "save_and_stop", "abort"):
            assert getattr(forgather_control, function)([]) == getattr(forgather_control, function)(()) == {}
        for wrong in ((), ("run1",)):
            with pytest.raises(errors.InvalidParams):
                jobs(*wrong, all=bool(wrong))
        for parallel in (0, -1, 1.5, "8", True):
            with pytest.raises(errors.InvalidParams):
                jobs("run1", parallel=parallel)
        assert not run.job.should_stop


def test_each_command_has_its_method():
    """As the verbs of the command line."""
    heat = {"t": 1.0}
    setting = {"t": {"get": lambda: heat["t"], "set": lambda value: heat.update(t=value)}}
    done = {"wait": "finished", "timeout": SOON}
    with running_loop("run1", settings=setting) as one, running_loop("run2"):
        both = jobs("run*", parallel=2)
        assert (list(both), len(both), repr(both), both.left_out) == (["run1", "run2"], 2, "<Jobs run1, run2>", {})
        assert [status["job_id"] for status in both.status().values()] == ["run1", "run2"]
        assert [rows[0]["rank"] for rows in both.ranks().values()] == [0, 0]
        assert {record.state for record in both.save(**done).values()} == {"finished"}
        assert len(one.saves) == 1
        assert {record.state for record in both.pause(60, reason="why", **done).values()} == {"finished"}
        assert {status["status"] for status in both.status().values()} == {"paused"}
        assert {record.state for record in both.resume(**done).values()} == {"finished"}
        changed = both.set({"t": 2.0}, **done)
        assert changed["run1"].result["t"]["new"] == heat["t"] == 2.0
        assert isinstance(changed["run2"], errors.CommandRefused)
        assert {type(answer) for answer in both.evaluate(**done).values()} == {errors.CommandRefused}
        rules = both.when("loss > 1e9 for 3", "abort", not_before=5, reason="diverged")
        assert {(rule["do"], rule["not_before"]) for rule in rules.values()} == {("abort", 5)}
        assert [len(rules) for rules in both.call("list_rules").values()] == [1, 1]
        assert jobs("run1").save_stop(**done)["run1"].state == "finished"
        assert list(jobs(all=True).stop(**done)) == ["run2"]
    with running_loop("run3") as run:
        assert jobs("run3").abort(**done)["run3"].state == "finished" and run.job.aborted


def test_over_ssh_each_job_is_reached_there(monkeypatch):
    """The host goes to every target."""
    made = []
    monkeypatch.setattr("forgather_control.client.many.Client", lambda target: made.append(target) or _Stub())
    assert jobs("a", "b", ssh="gpu7").call("ping") == {"a": "pong", "b": "pong"}
    assert sorted((target.name, target.ssh) for target in made) == [("a", "gpu7"), ("b", "gpu7")]


class _Stub:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def call(self, method, **params):
        return "pong"
