"""The file of a job's processes: what was written is read; what is broken or hostile ends in a ValueError."""

from __future__ import annotations

import json
import os
import stat
import threading

import pytest

from forgather_control.errors import BadJobId
from forgather_control.jobs import cleanup, directory, limits, spool
from forgather_control.jobs.rank_processes import RankRecord, parse_ranks, read, write
from forgather_control.processes.liveness import current_process

from ..support.harness import ROOT, SOON, Process, descriptors

ONE = RankRecord(0, "node", 123, 1.5, 1.0, "boot", "machine", 4026531836, 7)


def data(*changes):
    """The file of ranks 0, 1, ... that differ from ONE by these changes."""
    return json.dumps([{**ONE._asdict(), "rank": rank, **change} for rank, change in enumerate(changes)]).encode()


@pytest.fixture
def place(jobs_dir):
    """The path of ``ranks.json`` in the directory of the job "job"."""
    (jobs_dir / "job").mkdir(parents=True)
    return jobs_dir / "job" / "ranks.json"


def of_job(jobs_dir):
    """What is read for the job "job"."""
    return read(str(jobs_dir), "job")


def test_ranks_survive_the_way_through_their_file(place, jobs_dir):
    """A client reads what rank 0 writes, null members included."""
    ranks = [
        RankRecord.of(0, current_process(), 5),
        RankRecord.of(1, current_process()._replace(pid=7, machine=None), None),
    ]
    write(str(place.parent), ranks)
    assert of_job(jobs_dir) == ranks and of_job(jobs_dir)[0].identity == current_process()
    write(str(place.parent), ranks[:1])
    assert of_job(jobs_dir) == ranks[:1], "written again, it is replaced"


def test_only_its_owner_reads_it(place):
    """0600 whatever the umask, and no half-written file is left beside it."""
    old = os.umask(0)
    try:
        write(str(place.parent), [ONE])
    finally:
        os.umask(old)
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    assert [path.name for path in place.parent.iterdir()] == ["ranks.json"]


def test_what_cannot_be_written_leaves_what_was_there(place, jobs_dir):
    """No directory, or a link in the way: an OSError, and the old file stays."""
    write(str(place.parent), [ONE])
    with pytest.raises(OSError):
        write(str(place.parent / "none"), [ONE])
    (place.parent / f".ranks.json.{os.getpid()}").symlink_to(jobs_dir / "victim")
    with pytest.raises(OSError):
        write(str(place.parent), [])
    assert of_job(jobs_dir) == [ONE] and not (jobs_dir / "victim").exists()


def test_no_reader_sees_half_of_it(place, jobs_dir):
    """While it is written again and again, every reading is whole."""
    write(str(place.parent), [ONE])
    stop = threading.Event()

    def rewrite():
        while not stop.is_set():
            write(str(place.parent), [ONE._replace(rank=rank) for rank in range(200)])
            write(str(place.parent), [ONE])

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        assert {len(of_job(jobs_dir)) for _ in range(300)} <= {1, 200}
    finally:
        stop.set()
        writer.join(SOON)


def test_the_directory_takes_it_away(place, jobs_dir):
    """With the job's directory goes whatever is in it, of a job that ends and of a dead one that is cleaned up."""
    write(str(place.parent), [ONE])
    cleanup.remove_tree(str(jobs_dir), "job", spool.directory_id(str(place.parent)))
    assert not place.parent.exists()
    mine = directory.JobDirectory("mine", lambda path: open(path, "w").close(), 1)
    mine.claim()
    write(mine.path, [ONE])
    assert not mine.restore(), "a file more is no damage"
    mine.remove()
    assert not os.path.exists(mine.path)


# Nothing that is read is trusted...


def test_nothing_there_is_none(place, jobs_dir):
    """No file, no directory, a link or a file in the directory's place: there are no ranks, and no error."""
    assert of_job(jobs_dir) is None
    place.parent.rmdir()
    assert of_job(jobs_dir) is None
    place.parent.write_text("")
    assert of_job(jobs_dir) is None
    place.parent.unlink()
    (jobs_dir / "elsewhere").mkdir()
    write(str(jobs_dir / "elsewhere"), [ONE])
    place.parent.symlink_to(jobs_dir / "elsewhere")
    assert of_job(jobs_dir) is None


@pytest.mark.parametrize("name", ["..", "a/b", "", "/etc"])
def test_a_job_id_is_checked_before_it_is_a_path(jobs_dir, name):
    """Whatever a caller hands in."""
    with pytest.raises(BadJobId):
        read(str(jobs_dir), name)


def test_links_fifos_and_directories_are_not_read(place, jobs_dir):
    """Each is a ValueError at once; a FIFO without a writer does not block."""
    before = descriptors()
    (jobs_dir / "secret").write_bytes(data({}))
    place.symlink_to(jobs_dir / "secret")
    with pytest.raises(ValueError, match="cannot be read"):
        of_job(jobs_dir)
    place.unlink()
    os.mkfifo(place)
    with pytest.raises(ValueError, match="no regular file"):
        of_job(jobs_dir)
    place.unlink()
    place.mkdir()
    with pytest.raises(ValueError, match="no regular file"):
        of_job(jobs_dir)
    assert descriptors() == before


BROKEN = {
    "empty": (b"", "Expecting value"),
    "half written": (data({})[:50], "."),
    "not UTF-8": (b"\xff", "utf-8"),
    "an object": (b"{}", "no JSON array"),
    "a list of numbers": (b"[1]", "a rank must be an object"),
    "nested": (b"[" * 100_000, "nested|Expecting"),
    "a member is missing": (b'[{"rank": 0}]', "a rank has no host"),
    "rank as text": (data({"rank": "0"}), "rank of a rank must be an integer"),
    "rank below 0": (data({"rank": -1}), "rank of a rank must be .*, not -1"),
    "rank null": (data({"rank": None}), "rank of a rank must be an integer"),
    "the same twice": (data({}, {"rank": 0}), "in order"),
    "out of order": (data({"rank": 2}, {}), "in order"),
    "pid 0": (data({"pid": 0}), "pid of a rank must be an integer from 1 to 2147483647"),
    "pid -1, which means all": (data({"pid": -1}), "pid of a rank must be an integer from 1 to 2147483647"),
    "pid as bool": (data({"pid": True}), "pid of a rank must be an integer.*"),
    "pid beyond": (data({"pid": 1 << 31}), "pid of a rank must be an integer from 1 to 2147483647"),
    "host null": (data({"host": None}), "host of a rank must be a string"),
    "host a list": (data({"host": ["a"]}), "host of a rank must be a string"),
    "started_at as text": (data({"started_at": "now"}), "started_at of a rank must be a number"),
    "started_at NaN": (data({"started_at": float("nan")}), "started_at of a rank must be a number"),
    "started_at beyond": (data({"started_at": 10**400}), "started_at of a rank must be a number"),
    "machine a number": (data({"machine": 5}), "machine of a rank must be a string"),
    "stack_fd of a rank must be .*, not -1": (data({"stack_fd": -1}), "stack_fd of a rank must be .*, not -1"),
    "stack_fd as float": (data({"stack_fd": 5.0}), "stack_fd of a rank must be an integer"),
    "the second one": (data({}, {"pid": "x\x1b"}), r"pid of a rank must be an integer.*, not 'x\\x1b'"),
    "too long": (data({}) + b" " * limits.MAX_RANKS_FILE, "longer than"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_value_error(place, jobs_dir, name):
    """It says which member, briefly and printably."""
    content, why = BROKEN[name]
    place.write_bytes(content)
    with pytest.raises(ValueError, match=why) as caught:
        of_job(jobs_dir)
    assert len(str(caught.value)) < 200 and str(caught.value).isprintable()


def test_a_file_of_a_later_version_is_read():
    """Members that this version does not know are left out; those it can do without may be missing; so may ranks."""
    assert parse_ranks(data({"gpu": "H200"}, {"rank": 5, "nested": [{}]})) == [ONE, ONE._replace(rank=5)]
    assert parse_ranks(b'[{"rank": 3, "host": "n", "pid": 1}]') == [RankRecord(3, "n", 1)]
    assert parse_ranks(b"[]") == []


def test_room_for_thousands():
    """Ten thousand ranks fit."""
    me = current_process()._replace(host="h" * 64)
    many = [RankRecord.of(rank, me, 1000) for rank in range(10_000)]
    assert len(json.dumps([rank._asdict() for rank in many])) < limits.MAX_RANKS_FILE


def test_running_out_of_descriptors_is_an_oserror(tmp_path):
    """An OSError says so: it must not look as if the job had no ranks."""
    source = """
    import os, resource
    from forgather_control.jobs import rank_processes
    os.makedirs("job"); rank_processes.write("job", [])
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1, 4096))
    try:
        print(rank_processes.read(".", "job"), flush=True)
    except OSError as err:
        print(err.strerror, flush=True)
    """
    with Process(source, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}) as other:
        assert other.line() == "Too many open files", other.errors
