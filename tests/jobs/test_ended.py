"""What is kept of ended jobs: moved there by the job, by cleanup and by the next job; bounded, private, not trusted."""

from __future__ import annotations

import json
import os
import time

import pytest

import forgather_control
from forgather_control.jobs import ended, limits, private_files, registry

from ..support.harness import SOON, job_process, needs_root, running_loop, until
from .test_registry import publish


def put(root, job_id, started_at=1000.0, status=None, events=b"", age=0.0):
    """Keep a run, as if it had ended so many seconds ago; return its directory."""
    place = root / "job"
    place.mkdir(parents=True, mode=0o700)
    for name, data in (
        ("status.json", None if status is None else json.dumps(status).encode()),
        ("events.jsonl", events),
    ):
        if data is not None:
            (place / name).write_bytes(data)
            (place / name).chmod(0o600)
    with private_files.opened(str(place)) as directory:
        ended.keep(str(root), job_id, started_at, directory)
    place.rmdir()
    kept = root / ".ended" / f"{job_id}@{started_at!r}"
    os.utime(kept, (time.time() - age, time.time() - age))
    return kept


def status_of(job_id="run1", **ending):
    """A last status, with how the run has ended."""
    known = {"how": "finished", "ended_at": 2000.0, "reason": None, "checkpoint": "/c-7", "checkpoint_step": 7}
    return {"job_id": job_id, "global_step": 9, "host": "here", "pid": 5, "ended": {**known, **ending}}


# What real jobs leave...


@pytest.mark.parametrize(
    ("command", "how"), [("graceful_stop", "stopped"), ("save_and_stop", "stopped"), ("abort", "aborted")]
)
def test_a_command_ends_it(jobs_dir, command, how):
    """As soon as the client knows that the command is finished, the run is among the ended ones."""
    with running_loop() as run:
        until(lambda: run.steps > 2)
        path = forgather_control.save_checkpoint("job", wait="finished").result["path"]
        step = getattr(forgather_control, command)("job", wait="finished").applied_at_step
        found = ended.find(str(jobs_dir), "job")
        assert (found.how, found.global_step, found.reason, found.pid) == (how, step, None, os.getpid())
        assert found.checkpoint == path or command != "abort"
        assert abs(found.ended_at - time.time()) < SOON and found.status["status"] == "ended"
        run.thread.join(SOON)
    kinds = [event["kind"] for event in ended.read_events(str(jobs_dir), found)]
    assert kinds[0] == "started" and kinds[-1] == "ended" and {"phase", "command", "checkpoint"} <= {*kinds}
    assert ended.find(str(jobs_dir), "job").status["commands"][-1]["state"] == "finished"


def test_it_ends_by_itself_or_by_an_error(jobs_dir):
    """The reason is the exception's."""
    for crash in (None, KeyError("x")):
        with pytest.raises(KeyError) if crash else running_loop("other"), forgather_control.TrainingJob("job") as job:
            job.step(1)
            if crash:
                raise crash
    found = {job.job_id + job.how: job.reason for job in ended.scan(str(jobs_dir))}
    assert found == {"jobfinished": None, "jobfailed": "training ended by KeyError", "otherfinished": None}


@pytest.mark.once
@pytest.mark.parametrize("by", ["cleanup", "the next job"])
def test_a_killed_job_is_not_lost(jobs_dir, by):
    """Its events, its last checkpoint and the step that it had reached are kept."""
    with job_process() as victim:
        record = forgather_control.save_checkpoint("job", wait="finished")
        until(lambda: b'"checkpoint"' in (jobs_dir / "job" / "events.jsonl").read_bytes())
        started_at = registry.named(str(jobs_dir), "job").started_at
        victim.kill()
    assert ended.scan(str(jobs_dir)) == []
    if by == "cleanup":
        assert forgather_control.cleanup() == ["job"]
    else:
        with job_process():
            pass
    found = next(job for job in ended.scan(str(jobs_dir)) if job.started_at == started_at)
    assert (found.how, found.checkpoint) == ("died", record.result["path"])
    assert found.global_step >= found.checkpoint_step == record.result["step"]
    assert "ended" not in {event["kind"] for event in ended.read_events(str(jobs_dir), found)}


def test_many_runs_of_one_id(jobs_dir):
    """Each is kept; the id means the last one."""
    for _ in range(3):
        with forgather_control.TrainingJob("job") as job:
            job.step(1)
    found = ended.scan(str(jobs_dir))
    assert [job.job_id for job in found] == ["job"] * 3 and len({job.started_at for job in found}) == 3
    assert ended.find(str(jobs_dir), "job") == max(found, key=lambda job: job.ended_at)


def test_it_is_no_job(jobs_dir):
    """Neither a list nor a clean-up takes .ended for a job, even with the files of one in it."""
    with running_loop("alive"):
        put(jobs_dir, "run1")
        for name in ("endpoint.json", "control.sock", "lock"):
            (jobs_dir / ".ended" / name).write_bytes((jobs_dir / "alive" / "endpoint.json").read_bytes())
        assert [job.job_id for job in forgather_control.list_jobs()] == ["alive"]
        assert forgather_control.cleanup() == [] and registry.named(str(jobs_dir), ".ended") is None
        with pytest.raises(forgather_control.errors.NoSuchJob):
            forgather_control.get_job_status(".ended")
    assert (jobs_dir / ".ended").is_dir()


# Bounds...


def test_so_many_are_kept(jobs_dir, monkeypatch):
    """The oldest goes when another one ends; names that no job has go, too."""
    monkeypatch.setattr(limits, "MAX_ENDED", 3)
    (jobs_dir / ".ended" / "junk" / "deep").mkdir(parents=True)
    os.utime(jobs_dir / ".ended" / "junk", (1, 1))
    for number in range(5):
        put(jobs_dir, f"run{number}", status=status_of(f"run{number}", ended_at=float(number)), age=100.0 - number)
    assert [job.job_id for job in ended.scan(str(jobs_dir))] == ["run4", "run3", "run2"]
    assert len(list((jobs_dir / ".ended").iterdir())) == 3


def test_for_so_long(jobs_dir):
    """After 14 days it is not shown any more, and goes with the next one that ends."""
    old = put(jobs_dir, "old", age=limits.ENDED_SECONDS + 60)
    put(jobs_dir, "young", age=limits.ENDED_SECONDS - 60)
    assert [job.job_id for job in ended.scan(str(jobs_dir))] == ["young"] and not old.exists()
    os.utime(jobs_dir / ".ended" / "young@1000.0", (1, 1))
    assert ended.scan(str(jobs_dir)) == []


def test_the_numbers_of_the_contract():
    """100 jobs, 14 days, 1 MiB for each file."""
    assert (limits.MAX_ENDED, limits.ENDED_SECONDS) == (100, 14 * 24 * 3600)
    assert limits.MAX_EVENT_LOG == limits.MAX_STATUS == 1 << 20


# Trust...


def test_it_is_private(jobs_dir):
    """Directories are 0700 and files 0600, whatever the umask."""
    before = os.umask(0)
    try:
        with forgather_control.TrainingJob("job") as job:
            job.step(1)
    finally:
        os.umask(before)
    for path in (jobs_dir / ".ended").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize(
    "spoil",
    [
        lambda kept: (kept / "status.json").chmod(0o622),
        lambda kept: (kept / "events.jsonl").chmod(0o622),
        lambda kept: kept.chmod(0o722),
        lambda kept: kept.parent.chmod(0o722),
        lambda kept: (kept / "status.json").write_bytes(b" " * (limits.MAX_STATUS + 1)),
        lambda kept: kept.rename(kept.with_name("no job@1000.0")),
        lambda kept: kept.rename(kept.with_name("run1@nan")),
        lambda kept: kept.rename(kept.with_name("run1@inf")),
        lambda kept: kept.rename(kept.with_name("run1@1e300")),
        lambda kept: kept.rename(kept.with_name("run1")),
        lambda kept: kept.rename(kept.with_name("..@1.0")),
    ],
)
def test_what_others_could_have_written_is_not_shown(jobs_dir, spoil):
    """Nor what is too long, nor what has the name of no job."""
    kept = put(jobs_dir, "run1", status={"job_id": "run1"})
    assert len(ended.scan(str(jobs_dir))) == 1
    spoil(kept)
    assert ended.scan(str(jobs_dir)) == [] and ended.find(str(jobs_dir), "run1") is None


@needs_root
@pytest.mark.parametrize("name", ["status.json", "events.jsonl", "."])
def test_files_of_another_user_are_not_believed(jobs_dir, monkeypatch, name):
    """Neither a file nor a directory; only root reads those of any user."""
    kept = put(jobs_dir, "run1", status={"job_id": "run1"})
    os.chown(kept / name, 2000, -1)
    assert len(ended.scan(str(jobs_dir))) == 1
    monkeypatch.setattr(private_files.os, "geteuid", lambda: 1000)
    assert ended.scan(str(jobs_dir)) == []


@needs_root
def test_root_cleans_up_for_another_user(jobs_dir, dead):
    """What root makes there belongs to the owner of the jobs directory, who can read it."""
    publish(jobs_dir, "job", dead)
    (jobs_dir / "job" / "status.json").write_text('{"job_id": "job"}')
    os.chown(jobs_dir, 2000, 2000)
    assert forgather_control.cleanup() == ["job"]
    kept = next((jobs_dir / ".ended").iterdir())
    assert {kept.stat().st_uid, kept.parent.stat().st_uid} == {2000}


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (b"", ("died", None, None)),
        (b"\xff{", ("died", None, None)),
        (b"[1]", ("died", None, None)),
        (b"[" * 100_000, ("died", None, None)),
        (json.dumps({**status_of(), "job_id": "other"}).encode(), ("died", None, None)),
        (json.dumps(status_of(how="won")).encode(), ("died", 9, None)),
        (json.dumps(status_of(ended_at="now")).encode(), ("died", 9, None)),
        (json.dumps(status_of(ended_at=1e300)).encode(), ("died", 9, None)),
        (json.dumps(status_of(checkpoint=["/c"])).encode(), ("finished", 9, None)),
        (json.dumps({**status_of(), "global_step": "9"}).encode(), ("finished", None, "/c-7")),
        (json.dumps({**status_of(), "ended": 3}).encode(), ("died", 9, None)),
        (json.dumps(status_of()).encode(), ("finished", 9, "/c-7")),
    ],
    ids=range(12),
)
def test_a_status_of_any_content(jobs_dir, status, expected):
    """Members of the wrong kind are unknown; a run whose end is not known has died."""
    kept = put(jobs_dir, "run1", status={})
    (kept / "status.json").write_bytes(status)
    (found,) = ended.scan(str(jobs_dir))
    assert (found.how, found.global_step, found.checkpoint) == expected


@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_what_is_no_file_is_not_kept(jobs_dir, kind):
    """A link is not followed, and nothing blocks."""
    place = jobs_dir / "job"
    place.mkdir(parents=True)
    path = place / "events.jsonl"
    {"link": lambda: path.symlink_to("/etc/passwd"), "fifo": lambda: os.mkfifo(path), "directory": path.mkdir}[kind]()
    with private_files.opened(str(place)) as directory:
        ended.keep(str(jobs_dir), "job", 1.0, directory)
    assert ended.scan(str(jobs_dir)) == [] and not (jobs_dir / ".ended").exists()


@pytest.mark.parametrize("kind", ["file", "link", "writable"])
def test_where_it_cannot_be_kept_the_job_goes_all_the_same(jobs_dir, tmp_path, kind):
    """The end of training is not delayed by it, and nothing of the job stays."""
    jobs_dir.mkdir(mode=0o700)
    place = jobs_dir / ".ended"
    {"file": place.touch, "link": lambda: place.symlink_to(tmp_path), "writable": lambda: place.mkdir(mode=0o700)}[
        kind
    ]()
    if kind == "writable":
        place.chmod(0o777)
    with forgather_control.TrainingJob("job") as job:
        job.step(1)
    assert sorted(os.listdir(jobs_dir)) == [".ended", ".lock"] and ended.scan(str(jobs_dir)) == []
    assert list(tmp_path.iterdir()) == []
