"""The verb ``list`` with real jobs: live, stopped, killed and ended ones."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

import forgather_control
from forgather_control.cli import main, terminal
from forgather_control.jobs import registry

from ..support.harness import cli, job_process, running_loop, until


def listed(*words):
    done = cli("list", "--json", *words)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_live_job(jobs_dir):
    """All columns of the contract; -q prints ids only."""
    with running_loop("alive") as run:
        until(lambda: run.steps > 5)
        head, line = cli("list").stdout.splitlines()
        assert head.split() == [
            "STATE",
            "JOB",
            "STEP",
            "PROGRESS",
            "SPEED",
            "LEFT",
            "AGE",
            "HOST",
            "PID",
            "PORT",
            "NOTE",
        ]
        assert line.split()[:2] == ["live", "alive"] and str(os.getpid()) in line
        assert cli("list", "-q").stdout == cli("list", "--quiet").stdout == "alive\n"
        assert listed("-q") == ["alive"]


@pytest.mark.once
def test_silent_and_dead_jobs(jobs_dir):
    """Their last step and its age, and why one is silent."""
    with job_process("stopped") as stopped, job_process("killed") as killed:
        for job in ("stopped", "killed"):
            until(lambda job=job: (jobs_dir / job / "status.json").exists())
        os.kill(stopped.pid, signal.SIGSTOP)
        killed.kill()
        found = {job["job_id"]: job for job in listed()}
        shown = {line.split()[1]: line for line in cli("list").stdout.splitlines()}
        os.kill(stopped.pid, signal.SIGCONT)
    assert (found["stopped"]["state"], found["killed"]["state"]) == ("silent", "dead")
    assert "SIGSTOP" in found["stopped"]["silent_because"] and found["killed"]["silent_because"] is None
    for job in found.values():
        assert job["status"] is None and job["last_status"]["job_id"] == job["job_id"]
        assert job["global_step"] == job["last_status"]["global_step"] and job["last_status_at"] <= time.time() + 1
        assert "last known" in shown[job["job_id"]] and f" {job['global_step']}/100000 " in shown[job["job_id"]]
    assert "stopped by a signal" in shown["stopped"]


def test_sorted(jobs_dir):
    """Newest first, or upwards by a column; a column that there is not is an error of usage."""
    with running_loop("b"), running_loop("a"):
        assert cli("list", "-q").stdout.split() == ["a", "b"]
        assert cli("list", "-q", "--sort", "job").stdout.split() == ["a", "b"]
        assert cli("list", "-q", "--sort", "age").stdout.split() == ["a", "b"]
        assert [job["job_id"] for job in listed("--sort", "job")] == ["a", "b"]
    done = cli("list", "--sort", "colour")
    assert done.returncode == 2 and "progress" in done.stderr


def test_thirty_jobs_on_forty_columns(jobs_dir, monkeypatch, capsys):
    """Each on one line."""
    monkeypatch.setattr(terminal, "width", lambda: 40)
    jobs = [registry.Job(f"experiment-{n:02}", "host", None, n, 1.0, "dead") for n in range(1, 31)]
    monkeypatch.setattr(registry, "discover", lambda root, seconds: (jobs, {}))
    assert main.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 31 and max(map(len, lines)) <= 40 and "experiment-17" in lines[17]


def test_ended_jobs(jobs_dir):
    """How, when, the last step and the last checkpoint; the last one first."""
    assert cli("list", "--ended").stdout == f"no ended jobs in {jobs_dir}\n" and listed("--ended") == []
    for job in ("one", "two"):
        with running_loop(job) as run:
            until(lambda: run.steps > 2)
            path = forgather_control.save_checkpoint(job, wait="finished").result["path"]
            forgather_control.abort(job, wait="finished")
    head, line, _ = cli("list", "--ended").stdout.splitlines()
    assert head.split() == ["HOW", "JOB", "ENDED", "STEP", "CHECKPOINT", "REASON"]
    assert line.split()[:2] == ["aborted", "two"] and path in line
    assert listed("--ended", "-q") == ["two", "one"] and cli("list", "--ended", "-q").stdout == "two\none\n"
    first, _ = listed("--ended")
    assert (first["how"], first["checkpoint"], first["reason"]) == ("aborted", path, None)
    assert first["global_step"] >= first["checkpoint_step"] and abs(first["ended_at"] - time.time()) < 60
    assert cli("list").stdout == f"no jobs in {jobs_dir}\n"


@pytest.mark.parametrize("words", [("--remote", "h:1"), ("--sort", "job")])
def test_what_ended_jobs_do_not_have(words):
    """They are on this host, and in the order of their ends."""
    assert cli("list", "--ended", *words).returncode == 2


def test_a_list_waits_once_for_all_silent_jobs(jobs_dir, monkeypatch):
    """Fifty jobs whose server hangs cost one time-out together."""
    from forgather_control.processes import liveness

    from ..jobs.test_registry import listening, publish

    socks = []
    for number in range(50):
        record = publish(jobs_dir, f"job{number}", liveness.current_process())
        os.makedirs(os.path.dirname(record.socket), exist_ok=True)
        socks.append(listening(record.socket))
    begin = time.monotonic()
    found, _ = registry.discover(str(jobs_dir), 0.5)
    assert time.monotonic() - begin < 3 and {job.state for job in found} == {"silent"} and len(found) == 50
    for sock in socks:
        sock.close()
