"""Which directories are removed and which are not: real jobs, real deaths, and many of them at once."""

from __future__ import annotations

import fcntl
import os
import threading
import time

import pytest

import forgather_control
from forgather_control.errors import JobsDirUnusable
from forgather_control.jobs import cleanup, registry
from forgather_control.jobs.record import read_record
from forgather_control.processes import liveness

from ..support.harness import SOON, Process, descriptors, job_process, serving
from .test_registry import publish, states, tree


def test_a_killed_job_reads_dead_and_is_cleaned_up(jobs_dir):
    """After kill -9 the list says dead at once, cleanup removes all of it, and the id is free."""
    with job_process() as job:
        (jobs_dir / "job" / "requests" / "deep").mkdir(parents=True)
        (jobs_dir / "job" / "requests" / "deep" / "file").touch()
        job.kill()
        assert [(found.job_id, found.state) for found in forgather_control.list_jobs()] == [("job", "dead")]
        assert forgather_control.cleanup() == ["job"]
    assert tree(jobs_dir) == [] and forgather_control.cleanup() == []


@pytest.mark.parametrize(
    "changes",
    [{"host": "another.example.org"}, {"machine": "another"}, {"pid_namespace": 1}],
    ids=lambda changes: next(iter(changes)),
)
def test_what_this_host_cannot_see_is_not_removed(jobs_dir, dead, monkeypatch, changes):
    """A job of another host, machine or container is foreign, though its pid is gone here."""
    monkeypatch.setattr(liveness, "_machine", lambda: "this machine")
    publish(jobs_dir, "job", dead, **{"machine": "this machine", **changes})
    before = tree(jobs_dir)
    assert states(jobs_dir) == {"job": "foreign"}
    assert forgather_control.cleanup() == [] and not cleanup.remove_dead(str(jobs_dir), "job")
    assert tree(jobs_dir) == before


def test_another_boot_is_a_death(jobs_dir):
    """After a reboot no pid counts, though a process may have it."""
    publish(jobs_dir, "job", liveness.current_process()._replace(boot_id="before the reboot"))
    assert states(jobs_dir) == {"job": "dead"} and forgather_control.cleanup() == ["job"]


def test_who_answers_is_not_removed(jobs_dir, dead):
    """A record whose pid is gone here, but whose job still answers, is a live job's."""
    record = publish(jobs_dir, "job", dead)
    with serving(record.socket, lambda request, sink: {"job_id": "job"}):
        assert not cleanup.is_dead(record, str(jobs_dir)) and not cleanup.remove_dead(str(jobs_dir), "job")
    assert cleanup.remove_dead(str(jobs_dir), "job")


def test_a_dead_jobs_record_costs_no_live_job_its_directory(jobs_dir, dead):
    """A record was copied there: the socket beside it is asked, too, not only the one that the record names."""
    record = publish(jobs_dir, "job", dead, socket=None)
    with serving(jobs_dir / "job" / "control.sock", lambda request, sink: {"job_id": "job"}):
        assert cleanup.is_dead(record, str(jobs_dir)) and not cleanup.remove_dead(str(jobs_dir), "job")
    assert cleanup.remove_dead(str(jobs_dir), "job")


@pytest.mark.parametrize("job_id", ["", ".", "..", "../victim", "/abs", "nobody", "link", "file", "mismatch", ".lock"])
def test_only_a_job_directory_is_removed(jobs_dir, dead, job_id):
    """No path, no link, no file, and no directory whose record names another leads to a removal."""
    publish(jobs_dir.parent, "victim", dead)
    publish(jobs_dir, "other", dead, job_id="link")
    publish(jobs_dir, "mismatch", dead, job_id="../victim")
    (jobs_dir / "link").symlink_to("other")
    (jobs_dir / "file").touch()
    before = tree(jobs_dir.parent)
    assert not cleanup.remove_dead(str(jobs_dir), job_id) and not cleanup.remove_dead(
        str(jobs_dir), f"{jobs_dir}/{job_id}"
    )
    assert forgather_control.cleanup() == [] and tree(jobs_dir.parent) == before


def test_links_inside_a_dead_job_are_removed_not_followed(jobs_dir, dead):
    """Targets of links in a dead job's directory stay: a file, a directory, the jobs directory."""
    outside = jobs_dir.parent / "outside"
    outside.mkdir()
    (outside / "precious").write_text("weights")
    publish(jobs_dir, "job", dead)
    publish(jobs_dir, "broken", dead, pid=-5)
    for name, target in (("dir", outside), ("file", outside / "precious"), ("up", jobs_dir), ("control.sock", outside)):
        (jobs_dir / "job" / name).symlink_to(target)
    os.link(outside / "precious", jobs_dir / "job" / "hard")
    assert forgather_control.cleanup() == ["job"]
    assert (outside / "precious").read_text() == "weights" and tree(jobs_dir) == ["broken", "broken/endpoint.json"]


def test_a_job_is_judged_again_under_the_lock(jobs_dir, dead):
    """A job that takes the id over between the list and the removal is safe."""
    publish(jobs_dir, "job", dead)
    removed = []
    with cleanup.locked(str(jobs_dir), 1.0) as possible:
        assert possible
        cleaner = threading.Thread(target=lambda: removed.append(cleanup.remove_dead(str(jobs_dir), "job")))
        cleaner.start()
        publish(jobs_dir, "job", liveness.current_process())
    cleaner.join(SOON)
    assert removed == [False] and read_record(str(jobs_dir), "job").pid == os.getpid()


def test_the_lock_is_waited_for_until_the_deadline(jobs_dir):
    """Without the lock there is an error in time, and no descriptor left; killing the holder frees the lock."""
    jobs_dir.mkdir()
    program = """
    import sys
    from forgather_control.jobs import cleanup
    with cleanup.locked(sys.argv[1], 1.0):
        print("held", flush=True)
        sys.stdin.read()
    """
    with Process(program, str(jobs_dir)) as holder:
        assert holder.line() == "held"
        before, start = descriptors(), time.monotonic()
        with pytest.raises(JobsDirUnusable, match=r"held .*/\.lock for 0.1 s"), cleanup.locked(str(jobs_dir), 0.1):
            pass
        assert 0.1 <= time.monotonic() - start < 2 and descriptors() == before
        holder.kill()
        with cleanup.locked(str(jobs_dir), 0.0) as possible:
            assert possible


def test_a_file_system_without_locks_goes_on(jobs_dir, monkeypatch):
    """Where flock is not to be had (Lustre), the work goes on unlocked and says so."""
    jobs_dir.mkdir()

    def no_locks(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with cleanup.locked(str(jobs_dir), 1.0) as possible:
        assert not possible


def test_the_lock_is_not_made_through_a_link(jobs_dir):
    """A planted .lock that points elsewhere makes no file there."""
    jobs_dir.mkdir()
    (jobs_dir / ".lock").symlink_to(jobs_dir.parent / "planted")
    with pytest.raises(JobsDirUnusable, match="cannot be written"), cleanup.locked(str(jobs_dir), 1.0):
        pass
    assert not (jobs_dir.parent / "planted").exists()


#: A parent of jobs: forks one after the other, each claims, half of them end as they should, half by kill -9.
JOBS = """
import os, signal, sys
from forgather_control.jobs.directory import JobDirectory
from forgather_control.server.server import Server

for number in range(int(sys.argv[2])):
    child = os.fork()
    if child == 0:
        server = Server(lambda request, sink: {"job_id": job.job_id}, lambda: None)
        job = JobDirectory(f"{sys.argv[1]}-{number % 4}", server.listen, 1)
        job.claim()
        server.start()
        intact = not job.restore() and sorted(os.listdir(job.path)) == ["control.sock", "endpoint.json", "lock"]
        if number % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        job.remove()
        server.close(5.0)
        os._exit(0 if intact and not os.path.exists(job.path) else 1)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) not in (0, -signal.SIGKILL):
        sys.exit(1)
"""


@pytest.mark.once
def test_list_and_cleanup_while_jobs_start_and_stop(jobs_dir):
    """48 jobs come and go, half of them by kill -9, the list is read 200 times: nothing raises, no live job is hurt."""
    parents = [Process(JOBS, f"job{number}", "16") for number in range(3)]
    try:
        reads, end = 0, time.monotonic() + 2 * SOON
        while reads < 200 or any(parent.popen.poll() is None for parent in parents):
            found, left_out = registry.discover(str(jobs_dir), 2.0)
            assert not left_out and {job.state for job in found} <= {"live", "silent", "dead"}
            reads += 1
            if reads % 5 == 0:
                forgather_control.cleanup()
            assert time.monotonic() < end
        assert [parent.end() for parent in parents] == [0, 0, 0], [parent.errors for parent in parents]
    finally:
        for parent in parents:
            parent.__exit__()
    forgather_control.cleanup()
    assert tree(jobs_dir) == []
