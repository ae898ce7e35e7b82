"""Asking by file: the same calls and errors as over a socket, from a host that shares only the file system."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from forgather_control import errors
from forgather_control.client import api, file_transport
from forgather_control.client.connection import Client
from forgather_control.client.file_transport import FileTransport
from forgather_control.client.target import Target, find
from forgather_control.jobs import private_files, spool
from forgather_control.server import limits

from ..server.test_file_requests import needs_mount, small_disk
from ..support.harness import (
    MS,
    SOON,
    Process,
    cli,
    descriptors,
    job_process,
    needs_root,
    needs_success,
    running_loop,
    until,
)

pytestmark = pytest.mark.once


@pytest.fixture
def quick(monkeypatch):
    """Servers of this process tick often."""
    monkeypatch.setattr(limits, "TICK_PERIOD", 20 * MS)


@pytest.fixture
def job(quick):
    """A running job in this process."""
    with running_loop("job") as run:
        yield run


@contextmanager
def stopped(process):
    """A job that does nothing, on purpose of ours."""
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)


class FileTarget(Target):
    """A job that is reached by file, whatever else it offers."""

    def open(self, deadline):
        return FileTransport(self.record), None


def by_file(record, timeout=SOON):
    return Client(FileTarget(record.job_id, record.job_id, record), timeout)


def uses_files(client):
    return isinstance(client._transport, FileTransport)


def lying(jobs_dir, box):
    return os.listdir(jobs_dir / "job" / box)


# The same interface...


def test_calls_commands_and_errors(job, jobs_dir):
    """As over a connection; each reply is taken, nothing is left behind, nothing stays open."""
    before = descriptors()
    with by_file(find("job")) as asked:
        assert asked.call("ping")["pid"] == os.getpid()
        assert asked.call("status")["job_id"] == "job"
        record = asked.command("save_checkpoint", wait="finished", timeout=SOON)
        assert record.state == "finished" and record.result["path"] in job.saves
        assert asked.command("save_checkpoint", command_id="mine").command_id == "mine"
        with pytest.raises(errors.MethodNotFound, match="no method 'nonsense'"):
            asked.call("nonsense")
        with pytest.raises(errors.InvalidParams):
            asked.call_raw("save_checkpoint", ["never"])
    assert lying(jobs_dir, "requests") == lying(jobs_dir, "replies") == []
    until(lambda: descriptors() <= before)


def test_many_at_once(job, jobs_dir):
    """Twenty clients, five calls each: every one has its own answer."""
    found = []

    def ask(number):
        with by_file(find("job")) as asked:
            for turn in range(5):
                name = f"{number}-{turn}"
                found.append(asked.command("save_checkpoint", command_id=name).command_id == name)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert found == [True] * 100 and lying(jobs_dir, "replies") == []


def test_a_stop_is_told_as_finished(job, jobs_dir):
    """The reply of a job's last moment is read, and then there is no job any more."""
    with by_file(find("job")) as asked:
        assert asked.command("graceful_stop", wait="finished").state == "finished"
        until(lambda: not (jobs_dir / "job").exists())
        with pytest.raises(errors.JobDead, match="ended before it answered"):
            asked.call("ping")


def test_the_jobs_own_timeout_is_told(job):
    """A deadline that passes in the job is an answer of the job: the command is still pending."""
    job.job._controller._group.due = lambda step: False  # no step applies anything
    with by_file(find("job")) as asked, pytest.raises(errors.DeadlinePassed, match="will still run"):
        asked.command("save_checkpoint", wait="finished", timeout=0.1)


def test_events_need_a_connection(job):
    """A reply file cannot carry a stream: that is said at once."""
    with by_file(find("job")) as asked, pytest.raises(errors.ControlError, match="cannot subscribe to events"):
        asked.events()


# Without an answer...


def test_what_nobody_takes_is_taken_back(jobs_dir):
    """A suspended job: the request is removed when the call gives up, and the message says that nothing was done."""
    with job_process("job") as process:
        asked = by_file(find("job"), timeout=0.2)
        with stopped(process):
            with pytest.raises(errors.JobNotAnswering, match="taken back, and nothing was done"):
                asked.call("abort")
            assert lying(jobs_dir, "requests") == []
        with by_file(find("job")) as again:
            assert again.call("list_commands") == []


def test_what_was_taken_and_not_answered_is_unknown(jobs_dir):
    """A request was taken and not answered: the outcome of its command is not known."""
    with job_process("job") as process:
        asked = by_file(find("job"), timeout=1.0)
        with stopped(process):
            box = jobs_dir / "job" / "requests"
            taker = threading.Thread(target=lambda: until(lambda: [path.unlink() for path in box.glob("*.json")]))
            taker.start()
            with pytest.raises(errors.JobNotAnswering, match="whether its abort was carried out is not known"):
                asked.call("abort")
            taker.join(SOON)


def test_interrupted_it_is_taken_back(jobs_dir):
    """Ctrl-C while the client waits removes the request, so that it is not carried out later."""
    with job_process("job") as job:
        source = """
        from forgather_control.client.connection import Client
        from forgather_control.client.file_transport import FileTransport
        from forgather_control.client.target import Target, find
        Target.open = lambda self, deadline: (FileTransport(self.record), None)
        Client(Target("job", "job", find("job"))).call("abort")
        """
        with stopped(job), Process(source) as asking:
            until(lambda: [name for name in lying(jobs_dir, "requests") if not name.startswith(".")])
            asking.popen.send_signal(signal.SIGINT)
            assert asking.end() != 0
            assert lying(jobs_dir, "requests") == []


def test_a_job_that_dies_meanwhile(jobs_dir, monkeypatch):
    """A job that is killed on this host is detected long before the deadline."""
    monkeypatch.setattr(file_transport, "_PROBE_INTERVAL", 0.1)
    with job_process("job") as process:
        asked = by_file(find("job"), timeout=SOON * 10)
        os.kill(process.pid, signal.SIGSTOP)
        timer = threading.Timer(0.2, process.popen.kill)
        timer.start()
        with pytest.raises(errors.JobDead, match="ended before it answered; whether its abort was carried out"):
            asked.call("abort")
        timer.join(SOON)


@pytest.mark.once
def test_a_job_that_shows_no_life_is_given_up(jobs_dir, monkeypatch):
    """A wait without a deadline ends when status.json is no longer written, and lasts while it is."""
    monkeypatch.setattr(file_transport, "_SILENCE", 0.5)
    with job_process("job") as process:
        until(lambda: (jobs_dir / "job" / "status.json").exists())
        asked = by_file(find("job"))
        with stopped(process):
            with pytest.raises(errors.JobNotAnswering, match="nothing was done"):
                asked.command("save_checkpoint", wait="finished")
            fresh = jobs_dir / "job" / "status.json"
            end = time.monotonic() + 1.0
            alive = threading.Thread(target=lambda: until(lambda: os.utime(fresh) or time.monotonic() > end))
            alive.start()
            begin = time.monotonic()
            with pytest.raises(errors.JobNotAnswering):
                asked.command("save_checkpoint", wait="finished")
            assert time.monotonic() - begin > 1.0
            alive.join(SOON)


def test_a_directory_that_vanishes(job, jobs_dir):
    """Removed or replaced while a call waits: the job has ended, as far as can be said; nothing hangs."""
    asked = by_file(find("job"), timeout=SOON)
    (jobs_dir / "job").rename(jobs_dir.parent / "away")
    with pytest.raises(errors.ControlError):
        asked.call("ping")


def test_a_reply_that_is_none(job, jobs_dir):
    """A link or a FIFO where the reply should be is no reply, and is not followed or waited on."""
    asked = by_file(find("job"))
    asked._transport._request = "x.json"
    os.mkfifo(jobs_dir / "job" / "replies" / "x.json")
    assert asked._transport._taken() is None


# The directory...


@needs_root
def test_another_user_is_refused(job, jobs_dir):
    """A user who may not write there gets an error at once."""
    for path in (jobs_dir.parent, jobs_dir, jobs_dir / "job"):
        path.chmod(0o755)
    source = """
        import os
        from forgather_control.client import file_transport
        from forgather_control.jobs import record
        os.setgid(65534); os.setuid(65534)
        me = record.JobRecord("job", "h", None, 1, 1.0)
        try:
            file_transport.FileTransport(me)
        except Exception as err:
            print(type(err).__name__, err)
    """
    with Process(source) as process:
        assert process.line() == "FindError The directory of job job belongs to another user", process.errors
        process.end()


def test_a_directory_that_is_not_there(job):
    """Without a directory to write into, the job has ended."""
    with pytest.raises(errors.JobDead, match="Job another ended"):
        FileTransport(find("job")._replace(job_id="another"))


@needs_root
@needs_mount
def test_a_full_disk_is_told(tmp_path, monkeypatch, quick):
    """A request that cannot be written whole is not there at all, and the error says why."""
    with small_disk(tmp_path / "disk"):
        monkeypatch.setenv("FORGATHER_JOBS_DIR", str(tmp_path / "disk" / "jobs"))
        with running_loop("job"):
            asked = by_file(find("job"))
            with pytest.raises(OSError), open(tmp_path / "disk" / "full", "wb") as full:
                full.write(bytes(1 << 20))
            with pytest.raises(errors.JobNotAnswering, match="No space left"):
                asked.call("ping")
            assert os.listdir(tmp_path / "disk" / "jobs" / "job" / "requests") == []
            (tmp_path / "disk" / "full").unlink()
            assert asked.call("ping")["job_id"] == "job"


# Finding the way...


def test_only_where_it_is_needed(job, jobs_dir):
    """A job of this host is asked over its socket, however broken that is; another host's by file, if it has a box."""
    mine = find("job")
    assert not file_transport.is_offered(mine)
    assert file_transport.is_offered(mine, nothing_listens=True)
    assert file_transport.is_offered(mine._replace(socket=None))
    far = mine._replace(host="elsewhere", boot_id="elsewhere")
    assert file_transport.is_offered(far)
    assert not file_transport.is_offered(far._replace(job_id="without"))


def publish_far(jobs_dir, **members):
    """Have the job's record name another host and a socket that is out of reach from here."""
    record = json.loads((jobs_dir / "job" / "endpoint.json").read_text())
    record |= {"host": "elsewhere", "boot_id": "elsewhere", "socket": "/nowhere/control.sock", **members}
    letter = jobs_dir / "job" / "endpoint.json"
    with spool.opened(str(letter.parent), ".", spool.directory_id(str(letter.parent))) as home:
        private_files.write(home, letter.name, json.dumps(record).encode())


def test_connect_finds_it_last(quick, jobs_dir, monkeypatch):
    """Socket, then TCP, then files; what TCP says of a wrong certificate is not gone round."""
    monkeypatch.setattr("forgather_control.jobs.directory.JobDirectory.restore", lambda self: False)
    with running_loop("job", port=0) as run:
        with api.connect("job") as way:
            assert not uses_files(way)
        port = find("job").port
        publish_far(jobs_dir, address="127.0.0.1")
        with api.connect("job") as way:  # another host's loopback is out of reach
            assert uses_files(way) and way.call("ping")["pid"] == os.getpid()
        publish_far(jobs_dir, host="127.0.0.1", address="0.0.0.0")
        with api.connect("job") as way:
            assert not uses_files(way) and way.call("ping")["pid"] == os.getpid()
        publish_far(jobs_dir, host="127.0.0.1", address="0.0.0.0", port=1)
        with api.connect("job") as way:
            assert uses_files(way)
        publish_far(jobs_dir, host="127.0.0.1", address="0.0.0.0", port=port, token="wrong")
        with pytest.raises(errors.NotAuthenticated):
            api.connect("job")
        assert run.steps


def test_a_socket_that_cannot_be_seen_is_gone_round(quick, jobs_dir, monkeypatch):
    """A job of this host whose socket lies in a private /tmp: it lives and nothing listens there, so by file."""
    monkeypatch.setattr("forgather_control.jobs.directory.JobDirectory.restore", lambda self: False)
    with running_loop("job"):
        os.unlink(find("job").socket)
        with api.connect("job") as way:
            assert uses_files(way) and way.call("ping")["pid"] == os.getpid()


needs_hosts = needs_success("no other host can be simulated here", "unshare --uts --mount true")


@pytest.mark.once
@needs_root
@needs_hosts
def test_from_another_host(jobs_dir):
    """Another host name, the socket out of reach, the directory shared: status, save and stop from the command line."""
    with job_process("job") as process:
        sock = jobs_dir / "job" / "control.sock"
        there = [
            "unshare", "--uts", "--mount", "sh", "-c",
            f'hostname elsewhere; [ ! -e {sock} ] || mount --bind /dev/null {sock}; exec "$@"', "sh",
            sys.executable, "-m", "forgather_control",
        ]  # fmt: skip

        def remotely(*args):
            return subprocess.run([*there, *args], capture_output=True, text=True, timeout=SOON * 3)

        listed = remotely("list", "--json")
        assert [row["state"] for row in json.loads(listed.stdout)] == ["silent"], "one kernel: its lock is seen"
        status = remotely("status", "job", "--json")
        assert json.loads(status.stdout)["pid"] == process.pid, status.stderr
        saved = remotely("save", "job", "--wait", "--json")
        assert os.path.isdir(json.loads(saved.stdout)["result"]["path"]), saved.stderr
        assert cli("status", "job").returncode == 0, "and from its own host as ever"
        ended = remotely("stop", "job", "--wait")
        assert ended.returncode == 0, ended.stderr
        assert process.line().startswith("ended") and process.end() == 0
        assert "last checkpoint" in remotely("status", "job").stdout  # what is kept of a job that has ended
