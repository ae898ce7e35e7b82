"""A job's own directory: one winner, private from the first moment, repaired, and gone at the end."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import threading
import time
from contextlib import contextmanager

import pytest

from forgather_control.errors import JobIdTaken, JobsDirUnusable, StartError
from forgather_control.jobs import cleanup, directory, registry
from forgather_control.jobs.directory import JobDirectory, generate_job_id
from forgather_control.jobs.record import is_job_id, read_record
from forgather_control.server import limits
from forgather_control.server.server import Server
from forgather_control.training import controller
from forgather_control.training.loop_actions import RequestedActions
from forgather_control.training.options import ControlOptions

from ..support.harness import MS, Process, Wire, job_process, needs, needs_root, remove_folder, running_loop, until

#: Claims the job ids on its standard input, one a line, and prints what became of it; "end" removes the last.
CLAIMER = """
import os, sys, time
from forgather_control.processes import liveness as process
from forgather_control.jobs.directory import JobDirectory
from forgather_control.errors import StartError
from forgather_control.server.server import Server

def claim(job_id):
    server = Server(lambda request, sink: {"job_id": job_id, "pid": os.getpid()}, lambda: None)
    job = JobDirectory(job_id, server.listen, 1)
    try:
        job.claim()
    except StartError as err:
        server.close(5.0)
        return None, None, f"{type(err).__name__} {err.data.get('pid')} {err}"
    server.start()
    return job, server, "mine"

print(os.getpid(), flush=True)
if len(sys.argv) > 1:
    process.current_process()  # import now what is imported late: later this user may not read the interpreter's files
    os.setgroups([]); os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
job = None
for line in sys.stdin:
    word, _, moment = line.partition(" ")
    if word.strip() == "end":
        if job is not None:
            job.remove(); server.close(5.0)
        print("ended", flush=True)
        continue
    while moment and time.time() < float(moment):
        pass
    job, server, result = claim(word.strip())
    print(result, flush=True)
"""


@pytest.fixture
def make():
    """Makes job directories with a real server each; all are closed at the end."""
    servers = []

    def make(job_id="job", listen=None):
        def answer(request, sink):
            return {"job_id": job_id, "pid": os.getpid()}

        servers.append(Server(answer, lambda: None))
        if listen is None:
            servers[-1].start()
        return JobDirectory(job_id, listen or servers[-1].listen, 1)

    yield make
    for one in servers:
        one.close(5.0)


@contextmanager
def mounted(path, *options):
    """A tmpfs at ``path``."""
    path.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def mode(path):
    return stat.S_IMODE(os.lstat(path).st_mode)


def names(root):
    """What lies in the jobs directory, but for the lock and what is kept of ended jobs."""
    return sorted(set(os.listdir(root)) - {".lock", ".ended"})


def published(root, job_id="job"):
    """The record as a client finds it, once its socket has answered a ping with this job's id."""
    record = read_record(str(root), job_id)
    assert record is not None and record.job_id == job_id
    with Wire(record.socket, made_up=True) as wire:
        assert wire.call("ping")["result"]["job_id"] == job_id
    return record


# Claim...


def test_a_claim_publishes_and_remove_leaves_nothing(jobs_dir, make):
    """From claim to remove the job can be found; then its directory is gone, twice removed or not."""
    job = make()
    job.claim()
    record = published(jobs_dir)
    assert (record.pid, record.port, record.protocol, record.world_size) == (os.getpid(), None, 2, 1)
    assert record.socket == str(jobs_dir / "job" / "control.sock") and registry.judge(record) == "silent"
    assert names(jobs_dir / "job") == ["control.sock", "endpoint.json", "lock"]
    job.remove()
    job.remove()
    assert names(jobs_dir) == [] and not job.restore(), "what was removed is not restored"


def test_a_live_owner_keeps_its_id(jobs_dir, make):
    """A second claim, from this process or another, names the holder of the id, and changes nothing."""
    with job_process() as other:
        before = published(jobs_dir)
        with pytest.raises(JobIdTaken, match=f'job id "job" is in use by pid {other.pid} on') as caught:
            make().claim()
        assert caught.value.data == {"pid": other.pid, "host": socket.gethostname()}
        assert published(jobs_dir) == before
    make("mine").claim()
    with pytest.raises(JobIdTaken, match=f"pid {os.getpid()}"):
        make("mine").claim()
    published(jobs_dir, "mine")


def test_two_at_the_same_instant_one_wins(jobs_dir):
    """Twenty times two processes claim one id at one moment: one has it, the other learns whose it is."""
    with Process(CLAIMER) as one, Process(CLAIMER) as two:
        pids = {one: one.line(), two: two.line()}
        for number in range(20):
            moment = time.time() + 20 * MS
            for process in (one, two):
                process.say(f"job{number} {moment}")
            results = {process: process.line() for process in (one, two)}
            (winner,) = [process for process in results if results[process] == "mine"]
            (loser,) = {one, two} - {winner}
            assert results[loser].startswith(f"JobIdTaken {pids[winner]} "), results
            assert str(published(jobs_dir, f"job{number}").pid) == pids[winner]
            for process in (one, two):
                process.say("end")
                assert process.line() == "ended"
            assert names(jobs_dir) == []


def test_a_dead_owners_directory_is_taken_over(jobs_dir, make):
    """After kill -9 the next job of this id begins with a clean directory."""
    with job_process() as other:
        (jobs_dir / "job" / "requests").mkdir(exist_ok=True)
        other.kill()
    make().claim()
    assert published(jobs_dir).pid == os.getpid() and names(jobs_dir / "job") == [
        "control.sock",
        "endpoint.json",
        "lock",
    ]


def test_what_a_crash_left_before_it_published_is_taken_over(jobs_dir, make):
    """A directory without a record, seen under the lock, belongs to no job."""
    (jobs_dir / "job" / "junk").mkdir(parents=True)
    make().claim()
    assert published(jobs_dir) and names(jobs_dir / "job") == ["control.sock", "endpoint.json", "lock"]


@pytest.mark.parametrize("kind", ["unreadable", "foreign", "link", "file"])
def test_what_is_not_proven_dead_is_not_taken(jobs_dir, make, kind):
    """An unreadable record, another host's, a link to a directory or a file: the claim fails, all stays as it was."""
    target = jobs_dir.parent / "target"
    target.mkdir()
    (target / "precious").touch()
    jobs_dir.mkdir()
    if kind == "link":
        (jobs_dir / "job").symlink_to(target)
    elif kind == "file":
        (jobs_dir / "job").write_text("precious")
    else:
        (jobs_dir / "job").mkdir()
        record = {"job_id": "job", "host": "another.example.org", "port": None, "pid": 1, "started_at": 1}
        (jobs_dir / "job" / "endpoint.json").write_text(json.dumps(record if kind == "foreign" else {}))
    before = sorted(jobs_dir.parent.rglob("*"))
    with pytest.raises(JobIdTaken if kind == "foreign" else JobsDirUnusable) as caught:
        make().claim()
    assert isinstance(caught.value, StartError) and "job" in str(caught.value)
    assert sorted(jobs_dir.parent.rglob("*")) == sorted([*before, jobs_dir / ".lock"])


FAR = {"job_id": "job", "host": "another.example.org", "port": None, "pid": 1, "started_at": 1}


@pytest.mark.parametrize(
    ("theirs", "mine", "taken"),
    [
        ({"run_id": "r", "restart_count": 0}, {"TORCHELASTIC_RUN_ID": "r", "TORCHELASTIC_RESTART_COUNT": "1"}, False),
        ({"run_id": "r", "restart_count": 1}, {"TORCHELASTIC_RUN_ID": "r", "TORCHELASTIC_RESTART_COUNT": "1"}, True),
        ({"run_id": "r", "restart_count": 2}, {"TORCHELASTIC_RUN_ID": "r", "TORCHELASTIC_RESTART_COUNT": "1"}, True),
        ({"run_id": "r", "restart_count": 0}, {"TORCHELASTIC_RUN_ID": "s", "TORCHELASTIC_RESTART_COUNT": "1"}, True),
        ({"restart_count": 0}, {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "1"}, True),
        ({"slurm_job_id": 7, "slurm_restart_count": 0}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, False),
        ({"slurm_job_id": 7, "slurm_restart_count": 0}, {"SLURM_JOB_ID": "7"}, True),
        ({"slurm_job_id": 6, "slurm_restart_count": 0}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, True),
        (None, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, True),
        ({"run_id": "r", "restart_count": 0}, {}, True),
    ],
)
def test_a_run_begun_anew_takes_its_id_from_another_host(jobs_dir, make, monkeypatch, theirs, mine, taken):
    """A job that cannot be judged from here gives way to a later start of its own run, and to no other."""
    for variable, value in mine.items():
        monkeypatch.setenv(variable, value)
    (jobs_dir / "job" / "requests").mkdir(parents=True)
    (jobs_dir / "job" / "endpoint.json").write_text(json.dumps({**FAR, "launch": theirs}))
    before = sorted(jobs_dir.rglob("*"))
    if taken:
        with pytest.raises(JobIdTaken, match=r"another\.example\.org"):
            make().claim()
        assert sorted(jobs_dir.rglob("*")) == sorted([*before, jobs_dir / ".lock"])
    else:
        make().claim()
        assert published(jobs_dir).pid == os.getpid() and names(jobs_dir / "job") == [
            "control.sock",
            "endpoint.json",
            "lock",
        ]


def _again(monkeypatch, count):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "r")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))


def test_a_live_process_of_this_host_keeps_its_id(jobs_dir, make, monkeypatch):
    """Though a later turn of its run asks for it: torchrun would have ended it first. Stopped or not; dead, it goes."""
    _again(monkeypatch, 0)
    with job_process() as other:
        _again(monkeypatch, 1)
        for signum in (signal.SIGCONT, signal.SIGSTOP, None):
            if signum is None:  # nothing listens any more, and its process could not restore that
                (jobs_dir / "job" / "control.sock").unlink()
            else:
                os.kill(other.pid, signum)
            with pytest.raises(JobIdTaken, match=f"pid {other.pid}"):
                make().claim()
        other.kill()
        make().claim()
        assert published(jobs_dir).launch.restart_count == 1


def test_who_listens_on_this_host_keeps_its_id(jobs_dir, make, monkeypatch):
    """In another container its pid cannot be judged, but its socket is here, and a process listens."""
    _again(monkeypatch, 0)
    with job_process():
        place = jobs_dir / "job" / "endpoint.json"
        place.write_text(json.dumps({**json.loads(place.read_text()), "pid_namespace": 1}))
        (jobs_dir / "job" / "lock").unlink()
        assert registry.judge(read_record(str(jobs_dir), "job")) == "foreign"
        _again(monkeypatch, 1)
        with pytest.raises(JobIdTaken):
            make().claim()
    make().claim()
    assert published(jobs_dir).launch.restart_count == 1


def test_an_earlier_turn_that_lives_on_stands_down(jobs_dir, make, monkeypatch):
    """Cut off from its launcher, the old process learns whose the id is now, and touches nothing."""
    _again(monkeypatch, 0)
    old = make()
    old.claim()
    place = jobs_dir / "job" / "endpoint.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **FAR, "socket": None}))
    with Process(CLAIMER, env={"TORCHELASTIC_RESTART_COUNT": "1"}) as new:
        pid = new.line()
        new.say("job")
        assert new.line() == "mine"
        with pytest.raises(JobIdTaken, match=f"pid {pid}"):
            old.restore()
        old.remove()
        assert str(published(jobs_dir).pid) == pid


@pytest.mark.once
@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_everything_is_private_from_the_first_moment(jobs_dir, make, umask):
    """While jobs are claimed and removed, no directory and no record is ever open to other users."""
    seen, done = set(), threading.Event()

    def look():
        while not done.is_set():
            for name in ("", "job", "job/endpoint.json", f"job/.endpoint.json.{os.getpid()}"):
                try:
                    seen.add((name.split(".")[0], oct(mode(jobs_dir / name))))
                except FileNotFoundError:
                    pass

    thread = threading.Thread(target=look)
    old = os.umask(umask)
    try:
        thread.start()
        job = make()
        for _ in range(30):
            job.claim()
            assert mode(jobs_dir / "job" / "control.sock") == mode(jobs_dir / "job" / "endpoint.json") == 0o600
            job.remove()
        job.claim()
        until(lambda: len(seen - {("job/", "0o600")}) >= 3)
    finally:
        os.umask(old)
        done.set()
        thread.join()
    assert seen - {("job/", "0o600")} == {("", "0o700"), ("job", "0o700"), ("job/endpoint", "0o600")}
    assert mode(jobs_dir / ".lock") == 0o600


@pytest.mark.parametrize("length", [60, 84, 107, 108, 109, 122, 160, 200])
def test_any_length_of_path_works(jobs_dir, make, monkeypatch, length):
    """Up to 107 bytes the socket lies in place, beyond in a private short directory that goes with the job."""
    runtime = jobs_dir.parent / "run"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    rest = length - len(f"{jobs_dir}//control.sock")
    root = jobs_dir
    if rest > 128:
        root = jobs_dir / ("d" * (rest - 101))
        rest = 100
        monkeypatch.setenv("FORGATHER_JOBS_DIR", str(root))
    job = make("x" * rest)
    job.claim()
    name = root / job.job_id / "control.sock"
    record = published(root, job.job_id)
    assert len(str(name)) == length and mode(record.socket) == 0o600
    if length <= 107:
        assert record.socket == str(name) and not name.is_symlink() and names(runtime) == []
    else:
        (short,) = runtime.iterdir()
        assert record.socket == str(short / "s") == os.readlink(name) and mode(short) == 0o700
    job.remove()
    assert names(root) == names(runtime) == []


@pytest.mark.parametrize("runtime", ["missing", "too long", "unset"])
def test_without_a_runtime_directory_the_temporary_one_serves(jobs_dir, make, monkeypatch, runtime):
    """XDG_RUNTIME_DIR that is not there, or itself too long, is passed over; so is a long TMPDIR."""
    long = jobs_dir.parent / ("r" * 100)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(jobs_dir.parent / "missing" if runtime == "missing" else long))
    if runtime == "unset":
        monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(directory.tempfile, "tempdir", str(long) if runtime == "too long" else str(jobs_dir.parent))
    job = make("x" * 100)
    job.claim()
    where = published(jobs_dir, job.job_id).socket
    assert where.startswith("/tmp/forgather-" if runtime == "too long" else f"{jobs_dir.parent}/forgather-")
    job.remove()
    assert not os.path.exists(os.path.dirname(where))


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL])
def test_a_file_system_without_sockets_gets_a_link(jobs_dir, make, number):
    """Where bind(2) refuses, the socket lies elsewhere and its name links to it."""
    real = Server(lambda request, sink: {"job_id": "job"}, lambda: None)
    real.start()

    def listen(path):
        if path.startswith(str(jobs_dir)):
            raise OSError(number, os.strerror(number))
        real.listen(path)

    job = make(listen=listen)
    job.claim()
    assert os.readlink(jobs_dir / "job" / "control.sock") == published(jobs_dir).socket
    with Wire(jobs_dir / "job" / "control.sock") as wire:
        wire.still_answers()
    job.remove()
    real.close(5.0)
    assert names(jobs_dir) == []


def test_generated_ids_are_ids_and_get_suffixes(jobs_dir, monkeypatch):
    """Any host name makes a job id; where it is taken, the next job gets -2, then -3, none longer than an id may be."""
    for host in ("node0123", "über node/..", "h" * 300):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        assert is_job_id(generate_job_id()) and generate_job_id().startswith("job_")
    monkeypatch.undo()
    monkeypatch.setenv("FORGATHER_JOBS_DIR", str(jobs_dir))
    monkeypatch.setattr(directory, "generate_job_id", lambda: "x" * 128)
    running = [controller.Controller(ControlOptions(), RequestedActions()) for _ in range(3)]
    for one in running:
        one.start()
    assert [one.job_id for one in running] == ["x" * 128, "x" * 124 + "-2", "x" * 124 + "-3"]
    assert len(names(jobs_dir)) == 3
    for one in running:
        one.close()
    assert names(jobs_dir) == [] and all(map(is_job_id, running[0]._server._candidates()))


@pytest.mark.once
@pytest.mark.parametrize("variable", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
def test_a_job_without_an_id_keeps_its_id_when_it_is_restarted(jobs_dir, monkeypatch, variable):
    """SLURM or torchrun kill it and restart it: the new process has the id; another run beside it gets a suffix."""
    if variable.startswith("SLURM"):
        name = "job_7"
        monkeypatch.setenv("SLURM_JOB_ID", "7")
    else:
        name = "job_my-run"
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "my run")
    for count in range(3):
        with job_process("", env={variable: str(count)}) as job:
            assert names(jobs_dir) == [name] and published(jobs_dir, name).pid == job.pid
            if count == 2:
                with job_process(""):
                    assert names(jobs_dir) == [name, f"{name}-2"]
            job.kill()


# Restore...


@pytest.mark.parametrize("what", ["control.sock", "endpoint.json", "", "both", "replaced", "spoiled", "a dead job's"])
@pytest.mark.parametrize("job_id", ["job", "x" * 100], ids=["in place", "linked"])
def test_what_was_deleted_is_restored(jobs_dir, make, job_id, what):
    """Socket, link, record, all of it; the record replaced, cut off, or a dead job's: each is put right, once."""
    job = make(job_id)
    job.claim()
    assert not job.restore()
    place = jobs_dir / job_id
    if what == "":
        shutil.rmtree(jobs_dir)
    elif what == "replaced":
        shutil.copy(place / "endpoint.json", place / "copy")
        os.replace(place / "copy", place / "endpoint.json")
    elif what == "spoiled":
        (place / "copy").write_bytes((place / "endpoint.json").read_bytes()[:100])
        (place / "copy").chmod(0o600)
        os.replace(place / "copy", place / "endpoint.json")
    elif what == "a dead job's":
        record = {**json.loads((place / "endpoint.json").read_text()), "boot_id": "before", "socket": None}
        (place / "copy").write_text(json.dumps(record))
        (place / "copy").chmod(0o600)
        os.replace(place / "copy", place / "endpoint.json")
    else:
        for name in ("control.sock", "endpoint.json") if what == "both" else (what,):
            (place / name).unlink()
    assert job.restore() and not job.restore()
    published(jobs_dir, job_id)
    assert mode(place) == 0o700 and names(place) == ["control.sock", "endpoint.json", "lock"]
    job.remove()
    assert names(jobs_dir) == []


@pytest.mark.parametrize("whole", [False, True], ids=["socket", "directory"])
def test_a_tmp_cleaner_at_the_short_directory_is_noticed(jobs_dir, make, whole):
    """A socket that lies elsewhere is watched there, not only at the link to it."""
    job = make("x" * 100)
    job.claim()
    where = published(jobs_dir, job.job_id).socket
    shutil.rmtree(os.path.dirname(where)) if whole else os.unlink(where)
    assert job.restore() and not job.restore()
    published(jobs_dir, job.job_id)
    job.remove()


def test_open_connections_survive_a_restore(jobs_dir, make):
    """Open connections stay when the socket gets a new file."""
    job = make()
    job.claim()
    with Wire(jobs_dir / "job" / "control.sock") as wire:
        wire.still_answers()
        os.unlink(jobs_dir / "job" / "control.sock")
        assert job.restore()
        wire.still_answers()


def test_a_live_job_restores_itself_within_seconds(jobs_dir, monkeypatch):
    """A running job notices by itself that its directory is gone, and is found again."""
    monkeypatch.setattr(limits, "TICK_PERIOD", 50 * MS)
    with running_loop() as run:
        remove_folder(jobs_dir)
        until(lambda: (jobs_dir / "job" / "endpoint.json").exists())
        published(jobs_dir)
        assert run.thread.is_alive()
    assert names(jobs_dir) == []


def test_a_directory_that_another_took_over_is_left_alone(jobs_dir, make):
    """Its new owner keeps it: restore says whose it is, and neither restore nor remove touches a file."""
    job = make()
    job.claim()
    shutil.rmtree(jobs_dir / "job")
    with Process(CLAIMER) as other:
        pid = other.line()
        other.say("job")
        assert other.line() == "mine"
        before = {name: os.lstat(jobs_dir / "job" / name) for name in names(jobs_dir / "job")}
        for _ in range(2):
            with pytest.raises(JobIdTaken, match=f"pid {pid}"):
                job.restore()
        job.remove()
        assert {name: os.lstat(jobs_dir / "job" / name) for name in names(jobs_dir / "job")} == before
        assert str(published(jobs_dir).pid) == pid


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_is_no_socket_is_never_unlinked(jobs_dir, make, kind):
    """A file or a directory in the socket's place is not ours: restore reports it and leaves it."""
    job = make()
    job.claim()
    obstacle = jobs_dir / "job" / "control.sock"
    obstacle.unlink()
    obstacle.write_text("precious") if kind == "file" else obstacle.mkdir()
    before = os.lstat(obstacle)
    with pytest.raises(JobsDirUnusable, match="in the way and no socket"):
        job.restore()
    assert os.lstat(obstacle) == before


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_no_directory_is_left_alone(jobs_dir, make, kind):
    """A file or a link in the directory's place is neither written through nor removed."""
    job = make()
    job.claim()
    outside = jobs_dir.parent / "outside"
    (jobs_dir / "job").rename(outside)
    (jobs_dir / "job").symlink_to(outside) if kind == "link" else (jobs_dir / "job").touch()
    before = {name: os.lstat(outside / name) for name in names(outside)}
    with pytest.raises(JobsDirUnusable):
        job.restore()
    job.remove()
    assert names(jobs_dir) == ["job"] and {name: os.lstat(outside / name) for name in names(outside)} == before


def test_a_restore_does_not_wait_for_the_lock(jobs_dir, make):
    """The server thread never waits for a lock that another process holds."""
    job = make()
    job.claim()
    os.unlink(jobs_dir / "job" / "control.sock")
    with cleanup.locked(str(jobs_dir), 1.0), pytest.raises(JobsDirUnusable, match="held"):
        job.restore()
    assert job.restore()


# A jobs directory that cannot be used...


def refused(jobs_dir, job, match):
    """Assert that a claim fails as a StartError and leaves nothing behind."""
    with pytest.raises(JobsDirUnusable, match=match):
        job.claim()
    assert not jobs_dir.is_dir() or names(jobs_dir) == []


@needs_root
@needs("mount")
@pytest.mark.parametrize("room", range(7))
@pytest.mark.parametrize("options", ["size=64k", "nr_inodes=16"])
@pytest.mark.parametrize("job_id", ["job", "x" * 100], ids=["in place", "linked"])
def test_a_full_disk_leaves_nothing_behind(jobs_dir, make, monkeypatch, job_id, options, room):
    """Whether bytes or inodes run out, at whichever step: one error; and once there is room, the claim works."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(jobs_dir.parent / "run"))
    (jobs_dir.parent / "run").mkdir()
    with mounted(jobs_dir, "-o", options + ",mode=700"):
        fillers = []
        with pytest.raises(OSError, match="No space left on device"):
            while True:
                fillers.append(jobs_dir / f".fill{len(fillers)}")
                fillers[-1].write_bytes(b"x" * 4096)
        assert len(fillers) > 8
        for _ in range(room):
            fillers.pop().unlink(missing_ok=True)
        before, job = names(jobs_dir), make(job_id)
        try:
            job.claim()
        except JobsDirUnusable as err:
            assert "No space left on device" in str(err) and room < 6
        else:
            assert room > 0
            job.remove()
        assert names(jobs_dir) == before and names(jobs_dir.parent / "run") == []
        for filler in fillers:
            filler.unlink(missing_ok=True)
        job = make(job_id)
        job.claim()
        published(jobs_dir, job_id)
        job.remove()
        assert names(jobs_dir) == names(jobs_dir.parent / "run") == []


@needs_root
@needs("mount")
def test_a_read_only_file_system(jobs_dir, make):
    """At the start it is refused; under a live job it is an error to report, until it can be written again."""
    with mounted(jobs_dir, "-o", "mode=700"):
        subprocess.run(["mount", "-o", "remount,ro", str(jobs_dir)], check=True)
        refused(jobs_dir, make(), "Read-only file system")
        subprocess.run(["mount", "-o", "remount,rw", str(jobs_dir)], check=True)
        job = make()
        job.claim()
        os.rename(jobs_dir / "job" / "control.sock", jobs_dir / "job" / "moved")
        subprocess.run(["mount", "-o", "remount,ro", str(jobs_dir)], check=True)
        for work in (job.restore, job.remove, job.restore):
            with pytest.raises(JobsDirUnusable, match="Read-only file system"):
                work()
        subprocess.run(["mount", "-o", "remount,rw", str(jobs_dir)], check=True)
        assert job.restore() and published(jobs_dir)
        job.remove()
        assert names(jobs_dir) == []


@needs_root
@pytest.mark.parametrize(
    ("owner", "bits", "why"),
    [
        (1234, 0o755, "belongs to another user (uid 1234)"),
        (1234, 0o1777, "belongs to another user (uid 1234)"),
        (0, 0o755, "cannot be written (Permission denied)"),
        (0, 0o700, "cannot be written (Permission denied)"),
        (65534, 0o500, "cannot be written (Permission denied)"),
        (65534, 0o777, "any user may rename what is in the jobs directory"),
        (None, 0o755, "Permission denied"),
        (65534, 0o755, None),
        (65534, 0o775, None),  # umask 002
        (0, 0o1777, None),
    ],
)
def test_whose_directory_may_be_used(jobs_dir, owner, bits, why):
    """Only one's own, or root's that can be written, and none in which any user may rename; as an ordinary user."""
    jobs_dir.parent.chmod(0o755)
    if owner is not None:
        jobs_dir.mkdir()
        os.chown(jobs_dir, owner, owner)
        jobs_dir.chmod(bits)
    with Process(CLAIMER, "65534") as other:
        other.line()
        other.say("job")
        result = other.line()
        if why is None:
            assert result == "mine" and read_record(str(jobs_dir), "job").pid == other.pid
            other.say("end")
            assert other.line() == "ended"
        else:
            assert result.startswith("JobsDirUnusable None") and why in result, result
        assert not jobs_dir.exists() or names(jobs_dir) == []


def test_a_directory_in_which_anybody_may_rename_is_refused(jobs_dir, make):
    """World-writable without the sticky bit: another user could put a job under our name."""
    jobs_dir.mkdir()
    jobs_dir.chmod(0o777)
    refused(jobs_dir, make(), "any user may rename")
    jobs_dir.chmod(0o1777)
    make().claim()
    published(jobs_dir)


@pytest.mark.parametrize("kind", ["file", "below a file", "loop"])
def test_what_cannot_be_a_directory_is_refused(jobs_dir, make, monkeypatch, kind):
    """A file in the way, or a link to itself: one sentence that names the path."""
    jobs_dir.symlink_to(jobs_dir) if kind == "loop" else jobs_dir.touch()
    if kind == "below a file":
        monkeypatch.setenv("FORGATHER_JOBS_DIR", str(jobs_dir / "deeper"))
    refused(jobs_dir, make(), str(jobs_dir))


def test_a_job_whose_record_was_deleted_keeps_its_name(jobs_dir):
    """Between the deletion and the repair a process still listens: the name is not free."""
    with running_loop("job"):
        (jobs_dir / "job" / "endpoint.json").unlink()
        with pytest.raises(JobIdTaken, match="record was deleted"):
            directory.JobDirectory("job", lambda path: None, 1).claim()


def test_the_folders_above_are_private_too(monkeypatch, jobs_dir):
    """Under umask 0 nothing that we make can be written by others."""
    deep = jobs_dir / "config" / "forgather" / "jobs"
    monkeypatch.setenv("FORGATHER_JOBS_DIR", str(deep))
    old = os.umask(0)
    try:
        with running_loop("job"):
            for folder in (deep, deep.parent, deep.parent.parent):
                assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    finally:
        os.umask(old)
