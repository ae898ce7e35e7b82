"""The verb ``status``: of live jobs, of those that do not answer, and of those that have ended, each marked as such."""

from __future__ import annotations

import json

import pytest

import forgather_control

from ..support.harness import cli, job_process, running_loop, until


def test_a_live_job(jobs_dir):
    """What it answers, and no mark."""
    with running_loop():
        done = cli("status", "job")
        assert done.returncode == 0 and done.stdout.startswith("job  training\n") and "last step" in done.stdout
        assert json.loads(cli("status", "--json").stdout).keys() & {"ended", "error", "last_known_at"} == set()


@pytest.mark.once
def test_a_killed_job(jobs_dir):
    """What it wrote last, with its age; the exit code is that of a job that does not answer."""
    with job_process() as victim:
        until(lambda: (jobs_dir / "job" / "status.json").exists())
        victim.kill()
        done, told = cli("status", "job"), json.loads(cli("status", "job", "--json").stdout)
    assert done.returncode == 4 and done.stdout.startswith("job  is dead; it was training ")
    assert "last step" not in done.stdout and " left" not in done.stdout and "is dead" in done.stderr
    assert told["job_id"] == "job" and told["error"]["code"] == -31023 and told["last_known_at"] > 0


def test_a_killed_job_without_a_status(jobs_dir):
    """An error, as before."""
    with job_process() as victim:
        victim.kill()
        (jobs_dir / "job" / "status.json").unlink(missing_ok=True)
        done = cli("status", "job", "--json")
    assert done.returncode == 4 and json.loads(done.stdout).keys() == {"error"}


def test_an_ended_job(jobs_dir):
    """Its last status, how it ended and the last checkpoint; of several runs the last one."""
    for _ in range(2):
        with running_loop() as run:
            until(lambda: run.steps > 2)
            forgather_control.save_checkpoint("job", wait="finished")
            record = forgather_control.abort("job", wait="finished")
    done, told = cli("status", "job"), json.loads(cli("status", "job", "--json").stdout)
    assert done.returncode == 0 and done.stdout.startswith("job  has ended: aborted at ") and done.stderr == ""
    assert f"step {record.applied_at_step} " in done.stdout and f"last checkpoint: {run.saves[-1]}" in done.stdout
    assert told["status"] == "ended" and told["ended"]["how"] == "aborted" and told["ended"]["job_id"] == "job"
    assert cli("status", "jo").returncode == 3 and cli("status").returncode == 3


def test_an_ended_job_of_which_only_events_are_left(jobs_dir):
    """It was killed before it wrote a status."""
    with job_process() as victim:
        until(lambda: (jobs_dir / "job" / "events.jsonl").exists())
        victim.kill()
        (jobs_dir / "job" / "status.json").unlink(missing_ok=True)
    assert forgather_control.cleanup() == ["job"]
    done = cli("status", "job")
    assert done.returncode == 0 and done.stdout.startswith("job  has ended: died at ")


def test_a_live_job_hides_ended_ones_of_its_id(jobs_dir):
    """The id means the job that lives."""
    for _ in range(2):
        with running_loop():
            assert cli("status", "job").stdout.startswith("job  training\n")


@pytest.mark.once
def test_a_last_status_of_any_content(jobs_dir):
    """It is shown as far as it can be, and never raises."""
    with job_process() as victim:
        until(lambda: (jobs_dir / "job" / "status.json").exists())
        victim.kill()
        for status in ('{"job_id": "job", "global_step": []}', '{"job_id": "job"}', "[]", "{", '{"job_id": "x"}'):
            (jobs_dir / "job" / "status.json").write_text(status)
            done = cli("status", "job")
            assert done.returncode in (1, 4) and done.stderr.count("\n") == 1, done.stderr
