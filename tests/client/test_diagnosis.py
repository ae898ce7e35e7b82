"""Why a job does not answer: dead, ended, restarted, or alive and silent."""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path

import pytest

import forgather_control
from forgather_control import errors
from forgather_control.client import api, diagnosis
from forgather_control.client.target import find
from forgather_control.jobs.record import parse_record

from ..support.harness import SOON, cli, job_process, running_loop, until


@pytest.fixture
def folder(jobs_dir: Path) -> Path:
    jobs_dir.mkdir(parents=True, exist_ok=True)
    return jobs_dir


def test_a_killed_job_is_dead_at_once():
    """After kill -9 the client reports a dead job, not a silent one, also on a connection that was open."""
    with job_process("victim") as process:
        with forgather_control.connect("victim") as job:
            job.call("ping")
            process.kill()
            with pytest.raises(errors.JobDead, match=f"pid {process.pid} on .*, ended before it answered$"):
                job.call("ping")
        with pytest.raises(errors.JobDead, match="cleanup"):
            forgather_control.get_job_status("victim")
        assert [job.state for job in forgather_control.list_jobs()] == ["dead"]
        assert forgather_control.cleanup() == ["victim"]
        assert forgather_control.list_jobs() == []


def _waits(job_id: str) -> bool:
    """Whether the job has a command that is not over."""
    return any(command["state"] == "accepted" for command in api.get_job_status(job_id)["commands"])


def test_a_job_that_dies_while_somebody_waits_says_so():
    """A wait without a deadline ends at once, and says that the outcome of its command is not known."""
    with job_process("victim", step_seconds=SOON) as process:
        killer = threading.Thread(target=lambda: (until(lambda: _waits("victim")), process.kill()))
        killer.start()
        with pytest.raises(errors.JobDead) as caught:
            forgather_control.save_checkpoint("victim", wait="finished")
        killer.join(SOON)
    assert str(caught.value) == (
        f"The process of job victim, pid {process.pid} on {socket.gethostname()}, ended before it answered; "
        "whether its save_checkpoint was carried out is not known"
    )


def test_on_the_command_line_a_death_is_one_sentence():
    """save --wait on a job that is killed meanwhile: exit code 4, no traceback."""
    with job_process("victim", step_seconds=SOON) as process:
        killer = threading.Thread(target=lambda: (until(lambda: _waits("victim")), process.kill()))
        killer.start()
        done = cli("save", "victim", "--wait")
        killer.join(SOON)
    assert done.returncode == 4 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "is not known" in done.stderr, done.stderr


def test_a_job_that_was_restarted_says_as_whom(monkeypatch):
    """A client of the old process gets an error that names the new one and says to repeat the request."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with job_process("phoenix") as old, forgather_control.connect("phoenix") as job:
        job.call("ping")
        stale = find("phoenix")
        old.kill()
        monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
        with job_process("phoenix") as new:
            words = rf"restarted as pid {new.pid} on .*, restart 3, before it answered; whether its abort .* Repeat the"
            with pytest.raises(errors.JobDead, match=words + " request$") as caught:
                job.call("abort")
            assert caught.value.data["pid"] == new.pid
            assert "Repeat the request" in str(diagnosis.unreachable(stale))
            assert api.get_job_status("phoenix")["pid"] == new.pid


def test_a_job_that_ends_while_a_connection_is_open_says_so(folder):
    """Its directory was removed; its process may still run."""
    with running_loop("brief"):
        job = forgather_control.connect("brief")
        job.call("ping")
    with job, pytest.raises(errors.JobDead, match=r"Job brief ended before it answered$"):
        job.call("ping")


def test_a_job_that_has_just_ended_is_no_such_job(folder):
    """A job that ended after its record was read has ended, and is not dead."""
    record = {"job_id": "brief", "host": socket.gethostname(), "port": None, "pid": os.getpid(), "started_at": 1.0}
    gone = parse_record(json.dumps({**record, "socket": str(folder / "s")}).encode(), "brief")
    assert isinstance(diagnosis.unreachable(gone), errors.NoSuchJob)
