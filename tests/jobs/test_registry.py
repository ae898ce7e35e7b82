"""Who is there, who lives, what may be removed: real jobs, real deaths, and many of them at once."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest

import forgather_control
from forgather_control.deadline import Deadline
from forgather_control.errors import JobsDirUnusable
from forgather_control.jobs import registry
from forgather_control.jobs.record import JobRecord, read_record
from forgather_control.processes import liveness

from ..support.harness import ROOT, SOON, Process, descriptors, job_process, serving, until


@pytest.fixture(scope="module")
def dead():
    """The identity of a real process that is gone."""
    child = subprocess.Popen(["sleep", "1000"])
    started_at = psutil.Process(child.pid).create_time()
    child.kill()
    child.wait()
    return liveness.current_process()._replace(pid=child.pid, started_at=started_at)


def publish(root, name, owner, **changes):
    """Write a job's directory as a job would have left it, by the process ``owner``."""
    (root / name).mkdir(parents=True, exist_ok=True)
    record = JobRecord(
        job_id=name, host=owner.host, port=None, pid=owner.pid, started_at=1700000000.0,
        socket=str(root / name / "control.sock"), process_started_at=owner.started_at, boot_id=owner.boot_id,
        machine=owner.machine, booted_at=owner.booted_at, pid_namespace=owner.pid_namespace,
    )  # fmt: skip
    (root / name / "endpoint.json").write_text(json.dumps({**record.to_json(), **changes}))
    return record._replace(**changes)


def tree(path):
    """All names below a directory, links not followed."""
    return sorted(str(found.relative_to(path)) for found in path.rglob("*") if found.name != ".lock")


def listening(path, backlog=10):
    """A socket that takes connections into its backlog and never answers."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    sock.listen(backlog)
    return sock


def states(root, seconds=2.0):
    """What ``discover`` says of each job."""
    return {job.job_id: job.state for job in registry.discover(str(root), seconds)[0]}


def stop(pid):
    """SIGSTOP, and wait until it has stopped."""
    os.kill(pid, signal.SIGSTOP)
    until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)


# Discovery...


def test_no_directory_is_no_jobs(jobs_dir):
    """Before the first job there is nothing to list and nothing to complain about; nor is anything made."""
    assert registry.discover(str(jobs_dir), 1.0) == ([], {}) and not jobs_dir.exists()
    jobs_dir.write_text("a file")
    assert registry.discover(str(jobs_dir), 1.0) == ([], {})


def test_the_newest_comes_first(jobs_dir, dead):
    """Jobs are sorted by their start, then by name; what cannot be a job's name is not looked at."""
    for job_id, started_at in (("b", 2), ("a", 2.0), ("old", -1), ("new", 3.5)):
        publish(jobs_dir, job_id, dead, started_at=started_at)
    publish(jobs_dir, ".hidden", dead)
    publish(jobs_dir, "a name", dead)
    (jobs_dir / "file").touch()
    assert [record.job_id for record in registry.scan(str(jobs_dir))[0]] == ["new", "a", "b", "old"]


def test_one_bad_record_does_not_hide_the_others(jobs_dir, dead):
    """Each record that cannot be read is left out with its reason; the rest is listed and judged."""
    publish(jobs_dir, "good", dead)
    bad = {
        "half": '{"job_id": "half", "ho', "empty": "", "list": "[]", "deep": "[" * 60000,
        "victim": '{"job_id": "../victim"}',
        "null": json.dumps({"job_id": "null", "host": "h", "port": None, "pid": 1, "started_at": None}),
        "pid": json.dumps({"job_id": "pid", "host": "h", "port": None, "pid": "-5", "started_at": 1}),
        "port": json.dumps({"job_id": "port", "host": "h", "port": 10**300, "pid": 1, "started_at": 1}),
        "eternal": json.dumps({"job_id": "eternal", "host": "h", "port": None, "pid": 1, "started_at": 10**400}),
    }  # fmt: skip
    for name, text in bad.items():
        (jobs_dir / name).mkdir()
        (jobs_dir / name / "endpoint.json").write_text(text)
    for name in ("fifo", "folder"):
        (jobs_dir / name).mkdir()
    os.mkfifo(jobs_dir / "fifo" / "endpoint.json")
    (jobs_dir / "folder" / "endpoint.json").mkdir()
    found, left_out = registry.discover(str(jobs_dir), 1.0)
    assert [job.job_id for job in found] == ["good"]
    assert left_out.keys() == {*bad, "fifo", "folder"} and all(left_out.values())
    assert forgather_control.cleanup() == ["good"] and len(tree(jobs_dir)) == 2 * len(left_out)


def test_no_value_that_a_record_may_hold_breaks_the_list(jobs_dir, dead):
    """Times at their limits, sockets that are no paths, pids at the end: each is listed with some state."""
    odd = [
        {"process_started_at": 2e11, "booted_at": -2e11}, {"process_started_at": -1}, {"started_at": -2e11},
        {"socket": ""}, {"socket": "\0abstract"}, {"socket": "a\0b"}, {"socket": "\ud800"}, {"socket": "x" * 5000},
        {"socket": str(jobs_dir)}, {"socket": "/dev/null"}, {"pid": 2**31 - 1}, {"host": "\ud800\x1b[2J"},
        {"port": 65535},
    ]  # fmt: skip
    for number, changes in enumerate(odd):
        publish(jobs_dir, f"odd{number}", dead, **changes)
    found, left_out = registry.discover(str(jobs_dir), 1.0)
    assert len(found) == len(odd) and not left_out
    assert {job.state for job in found} == {"dead", "foreign"}


def test_live_is_who_answers_for_this_job(jobs_dir, dead):
    """A socket that answers with the job's id makes it live, whatever its record says of pids and hosts."""
    record = publish(jobs_dir, "job", dead._replace(host="another"))
    with serving(record.socket, lambda request, sink: {"job_id": "job", "global_step": 7}):
        job = registry.discover(str(jobs_dir), SOON)[0][0]
        assert (job.state, job.global_step, job.to_json()["global_step"]) == ("live", 7, 7)
    assert states(jobs_dir) == {"job": "foreign"}


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\n",
        b"garbage\n",
        b"\xff\xfe\n",
        b"x" * (1 << 21),
        b"[" * 9999 + b"\n",
        b'{"jsonrpc":"2.0","id":1,"result":{"job_id":"other"}}\n',
        b'{"jsonrpc":"2.0","id":1,"result":"job"}\n',
        b'{"jsonrpc":"2.0","id":1,"error":{"code":-32603,"message":"no"}}\n',
        b'{"jsonrpc":"2.0","id":1,"result":{"job_id":"job"}}',
    ],
    ids=lambda value: ascii(value[:20]),
)
def test_who_answers_something_else_is_not_live(jobs_dir, dead, answer):
    """Another job's answer, an error, garbage or a line without end is no sign of life of this job."""
    record = publish(jobs_dir, "job", liveness.current_process())
    with listening(record.socket) as listener:

        def speak():
            client, _ = listener.accept()
            with client:
                client.recv(1000)
                try:
                    client.sendall(answer)
                except OSError:
                    pass  # it had heard enough

        thread = threading.Thread(target=speak)
        thread.start()
        found = states(jobs_dir, SOON)
        thread.join(SOON)
    # A whole answer that lacks only its newline is still an answer: the stream has ended.
    assert found == {"job": "live" if answer.endswith(b'"job"}}') else "silent"}


def test_a_reused_pid_reads_dead(jobs_dir):
    """A record that points at a live foreign pid with another start time is a dead job's, and is removed."""
    with Process("import sys; sys.stdin.read()") as other:
        owner = liveness.current_process()._replace(
            pid=other.pid, started_at=psutil.Process(other.pid).create_time() - 100
        )
        publish(jobs_dir, "job", owner)
        assert states(jobs_dir) == {"job": "dead"} and forgather_control.cleanup() == ["job"]
        assert other.popen.poll() is None


@pytest.mark.once
def test_a_thousand_dead_cost_no_deadline_each(jobs_dir, dead):
    """Dead jobs, with the socket files that kill -9 leaves, refuse at once."""
    for number in range(1000):
        record = publish(jobs_dir, f"job{number}", dead)
        if number % 10 == 0:
            listening(record.socket).close()
    before, start = descriptors(), time.monotonic()
    assert list(states(jobs_dir, 10.0).values()) == ["dead"] * 1000
    assert time.monotonic() - start < 5, "one time-out would have been 10 s"
    assert descriptors() == before


@pytest.mark.once
def test_many_silent_ones_share_one_deadline(jobs_dir):
    """Fifty jobs that never answer take as long as one, and the live one beside them is seen."""
    listeners = [listening(publish(jobs_dir, f"mute{n}", liveness.current_process()).socket) for n in range(50)]
    record = publish(jobs_dir, "alive", liveness.current_process(), started_at=1)
    before, start = descriptors(), time.monotonic()
    with serving(record.socket, lambda request, sink: {"job_id": "alive"}):
        found = states(jobs_dir, 0.5)
    assert found.pop("alive") == "live" and set(found.values()) == {"silent"} and len(found) == 50
    assert 0.5 <= time.monotonic() - start < 2 and descriptors() == before
    for listener in listeners:
        listener.close()


def test_more_jobs_than_are_asked_at_once(jobs_dir):
    """All of 300 live jobs are seen, though not all sockets are open at the same time."""
    names = sorted((f"job{number:03}" for number in range(300)), reverse=True)
    listeners = [
        (n, listening(publish(jobs_dir, n, liveness.current_process(), started_at=int(n[3:])).socket)) for n in names
    ]

    def serve():
        for name, listener in listeners:
            client, _ = listener.accept()
            client.recv(1000)
            client.sendall(b'{"jsonrpc":"2.0","id":1,"result":{"job_id":"%s"}}\n' % name.encode())
            client.close()
            listener.close()

    thread = threading.Thread(target=serve)
    thread.start()
    found = states(jobs_dir, SOON)
    thread.join(SOON)
    assert found == dict.fromkeys(names, "live")


@pytest.mark.once
def test_a_stopped_job_is_silent_and_comes_back(jobs_dir):
    """SIGSTOP makes a job silent within the deadline; no cleanup touches it; SIGCONT makes it live."""
    with job_process() as job:
        assert states(jobs_dir) == {"job": "live"}
        stop(job.pid)
        start = time.monotonic()
        assert states(jobs_dir, 0.3) == {"job": "silent"} and time.monotonic() - start < 2
        before = tree(jobs_dir)
        assert forgather_control.cleanup() == [] and not registry.remove_dead(str(jobs_dir), "job")
        assert tree(jobs_dir) == before
        os.kill(job.pid, signal.SIGCONT)
        assert states(jobs_dir, SOON) == {"job": "live"}


# Cleaning up...


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
    assert forgather_control.cleanup() == [] and not registry.remove_dead(str(jobs_dir), "job")
    assert tree(jobs_dir) == before


def test_another_boot_is_a_death(jobs_dir):
    """After a reboot no pid counts, though a process may have it."""
    publish(jobs_dir, "job", liveness.current_process()._replace(boot_id="before the reboot"))
    assert states(jobs_dir) == {"job": "dead"} and forgather_control.cleanup() == ["job"]


def test_who_answers_is_not_removed(jobs_dir, dead):
    """A record whose pid is gone here, but in whose name somebody answers, is a live job's."""
    record = publish(jobs_dir, "job", dead)
    with serving(record.socket, lambda request, sink: {"job_id": "job"}):
        assert not registry.is_dead(record) and not registry.remove_dead(str(jobs_dir), "job")
    assert registry.remove_dead(str(jobs_dir), "job")


def test_a_dead_jobs_record_costs_no_live_job_its_directory(jobs_dir, dead):
    """Somebody copied it there: who answers at the socket beside it is not asked by what the record says."""
    record = publish(jobs_dir, "job", dead, socket=None)
    with serving(jobs_dir / "job" / "control.sock", lambda request, sink: {"job_id": "job"}):
        assert registry.is_dead(record) and not registry.remove_dead(str(jobs_dir), "job")
    assert registry.remove_dead(str(jobs_dir), "job")


@pytest.mark.parametrize("job_id", ["", ".", "..", "../victim", "/abs", "nobody", "link", "file", "mismatch", ".lock"])
def test_only_a_job_directory_is_removed(jobs_dir, dead, job_id):
    """No path, no link, no file, and no directory whose record names another leads to a removal."""
    publish(jobs_dir.parent, "victim", dead)
    publish(jobs_dir, "other", dead, job_id="link")
    publish(jobs_dir, "mismatch", dead, job_id="../victim")
    (jobs_dir / "link").symlink_to("other")
    (jobs_dir / "file").touch()
    before = tree(jobs_dir.parent)
    assert not registry.remove_dead(str(jobs_dir), job_id) and not registry.remove_dead(
        str(jobs_dir), f"{jobs_dir}/{job_id}"
    )
    assert forgather_control.cleanup() == [] and tree(jobs_dir.parent) == before


def test_links_inside_a_dead_job_are_removed_not_followed(jobs_dir, dead):
    """What a dead job's directory points at stays, be it a file, a directory or the jobs directory."""
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
    with registry.locked(str(jobs_dir), 1.0) as possible:
        assert possible
        cleaner = threading.Thread(target=lambda: removed.append(registry.remove_dead(str(jobs_dir), "job")))
        cleaner.start()
        publish(jobs_dir, "job", liveness.current_process())
    cleaner.join(SOON)
    assert removed == [False] and read_record(str(jobs_dir), "job").pid == os.getpid()


def test_the_lock_is_waited_for_until_the_deadline(jobs_dir):
    """Who cannot get the lock says so in time, and leaves no descriptor; a killed holder lets go of it."""
    jobs_dir.mkdir()
    program = """
    import sys
    from forgather_control.jobs import registry as jobs
    with jobs.locked(sys.argv[1], 1.0):
        print("held", flush=True)
        sys.stdin.read()
    """
    with Process(program, str(jobs_dir)) as holder:
        assert holder.line() == "held"
        before, start = descriptors(), time.monotonic()
        with pytest.raises(JobsDirUnusable, match=r"held .*/\.lock for too long"), registry.locked(str(jobs_dir), 0.1):
            pass
        assert 0.1 <= time.monotonic() - start < 2 and descriptors() == before
        holder.kill()
        with registry.locked(str(jobs_dir), 0.0) as possible:
            assert possible


def test_a_file_system_without_locks_goes_on(jobs_dir, monkeypatch):
    """Where flock is not to be had (Lustre), the work goes on unlocked and says so."""
    jobs_dir.mkdir()

    def no_locks(*args):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with registry.locked(str(jobs_dir), 1.0) as possible:
        assert not possible


def test_the_lock_is_not_made_through_a_link(jobs_dir):
    """A planted .lock that points elsewhere makes no file there."""
    jobs_dir.mkdir()
    (jobs_dir / ".lock").symlink_to(jobs_dir.parent / "planted")
    with pytest.raises(JobsDirUnusable, match="cannot be written"), registry.locked(str(jobs_dir), 1.0):
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
        intact = not job.restore() and sorted(os.listdir(job.path)) == ["control.sock", "endpoint.json"]
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


def test_asking_takes_a_deadline_that_has_passed(jobs_dir):
    """With no time left nobody is waited for."""
    record = publish(jobs_dir, "job", liveness.current_process())
    with listening(record.socket):
        start = time.monotonic()
        assert registry.ask([record], "ping", Deadline(0)) == {} and time.monotonic() - start < 1


def test_the_jobs_directory_that_cannot_be_read_says_so(jobs_dir):
    """An error of the system on the directory itself is one sentence with its path."""
    jobs_dir.symlink_to(jobs_dir)  # ELOOP, for root, too
    with pytest.raises(JobsDirUnusable, match="cannot be read"):
        registry.scan(str(jobs_dir))


def test_these_tests_run_on_this_package():
    """Control: the children above import the same code."""
    assert Path(forgather_control.__file__).is_relative_to(ROOT)
