"""Which jobs exist and which are live: real jobs, real deaths, and many of them at once."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest

import forgather_control
from forgather_control.deadline import Deadline
from forgather_control.errors import JobsDirUnusable
from forgather_control.jobs import cleanup, limits, registry
from forgather_control.jobs.record import JobRecord
from forgather_control.processes import liveness

from ..support.harness import MS, ROOT, SOON, Process, descriptors, job_process, running_loop, serving, until


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
    """All names below a directory, links not followed, but for what is kept of ended jobs."""
    return sorted(
        str(found.relative_to(path))
        for found in path.rglob("*")
        if ".lock" not in found.parts and ".ended" not in found.parts
    )


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


def test_a_file_in_place_of_the_jobs_directory_is_an_error(jobs_dir):
    """It is not taken for a directory without jobs."""
    jobs_dir.write_text("a file")
    with pytest.raises(JobsDirUnusable, match="Not a directory"):
        registry.discover(str(jobs_dir), 1.0)


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
    os.unlink(record.socket)
    with serving(record.socket, lambda request, sink: {"job_id": "job", "metrics": "x" * 900_000}):
        assert states(jobs_dir, SOON) == {"job": "live"}
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
        assert forgather_control.cleanup() == [] and not cleanup.remove_dead(str(jobs_dir), "job")
        assert tree(jobs_dir) == before
        os.kill(job.pid, signal.SIGCONT)
        assert states(jobs_dir, SOON) == {"job": "live"}


def answering(path, job_id, after=0.0):
    """A thread that answers one request for the job ``job_id``, ``after`` seconds late."""
    listener = listening(path)

    def serve():
        with listener, listener.accept()[0] as client:
            client.recv(1000)
            threading.Event().wait(after)
            client.sendall(b'{"jsonrpc":"2.0","id":1,"result":{"job_id":"%s"}}\n' % job_id.encode())

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def full(path):
    """A socket whose backlog is full, as that of a job that was stopped while clients came, and its clients."""
    listener, clients = listening(path, backlog=0), []
    while True:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        clients.append(client)
        client.setblocking(False)
        try:
            client.connect(str(path))
        except BlockingIOError:
            return [listener, *clients]


@pytest.mark.once
def test_a_live_job_is_seen_behind_more_silent_ones_than_are_asked_at_once(jobs_dir):
    """Silent jobs make room, so the oldest job of 450 is asked in time, too; the wait is no longer for it."""
    me, before = liveness.current_process(), descriptors()
    listeners = [listening(publish(jobs_dir, f"mute{n}", me).socket) for n in range(2 * limits.MAX_ASKED_AT_ONCE)]
    thread = answering(publish(jobs_dir, "alive", me, started_at=1).socket, "alive")
    start = time.monotonic()
    found = states(jobs_dir, 1.5)
    assert found.pop("alive") == "live" and set(found.values()) == {"silent"}
    assert 1.5 <= time.monotonic() - start < 5
    thread.join(SOON)
    for listener in listeners:
        listener.close()
    assert descriptors() == before


def test_slow_answers_count_while_nobody_waits_for_a_place(jobs_dir):
    """Fewer jobs than are asked at once have all of the time, each."""
    me = liveness.current_process()
    threads = [answering(publish(jobs_dir, f"slow{n}", me).socket, f"slow{n}", after=0.5) for n in range(3)]
    assert set(states(jobs_dir, SOON).values()) == {"live"}
    for thread in threads:
        thread.join(SOON)


def test_full_backlogs_cost_the_others_nothing(jobs_dir):
    """Ten stopped jobs that take no more connections, and 250 foreign records: the live job is seen at once."""
    me = liveness.current_process()
    stuck = [full(publish(jobs_dir, f"stuck{n}", me).socket) for n in range(10)]
    for number in range(250):
        publish(jobs_dir, f"far{number}", me._replace(host="far"))
    thread = answering(publish(jobs_dir, "alive", me, started_at=1).socket, "alive")
    start = time.monotonic()
    found = states(jobs_dir, 0.5)
    assert time.monotonic() - start < 2
    assert found.pop("alive") == "live" and set(found.values()) == {"silent", "foreign"}
    thread.join(SOON)
    for sockets in stuck:
        for sock in sockets:
            sock.close()


def test_a_backlog_that_drains_is_asked_after_all(jobs_dir):
    """A job that takes connections again before the deadline is live."""
    record = publish(jobs_dir, "job", liveness.current_process())
    listener, *clients = full(record.socket)
    answers = []
    asker = threading.Thread(target=lambda: answers.append(registry.ask([record], "ping", Deadline(SOON))))
    asker.start()
    with listener:
        for client in clients:
            client.close()
        while not answers:
            connection, _ = listener.accept()
            with connection:
                if connection.recv(1000):
                    connection.sendall(b'{"jsonrpc":"2.0","id":1,"result":{"job_id":"job"}}\n')
                    asker.join(SOON)
    assert answers == [{"job": {"job_id": "job"}}]


def test_a_reply_in_small_pieces_does_not_outlast_the_deadline(jobs_dir):
    """A job, or what has its socket, that sends a byte now and then is not waited for any longer."""
    record, over = publish(jobs_dir, "job", liveness.current_process()), threading.Event()
    with listening(record.socket) as listener:

        def trickle():
            with listener.accept()[0] as client:
                try:
                    while not over.wait(MS):
                        client.sendall(b"x")
                except OSError:
                    pass  # the asker has hung up

        thread = threading.Thread(target=trickle)
        thread.start()
        start = time.monotonic()
        assert registry.ask([record], "ping", Deadline(0.2)) == {} and time.monotonic() - start < 2
        over.set()
        thread.join(SOON)


def test_the_only_live_job(jobs_dir, dead):
    """Live records are those of jobs that answer; the process of a dead one is not asked."""
    publish(jobs_dir, "gone", dead)
    publish(jobs_dir, "silent", liveness.current_process())
    record = publish(jobs_dir, "alive", liveness.current_process())
    with serving(record.socket, lambda request, sink: {"job_id": "alive"}):
        assert registry.live_records(str(jobs_dir), 0.5) == [record]
    assert registry.live_records(str(jobs_dir), 0.5) == []


def test_asking_takes_a_deadline_that_has_passed(jobs_dir):
    """With no time left no job is waited for."""
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


def test_how_a_job_is_shown(jobs_dir):
    """In one line, and as a table."""
    with running_loop("run"):
        (job,) = forgather_control.list_jobs()
    assert repr(job) == f"<Job run: live, step {job.global_step}, pid {job.pid} on {job.host}>"
    assert f"<th>pid</th><td>{job.pid}</td>" in job._repr_html_() and "metrics" not in job._repr_html_()
