"""What a job publishes: good records survive, and no broken or hostile one gets further than a ValueError."""

from __future__ import annotations

import json
import os
import socket
import threading

import pytest

from forgather_control.errors import BadJobId, JobsDirUnusable, StartError
from forgather_control.jobs import limits, private_files, record
from forgather_control.jobs.record import JobRecord, check_job_id, is_job_id, jobs_dir, parse_record, read_record
from forgather_control.processes import liveness
from forgather_control.processes.launcher import Launch
from forgather_control.wire import jsonrpc

from ..support.harness import Process, descriptors, needs_root, until

GOOD = JobRecord(job_id="job", host="node", port=None, pid=123, started_at=1700000000.5, socket="/tmp/s", user="ä\n")


def _data(**changes):
    return json.dumps({**GOOD.to_json(), **changes}).encode()


@pytest.fixture
def place(jobs_dir):
    """The directory of the job "job", and a way to write its endpoint.json."""
    (jobs_dir / "job").mkdir(parents=True)
    return jobs_dir / "job" / "endpoint.json"


# Names and places...


def test_where_the_jobs_directory_is(monkeypatch):
    """$FORGATHER_JOBS_DIR, else $XDG_CONFIG_HOME if absolute, else ~/.config; empty is unset; always absolute."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/xdg")
    monkeypatch.setenv("FORGATHER_JOBS_DIR", "some/jobs")
    assert jobs_dir() == os.path.join(os.getcwd(), "some/jobs")
    monkeypatch.setenv("FORGATHER_JOBS_DIR", "")
    assert jobs_dir() == "/xdg/forgather/jobs"
    monkeypatch.setenv("XDG_CONFIG_HOME", "")
    assert jobs_dir() == "/home/me/.config/forgather/jobs"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")
    assert jobs_dir() == "/home/me/.config/forgather/jobs"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert jobs_dir() == "/home/me/.config/forgather/jobs"


def test_the_jobs_directory_stays_the_same_in_another_working_directory(monkeypatch, tmp_path):
    """A relative path is resolved once: a job that changes its directory keeps its place."""
    monkeypatch.setenv("FORGATHER_JOBS_DIR", "kept/jobs")
    before = jobs_dir()
    monkeypatch.chdir(tmp_path)
    assert jobs_dir() == before


@pytest.mark.parametrize("home", ["~", "relative"])
def test_without_a_home_there_is_no_jobs_directory(monkeypatch, home):
    """No directory named "~" is made where the process happens to be: the error says what to set."""
    for name in ("FORGATHER_JOBS_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: home)
    with pytest.raises(JobsDirUnusable, match="set HOME or FORGATHER_JOBS_DIR"):
        jobs_dir()


@pytest.mark.parametrize("name", ["a", "0", "_", "A.b-c_9", "a..b", "x" * 128, "job_2026-01-01_node_1"])
def test_what_can_be_a_job_id(name):
    """1 to 128 of letters, digits, dot, underscore and dash."""
    assert is_job_id(name) and check_job_id(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".lock", "-rf", "a/b", "../../victim", "/abs", "a b", "a\n", "a\0", "ä", "a\x1b[2J", "x" * 129]
    + [None, 5, True, b"job", ["job"], "\ud800", "x" * 10**6],
    ids=lambda value: ascii(value)[:20],
)
def test_what_cannot_be_a_job_id(name):
    """Anything else is refused in one short, printable sentence, as a ValueError and a StartError."""
    assert not is_job_id(name)
    with pytest.raises(BadJobId, match="is no job id") as caught:
        check_job_id(name)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, StartError)
    assert len(str(caught.value)) < 300 and str(caught.value).isprintable() and str(caught.value).isascii()


# Records...


def test_a_record_survives_the_way_through_its_file(place):
    """What a job publishes is what is read."""
    mine = GOOD._replace(socket="/run/s", boot_id="b", world_size=8, booted_at=1.5, pid_namespace=2, machine="m")
    mine = mine._replace(launch=Launch(slurm_job_id=7, slurm_nodes="node[1-2]", run_id="r", restart_count=1))
    place.write_bytes(jsonrpc.encode(mine.to_json()))
    assert read_record(str(place.parent.parent), "job") == mine


def test_the_owner_is_the_process_that_published():
    """Each fact goes where a judge looks for it."""
    mine = GOOD._replace(process_started_at=1.0, boot_id="b", machine="m", booted_at=2.0, pid_namespace=3)
    assert mine.owner == liveness.Identity("node", 123, 1.0, 2.0, "b", "m", 3)


def test_a_record_of_a_later_version_is_read():
    """Members that this version does not know are no fault; those it could do without may be missing."""
    assert parse_record(_data(gpu="H200", nested={"a": [1]}), "job") == GOOD
    few = {name: GOOD.to_json()[name] for name in ("job_id", "host", "port", "pid", "started_at")}
    assert parse_record(json.dumps(few).encode(), "job").socket is None
    assert parse_record(json.dumps(few).encode(), "job").launch is None


BROKEN = {
    "empty": (b"", "Expecting value"),
    "half written": (_data()[:60], "."),
    "not UTF-8": (b'{"job_id": "\xff"}', "utf-8"),
    "UTF-16": (_data().decode().encode("utf-16"), "utf-8"),
    "a list": (b"[]", "must be an object"),
    "null": (b"null", "must be an object"),
    "a number": (b"5", "must be an object"),
    "no id": (b"{}", "another job"),
    "another id": (_data(job_id="other"), "another job, 'other'"),
    "a path as id": (_data(job_id="../../victim"), "another job"),
    "an absolute id": (_data(job_id="/abs"), "another job"),
    "an empty id": (_data(job_id=""), "another job"),
    "a list as id": (_data(job_id=["job"]), "another job"),
    "terminal codes as id": (_data(job_id="\x1b[2J\n"), r"'\\x1b\[2J\\n'"),
    "only its id": (b'{"job_id": "job"}', "the record has no host"),
    "null started_at": (_data(started_at=None), "started_at of the record must be a number"),
    "started_at as text": (_data(started_at="now"), "started_at of the record must be a number"),
    "started_at NaN": (_data(started_at=float("nan")), "started_at of the record must be a number from"),
    "started_at infinite": (
        _data().replace(b"1700000000.5", b"1e999"),
        "started_at of the record must be a number from",
    ),
    "started_at beyond all time": (
        _data(started_at=10**400),
        "started_at of the record must be a number from .*, not 1000",
    ),
    "started_at at the end of floats": (_data(started_at=1e300), "started_at"),
    "process_started_at beyond all time": (_data(process_started_at=-(10**400)), "process_started_at"),
    "booted_at beyond all time": (_data(booted_at=10**4000), "booted_at"),
    "an integer of 5,000 digits": (_data().replace(b"123", b"1" * 5000), "."),
    "pid 0": (_data(pid=0), "pid of the record must be an integer from 1 to 2147483647"),
    "pid -5": (_data(pid=-5), "pid of the record must be an integer from 1 to 2147483647"),
    "pid 2**31": (_data(pid=2**31), "pid of the record must be an integer from 1 to 2147483647"),
    "pid as text": (_data(pid="123"), "pid of the record must be an integer from 1 to 2147483647"),
    "pid as bool": (_data(pid=True), "pid of the record must be an integer from 1 to 2147483647"),
    "pid as float": (_data(pid=123.0), "pid of the record must be an integer from 1 to 2147483647"),
    "pid null": (_data(pid=None), "pid of the record must be an integer from 1 to 2147483647"),
    "host null": (_data(host=None), "host of the record must be a string"),
    "a list as host": (_data(host=["node"] * 5000), "host of the record must be a string"),
    "an object as socket": (_data(socket={"path": "/tmp/s"}), "socket of the record must be a string or null"),
    "pid of 400 digits": (_data(pid=10**400), "pid of the record must be an integer from 1 to 2147483647"),
    "port as text": (_data(port="8900"), "port of the record must be an integer"),
    "port -1": (_data(port=-1), "port of the record must be an integer from 0 to 65535 or null, not -1"),
    "port 65536": (_data(port=65536), "port of the record must be .*, not 65536"),
    "port of 400 digits": (_data(port=10**400), "port of the record must be .*, not 1000"),
    "world_size of 400 digits": (_data(world_size=-(10**400)), "world_size of the record must be .*, not -1000"),
    "world_size as bool": (_data(world_size=True), "world_size of the record must be an integer"),
    "a list as launch": (_data(launch=["slurm"]), "launch of the record must be an object or null"),
    "launch as bool": (_data(launch=False), "launch of the record must be an object or null"),
    "terminal codes in launch": (_data(launch={"run_id": "\x1b[2J"}), "run_id of launch must be a string"),
    "a count as text": (_data(launch={"restart_count": "1"}), "restart_count of launch must be an integer"),
    "too long": (_data() + b" " * limits.MAX_RECORD, "longer than 65536 bytes"),
    "1 MB": (b'{"job_id": "' + b"x" * 10**6 + b'"}', "longer than 65536 bytes"),
    "NUL bytes": (b"\0" * 100, "."),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_record_is_one_value_error(place, name):
    """Whatever the file holds, reading it ends in a ValueError that says why, printably and briefly."""
    data, why = BROKEN[name]
    place.write_bytes(data)
    with pytest.raises(ValueError, match=why) as caught:
        read_record(str(place.parent.parent), "job")
    assert len(str(caught.value)) < 300 and str(caught.value).isascii() and str(caught.value).isprintable()


def test_the_longest_record_is_read(place):
    """The limit is the last length that passes."""
    place.write_bytes(_data().ljust(limits.MAX_RECORD))
    assert read_record(str(place.parent.parent), "job") == GOOD


@pytest.mark.parametrize("member", ["job_id", "host", "unknown"])
def test_no_nesting_gets_through(member):
    """Up to 32,000 levels deep: a ValueError or, in an unknown member, a record; never a RecursionError."""
    for depth in [*range(1, 30), *range(800, 1100, 7), 5000, 9999, 20000, 32000]:
        data = _data().replace(b'"job"' if member == "job_id" else b'"node"', b"@", member != "unknown")
        data = data.replace(b"@", b"[" * depth + b"]" * depth)
        if member == "unknown":
            data = data[:-1] + b', "unknown": ' + b"[" * depth + b"]" * depth + b"}"
        try:
            found = parse_record(data, "job")
        except ValueError as err:
            assert len(str(err)) < 300
        else:
            assert member == "unknown" and found == GOOD


# Files...


def _fifo(path):
    os.mkfifo(path)


def _link(path):
    (path.parent.parent / "elsewhere").write_bytes(_data())
    path.symlink_to("../elsewhere")


def _socket(path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (_fifo, "no regular file"),
        (lambda path: path.mkdir(), "no regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "cannot be read"),
        (_link, "cannot be read"),
        (_socket, "cannot be read"),
    ],
)
def test_only_a_regular_file_is_a_record(place, make, why):
    """A FIFO does not block, a link is not followed, a device is not read."""
    make(place)
    with pytest.raises(ValueError, match=why):
        read_record(str(place.parent.parent), "job")


def test_nothing_is_no_record(place):
    """No directory, no file, a file instead of a directory: no job, and no fault."""
    root = str(place.parent.parent)
    (place.parent.parent / "file").touch()
    assert [read_record(root, name) for name in ("job", "nobody", "file")] == [None, None, None]


def test_a_linked_job_directory_is_no_job(place):
    """The target of a link with a job's name is not read."""
    place.write_bytes(_data(job_id="alias"))
    (place.parent.parent / "alias").symlink_to(place.parent)
    assert read_record(str(place.parent.parent), "alias") is None


@needs_root
def test_an_unreadable_record_says_so(place):
    """A job of another user is a ValueError with the system's reason, for the file and for the directory."""
    place.write_bytes(_data())
    place.chmod(0o600)
    for directory_ in (place.parent.parent.parent, place.parent.parent, place.parent):
        directory_.chmod(0o755)
    program = """
    import os, sys
    from forgather_control.jobs.record import read_record
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
    for line in sys.stdin:
        try:
            print(read_record(line.strip(), "job"), flush=True)
        except ValueError as err:
            print(err, flush=True)
    """
    with Process(program) as other:
        other.say(str(place.parent.parent))
        assert other.line() == "endpoint.json cannot be read (Permission denied)"
        place.parent.chmod(0o700)
        other.say(str(place.parent.parent))
        assert other.line() == "its directory cannot be read (Permission denied)"


def test_reading_leaks_no_descriptors(place):
    """Good or broken, a reader closes what it opened."""
    root, before = str(place.parent.parent), descriptors()
    for data in (_data(), b"", _data(pid=-5), b" " * 10**6):
        place.write_bytes(data)
        for _ in range(5):
            try:
                read_record(root, "job")
            except ValueError:
                pass
    assert descriptors() == before


def test_a_record_is_never_seen_half_written(place):
    """While it is rewritten over and over, every reader gets one whole record or the other."""
    root = str(place.parent.parent)
    one, two = GOOD._replace(user="1" * 3000), GOOD._replace(user="2" * 30)
    done, seen = threading.Event(), set()

    def write():
        while not done.is_set():
            for mine in (one, two):
                private_files.write(directory, record.RECORD, jsonrpc.encode(mine.to_json()))

    directory = os.open(place.parent, os.O_RDONLY | os.O_DIRECTORY)
    private_files.write(directory, record.RECORD, jsonrpc.encode(one.to_json()))
    writer = threading.Thread(target=write)
    writer.start()
    try:
        until(lambda: seen.update(read_record(root, "job") for _ in range(1000)) or len(seen) > 1)
    finally:
        done.set()
        writer.join()
        os.close(directory)
    assert seen == {one, two}
