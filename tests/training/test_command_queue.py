"""The command queue between two threads: every accepted command ends in exactly one state, whatever the race."""

from __future__ import annotations

import random
import sys
import threading
from collections import Counter

import pytest

from forgather_control.errors import (
    CommandFailed,
    CommandNotFound,
    ControlError,
    InvalidParams,
    JobEnding,
    NotCancellable,
    TooManyCommands,
)
from forgather_control.states import FINAL_STATES
from forgather_control.training import limits
from forgather_control.training.command_queue import CommandQueue, Submission
from forgather_control.training.limits import MAX_PENDING, MAX_RECORDS
from forgather_control.wire.records import CommandRecord, ScheduledCommand

from ..support.harness import SOON

NAMES = ("save_checkpoint", "graceful_stop", "save_and_stop", "abort")
ENDED = JobEnding("training ended")


@pytest.fixture
def changes():
    """The records that ``on_change`` was called with, as (id, state)."""
    return []


@pytest.fixture
def queue(changes):
    """A queue that notes its changes."""
    return CommandQueue(lambda record: changes.append((record.command_id, record.state)))


def states(queue):
    return {record.command_id: record.state for record in queue.records()}


# A life...


def test_whole_life(queue, changes):
    """A save is accepted, drained, applied at its step, finished with its result; each change is published."""
    record = queue.submit("save_checkpoint", "id")
    assert (record, queue.pending) == (CommandRecord("id", "save_checkpoint", "accepted", record.requested_at), True)
    assert (queue.drain(), queue.pending, queue.drain()) == ([record], False, [])
    queue.applied("id", 7)
    applied = queue.get("id")
    queue.finished("id", {"path": "p"})
    finished = queue.get("id")
    assert (applied.state, applied.applied_at_step, applied.finished_at) == ("applied", 7, None)
    assert (finished.state, finished.applied_at_step, finished.result) == ("finished", 7, {"path": "p"})
    assert finished.error is None
    assert finished.finished_at >= finished.requested_at == record.requested_at
    assert changes == [("id", "accepted"), ("id", "applied"), ("id", "finished")] and queue.changes == 3


def test_failure_says_why(queue):
    """A failed command keeps the error's code and message, and what was done of it."""
    queue.submit("save_and_stop", "id")
    queue.drain()
    queue.applied("id", 3)
    queue.failed("id", CommandFailed("disk full", path="x"), {"step": 3})
    record = queue.get("id")
    assert (record.state, record.error) == ("failed", {"code": -32002, "message": "disk full"})
    assert (record.result, record.applied_at_step) == ({"step": 3}, 3)


@pytest.mark.parametrize("late", ["applied", "finished", "failed", "close"])
@pytest.mark.parametrize("end", ["finished", "failed", "cancelled", "closed"])
def test_what_is_over_stays(queue, end, late):
    """A final state never changes: what a client has read stays true."""
    queue.submit("abort", "id")
    if end == "cancelled":
        queue.cancel("id")
    elif end == "closed":
        queue.close(ENDED)
    else:
        queue.drain()
        queue.finished("id", None) if end == "finished" else queue.failed("id", ENDED)
    told = queue.get("id")
    assert told.is_final
    {
        "applied": lambda: queue.applied("id", 9),
        "finished": lambda: queue.finished("id", {"step": 9}),
        "failed": lambda: queue.failed("id", CommandFailed("again")),
        "close": lambda: queue.close(JobEnding("again")),
    }[late]()
    assert queue.get("id") == told


def test_order(queue):
    """Commands are applied in the order they came, cancelled ones left out."""
    for name in "abcde":
        queue.submit("abort", name)
    queue.cancel("c")
    assert [record.command_id for record in queue.drain()] == list("abde")


# The same command twice...


def test_equal_pending_commands_share_a_record(queue):
    """Two thousand saves without an id are one save."""
    first = queue.submit("save_checkpoint", None)
    assert all(queue.submit("save_checkpoint", None) is first for _ in range(2000))
    other = queue.submit("abort", None)
    assert queue.drain() == [first, other]
    assert queue.submit("save_checkpoint", None).command_id != first.command_id, "what is taken is another save"


def test_coalescing_takes_one_with_an_id(queue):
    """Without an id, an equal pending command is the answer, also one with an id; with a new id it is not."""
    named = queue.submit("abort", "mine")
    assert queue.submit("abort", None) is named
    assert queue.submit("abort", "yours") is not named
    assert len(queue.drain()) == 2


@pytest.mark.parametrize("stage", ["accepted", "drained", "applied", "finished", "cancelled", "closed"])
def test_same_id_is_the_same_command(queue, stage):
    """A repeated id answers the record as it is now, at any stage of its life, after the end as well."""
    queue.submit("abort", "id")
    if stage == "cancelled":
        queue.cancel("id")
    elif stage != "accepted":
        queue.drain()
        if stage in ("applied", "finished"):
            queue.applied("id", 1)
        if stage == "finished":
            queue.finished("id", None)
        if stage == "closed":
            queue.close(ENDED)
    pending = queue.pending
    assert queue.submit("abort", "id") == queue.get("id")
    assert (len(queue.records()), queue.pending) == (1, pending)
    with pytest.raises(InvalidParams, match="belongs to a abort") as caught:
        queue.submit("graceful_stop", "id")
    assert caught.value.data == {"parameter": "command_id"}


# Taking back...


def test_cancel(queue, changes):
    """A cancelled command is over, is never drained, and its waiter is woken."""
    queue.submit("abort", "a")
    queue.submit("save_checkpoint", "b")
    record = queue.cancel("a")
    assert (record.state, record.error, record.finished_at >= record.requested_at) == ("cancelled", None, True)
    assert queue.pending and changes[-1] == ("a", "cancelled")
    queue.cancel("b")
    assert not queue.pending and queue.drain() == []


@pytest.mark.parametrize("stage", ["drained", "applied", "finished", "cancelled"])
def test_too_late_to_cancel(queue, stage):
    """What left the queue cannot be taken back; the error holds the record."""
    queue.submit("abort", "id")
    if stage == "cancelled":
        queue.cancel("id")
    else:
        queue.drain()
        if stage == "applied":
            queue.applied("id", 1)
        elif stage == "finished":
            queue.finished("id", None)
    before = queue.get("id")
    with pytest.raises(NotCancellable) as caught:
        queue.cancel("id")
    assert caught.value.data == before.to_json() and queue.get("id") == before
    assert caught.value.message == f"the abort is {'being applied' if stage == 'drained' else f'{stage} already'}"


@pytest.mark.parametrize("ask", ["get", "cancel"])
@pytest.mark.parametrize("command_id", ["", "unknown", "\x1b[2J", "x" * 10_000])
def test_unknown_id(queue, ask, command_id):
    """An unknown id is an error that can be shown."""
    with pytest.raises(CommandNotFound) as caught:
        getattr(queue, ask)(command_id)
    assert caught.value.message.isprintable() and len(caught.value.message) < 600


# Bounds...


def test_bound_of_unfinished_commands(queue):
    """Of one command only so many may be open; the next is refused and leaves no trace."""
    for number in range(MAX_PENDING):
        queue.submit("save_checkpoint", f"{number}")
    assert len(queue.drain()) == MAX_PENDING
    for _ in range(3):
        with pytest.raises(TooManyCommands) as caught:
            queue.submit("save_checkpoint", "one more")
    assert caught.value.data == {"limit": MAX_PENDING}
    assert len(queue.records()) == MAX_PENDING and not queue.pending
    assert queue.submit("save_checkpoint", "3").command_id == "3", "a known id is no new command"
    queue.finished("0", None)
    assert queue.submit("save_checkpoint", "one more").state == "accepted"


def test_saves_do_not_keep_an_abort_out(queue):
    """A loop that never saves can still be stopped, however many saves are open."""
    for name in NAMES:
        for number in range(MAX_PENDING):
            queue.submit(name, f"{name}{number}")
            queue.drain()
        with pytest.raises(TooManyCommands):
            queue.submit(name, None)
    assert len(queue.records()) == len(NAMES) * MAX_PENDING <= MAX_RECORDS


def test_bound_of_records(queue):
    """Old records go, finished ones first and the oldest of them first; those that are not over stay."""
    queue.submit("abort", "applied")
    queue.drain()
    queue.applied("applied", 1)
    queue.submit("abort", "pending")
    for number in range(3 * MAX_RECORDS):
        queue.submit("save_checkpoint", f"{number}")
        queue.cancel(f"{number}")
        assert len(queue.records()) <= MAX_RECORDS
    last = [f"{number}" for number in range(2 * MAX_RECORDS + 2, 3 * MAX_RECORDS)]
    assert list(states(queue)) == ["applied", "pending", *last]
    with pytest.raises(CommandNotFound, match="no record of command"):
        queue.get("0")


# The end...


def test_close_fails_what_is_left(queue, changes):
    """Pending and applied commands fail with the reason; what was over is untouched; all waiters are woken."""
    for name in ("pending", "drained", "applied", "finished", "cancelled"):
        queue.submit("abort", name)
        if name == "cancelled":
            queue.cancel(name)
        elif name != "pending":
            queue.drain()
    queue.submit("abort", "pending")
    queue.applied("applied", 4)
    queue.finished("finished", None)
    changes.clear()
    queue.close(ENDED)
    assert states(queue) == dict.fromkeys(["pending", "drained", "applied"], "failed") | {
        "finished": "finished",
        "cancelled": "cancelled",
    }
    assert queue.get("applied").applied_at_step == 4
    assert queue.get("pending").error == {"code": JobEnding.code, "message": "training ended"}
    assert not queue.pending and queue.drain() == []
    assert sorted(changes) == [(name, "failed") for name in ("applied", "drained", "pending")]


def scheduled(*command_ids):
    """Commands as the ranks got them."""
    return [ScheduledCommand(command_id, "abort", {}) for command_id in command_ids]


def test_put_back_stands_before_what_came_meanwhile(queue, changes):
    """A round that was off loses nothing, keeps the order, and what is queued again can be cancelled again."""
    for name in "ab":
        queue.submit("save_checkpoint", name)
    queue.drain()
    queue.submit("abort", "c")
    queue.put_back(scheduled("a", "b"))
    assert queue.pending and states(queue) == dict.fromkeys("abc", "accepted")
    assert queue.cancel("a").state == "cancelled"
    assert [record.command_id for record in queue.drain()] == ["b", "c"]


def test_refused_queue_fails_what_is_queued_and_leaves_what_is_on_its_way(queue, changes):
    """Commands that ranks agreed on are finished; those that are put back after that fail at once."""
    for name in "ab":
        queue.submit("save_checkpoint", name)
        queue.drain()
    queue.submit("abort", "c")
    queue.close(ENDED, pending_only=True)
    assert states(queue) == {"a": "accepted", "b": "accepted", "c": "failed"} and not queue.pending
    with pytest.raises(JobEnding, match="training ended"):
        queue.submit("abort", "d")
    queue.put_back(scheduled("a"))
    assert states(queue) == {"a": "failed", "b": "accepted", "c": "failed"} and not queue.pending
    queue.applied("b", 3)
    queue.finished("b", None)
    queue.close(JobEnding("again"), pending_only=True)
    assert queue.get("b").state == "finished" and queue.get("c").error["message"] == "training ended"


def test_put_back_of_what_failed_meanwhile(queue, changes):
    """Commands that a closed queue has failed do not fail a second time."""
    queue.submit("abort", "a")
    queue.drain()
    queue.close(ENDED)
    queue.put_back(scheduled("a"))
    assert queue.get("a").state == "failed" and not queue.pending


@pytest.mark.parametrize("error", [ENDED, JobEnding("x", step=3), ControlError("the thread died", a=1)], ids=repr)
def test_closed_queue_refuses(queue, error):
    """After the end each submit is refused as JobEnding with the first reason, each time a fresh exception."""
    queue.close(error)
    queue.close(JobEnding("second"))
    caught = []
    for _ in range(50):
        with pytest.raises(JobEnding, match=error.message) as refused:
            queue.submit("abort", None)
        caught.append(refused.value)
    depths = {sum(1 for _ in _frames(err.__traceback__)) for err in caught}
    assert len(depths) == 1, "one exception raised again and again keeps every frame it passed"
    assert len({id(err) for err in caught}) == 50 and queue.records() == []


def _frames(traceback):
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


# Races...


def test_lock_is_held(queue):
    """Every operation holds the lock when it touches the records or the queue (a race would show it too seldom)."""

    def guarded(base, names):
        def guard(name):
            def call(self, *args):
                assert queue._lock.locked(), name
                return getattr(base, name)(self, *args)

            return call

        return type("Guarded", (base,), {name: guard(name) for name in names})()

    queue._records = guarded(dict, ["get", "values", "__getitem__", "__setitem__", "__contains__", "__len__"])
    queue._pending = guarded(list, ["append", "clear", "remove", "__contains__", "__iter__", "__len__"])
    for name in "abc":
        queue.submit("abort", name)
    queue.submit("abort", None)
    queue.cancel("a")
    assert queue.get("a").state == "cancelled"
    assert [record.command_id for record in queue.drain()] == ["b", "c"]
    queue.applied("b", 1)
    queue.finished("b", None)
    queue.failed("c", ENDED)
    queue.close(ENDED)
    assert len(queue.records()) == 3


def together(*works):
    """Run the functions in threads that start at once; fails on the first exception, or if one hangs."""
    barrier, failures = threading.Barrier(len(works)), []

    def run(work):
        try:
            barrier.wait(SOON)
            work()
        except BaseException as err:
            failures.append(err)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert not failures, failures
    assert not any(thread.is_alive() for thread in threads)


@pytest.fixture
def hurry():
    """Threads are switched a thousand times as often, so that a race has its chance."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("seed", range(12))
def test_race(hurry, seed):
    """Submit, cancel, drain and close at once: each accepted command has one last state, and each refusal none."""
    transitions, lock = [], threading.Lock()
    queue = CommandQueue(lambda record: None)
    put = queue._put

    def spy(record, **changes):
        with lock:
            before = queue._records.get(record.command_id)
            after = record._replace(**changes)
            transitions.append((record.command_id, before.state if before else None, after.state))
        return put(record, **changes)

    queue._put = spy
    accepted, refused, cancelled, drained = [], [], [], []
    closed = threading.Event()

    def submitter(index):
        rng = random.Random(seed * 10 + index)
        for number in range(60):
            command_id = None if rng.random() < 0.2 else f"{index}-{number}"
            try:
                accepted.append(queue.submit(rng.choice(NAMES), command_id).command_id)
            except (TooManyCommands, JobEnding):
                refused.append(command_id)
            if accepted and rng.random() < 0.4:
                victim = rng.choice(accepted)
                try:
                    cancelled.append(queue.cancel(victim).command_id)
                except (NotCancellable, CommandNotFound):
                    pass

    def trainer():
        rng, step = random.Random(seed), 0
        while not closed.is_set():
            step += 1
            for record in queue.drain() if queue.pending else ():
                drained.append(record.command_id)
                queue.applied(record.command_id, step)
                if rng.random() < 0.5:
                    queue.finished(record.command_id, {"step": step})
                elif rng.random() < 0.5:
                    queue.failed(record.command_id, CommandFailed("no"))

    def closer():
        if seed % 3:
            while len(drained) < 20 * (seed % 3) and len(accepted) + len(refused) < 100:
                pass
            queue.close(ENDED)
        closed.set()

    works = [lambda: submitter(1), lambda: submitter(2), trainer]
    if seed % 3:
        together(*works, closer)
    else:  # the trainer works to the end; what it left over is closed afterwards
        count, done = 2, threading.Lock()

        def counted(index):
            nonlocal count
            submitter(index)
            with done:
                count -= 1
                if not count:
                    closed.set()

        together(lambda: counted(1), lambda: counted(2), trainer)
    queue.close(ENDED)

    ends = Counter(command_id for command_id, _, after in transitions if after in FINAL_STATES)
    assert ends == Counter(set(accepted)), "each accepted command ends, and once"
    assert not any(before in FINAL_STATES for _, before, _ in transitions)
    assert not set(refused) & set(accepted) - {None}
    assert len(drained) == len(set(drained)) and not set(drained) & set(cancelled)
    assert len(cancelled) == len(set(cancelled))
    assert all(record.is_final for record in queue.records()) and len(queue.records()) <= MAX_RECORDS
    assert not queue.pending and queue.drain() == []


def test_race_of_submit_and_close(hurry):
    """A command that meets the end is either refused or failed: never accepted and forgotten."""
    outcomes = Counter()
    for number in range(300):
        queue = CommandQueue(lambda record: None)

        def submit(queue=queue):
            try:
                outcome = queue.submit("abort", "id").state
            except JobEnding:
                outcome = "refused"
            outcomes[outcome] += 1

        def close(queue=queue):
            queue.close(ENDED)

        together(*((submit, close) if number % 2 else (close, submit)))
        assert set(states(queue).values()) <= {"failed"} and not queue.pending
    assert sum(outcomes.values()) == 300 and outcomes.keys() <= {"accepted", "refused"}


def test_race_for_one_id(hurry):
    """Eight callers with one id, or without one, start one command."""
    for command_id in ["id", None] * 20:
        queue, found = CommandQueue(lambda record: None), []
        together(*[lambda: found.append(queue.submit("abort", command_id))] * 8)  # noqa: B023  they end in this round
        assert len({record.command_id for record in found}) == 1 == len(queue.drain())


def test_a_record_keeps_who_asked_for_what_and_why(queue):
    """Parameters, reason and caller are in the record from the start."""
    by = {"via": "socket", "uid": 1000, "user": "alice", "pid": 7, "program": "python"}
    record = queue.submit("save_checkpoint", None, {"evaluate": False}, "before maintenance", by)
    assert (record.params, record.reason, record.requested_by) == ({"evaluate": False}, "before maintenance", by)


def test_equal_pending_commands_have_equal_parameters(queue):
    """Without an id a pending command is shared only by one with the same parameters."""
    first = queue.submit("save_checkpoint", None, {"evaluate": "auto"})
    assert queue.submit("save_checkpoint", None, {"evaluate": "auto"}).command_id == first.command_id
    assert queue.submit("save_checkpoint", None, {"evaluate": False}).command_id != first.command_id


def test_one_id_is_one_command_with_its_parameters(queue):
    """The same id with other parameters is refused, and nothing is queued."""
    queue.submit("save_checkpoint", "id", {"evaluate": "auto"})
    with pytest.raises(InvalidParams, match="with other parameters"):
        queue.submit("save_checkpoint", "id", {"evaluate": False})
    assert len(queue.records()) == 1


def test_commands_that_are_accepted_together(monkeypatch):
    """Equal ones have records of their own; one that is refused keeps no other out; none is taken before the last."""
    queue = CommandQueue(lambda record: found.append(queue._lock.locked()))
    found: list[bool] = []
    monkeypatch.setattr(limits, "MAX_PENDING", 2)
    wanted = [Submission(name, {}, "why", {"via": "rule"}) for name in ("abort", "abort", "abort", "save_checkpoint")]
    first, second, refused, other = queue.submit_all(wanted)
    assert first.command_id != second.command_id and (first.reason, first.requested_by) == ("why", {"via": "rule"})
    assert isinstance(refused, TooManyCommands) and other.command == "save_checkpoint"
    assert [record.command for record in queue.drain()] == ["abort", "abort", "save_checkpoint"]
    assert found == [True] * 3
    queue.close(JobEnding("it is over"))
    assert [type(each) for each in queue.submit_all(wanted[:2])] == [JobEnding] * 2
