"""A job that does not answer: its ranks are listed, their stacks read, its processes ended; no other processes."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from contextlib import ExitStack, contextmanager

import pytest

from forgather_control.client import api, limits, recovery
from forgather_control.client.target import find
from forgather_control.errors import (
    CommandFailed,
    ControlError,
    DeadlinePassed,
    InternalError,
    JobDead,
    JobEnding,
    JobNotAnswering,
    NoSuchJob,
    NotAuthenticated,
    TooManyCommands,
)
from forgather_control.jobs import rank_processes
from forgather_control.jobs.rank_processes import RankRecord
from forgather_control.jobs.record import JobRecord
from forgather_control.processes import liveness, stack_dump
from forgather_control.processes.liveness import current_process, judge

from ..processes.test_stack_dump import dumping
from ..support.harness import MS, SOON, Process, needs_root, running_loop, serving, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has memfds and /proc")

#: A rank that hangs without the interpreter lock, and one that holds it.
WAITS = "sys.stdin.readline()\nprint('unhurt', flush=True)"
KEEPS = "hold_the_lock_in_c()\nprint('unhurt', flush=True)"
#: Clients can connect to it, as to a job whose interpreter lock is held.
LISTENS = "one = socket.socket(socket.AF_UNIX)\none.bind({path!r})\none.listen()\n"
DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf', flush=True)\n"


@pytest.fixture
def impatient(monkeypatch):
    """All time-outs are shorter than in real use."""
    monkeypatch.setattr(stack_dump, "_LOCK_HELD", 300 * MS)
    monkeypatch.setattr(recovery, "_SLACK", 200 * MS)
    monkeypatch.setattr(limits, "KILL_GRACE", 300 * MS)
    monkeypatch.setattr(limits, "REPLY_GRACE", 200 * MS)


def publish(jobs_dir, ranks, world_size=None, ranks_file_too=True, **changes):
    """Write the files of a job with these ranks; return its record."""
    me = ranks[0].identity
    known = JobRecord("job", me.host, None, me.pid, 1.0, str(jobs_dir / "job" / "control.sock"), me.started_at)
    known = known._replace(boot_id=me.boot_id, machine=me.machine, booted_at=me.booted_at, **changes)
    known = known._replace(pid_namespace=me.pid_namespace, world_size=world_size or len(ranks))
    (jobs_dir / "job").mkdir(parents=True, exist_ok=True)
    (jobs_dir / "job" / "endpoint.json").write_text(json.dumps(known.to_json()))
    if ranks_file_too:
        rank_processes.write(str(jobs_dir / "job"), ranks)
    return known


@contextmanager
def ranks(*sources):
    """Start a process for each source; yield them and their records."""
    with ExitStack() as stack:
        found = [stack.enter_context(dumping(source)) for source in sources]
        records = [RankRecord.of(rank, identity, fd) for rank, (_, identity, fd) in enumerate(found)]
        yield [other for other, _, _ in found], records


@contextmanager
def answering(jobs_dir, rows, others):
    """A job whose rank 0 is this process, which answers these rows; yields its record."""
    known = publish(
        jobs_dir, [RankRecord.of(0, current_process(), None), *(one._replace(rank=one.rank + 1) for one in others)]
    )
    with serving(known.socket, lambda request, sink: rows):
        yield known


def row(rank, state="silent", **more):
    """A row as a job sends it."""
    return {"rank": rank, "host": "node", "pid": 1, "state": state, "step": None, "stacks": None, **more}


# Processes...


def test_processes_are_those_in_ranks_json(jobs_dir):
    """All ranks, the owner of the directory, and how many are not recorded."""
    two = [RankRecord.of(0, current_process(), 3), RankRecord.of(1, current_process()._replace(pid=7), None)]
    found = recovery.job_processes(publish(jobs_dir, two, world_size=4))
    assert (found.ranks, found.missing, found.owner) == (two, 2, os.getuid())


@pytest.mark.parametrize("content", [None, b"", b"[]", b"nonsense", b"x" * (5 << 20)])
def test_without_ranks_json_there_is_rank_0(jobs_dir, content):
    """The process in endpoint.json is known in any case; the others are counted."""
    known = publish(jobs_dir, [RankRecord.of(0, current_process(), None)], world_size=3, ranks_file_too=False)
    if content is not None:
        (jobs_dir / "job" / "ranks.json").write_bytes(content)
    found = recovery.job_processes(known)
    assert [rank.identity for rank in found.ranks] == [known.owner] and found.missing == 2


def test_ranks_from_before_a_restart_are_ignored(jobs_dir):
    """An old file names processes that are not this job's."""
    old = [RankRecord.of(rank, current_process()._replace(pid=100 + rank), 3) for rank in range(2)]
    publish(jobs_dir, old)
    known = publish(jobs_dir, [RankRecord.of(0, current_process(), None)], ranks_file_too=False)
    assert [rank.pid for rank in recovery.job_processes(known).ranks] == [os.getpid()]


def test_a_directory_that_is_gone(jobs_dir):
    """A job that ended since it was found has only the process of its record."""
    known = publish(jobs_dir, [RankRecord.of(0, current_process(), None)])
    for path in (jobs_dir / "job").iterdir():
        path.unlink()
    (jobs_dir / "job").rmdir()
    assert recovery.job_processes(known).owner == os.geteuid()


# Ranks...


def test_query_returns_what_the_job_answers(jobs_dir):
    """Rows are unchanged, but a silent or unknown rank whose process is proven to be gone is absent."""
    with ranks(WAITS, WAITS, WAITS) as ((alive, *dead), others):
        for each in dead:
            each.kill()
        answer = [row(0, "answering"), row(1), row(2), row(3, "unknown"), row(4, "ended"), row(5, "unknown")]
        with answering(jobs_dir, answer, others) as known:
            view = recovery.query(known, "ranks", 1.0)
        assert alive.popen.poll() is None
    assert [one["state"] for one in view.rows] == ["answering", "silent", "absent", "absent", "ended", "unknown"]
    assert view.problem is None and view.rows[0] == answer[0]


@pytest.mark.parametrize("rows", [None, {}, [1], [{}], [{"rank": "0"}], [{"rank": [0], "state": "silent"}]])
def test_an_answer_that_is_no_list_of_ranks(jobs_dir, rows):
    """Another program's answer is an error, and not shown."""
    with answering(jobs_dir, rows, []) as known, pytest.raises(InternalError):
        recovery.query(known, "ranks", 1.0)


def test_query_of_a_job_that_does_not_answer(jobs_dir, impatient):
    """Rank 0 holds the lock: the rows come from the records, in the shape of an answer, with the reason."""
    keeps = LISTENS.format(path=str(jobs_dir / "job" / "control.sock")) + KEEPS
    (jobs_dir / "job").mkdir(parents=True)
    with ranks(keeps, WAITS, WAITS) as ((_, _, dead), records):
        known = publish(jobs_dir, records)
        until(lambda: (jobs_dir / "job" / "control.sock").exists())
        dead.kill()
        view = recovery.query(known, "ranks", 0.1)
    assert isinstance(view.problem, JobNotAnswering)
    assert [(one["rank"], one["pid"], one["state"]) for one in view.rows] == [
        (0, records[0].pid, "silent"), (1, records[1].pid, "silent"), (2, records[2].pid, "absent"),
    ]  # fmt: skip
    assert {"step", "seconds_since_step", "rss_bytes", "device", "device_memory_bytes"} <= view.rows[0].keys()


def test_query_of_a_job_whose_rank_0_is_gone(jobs_dir):
    """The other ranks still hang, and are listed; when they are gone as well, the job is dead."""
    with ranks(WAITS, WAITS) as ((first, second), records):
        known = publish(jobs_dir, records)
        first.kill()
        view = recovery.query(known, "stacks", 1.0)
        assert isinstance(view.problem, JobDead)
        assert [one["state"] for one in view.rows] == ["absent", "silent"]
        second.kill()
        with pytest.raises(JobDead):
            recovery.query(known, "stacks", 1.0)


# Stacks...


def test_stacks_of_silent_and_unknown_ranks_are_read_from_outside(jobs_dir):
    """Waiting ranks write a Python dump; an answered stack stays; the other ranks are listed with the reason."""
    with ranks(WAITS, WAITS) as ((_, dead), others):
        far = RankRecord.of(3, current_process()._replace(host="another.example.org"), 5)
        none = RankRecord.of(4, current_process(), None)
        answer = [row(0, "answering", stacks="mine"), row(1, "unknown"), *map(row, range(2, 6)), row(6, "ended")]
        with answering(jobs_dir, answer, others) as known:
            rank_processes.write(str(jobs_dir / "job"), [*recovery.job_processes(known).ranks, far, none])
            view = recovery.query(known, "stacks", 1.0)
        dead.kill()
        rows, why = recovery.read_stacks(view)
        full, _ = recovery.read_stacks(view, internal=True)
    assert rows[0] == answer[0] and "MainThread" in rows[1]["stacks"] and rows[1]["state"] == "unknown"
    assert "forgather-stacks" in full[1]["stacks"] and "forgather-stacks" not in rows[1]["stacks"]
    assert [one["stacks"] for one in rows[2:]] == [None] * 5 and rows[2]["state"] == "absent"
    assert why.keys() == {2, 3, 4, 5}
    assert "gone" in why[2] and "another.example.org" in why[3] and "has no stack dumper" in why[4] and why[4] == why[5]


def test_stacks_of_ranks_that_hold_the_lock(jobs_dir, impatient):
    """All at the same time, so that none delays the others; afterwards they continue."""
    with ranks(KEEPS, KEEPS, KEEPS) as (processes, records):
        view = recovery.RankView([row(rank) for rank in range(3)], recovery.job_processes(publish(jobs_dir, records)))

        def read():
            rows, why = recovery.read_stacks(view)
            return all("most recent call first" in one["stacks"] for one in rows) and (rows, why)

        rows, why = until(read)
        assert all("in hold_the_lock_in_c" in one["stacks"] for one in rows) and why == {}
        for other in processes:
            other.say("go on")
            assert other.line() == "unhurt"


def test_without_silent_ranks_no_process_is_touched(jobs_dir):
    """Where all ranks have answered, no stacks are read."""
    found = recovery.job_processes(publish(jobs_dir, [RankRecord.of(0, current_process(), 5)]))
    rows = [row(0, "answering", stacks="x"), row(1, "ended")]
    assert recovery.read_stacks(recovery.RankView(rows, found)) == (rows, {})


# Ending processes...


def test_an_abort_that_works_kills_no_process(jobs_dir):
    """The job reaches its next step and ends by itself: the record is returned, and this process lives."""
    with running_loop() as run:
        end = recovery.abort(find("job"), SOON)
        assert end.record["state"] == "finished" and (end.problem, end.outcomes) == (None, [])
        run.thread.join(SOON)
        assert run.job.aborted


def test_a_job_that_reaches_no_further_step_is_ended(jobs_dir, impatient):
    """Rank 0 answers, the deadline passes: SIGTERM for all, SIGKILL for those that ignore it."""
    with ranks(WAITS, DEAF + WAITS, KEEPS) as (processes, records):
        assert processes[1].line() == "deaf"
        known = publish(jobs_dir, records)
        with serving(known.socket, lambda request, sink: (_ for _ in ()).throw(DeadlinePassed("not yet"))):
            end = recovery.abort(known, 0.05)
        assert isinstance(end.problem, DeadlinePassed) and end.record is None and end.missing == 0
        assert [one["outcome"] for one in end.outcomes] == ["ended", "killed", "ended"]
        assert [one["pid"] for one in end.outcomes] == [other.pid for other in processes]
        assert [other.popen.wait(SOON) for other in processes] == [-15, -9, -15]


#: A real job in a step that never ends. For each line it reads it loses control: commands fail, new ones are refused.
LOSES = """
import sys
from forgather_control import TrainingJob
with TrainingJob(job_id="job") as job:
    job.step(1)
    print("ready", flush=True)
    for line in sys.stdin:
        job._controller.agreement_lost("rank 1 is cut off")
        print("lost", flush=True)
"""


def test_a_job_that_refuses_the_command_is_ended(jobs_dir, impatient):
    """Training runs, but control is lost: the refusal is the reason, and the process is ended after the time given."""
    with Process(LOSES) as job:
        assert job.line() == "ready"
        job.say("lose")
        assert job.line() == "lost"
        result = recovery.abort(find("job"), 100 * MS)
        assert isinstance(result.problem, JobEnding) and "rank 1 is cut off" in str(result.problem)
        assert result.record is None and [one["outcome"] for one in result.outcomes] == ["ended"]
        assert [one["pid"] for one in result.outcomes] == [job.pid] and job.popen.wait(SOON) == -15


@pytest.mark.once
def test_a_job_that_fails_the_command_is_ended(jobs_dir, impatient):
    """The abort was accepted, then control is lost: its record ends as failed, and is the reason."""
    with Process(LOSES) as job:
        assert job.line() == "ready"
        results = []
        aborter = threading.Thread(target=lambda: results.append(recovery.abort(find("job"), SOON / 10)))
        aborter.start()
        until(lambda: api.get_job_status("job")["commands"])
        job.say("lose")
        aborter.join(SOON)
        (result,) = results
        assert isinstance(result.problem, CommandFailed) and result.problem.data["state"] == "failed"
        assert [one["outcome"] for one in result.outcomes] == ["ended"] and job.popen.wait(SOON) == -15


@pytest.mark.parametrize(
    "answer",
    [TooManyCommands("full"), InternalError("a bug"), NotAuthenticated("another job"), [], "nonsense"],
    ids=repr,
)
def test_a_job_is_ended_whatever_it_answers(jobs_dir, impatient, answer):
    """Any error, and any answer that is no record, is a reason."""

    def reply(*_):
        if isinstance(answer, Exception):
            raise answer
        return answer

    with ranks(WAITS) as ((process,), records), serving(publish(jobs_dir, records).socket, reply):
        result = recovery.abort(find("job"), 0.0)
        assert isinstance(result.problem, ControlError) and result.outcomes[0]["outcome"] == "ended"
        assert process.popen.wait(SOON) == -15


def test_a_job_that_ended_meanwhile_is_not_killed(jobs_dir, impatient):
    """It refuses the command because training ends: its process may have other work to do after that."""
    with ranks(WAITS) as ((process,), records):
        known = publish(jobs_dir, records)

        def refuse(*_):
            (jobs_dir / "job" / "endpoint.json").unlink()
            raise JobEnding("training has ended")

        with serving(known.socket, refuse), pytest.raises(JobEnding):
            recovery.abort(known, SOON)
        with pytest.raises(NoSuchJob):
            recovery.abort(known, SOON)
        assert judge(records[0].identity) == "running"
        process.say("go on")
        assert process.line() == "unhurt"


def test_a_job_that_does_not_answer_is_ended(jobs_dir, impatient):
    """Rank 0 holds the lock: the abort gets no answer, the signals work."""
    (jobs_dir / "job").mkdir(parents=True)
    keeps = LISTENS.format(path=str(jobs_dir / "job" / "control.sock")) + KEEPS
    with ranks(keeps, WAITS) as (processes, records):
        known = publish(jobs_dir, records)
        until(lambda: (jobs_dir / "job" / "control.sock").exists())
        end = recovery.abort(known, 0.05)
        assert isinstance(end.problem, JobNotAnswering)
        assert [one["outcome"] for one in end.outcomes] == ["ended", "ended"]
        assert [other.popen.wait(SOON) for other in processes] == [-15, -15]


def test_what_rank_0_left_behind_is_ended(jobs_dir, impatient):
    """Rank 0 was killed, the others hang: they have their time, then they are ended."""
    with ranks(WAITS, WAITS, WAITS) as (processes, records):
        known = publish(jobs_dir, records)
        processes[0].kill()
        leaves = threading.Timer(50 * MS, processes[1].say, ["go on"])
        leaves.start()
        end = recovery.abort(known, 300 * MS)
        assert [one["outcome"] for one in end.outcomes] == ["gone", "gone", "ended"]
        assert processes[1].end() == 0
        leaves.join(SOON)


def test_a_job_that_was_dead_before(jobs_dir):
    """Where no process was left to begin with, the error is that of any command."""
    with ranks(WAITS) as ((first,), records):
        known = publish(jobs_dir, records)
        first.kill()
        with pytest.raises(JobDead):
            recovery.abort(known, 1.0)
    (jobs_dir / "job" / "endpoint.json").unlink()
    with pytest.raises(NoSuchJob):
        recovery.abort(known, 1.0)


def test_only_recorded_processes_of_this_host_are_ended(jobs_dir, impatient):
    """A process with another start or host is spared, so are bystanders; missing processes are counted."""
    with ranks(WAITS, WAITS) as ((first, bystander), records):
        used_again = records[1]._replace(started_at=records[1].started_at - 100)
        far = RankRecord.of(2, records[1].identity._replace(host="another.example.org"), None)
        known = publish(jobs_dir, [records[0], used_again, far], world_size=5)
        end = recovery.abort(known, 0.0)
        assert [one["outcome"] for one in end.outcomes] == ["ended", "gone", "elsewhere"] and end.missing == 2
        assert first.popen.wait(SOON) == -15 and judge(records[1].identity) == "running"
        assert bystander.popen.poll() is None


@needs_root
def test_root_ends_no_other_users_process(jobs_dir, impatient):
    """A user's ranks.json names a process of root: an abort of that user's job by root spares it."""
    with ranks(WAITS) as ((first,), records):
        known = publish(jobs_dir, records)
        os.chown(jobs_dir / "job", 65534, 65534)
        assert [one["outcome"] for one in recovery.abort(known, 0.0).outcomes] == ["refused"]
        assert first.popen.poll() is None


def test_a_launcher_is_left_alone(jobs_dir, impatient):
    """The parent of the ranks, which is not recorded, sees its child end and continues."""
    source = """
    import json, subprocess, sys
    code = "import json, sys\\nfrom forgather_control.processes.liveness import current_process\\n"
    code += "print(json.dumps(current_process()._asdict()), flush=True)\\nsys.stdin.read()"
    one = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=sys.stdout)
    print(one.wait(), flush=True)
    sys.stdin.readline()
    """
    with Process(source) as launcher:
        identity = liveness.Identity(**json.loads(launcher.line()))
        end = recovery.abort(publish(jobs_dir, [RankRecord.of(0, identity, None)]), 0.0)
        assert [one["outcome"] for one in end.outcomes] == ["ended"]
        assert launcher.line() == str(-signal.SIGTERM) and launcher.popen.poll() is None
