"""The Python interface against real jobs: list, connect, give commands, wait, follow events."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

import forgather_control
from forgather_control import errors
from forgather_control.client import api
from forgather_control.client.target import find

from ..support.harness import MS, SOON, job_process, running_loop, until


@pytest.fixture
def folder(jobs_dir: Path) -> Path:
    jobs_dir.mkdir(parents=True, exist_ok=True)
    return jobs_dir


def test_list_names_what_a_person_needs():
    """list_jobs gives id, host, port, pid, start, state and step, and no secrets."""
    with running_loop("one") as run:
        until(lambda: run.steps)
        (job,) = forgather_control.list_jobs()
        assert (job.job_id, job.pid, job.port, job.state) == ("one", os.getpid(), None, "live")
        assert job.host == socket.gethostname() and abs(job.started_at - time.time()) < SOON
        assert job.global_step >= 1 and "token" not in job.to_json()
    assert forgather_control.list_jobs() == []


def test_every_wait_returns_at_its_own_moment():
    """accepted, applied and finished come in this order, and finished has the path."""
    with running_loop(step_seconds=20 * MS):
        accepted = forgather_control.save_checkpoint("job")
        assert accepted.state == "accepted" and accepted.applied_at_step is None
        applied = forgather_control.save_checkpoint("job", wait="applied", timeout=SOON)
        assert applied.state in ("applied", "finished") and applied.applied_at_step >= 1
        finished = forgather_control.save_checkpoint("job", wait="finished", timeout=SOON)
        assert finished.state == "finished" and Path(finished.result["path"]).is_dir()
        assert finished.result["step"] == finished.applied_at_step and finished.result["seconds"] >= 0


@pytest.mark.parametrize("give", ["graceful_stop", "save_and_stop", "abort"])
def test_a_stop_is_finished_when_the_job_is_gone(give):
    """wait="finished" on a stop returns after training ended; by then the job is not listed any more."""
    with running_loop() as run:
        until(lambda: run.steps)
        record = getattr(forgather_control, give)("job", wait="finished", timeout=SOON)
        assert record.state == "finished"
        assert forgather_control.list_jobs() == []
        run.thread.join(SOON)
        assert run.steps == record.applied_at_step == record.result["step"]
        assert run.saves[-1:] == ([] if give == "abort" else [record.result["path"]])


def test_the_same_id_twice_is_the_same_command():
    """A repeated command_id is answered with the first one's record, and saves once."""
    with running_loop() as run:
        one = forgather_control.save_checkpoint("job", wait="finished", timeout=SOON, command_id="mine")
        two = forgather_control.save_checkpoint("job", wait="finished", timeout=SOON, command_id="mine")
        assert one == two and len(run.saves) == 1
        assert forgather_control.get_command("job", "mine") == one
        with pytest.raises(errors.InvalidParams, match="belongs to"):
            forgather_control.abort("job", command_id="mine")
        with pytest.raises(errors.NotCancellable):
            forgather_control.cancel_command("job", "mine")
        with pytest.raises(errors.CommandNotFound):
            forgather_control.get_command("job", "unknown")


def test_a_cancelled_command_is_never_applied():
    """A command that is cancelled before its step ends is never applied, and its waiter gets an error."""
    with running_loop(step_seconds=400 * MS) as run:
        until(lambda: run.steps)
        caught: list[BaseException] = []

        def wait() -> None:
            try:
                forgather_control.save_checkpoint("job", wait="finished", timeout=SOON, command_id="x")
            except errors.CommandFailed as err:
                caught.append(err)

        waiter = threading.Thread(target=wait)
        waiter.start()
        with forgather_control.connect("job") as job:
            until(lambda: any(record["command_id"] == "x" for record in job.call("list_commands")))
            job.call("cancel_command", command_id="x")
        waiter.join(SOON)
        assert [err.data["state"] for err in caught] == ["cancelled"]
        assert run.saves == []


def test_a_deadline_passes_and_the_command_goes_on():
    """timeout=0 raises DeadlinePassed with the record; the command is finished all the same."""
    with running_loop(step_seconds=50 * MS):
        with pytest.raises(errors.DeadlinePassed) as caught:
            forgather_control.save_checkpoint("job", wait="finished", timeout=0)
        assert isinstance(caught.value, TimeoutError)
        command_id = caught.value.data["command_id"]
        until(lambda: forgather_control.get_command("job", command_id).state == "finished")


def test_wrong_parameters_are_errors_before_any_effect():
    """Unknown, missing and ill-typed parameters raise InvalidParams, and no command is recorded."""
    with running_loop(), forgather_control.connect("job") as job:
        for method, params in [
            ("save_checkpoint", {"wait": "soon"}),
            ("save_checkpoint", {"wiat": "finished"}),
            ("save_checkpoint", {"timeout": -1}),
            ("save_checkpoint", {"timeout": True}),
            ("save_checkpoint", {"command_id": ""}),
            ("get_command", {}),
            ("status", {"job_id": "job"}),
        ]:
            with pytest.raises(errors.InvalidParams):
                job.call(method, **params)
        with pytest.raises(errors.MethodNotFound):
            job.call("__class__")
        assert job.call("list_commands") == []


def _all_stopped(pid: int) -> bool:
    return all(
        path.read_text().rpartition(")")[2].split()[0] == "T" for path in Path(f"/proc/{pid}/task").glob("*/stat")
    )


@pytest.mark.once
def test_a_stopped_process_is_silent_and_never_cleaned_up():
    """SIGSTOP: the job lives and does not answer; the client says so by its deadline, cleanup leaves it alone."""
    with job_process("frozen") as process:
        os.kill(process.pid, signal.SIGSTOP)
        # The signal reaches one thread after the other; the server's is stopped when all are.
        until(lambda: _all_stopped(process.pid))
        try:
            assert [job.state for job in forgather_control.list_jobs(timeout=300 * MS)] == ["silent"]
            with forgather_control.connect("frozen", timeout=300 * MS) as job, pytest.raises(errors.JobNotAnswering):
                job.call("ping")
            assert forgather_control.cleanup() == []
        finally:
            os.kill(process.pid, signal.SIGCONT)
        until(lambda: [job.state for job in forgather_control.list_jobs()] == ["live"])


def test_an_unknown_error_code_is_kept():
    """A newer job's error arrives as a ControlError with its code and data."""
    error = errors.from_wire(-32077, "new", {"fact": 1})
    assert type(error) is errors.ControlError and error.data == {"code": -32077, "fact": 1}


def test_cleanup_removes_what_was_agreed_to_and_judges_it_again():
    """Of the jobs that were shown, one has been started again meanwhile: it stays."""
    with job_process("one") as one, job_process("two") as two:
        one.kill()
        two.kill()
        shown = api.dead_jobs()
    with running_loop("two"):
        assert api.cleanup(shown) == ["one"]
        assert [job.job_id for job in forgather_control.list_jobs()] == ["two"]


@pytest.mark.parametrize("way", ["socket", "port"])
def test_events_of_a_real_job(way):
    """From its start to its end, while a command is given on the same connection; over the socket and over TCP."""
    with running_loop(port=0 if way == "port" else None) as run:
        at = f"tcp://127.0.0.1:{find('job').port}" if way == "port" else None
        seen = []
        with forgather_control.connect("job", at=at) as job:
            for event in job.events(since=0, kinds=("started", "command", "checkpoint", "ended")):
                seen.append(event)
                if event["kind"] == "started":
                    saved = job.command("save_checkpoint", wait="finished", timeout=SOON, reason="why")
                if event["kind"] == "checkpoint" and len(run.saves) == 1:  # the stop saves, too
                    assert event["path"] == saved.result["path"] == run.saves[0]
                    job.command("graceful_stop")
        run.thread.join(SOON)
    kinds = [event["kind"] for event in seen]
    assert kinds[0] == "started" and kinds[-1] == "ended" and {"command", "checkpoint"} <= set(kinds)
    assert [event["seq"] for event in seen] == sorted({event["seq"] for event in seen})
    reasons = [
        event["reason"] for event in seen if event["kind"] == "command" and event["command"] == "save_checkpoint"
    ]
    assert reasons and set(reasons) == {"why"}


def test_an_expired_command_is_refused():
    """The job refuses what it reads too late, before any effect."""
    with running_loop(), forgather_control.connect("job") as job:
        with pytest.raises(errors.CommandExpired):
            job.command("save_checkpoint", expires_at=time.time() - 1)
        assert job.call("list_commands") == []


def test_what_was_reported_as_unanswered_is_not_done_later():
    """A job that is suspended while a stop is sent continues training when it resumes."""
    with job_process("frozen") as process:
        with forgather_control.connect("frozen", timeout=300 * MS) as job:
            job.call("ping")
            os.kill(process.pid, signal.SIGSTOP)
            try:
                until(lambda: _all_stopped(process.pid))
                with pytest.raises(errors.JobNotAnswering, match="The graceful_stop expired"):
                    job.command("graceful_stop")
            finally:
                os.kill(process.pid, signal.SIGCONT)
        assert until(lambda: [one.state for one in forgather_control.list_jobs()] == ["live"])
        assert forgather_control.get_job_status("frozen")["commands"] == []
