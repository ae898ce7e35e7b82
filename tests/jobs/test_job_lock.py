"""The lock of a job: the kernel keeps it for the job's process alone, and nothing else proves life."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys

import psutil
import pytest

from forgather_control import get_job_status
from forgather_control.jobs import cleanup, job_lock, registry
from forgather_control.jobs.directory import JobDirectory
from forgather_control.jobs.job_lock import JobLock, is_held
from forgather_control.jobs.record import read_record
from forgather_control.processes import liveness

from ..support.harness import JOB, SOON, Process, descriptors, job_process, needs, needs_root, running_loop, until
from .test_registry import publish, states, stop

#: Takes a lock in the directory of its first argument, does what its second one says, and prints "done".
HOLDER = """
import multiprocessing, os, subprocess, sys, time
from forgather_control.jobs.job_lock import JobLock

lock = JobLock(sys.argv[1], 1.0)
assert lock.take()
exec(sys.argv[2])
sys.stdin.read()
"""


@pytest.fixture
def place(jobs_dir):
    """The directory of a job."""
    (jobs_dir / "job").mkdir(parents=True)
    return jobs_dir / "job"


@pytest.fixture
def lock(place):
    """A lock that this process holds."""
    lock = JobLock(str(place), 1.0)
    assert lock.take()
    yield lock
    lock.release()


def test_it_is_held_until_it_is_released(place, lock):
    """In the job's own process, too, whatever opens the file; then it is free, and no descriptor left."""
    before = descriptors()
    for _ in range(3):
        assert is_held(str(place), 1.0)
        (place / "lock").read_bytes()
    assert (place / "lock").stat().st_mode & 0o777 == 0o600 and os.listdir(place) == ["lock"]
    lock.release()
    lock.release()
    assert is_held(str(place), 1.0) is False and descriptors() == before - 1


@pytest.mark.parametrize(
    "child",
    [
        "child = os.fork() or time.sleep(1000)",
        "p = multiprocessing.get_context('fork').Process(target=time.sleep, args=(1000,)); p.start(); child = p.pid",
        "child = subprocess.Popen(['sleep', '1000'], close_fds=False).pid",
        "child = os.posix_spawnp('sleep', ['sleep', '1000'], os.environ)",
    ],
    ids=["fork", "multiprocessing", "subprocess", "posix_spawn"],
)
def test_no_child_keeps_it(place, child):
    """The process is killed, and its child lives on: the lock is free."""
    with Process(HOLDER, str(place), child + "; print(child, flush=True)") as holder:
        orphan = psutil.Process(int(holder.line()))
        try:
            assert is_held(str(place), 1.0)
            holder.kill()
            until(lambda: is_held(str(place), 1.0) is False)
            assert orphan.is_running()
        finally:
            orphan.kill()


def test_a_child_of_another_thread_at_that_very_moment(place, monkeypatch):
    """A descriptor that a fork may have copied before it was noted is not used."""
    opened, real = [], os.open

    def open_while_forking(*args, **options):
        opened.append(real(*args, **options))
        if len(opened) == 1:
            job_lock._in_parent()
        return opened[-1]

    (place / "file").touch()
    monkeypatch.setattr(os, "open", open_while_forking)
    file = job_lock._open_noted(str(place / "file"), os.O_RDONLY, None)
    assert len(opened) == 2 and file in job_lock._files
    job_lock._close(file)


def test_a_program_executed_anew_does_not_hold_it(place):
    """execve(2) keeps the pid, the start time, and no lock."""
    again = "import sys; print('again', flush=True); sys.stdin.read()"
    with Process(HOLDER, str(place), f"os.execv(sys.executable, [sys.executable, '-c', {again!r}])") as holder:
        assert holder.line() == "again" and is_held(str(place), 1.0) is False and holder.popen.poll() is None


@pytest.mark.parametrize("what", ["none", "another run's", "link", "fifo", "directory"])
def test_what_is_no_lock_of_the_run_proves_nothing(place, what):
    """No file, or one of another run, or no regular file: unknown, not dead."""
    held = JobLock(str(place), 2.0)
    if what == "another run's":
        held.take()
    elif what == "link":
        (place / "target").write_text("1.0\n")
        (place / "lock").symlink_to("target")
    elif what == "fifo":
        os.mkfifo(place / "lock")
    elif what == "directory":
        (place / "lock").mkdir()
    assert is_held(str(place), 1.0) is None
    held.release()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO])
def test_without_locks_there_is_no_file_and_one_warning(place, monkeypatch, caplog, number):
    """It is said once what judges the job then; an old file does not stay to prove its death."""

    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    (place / "lock").write_text("1.0\n")
    monkeypatch.setattr(job_lock, "_warned", False)
    monkeypatch.setattr(fcntl, "flock", flock)
    before, lock = descriptors(), JobLock(str(place), 1.0)
    with caplog.at_level(logging.WARNING):
        assert not lock.take() and not lock.take() and not lock.is_lost()
    assert os.listdir(place) == [] and descriptors() == before
    assert [record.getMessage() for record in caplog.records] == [
        f"{place} cannot be locked ({os.strerror(number)}): whether this job lives is judged by its host and pid."
    ]


def test_a_file_that_only_writers_may_lock(place, monkeypatch):
    """NFS refuses an exclusive lock on a descriptor that is open for reading: a second one is tried."""
    real, modes = fcntl.flock, []

    def flock(file, operation):
        modes.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE)
        if modes[-1] == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = JobLock(str(place), 1.0)
    assert lock.take() and modes == [os.O_RDONLY, os.O_RDWR]
    monkeypatch.undo()
    assert is_held(str(place), 1.0)
    lock.release()


def test_a_descriptor_that_others_closed(place, lock):
    """os.closerange by the application: the loss is noticed, and the number's next owner is left alone."""
    number = lock._file.number
    with open(os.devnull) as other:
        os.dup2(other.fileno(), number)
    assert lock.is_lost() and is_held(str(place), 1.0) is False
    assert lock.take() and not lock.is_lost() and is_held(str(place), 1.0)
    os.close(number)


# How a job is judged by it...


@pytest.mark.parametrize(
    ("changes", "held", "state"),
    [
        ({}, True, "silent"),
        ({}, False, "dead"),
        ({}, None, "silent"),
        # Names and numbers only explain ...
        ({"host": "renamed"}, True, "silent"),
        ({"host": "renamed"}, False, "dead"),
        ({"host": "renamed"}, None, "foreign"),
        ({"pid": 2**31 - 1}, True, "silent"),
        ({"process_started_at": 1.0}, True, "silent"),
        ({"pid_namespace": 1}, True, "silent"),
        ({"pid_namespace": 1}, False, "dead"),
        ({"pid_namespace": 1}, None, "foreign"),
        # ... but locks of another boot may not be seen here.
        ({"host": "another", "boot_id": "another"}, True, "foreign"),
        ({"host": "another", "boot_id": "another"}, False, "foreign"),
        ({"host": "another", "boot_id": None}, False, "foreign"),
        ({"boot_id": None}, False, "silent"),
        ({"boot_id": None}, True, "silent"),
        ({"boot_id": "another"}, False, "dead"),
    ],
)
def test_the_lock_decides(jobs_dir, monkeypatch, changes, held, state):
    """A held lock is life. A free one is death on this boot. Without one, the process is judged."""
    monkeypatch.setattr(liveness, "_boot_id", lambda: "this boot")
    monkeypatch.setattr(liveness, "_machine", lambda: None)
    monkeypatch.setattr(liveness, "_pid_namespace", lambda: 4026531836)
    record = publish(jobs_dir, "job", liveness.current_process(), **changes)
    lock = JobLock(str(jobs_dir / "job"), record.started_at)
    if held is not None:
        lock.take()
        if not held:
            lock.release()
    assert registry.judge(record) == state and states(jobs_dir) == {"job": state}
    assert cleanup.remove_dead(str(jobs_dir), "job") == (state == "dead")
    lock.release()


def test_a_stopped_job_that_lists_jobs_stays_alive(jobs_dir):
    """It has opened its own file, by the wire and by its own call; and its record's names are wrong, too."""
    with job_process() as job:
        from forgather_control import connect

        with connect("job") as client:
            assert [row["job_id"] for row in client.call("list_jobs")] == ["job"]
        place = jobs_dir / "job" / "endpoint.json"
        stop(job.pid)
        place.write_text(json.dumps({**json.loads(place.read_text()), "pid": 2**31 - 1, "host": "renamed"}))
        assert registry.judge(read_record(str(jobs_dir), "job")) == "silent"
        job.kill()
        assert registry.judge(read_record(str(jobs_dir), "job")) == "dead"


@pytest.mark.once
@pytest.mark.parametrize("loss", ["deleted", "replaced", "closed"])
def test_a_job_takes_its_lock_again(jobs_dir, loss):
    """Whoever deletes or replaces the file, or closes its descriptor: at the next tick it is held again."""
    with running_loop() as run:
        place, started_at = jobs_dir / "job", read_record(str(jobs_dir), "job").started_at
        if loss == "closed":
            os.close(run.job._controller._server._directory._lock._file.number)
        else:
            (place / "lock").unlink()
            if loss == "replaced":
                (place / "lock").write_text(f"{started_at!r}\n")
        assert not is_held(str(place), started_at)
        until(lambda: is_held(str(place), started_at))
    assert not place.exists()


def test_what_a_removal_left_is_a_dead_jobs(jobs_dir, monkeypatch):
    """The directory cannot be removed as training ends, and its process lives on: the id is free all the same."""
    with running_loop() as run:
        monkeypatch.setattr(JobDirectory, "_discard", lambda self: None)
        assert run.job.job_id == "job"
    monkeypatch.undo()
    assert states(jobs_dir) == {"job": "dead"} and cleanup.remove_dead(str(jobs_dir), "job")


@needs_root
@needs("unshare")
def test_a_container_that_is_made_anew_has_its_id(jobs_dir):
    """Pid 1 of a container is killed; the next one has another name, and another PID namespace."""
    code = """
import socket, sys, time
socket.sethostname(sys.argv[1])
from forgather_control import TrainingJob
with TrainingJob(job_id="job") as job:
    print(job.job_id, socket.gethostname(), flush=True)
    time.sleep(1000)
"""
    options = "--uts --pid --fork --kill-child --mount-proc"
    for name in ("old-name", "new-name", "new-name"):
        inside = ["unshare", *options.split(), sys.executable, "-c", code, name]
        with subprocess.Popen(inside, stdout=subprocess.PIPE, text=True) as container:
            assert container.stdout.readline() == f"job {name}\n"
            assert states(jobs_dir) == {"job": "live"}
            container.kill()
        until(lambda: states(jobs_dir) == {"job": "dead"})
    assert cleanup.remove_dead(str(jobs_dir), "job")


def test_a_renamed_host(jobs_dir, monkeypatch):
    """The host is renamed under a job: it is live, its stopped process is silent, and its death is seen."""
    with job_process() as job:
        monkeypatch.setattr(socket, "gethostname", lambda: "renamed")
        assert states(jobs_dir) == {"job": "live"}
        stop(job.pid)
        assert states(jobs_dir, 0.1) == {"job": "silent"}
        os.kill(job.pid, signal.SIGKILL)
        job.popen.wait(SOON)
        assert states(jobs_dir) == {"job": "dead"}


@needs_root
@needs("unshare")
@pytest.mark.parametrize(
    "options",
    [["--mount", "sh", "-c", 'mount -t tmpfs none /proc; exec "$@"', "sh"], ["--pid", "--fork", "--kill-child"]],
    ids=["none", "another namespace's"],
)
def test_a_job_without_a_proc_of_its_own(jobs_dir, options):
    """It is controlled, its unknown figures are null, one line says so, and its lock is its life."""
    inside = ["unshare", *options, sys.executable, "-c", JOB, "job"]
    with subprocess.Popen(inside, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        try:
            assert job.stdout.readline() == "ready\n"
            record = read_record(str(jobs_dir), "job")
            assert (record.process_started_at, record.booted_at) == (None, None)
            status = get_job_status("job")
            assert (status["pid"], status["rss_bytes"]) == (record.pid, None)
            assert registry.judge(record) == "silent"
        finally:
            job.kill()
        said = job.stderr.read()
    assert said.count("WARNING") == 1 and "the start and memory of this process are unknown" in said
    until(lambda: registry.judge(record) == "dead")
