"""A jobs directory whose file system hangs: neither training nor the other clients wait for it.

The calls of ``os`` on the jobs directory, and on open directories, block until the test lets the file system answer.
What happens before that has not waited for it.
"""

from __future__ import annotations

import os
import threading

import pytest

import forgather_control
from forgather_control import ControlError, JobsDirUnusable, TrainingJob, connect
from forgather_control.server import limits as server_limits
from forgather_control.training import limits

from ..support.harness import SOON, job_process, running_loop, until

CALLS = ("open", "mkdir", "rmdir", "rename", "unlink", "stat", "lstat", "chmod", "utime", "scandir", "listdir")


@pytest.fixture
def disk(jobs_dir, monkeypatch):
    """Whether the file system answers: ``clear()`` makes it hang."""
    answers = threading.Event()
    answers.set()

    def gated(call):
        def wrapped(path, *args, **kwargs):
            if str(path).startswith(str(jobs_dir)) or {*kwargs} & {"dir_fd", "src_dir_fd"}:
                answers.wait(2 * SOON)
            return call(path, *args, **kwargs)

        return wrapped

    for name in CALLS:
        monkeypatch.setattr(os, name, gated(getattr(os, name)))
    monkeypatch.setattr(limits, "DISK_TIMEOUT", 0.1)
    monkeypatch.setattr(server_limits, "TICK_PERIOD", 0.1)
    yield answers
    answers.set()


def test_training_starts_and_ends_without_the_disk(disk, caplog):
    """A whole run passes while the file system hangs, and leaves nothing once it answers; two warnings."""
    disk.clear()
    with TrainingJob("job", max_steps=3) as job:
        for step in range(1, 4):
            job.log(loss=1.0)
            job.step(step)
    assert [record.getMessage()[:26] for record in caplog.records] == 2 * ["The jobs directory is slow"]
    assert "forgather-disk" in [thread.name for thread in threading.enumerate()]
    disk.set()
    until(lambda: "forgather-disk" not in [thread.name for thread in threading.enumerate()])
    assert forgather_control.list_jobs() == [] and len(caplog.records) == 2


def test_a_job_is_found_once_the_disk_answers(disk):
    """It started without its directory, and takes commands as any other later."""
    disk.clear()
    with running_loop() as run:
        until(lambda: run.steps > 3)
        disk.set()
        until(lambda: [job.state for job in forgather_control.list_jobs()] == ["live"])
        assert forgather_control.save_checkpoint("job", wait="finished", timeout=SOON).state == "finished"
    assert forgather_control.list_jobs() == []


def test_an_id_that_turns_out_to_be_taken_is_one_warning(disk, caplog):
    """Training is under way when the disk answers: it continues, and the other job keeps its id."""
    with job_process("job") as other:
        disk.clear()
        with running_loop() as run:
            until(lambda: run.steps > 3)
            disk.set()
            until(lambda: "in use by pid" in caplog.text)
            steps = run.steps
            until(lambda: run.steps > steps)
        assert caplog.text.count("Control is off for this run") == 1
        assert forgather_control.get_job_status("job")["pid"] == other.pid


def test_clients_are_answered_while_the_disk_hangs(disk, monkeypatch, jobs_dir):
    """Only ``list_jobs`` needs it, and gives up; a save is applied and finished, and the steps go on."""
    monkeypatch.setattr(limits, "LIST_TIMEOUT", 0.2)
    with running_loop() as run, connect("job") as client, connect("job") as other:
        saved = jobs_dir.parent / "checkpoints-job"
        saved.mkdir(exist_ok=True)
        disk.clear()
        with pytest.raises(JobsDirUnusable, match="could not be listed within"):
            client.call("list_jobs")
        for method in ("ping", "status", "ranks", "list_commands"):
            other.call(method)
        steps = run.steps
        until(lambda: run.steps > steps)
        assert client.call("save_checkpoint", wait="finished", timeout=SOON)["state"] == "finished"
        disk.set()
        until(lambda: any(job["job_id"] == "job" for job in listed(client)))


def listed(client):
    """Return what ``list_jobs`` answers, nothing while it gives up."""
    try:
        return client.call("list_jobs")
    except ControlError:
        return []


def test_the_list_of_jobs_is_as_new_as_the_request(jobs_dir):
    """A scan that began before the request does not answer it."""
    with running_loop("one"), connect("one") as client:
        assert [job["job_id"] for job in client.call("list_jobs")] == ["one"]
        with running_loop("two"):
            assert [job["job_id"] for job in client.call("list_jobs")] == ["two", "one"]
        assert [job["job_id"] for job in client.call("list_jobs")] == ["one"]
