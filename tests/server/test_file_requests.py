"""Requests by file: each answered once, whatever else lies there, within bounds, and never at the job's cost."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from forgather_control.errors import InvalidParams
from forgather_control.server import limits
from forgather_control.server.dispatcher import PENDING, Deferred, Dispatcher, Peer
from forgather_control.server.file_requests import FileRequestServer
from forgather_control.wire import addresses
from forgather_control.wire import limits as wire_limits

from ..support.harness import (
    MS,
    SOON,
    Process,
    Wire,
    cli,
    job_process,
    needs_root,
    needs_success,
    running_loop,
    strict,
    until,
)

pytestmark = pytest.mark.once


#: The methods that an empty file can be.
METHODS = ("save_checkpoint", "abort")


class Desk:
    """The files of one job with a real dispatcher behind them, whose ticks the test makes."""

    def __init__(self, path: Path) -> None:
        self.path, self.asked, self.peers, self.given, self.progress = path, [], [], {}, 0
        self.dispatcher = Dispatcher(self.answer)
        self.files = FileRequestServer(
            str(path), self.dispatcher.dispatch, lambda: {"step": self.progress}, lambda: self.progress, METHODS
        )

    def answer(self, request, sink):
        self.asked.append(request.method)
        self.peers.append(sink.peer)
        if request.method == "later":
            return Deferred(lambda: self.given.get("later", PENDING))
        if request.method == "big":
            return "x" * request.params[0]
        if request.method == "refuse":
            raise InvalidParams("no")
        return request.params

    def tick(self) -> None:
        self.files.tick()

    def put(self, name: str, data: bytes | str = b"") -> Path:
        """Write elsewhere, rename in."""
        hidden = self.path / "requests" / f".{name}"
        hidden.write_bytes(data if isinstance(data, bytes) else data.encode())
        return hidden.rename(self.path / "requests" / name)

    def ask(self, name: str, method: str, *params, **members) -> None:
        self.put(name, json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params, **members}))

    def reply(self, name: str):
        return strict((self.path / "replies" / name).read_bytes())

    def lying(self, box: str) -> list[str]:
        return sorted(os.listdir(self.path / box))


@pytest.fixture
def desk(tmp_path):
    """A desk in a directory of its own."""
    return Desk(tmp_path)


@pytest.fixture
def quick(monkeypatch):
    """Servers of this process tick often."""
    monkeypatch.setattr(limits, "TICK_PERIOD", 20 * MS)


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def patient(monkeypatch) -> None:
    """A tick lasts as long as it takes."""
    monkeypatch.setattr(limits, "FILES_CPU_SLICE", SOON)
    monkeypatch.setattr(limits, "FILES_TIMEOUT", SOON)


# Requests...


def test_each_is_answered_once(desk):
    """The request is gone, its reply is there, private, and a second tick does nothing more."""
    desk.ask("a.json", "echo", 1)
    desk.tick()
    assert desk.reply("a.json") == {"jsonrpc": "2.0", "id": 1, "result": [1]}
    assert (desk.path / "replies" / "a.json").stat().st_mode & 0o777 == 0o600
    desk.tick()
    assert (desk.asked, desk.lying("requests"), desk.lying("replies")) == (["echo"], [], ["a.json"])


def test_both_directories_are_private(desk):
    """They are made 0700, and requests/ is made so again."""
    modes = lambda: [(desk.path / box).stat().st_mode & 0o777 for box in ("requests", "replies")]  # noqa: E731
    assert modes() == [0o700, 0o700]
    (desk.path / "requests").chmod(0o777)
    desk.ask("a.json", "echo")
    desk.tick()
    assert modes() == [0o700, 0o700]


@pytest.mark.parametrize("content", ["", "\n", " \r\n"])
def test_an_empty_file_is_the_command(desk, content):
    """Named after a method, with nothing in it: the method with its defaults; a new touch is a new request."""
    for _ in range(2):
        desk.put("save_checkpoint", content)
        desk.tick()
        assert desk.reply("save_checkpoint.json") == {"jsonrpc": "2.0", "id": "save_checkpoint", "result": {}}
    assert desk.asked == ["save_checkpoint"] * 2


def test_a_command_file_with_content_is_refused(desk):
    """Parameters in the wrong place are not ignored; nothing is done."""
    desk.put("save_checkpoint", '{"wait": "finished"}')
    desk.tick()
    assert "save_checkpoint is not empty" in desk.reply("save_checkpoint.json")["error"]["message"]
    assert (desk.asked, desk.lying("requests")) == ([], [])


def test_notifications_batches_and_errors(desk):
    """As over a line: no reply to a notification, one array to a batch, errors with their codes."""
    desk.put("n.json", '{"jsonrpc": "2.0", "method": "echo"}')
    desk.put("b.json", json.dumps([{"jsonrpc": "2.0", "id": n, "method": "echo", "params": [n]} for n in range(3)]))
    desk.ask("e.json", "refuse")
    desk.put("i.json", '{"jsonrpc": "2.0", "id": 7}')
    desk.tick()
    assert [item["result"] for item in desk.reply("b.json")] == [[0], [1], [2]]
    assert (desk.reply("e.json")["error"]["code"], desk.reply("i.json")["error"]["code"]) == (-32602, -32600)
    assert desk.lying("replies") == ["b.json", "e.json", "i.json"]


def test_the_reply_comes_when_it_is_there(desk):
    """A request that waits is answered when its value comes, between two ticks, too."""
    desk.ask("a.json", "later")
    desk.tick()
    assert desk.lying("replies") == []
    desk.given["later"] = "now"
    desk.dispatcher.poll(woken=True)
    assert desk.reply("a.json")["result"] == "now"


@pytest.mark.parametrize("data", [b"", b'{"jsonrpc": "2.0", ', b"\xff\xff", b"nonsense}", b"5"])
def test_what_is_not_complete_is_an_error(desk, data):
    """A request counts when it is renamed in, so one that is not JSON to its end is answered with an error at once."""
    desk.put("a.json", data)
    desk.tick()
    assert desk.reply("a.json")["error"]["code"] in (-32700, -32600)
    assert (desk.asked, desk.lying("requests")) == ([], [])


def test_writing_in_place_is_told_to_rename(desk):
    """The error for a file that was read half written says what to do instead."""
    (desk.path / "requests" / "a.json").write_text('{"jsonrpc": "2.0", "id": 1, "meth')
    desk.tick()
    error = desk.reply("a.json")["error"]
    assert error["code"] == -32700 and "write it under another name, then rename it to a.json" in error["message"]


def test_the_peer_is_the_owner_of_the_file(desk):
    """What answers a request learns that it came by file, and whose file that is."""
    desk.ask("a.json", "echo")
    desk.tick()
    assert desk.peers == [Peer("file", os.getuid())]


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_the_limit_is_that_of_a_line(desk, over):
    """One byte more than a line may have is refused; its newline does not count."""
    line = b'{"jsonrpc": "2.0", "id": 1, "method": "echo"'
    line += b" " * (wire_limits.MAX_LINE + over - len(line) - 1) + b"}\n"
    desk.put("a.json", line)
    desk.tick()
    assert ("result" in desk.reply("a.json")) == (over <= 0)
    assert desk.lying("requests") == []


def test_a_huge_file_is_not_read(desk):
    """A terabyte (sparse) is refused for its first 64 KiB."""
    path = desk.put("a.json", b"[")
    os.truncate(path, 1 << 40)
    desk.tick()
    assert desk.reply("a.json")["error"]["code"] == -32600


def test_what_is_no_request_stays(desk, tmp_path_factory):
    """Hidden and foreign names, links, FIFOs, sockets and directories are left alone, and block nothing."""
    box, other = desk.path / "requests", tmp_path_factory.mktemp("other") / "file"
    other.write_bytes(b'{"jsonrpc": "2.0", "id": 1, "method": "echo"}')
    for name in (".hidden.json", "a.json.tmp", "a.json~", "-a.json", "nonsense", "ä.json"):
        (box / name).write_bytes(other.read_bytes())
    (box / "link.json").symlink_to(other)
    (box / "abort").symlink_to("/dev/null")
    (box / "hard.json").hardlink_to(other)
    os.mkfifo(box / "fifo.json")
    (box / "directory.json").mkdir()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.path.relpath(box / "socket.json"))
    before = desk.lying("requests")
    for _ in range(3):
        desk.tick()
    assert (desk.asked, desk.lying("replies"), desk.lying("requests")) == ([], [], before)
    desk.ask("good.json", "echo")
    desk.tick()
    assert "result" in desk.reply("good.json")


@needs_root
def test_another_users_file_is_none(desk):
    """Even where the directory is open to others: only requests of this user and of root."""
    path = desk.put("abort")
    os.chown(path, 65534, 65534)
    desk.tick()
    desk.tick()
    assert (desk.asked, desk.lying("requests")) == ([], ["abort"])


@needs_root
def test_another_user_cannot_ask(jobs_dir, quick):
    """A process of another uid can neither write a request nor read a reply or the status."""
    with running_loop("job"):
        home = until(lambda: (jobs_dir / "job" / "status.json").exists()) and jobs_dir / "job"
        for path in (jobs_dir.parent, jobs_dir):
            path.chmod(0o755)
        for command in (f"touch {home}/requests/abort", f"cat {home}/status.json", f"ls {home}/replies"):
            done = subprocess.run(["sh", "-c", command], user=65534, group=65534, extra_groups=[], capture_output=True)
            assert done.returncode and b"ermission denied" in done.stderr


# Ages, by the clock of the file system...


def test_a_request_that_seems_a_little_older_than_the_job_is_taken(desk):
    """A file system may round its times down."""
    os.utime(desk.put("abort"), (time.time() - 1.5,) * 2)
    desk.tick()
    assert desk.asked == ["abort"]


def test_stale_requests_are_refused(desk):
    """Older than the job, or unseen for longer than five minutes: nothing is done, and the reply says why."""
    aged = lambda path, seconds: os.utime(path, (time.time() - seconds,) * 2)  # noqa: E731
    aged(desk.put("abort"), 60)
    desk.tick()
    assert "older than the job" in desk.reply("abort.json")["error"]["message"]
    desk.files._started_at -= 3600
    aged(desk.put("abort"), limits.REQUEST_FILE_TIMEOUT + 5)
    desk.tick()
    assert "lay for 305 s" in desk.reply("abort.json")["error"]["message"]
    assert desk.asked == []
    aged(desk.put("abort"), limits.REQUEST_FILE_TIMEOUT - 5)
    desk.tick()
    assert desk.asked == ["abort"]


@pytest.mark.parametrize("jump", [-1e6, 1e6])
def test_the_jobs_clock_does_not_matter(desk, monkeypatch, jump):
    """Where the hosts' clocks differ, or ours jumps, ages are still those of the file system."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump)
    desk.put("abort")
    desk.tick()
    assert desk.asked == ["abort"]


def test_a_request_from_the_future_is_taken(desk):
    """A clock that was set back leaves requests with a later time; they are young, not old."""
    path = desk.put("abort")
    os.utime(path, (time.time() + 1e6,) * 2)
    desk.tick()
    assert desk.asked == ["abort"]


# Bounds...


def test_at_most_so_many_a_tick(desk, monkeypatch):
    """The rest waits for the next ticks; the oldest go first; all are answered."""
    patient(monkeypatch)
    total = limits.MAX_FILES_TAKEN * 2 + 5
    for number in range(total):
        desk.ask(f"{number}.json", f"m{number}")
    for expected in (limits.MAX_FILES_TAKEN, limits.MAX_FILES_TAKEN * 2, total, total):
        desk.tick()
        assert len(desk.asked) == expected
    first = {f"m{number}" for number in range(limits.MAX_FILES_TAKEN)}
    assert len(first & set(desk.asked[: limits.MAX_FILES_TAKEN])) > limits.MAX_FILES_TAKEN // 2, (
        "oldest first, as times can tell"
    )


@pytest.mark.parametrize("bound", ["FILES_CPU_SLICE", "FILES_TIMEOUT"])
def test_time_ends_a_tick(desk, monkeypatch, bound):
    """When the time of a tick is over, of the processor or of a slow file system, no more is taken."""
    patient(monkeypatch)
    monkeypatch.setattr(limits, bound, 0.0)
    desk.ask("a.json", "echo")
    desk.tick()
    assert desk.asked == []
    patient(monkeypatch)
    desk.tick()
    assert desk.asked == ["echo"]


def test_an_idle_tick_looks_at_nothing(desk, monkeypatch):
    """Once two looks found the same, requests/ is no longer listed; a new file is seen all the same."""
    looks = []
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda *args: looks.append(1) or real(*args))
    for _ in range(5):
        desk.tick()
    assert len(looks) == 2
    desk.ask("a.json", "echo")
    desk.tick()
    assert desk.asked == ["echo"]


def test_so_many_may_wait(desk, monkeypatch):
    """One more than may wait is refused; once one is answered, there is room again."""
    monkeypatch.setattr(limits, "MAX_FILES_WAITING", 2)
    for name in "abc":
        desk.ask(f"{name}.json", "later")
    desk.tick()
    assert [desk.reply(name)["error"]["code"] for name in desk.lying("replies")] == [-32005]
    desk.given["later"] = 1
    desk.dispatcher.poll(woken=True)
    desk.ask("d.json", "later")
    desk.tick()
    desk.dispatcher.poll(woken=True)
    assert desk.reply("d.json")["result"] == 1


def test_two_who_take_do_not_both_run(tmp_path):
    """Two threads at one directory, as after a restart on another host: each request is carried out once."""
    desks = [Desk(tmp_path), Desk(tmp_path)]
    count = 200
    for number in range(count):
        desks[0].ask(f"{number}.json", f"m{number}")
    stop = threading.Event()

    def work(desk):
        while not stop.is_set():
            desk.tick()

    threads = [threading.Thread(target=work, args=(desk,)) for desk in desks]
    for thread in threads:
        thread.start()
    try:
        until(lambda: not desks[0].lying("requests"))
    finally:
        stop.set()
        for thread in threads:
            thread.join(SOON)
    asked = desks[0].asked + desks[1].asked
    assert len(asked) == len(set(asked))


# A file system that fails...


def test_a_damaged_directory_is_one_warning(desk, caplog):
    """Deleted directories are made again; one that cannot be is one warning, and works again once it can."""
    shutil.rmtree(desk.path / "requests")
    shutil.rmtree(desk.path / "replies")
    desk.tick()
    desk.ask("a.json", "echo")
    desk.tick()
    assert "result" in desk.reply("a.json") and warnings(caplog) == []
    (desk.path / "requests").rename(desk.path / "away")
    (desk.path / "requests").symlink_to("away")
    for _ in range(3):
        desk.tick()
    (warning,) = warnings(caplog)
    assert "Control by file does not work (requests: " in warning
    (desk.path / "requests").unlink()
    desk.tick()
    desk.ask("b.json", "echo")
    desk.tick()
    assert "result" in desk.reply("b.json")


def test_another_directory_of_that_name_is_not_touched(tmp_path, caplog):
    """Where another job has the path now, nothing is read or written there."""
    home = tmp_path / "job"
    home.mkdir()
    desk = Desk(home)
    home.rename(tmp_path / "old")
    (home / "requests").mkdir(parents=True)
    desk.put("abort")
    desk.tick()
    assert (desk.asked, desk.lying("requests"), desk.lying(".")) == ([], ["abort"], ["requests"])


@contextmanager
def small_disk(path: Path):
    """A file system of 64 KiB at ``path``."""
    path.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "none", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


needs_mount = needs_success("nothing may be mounted here", "d=$(mktemp -d) && mount -t tmpfs none $d && umount $d")


@needs_root
@needs_mount
def test_a_full_disk_delays_the_reply(tmp_path, caplog):
    """One warning; the command is carried out; its reply comes when there is room, and half a file never."""
    with small_disk(tmp_path / "job"):
        desk = Desk(tmp_path / "job")
        desk.put("save_checkpoint")
        with pytest.raises(OSError), open(tmp_path / "job" / "full", "wb") as full:
            full.write(bytes(1 << 20))
        for _ in range(3):
            desk.tick()
        assert (desk.asked, desk.lying("replies"), len(warnings(caplog))) == (["save_checkpoint"], [], 1)
        (tmp_path / "job" / "full").unlink()
        desk.tick()
        assert "result" in desk.reply("save_checkpoint.json")
        assert desk.lying("replies") == ["save_checkpoint.json"]


@needs_root
@needs_mount
def test_a_read_only_disk_is_one_warning(tmp_path, caplog):
    """What cannot be removed is not carried out, as it would be again and again."""
    with small_disk(tmp_path / "job"):
        desk = Desk(tmp_path / "job")
        desk.put("abort")
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "job")], check=True)
        for _ in range(3):
            desk.tick()
        assert (desk.asked, len(warnings(caplog))) == ([], 1)
        subprocess.run(["mount", "-o", "remount,rw", str(tmp_path / "job")], check=True)
        desk.tick()
        assert desk.asked == ["abort"]


# Status...


def test_status_is_written_when_it_changes(desk, monkeypatch):
    """At first, then only for something new, or so that its age shows that the job lives."""
    monkeypatch.setattr(limits, "STATUS_SHARE", float("inf"))
    monkeypatch.setattr(limits, "STATUS_PERIOD", 0.0)
    path = desk.path / "status.json"
    stamp = lambda: (path.stat().st_ino, path.stat().st_mtime_ns)  # noqa: E731
    desk.tick()
    assert strict(path.read_bytes()) == {"step": 0} and path.stat().st_mode & 0o777 == 0o600
    first = stamp()
    desk.tick()
    assert stamp() == first
    desk.progress = 5
    desk.tick()
    assert strict(path.read_bytes()) == {"step": 5}
    monkeypatch.setattr(limits, "STATUS_REFRESH", 0.0)
    desk.tick()  # the moment for this one was set before
    desk.progress = 6
    desk.tick()
    last = stamp()
    desk.tick()
    assert stamp() != last


def test_slow_status_is_written_seldom(desk, monkeypatch):
    """Writing takes at most its share of the time."""
    monkeypatch.setattr(limits, "STATUS_PERIOD", 0.0)

    def slow():
        time.sleep(20 * MS)
        desk.asked.append("status")
        return {}

    desk.files._status = slow
    for _ in range(50):
        desk.progress += 1
        desk.tick()
        time.sleep(MS)
    assert desk.asked == ["status"]


def test_status_is_written_once_a_period(desk, monkeypatch):
    """However often the job changes, and again when the file was deleted."""
    monkeypatch.setattr(limits, "STATUS_SHARE", float("inf"))
    path = desk.path / "status.json"
    for _ in range(5):
        desk.progress += 1
        desk.tick()
    assert strict(path.read_bytes()) == {"step": 1}
    path.unlink()
    desk.files._status_due = 0.0  # the period is over
    desk.tick()
    assert strict(path.read_bytes()) == {"step": 5}


# Reply files: bounded in number, bytes and age...


def test_replies_are_kept_within_bounds(desk, monkeypatch):
    """The newest 256, the newest few megabytes, and none that is older than an hour."""
    patient(monkeypatch)
    count = limits.MAX_REPLY_FILES + 10
    for number in range(count):
        desk.ask(f"{number}.json", "echo")
    for _ in range(5):
        desk.tick()
    assert len(desk.lying("replies")) == limits.MAX_REPLY_FILES
    monkeypatch.setattr(limits, "MAX_REPLY_FILES_BYTES", 100_000)
    for name in "abc":
        desk.ask(f"{name}.json", "big", 40_000)
        desk.tick()
    assert {"b.json", "c.json"} <= set(desk.lying("replies")) and "a.json" not in desk.lying("replies")
    monkeypatch.setattr(limits, "REPLY_FILE_TIMEOUT", 0.0)
    desk.tick()
    assert desk.lying("replies") == []


def test_replies_that_were_taken_leave_room(desk, monkeypatch):
    """Replies that were removed do not count, so a program's many do not push out a person's one."""
    monkeypatch.setattr(limits, "MAX_REPLY_FILES", 20)
    patient(monkeypatch)
    desk.put("save_checkpoint")
    desk.tick()
    for number in range(limits.MAX_REPLY_FILES * 2):
        desk.ask(f"{number}.json", "echo")
        desk.tick()
        (desk.path / "replies" / f"{number}.json").unlink()
    assert desk.lying("replies") == ["save_checkpoint.json"]


def test_a_reply_too_long_says_so(desk):
    """Its request was carried out, and that is what is told."""
    desk.ask("a.json", "big", limits.MAX_REPLY_FILE)
    desk.tick()
    assert "it was carried out, but the reply is longer" in desk.reply("a.json")["error"]["message"]


# A real job...


@pytest.mark.once
def test_touch_from_a_shell(jobs_dir):
    """A person with nothing but a shell, a job of its own process, at its real pace."""
    with job_process("job") as process:
        home = jobs_dir / "job"
        until(lambda: (home / "requests").is_dir())
        subprocess.run("touch requests/save_checkpoint", shell=True, cwd=home, check=True)
        until(lambda: (home / "replies" / "save_checkpoint.json").exists())
        record = json.loads((home / "replies" / "save_checkpoint.json").read_text())["result"]
        assert record["command"] == "save_checkpoint"
        until(lambda: list((jobs_dir.parent / "checkpoints").glob("checkpoint-*")))
        status = until(lambda: (home / "status.json").exists() and json.loads((home / "status.json").read_text()))
        assert (status["job_id"], status["pid"]) == ("job", process.pid) and status["metrics"]["loss"] > 0
        subprocess.run("touch requests/graceful_stop", shell=True, cwd=home, check=True)
        assert process.line().startswith("ended") and process.end() == 0
        assert not home.exists()


@pytest.mark.once
def test_a_stopped_job_refuses_what_it_slept_through(jobs_dir):
    """Requests from before are refused once the job continues; training continues."""
    with job_process("job") as process:
        home = jobs_dir / "job"
        until(lambda: (home / "status.json").exists())
        os.kill(process.pid, signal.SIGSTOP)
        (home / "requests" / "abort").touch()
        os.utime(home / "requests" / "abort", (time.time() - 600,) * 2)
        os.kill(process.pid, signal.SIGCONT)
        reply = until(lambda: (home / "replies" / "abort.json").exists() and (home / "replies" / "abort.json"))
        assert "nothing was done" in json.loads(reply.read_text())["error"]["message"]
        assert cli("status", "job", "--json").returncode == 0


def test_waits_for_the_checkpoint(jobs_dir, quick):
    """With wait="finished" the reply comes when the checkpoint is on disk, and names it."""
    with running_loop("job") as run:
        (jobs_dir / "job" / "requests" / ".a").write_text(
            '{"jsonrpc": "2.0", "id": 1, "method": "save_checkpoint", "params": {"wait": "finished"}}'
        )
        (jobs_dir / "job" / "requests" / ".a").rename(jobs_dir / "job" / "requests" / "a.json")
        reply = until(lambda: (path := jobs_dir / "job" / "replies" / "a.json").exists() and path)
        record = json.loads(reply.read_text())["result"]
        assert record["state"] == "finished" and record["result"]["path"] in run.saves


@pytest.mark.once
def test_ten_thousand_files_at_once(jobs_dir):
    """They are answered in bounded pieces; the socket is answered meanwhile, and training continues."""
    with job_process("job") as process:
        home, away = jobs_dir / "job", jobs_dir.parent / "away"
        until(lambda: (home / "status.json").exists())
        away.mkdir()
        for number in range(10_000):
            (away / f"{number}.json").write_text('{"jsonrpc": "2.0", "id": 1, "method": "ping"}')
        subprocess.run(["find", str(away), "-name", "*.json", "-exec", "mv", "-t", f"{home}/requests", "{}", "+"])
        answered = lambda: len(os.listdir(home / "replies"))  # noqa: E731
        with Wire(home / "control.sock") as wire:
            for _ in range(2):
                before = answered()
                until(lambda before=before: answered() > before)
                assert wire.call("ping")["result"]["pid"] == process.pid
            step = wire.call("status")["result"]["global_step"]
            until(lambda: wire.call("status")["result"]["global_step"] > step)
            assert answered() <= 4 * limits.MAX_FILES_TAKEN


def test_a_deleted_directory_comes_back(jobs_dir, quick):
    """The directory, the spool and the status are restored under a running job, and requests are answered again."""
    with running_loop("job"):
        home = jobs_dir / "job"
        until(lambda: (home / "status.json").exists())
        home.rename(jobs_dir.parent / "gone")  # at once: rmtree would race with what is restored meanwhile
        until(lambda: (home / "status.json").exists() and (home / "requests").is_dir())
        (home / "requests" / "ping").touch()
        until(lambda: (home / "replies" / "ping.json").exists())


def test_requests_that_wait_at_the_end_are_answered(jobs_dir, quick):
    """Their replies can be read for a moment, though the job is no longer listed; then all is gone."""
    seen = {}
    with running_loop("job") as run:
        home = jobs_dir / "job"
        (home / "requests" / ".a").write_text(
            '{"jsonrpc": "2.0", "id": 1, "method": "graceful_stop", "params": {"wait": "finished"}}'
        )
        (home / "requests" / ".a").rename(home / "requests" / "a.json")
        reply = home / "replies" / "a.json"

        def take():
            try:
                seen["reply"] = json.loads(reply.read_text())
                seen["listed"] = (home / "endpoint.json").exists()
                reply.unlink()
            except FileNotFoundError:
                return False
            return True

        until(take)
        begin = time.monotonic()
        run.thread.join(SOON)
        assert seen["reply"]["result"]["state"] == "finished" and not seen["listed"]
        assert not home.exists() and time.monotonic() - begin < SOON / 4


def test_the_end_does_not_wait_for_ever(jobs_dir, quick):
    """A reply that no client reads delays the end of training by a bounded moment, and no more."""
    with running_loop("job") as run:
        home = jobs_dir / "job"
        (home / "requests" / ".a").write_text(
            '{"jsonrpc": "2.0", "id": 1, "method": "abort", "params": {"wait": "finished"}}'
        )
        (home / "requests" / ".a").rename(home / "requests" / "a.json")
        run.thread.join(SOON)
        assert not run.thread.is_alive() and not home.exists()


def test_writers_at_the_end_do_not_keep_the_directory(jobs_dir, quick, caplog):
    """Clients that keep writing requests while the job ends cannot make its directory stay behind."""
    with running_loop("job") as run:
        box, over = jobs_dir / "job" / "requests", threading.Event()

        def write():
            for number in range(1 << 30):
                try:
                    (box / f"{number}.json").write_text("{}")
                except OSError:
                    if over.is_set():
                        return

        writer = threading.Thread(target=write)
        writer.start()
        (box / "graceful_stop").touch()
        run.thread.join(SOON)
        over.set()
        writer.join(SOON)
        until(lambda: not (jobs_dir / "job").exists())  # training does not wait for a slow directory
    assert not [text for text in warnings(caplog) if "stays behind" in text]


def test_an_ending_job_leaves_its_name_to_others(jobs_dir):
    """No longer listed, its id is free; the job that takes it is not harmed when the first is removed."""
    source = """
        from forgather_control.jobs.directory import JobDirectory
        mine = JobDirectory("job", lambda path: open(path, "w").close(), 1)
        mine.claim()
        mine.unlist()
        print("unlisted")
        input()
        mine.remove()
    """
    with Process(source) as process:
        assert process.line() == "unlisted", process.errors
        assert [path.name for path in (jobs_dir / "job").iterdir()] == ["lock"]
        with job_process("job"):
            process.say("go on")
            assert process.end() == 0, process.errors
            assert (jobs_dir / "job" / "endpoint.json").exists()


def test_nobody_by_file_costs_the_end_nothing(desk):
    """Without requests, dispatched or not, the end does not wait; nor for a person who touched a file."""
    assert not desk.files.end()
    desk.put("save_checkpoint")
    assert desk.files.end()
    desk.tick()
    assert not desk.files.end()
    desk.ask("a.json", "echo")
    desk.tick()
    assert desk.files.end()
    (desk.path / "replies" / "a.json").unlink()
    assert not desk.files.end()


def test_a_job_without_a_socket(jobs_dir, quick, monkeypatch):
    """Where the system has no Unix sockets, the job is controlled by file, and says so in its record."""

    def refuse(sock, path):
        raise OSError(97, "Address family not supported by protocol")

    monkeypatch.setattr(addresses, "bind", refuse)
    with running_loop("job"):
        home = jobs_dir / "job"
        assert json.loads((home / "endpoint.json").read_text())["socket"] is None
        assert not (home / "control.sock").exists()
        done = cli("status", "job", "--json")
        assert done.returncode == 0 and json.loads(done.stdout)["job_id"] == "job", done.stderr
