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
from forgather_control.training.command_queue import CommandQueue
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
def box(changes):
    """A queue that notes its changes."""
    return CommandQueue(lambda record: changes.append((record.command_id, record.state)))


def states(box):
    return {record.command_id: record.state for record in box.records()}


# A life...


def test_whole_life(box, changes):
    """A save is accepted, drained, applied at its step, finished with its result; each move is told."""
    record = box.submit("save_checkpoint", "id")
    assert (record, box.pending) == (CommandRecord("id", "save_checkpoint", "accepted", record.requested_at), True)
    assert (box.drain(), box.pending, box.drain()) == ([record], False, [])
    box.applied("id", 7)
    applied = box.get("id")
    box.finished("id", {"path": "p"})
    finished = box.get("id")
    assert (applied.state, applied.applied_at_step, applied.finished_at) == ("applied", 7, None)
    assert (finished.state, finished.applied_at_step, finished.result) == ("finished", 7, {"path": "p"})
    assert finished.error is None
    assert finished.finished_at >= finished.requested_at == record.requested_at
    assert changes == [("id", "accepted"), ("id", "applied"), ("id", "finished")]


def test_failure_says_why(box):
    """A failed command keeps the error's code and message, and what was done of it."""
    box.submit("save_and_stop", "id")
    box.drain()
    box.applied("id", 3)
    box.failed("id", CommandFailed("disk full", path="x"), {"step": 3})
    record = box.get("id")
    assert (record.state, record.error) == ("failed", {"code": -32002, "message": "disk full"})
    assert (record.result, record.applied_at_step) == ({"step": 3}, 3)


@pytest.mark.parametrize("late", ["applied", "finished", "failed", "close"])
@pytest.mark.parametrize("end", ["finished", "failed", "cancelled", "closed"])
def test_what_is_over_stays(box, end, late):
    """No later word changes a final state: what a client was told stays true."""
    box.submit("abort", "id")
    if end == "cancelled":
        box.cancel("id")
    elif end == "closed":
        box.close(ENDED)
    else:
        box.drain()
        box.finished("id", None) if end == "finished" else box.failed("id", ENDED)
    told = box.get("id")
    assert told.is_final
    {
        "applied": lambda: box.applied("id", 9),
        "finished": lambda: box.finished("id", {"step": 9}),
        "failed": lambda: box.failed("id", CommandFailed("again")),
        "close": lambda: box.close(JobEnding("again")),
    }[late]()
    assert box.get("id") == told


def test_order(box):
    """Commands are applied in the order they came, cancelled ones left out."""
    for name in "abcde":
        box.submit("abort", name)
    box.cancel("c")
    assert [record.command_id for record in box.drain()] == list("abde")


# The same command twice...


def test_equal_pending_commands_share_a_record(box):
    """Two thousand saves without an id are one save."""
    first = box.submit("save_checkpoint", None)
    assert all(box.submit("save_checkpoint", None) is first for _ in range(2000))
    other = box.submit("abort", None)
    assert box.drain() == [first, other]
    assert box.submit("save_checkpoint", None).command_id != first.command_id, "what is taken is another save"


def test_coalescing_takes_one_with_an_id(box):
    """Without an id, an equal pending command is the answer, whoever named it; with a new id it is not."""
    named = box.submit("abort", "mine")
    assert box.submit("abort", None) is named
    assert box.submit("abort", "yours") is not named
    assert len(box.drain()) == 2


@pytest.mark.parametrize("stage", ["accepted", "drained", "applied", "finished", "cancelled", "closed"])
def test_same_id_is_the_same_command(box, stage):
    """A repeated id answers the record as it is now, at any stage of its life, after the end as well."""
    box.submit("abort", "id")
    if stage == "cancelled":
        box.cancel("id")
    elif stage != "accepted":
        box.drain()
        if stage in ("applied", "finished"):
            box.applied("id", 1)
        if stage == "finished":
            box.finished("id", None)
        if stage == "closed":
            box.close(ENDED)
    pending = box.pending
    assert box.submit("abort", "id") == box.get("id")
    assert (len(box.records()), box.pending) == (1, pending)
    with pytest.raises(InvalidParams, match="belongs to a abort") as caught:
        box.submit("graceful_stop", "id")
    assert caught.value.data == {"parameter": "command_id"}


# Taking back...


def test_cancel(box, changes):
    """A cancelled command is over, is never drained, and its waiter is woken."""
    box.submit("abort", "a")
    box.submit("save_checkpoint", "b")
    record = box.cancel("a")
    assert (record.state, record.error, record.finished_at >= record.requested_at) == ("cancelled", None, True)
    assert box.pending and changes[-1] == ("a", "cancelled")
    box.cancel("b")
    assert not box.pending and box.drain() == []


@pytest.mark.parametrize("stage", ["drained", "applied", "finished", "cancelled"])
def test_too_late_to_cancel(box, stage):
    """What left the queue cannot be taken back; the error holds the record."""
    box.submit("abort", "id")
    if stage == "cancelled":
        box.cancel("id")
    else:
        box.drain()
        if stage == "applied":
            box.applied("id", 1)
        elif stage == "finished":
            box.finished("id", None)
    before = box.get("id")
    with pytest.raises(NotCancellable) as caught:
        box.cancel("id")
    assert caught.value.data == before.to_json() and box.get("id") == before


@pytest.mark.parametrize("ask", ["get", "cancel"])
@pytest.mark.parametrize("command_id", ["", "nobody", "\x1b[2J", "x" * 10_000])
def test_unknown_id(box, ask, command_id):
    """An id that nobody knows is an error that can be shown."""
    with pytest.raises(CommandNotFound) as caught:
        getattr(box, ask)(command_id)
    assert caught.value.message.isprintable() and len(caught.value.message) < 600


# Bounds...


def test_bound_of_unfinished_commands(box):
    """Of one command only so many may be open; the next is refused and leaves no trace."""
    for number in range(MAX_PENDING):
        box.submit("save_checkpoint", f"{number}")
    assert len(box.drain()) == MAX_PENDING
    for _ in range(3):
        with pytest.raises(TooManyCommands) as caught:
            box.submit("save_checkpoint", "one more")
    assert caught.value.data == {"limit": MAX_PENDING}
    assert len(box.records()) == MAX_PENDING and not box.pending
    assert box.submit("save_checkpoint", "3").command_id == "3", "a known id is no new command"
    box.finished("0", None)
    assert box.submit("save_checkpoint", "one more").state == "accepted"


def test_saves_do_not_keep_an_abort_out(box):
    """A loop that never saves can still be stopped, however many saves are open."""
    for name in NAMES:
        for number in range(MAX_PENDING):
            box.submit(name, f"{name}{number}")
            box.drain()
        with pytest.raises(TooManyCommands):
            box.submit(name, None)
    assert len(box.records()) == len(NAMES) * MAX_PENDING <= MAX_RECORDS


def test_bound_of_records(box):
    """Old records go, finished ones first and the oldest of them first; those that are not over stay."""
    box.submit("abort", "applied")
    box.drain()
    box.applied("applied", 1)
    box.submit("abort", "pending")
    for number in range(3 * MAX_RECORDS):
        box.submit("save_checkpoint", f"{number}")
        box.cancel(f"{number}")
        assert len(box.records()) <= MAX_RECORDS
    last = [f"{number}" for number in range(2 * MAX_RECORDS + 2, 3 * MAX_RECORDS)]
    assert list(states(box)) == ["applied", "pending", *last]
    with pytest.raises(CommandNotFound, match="no record of command"):
        box.get("0")


# The end...


def test_close_fails_what_is_left(box, changes):
    """Pending and applied commands fail with the reason; what was over is untouched; all waiters are woken."""
    for name in ("pending", "drained", "applied", "finished", "cancelled"):
        box.submit("abort", name)
        if name == "cancelled":
            box.cancel(name)
        elif name != "pending":
            box.drain()
    box.submit("abort", "pending")
    box.applied("applied", 4)
    box.finished("finished", None)
    changes.clear()
    box.close(ENDED)
    assert states(box) == dict.fromkeys(["pending", "drained", "applied"], "failed") | {
        "finished": "finished",
        "cancelled": "cancelled",
    }
    assert box.get("applied").applied_at_step == 4
    assert box.get("pending").error == {"code": JobEnding.code, "message": "training ended"}
    assert not box.pending and box.drain() == []
    assert sorted(changes) == [(name, "failed") for name in ("applied", "drained", "pending")]


def scheduled(*command_ids):
    """Commands as the ranks got them."""
    return [ScheduledCommand(command_id, "abort", {}) for command_id in command_ids]


def test_put_back_stands_before_what_came_meanwhile(box, changes):
    """A round that was off loses nothing, keeps the order, and what is queued again can be cancelled again."""
    for name in "ab":
        box.submit("save_checkpoint", name)
    box.drain()
    box.submit("abort", "c")
    box.put_back(scheduled("a", "b"))
    assert box.pending and states(box) == dict.fromkeys("abc", "accepted")
    assert box.cancel("a").state == "cancelled"
    assert [record.command_id for record in box.drain()] == ["b", "c"]


def test_refused_box_fails_what_is_queued_and_leaves_what_is_on_its_way(box, changes):
    """What ranks have agreed on goes on to its end; what is put back after that fails at once."""
    for name in "ab":
        box.submit("save_checkpoint", name)
        box.drain()
    box.submit("abort", "c")
    box.close(ENDED, pending_only=True)
    assert states(box) == {"a": "accepted", "b": "accepted", "c": "failed"} and not box.pending
    with pytest.raises(JobEnding, match="training ended"):
        box.submit("abort", "d")
    box.put_back(scheduled("a"))
    assert states(box) == {"a": "failed", "b": "accepted", "c": "failed"} and not box.pending
    box.applied("b", 3)
    box.finished("b", None)
    box.close(JobEnding("again"), pending_only=True)
    assert box.get("b").state == "finished" and box.get("c").error["message"] == "training ended"


def test_put_back_of_what_failed_meanwhile(box, changes):
    """A box that closed has told them their end; they are not told another."""
    box.submit("abort", "a")
    box.drain()
    box.close(ENDED)
    box.put_back(scheduled("a"))
    assert box.get("a").state == "failed" and not box.pending


@pytest.mark.parametrize("error", [ENDED, JobEnding("x", step=3), ControlError("the thread died", a=1)], ids=repr)
def test_closed_box_refuses(box, error):
    """After the end each submit is refused as JobEnding with the first reason, each time a fresh exception."""
    box.close(error)
    box.close(JobEnding("second"))
    caught = []
    for _ in range(50):
        with pytest.raises(JobEnding, match=error.message) as refused:
            box.submit("abort", None)
        caught.append(refused.value)
    depths = {sum(1 for _ in _frames(err.__traceback__)) for err in caught}
    assert len(depths) == 1, "one exception raised again and again keeps every frame it passed"
    assert len({id(err) for err in caught}) == 50 and box.records() == []


def _frames(traceback):
    while traceback is not None:
        yield traceback.tb_frame
        traceback = traceback.tb_next


# Races...


def test_lock_is_held(box):
    """Every operation holds the lock when it touches the records or the queue (a race would show it too seldom)."""

    def guarded(base, names):
        def guard(name):
            def call(self, *args):
                assert box._lock.locked(), name
                return getattr(base, name)(self, *args)

            return call

        return type("Guarded", (base,), {name: guard(name) for name in names})()

    box._records = guarded(dict, ["get", "values", "__getitem__", "__setitem__", "__contains__", "__len__"])
    box._pending = guarded(list, ["append", "clear", "remove", "__contains__", "__iter__", "__len__"])
    for name in "abc":
        box.submit("abort", name)
    box.submit("abort", None)
    box.cancel("a")
    assert box.get("a").state == "cancelled"
    assert [record.command_id for record in box.drain()] == ["b", "c"]
    box.applied("b", 1)
    box.finished("b", None)
    box.failed("c", ENDED)
    box.close(ENDED)
    assert len(box.records()) == 3


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
    box = CommandQueue(lambda record: None)
    put = box._put

    def spy(record, **changes):
        with lock:
            before = box._records.get(record.command_id)
            after = record._replace(**changes)
            transitions.append((record.command_id, before.state if before else None, after.state))
        return put(record, **changes)

    box._put = spy
    accepted, refused, cancelled, drained = [], [], [], []
    closed = threading.Event()

    def submitter(who):
        rng = random.Random(seed * 10 + who)
        for number in range(60):
            command_id = None if rng.random() < 0.2 else f"{who}-{number}"
            try:
                accepted.append(box.submit(rng.choice(NAMES), command_id).command_id)
            except (TooManyCommands, JobEnding):
                refused.append(command_id)
            if accepted and rng.random() < 0.4:
                victim = rng.choice(accepted)
                try:
                    cancelled.append(box.cancel(victim).command_id)
                except (NotCancellable, CommandNotFound):
                    pass

    def trainer():
        rng, step = random.Random(seed), 0
        while not closed.is_set():
            step += 1
            for record in box.drain() if box.pending else ():
                drained.append(record.command_id)
                box.applied(record.command_id, step)
                if rng.random() < 0.5:
                    box.finished(record.command_id, {"step": step})
                elif rng.random() < 0.5:
                    box.failed(record.command_id, CommandFailed("no"))

    def closer():
        if seed % 3:
            while len(drained) < 20 * (seed % 3) and len(accepted) + len(refused) < 100:
                pass
            box.close(ENDED)
        closed.set()

    works = [lambda: submitter(1), lambda: submitter(2), trainer]
    if seed % 3:
        together(*works, closer)
    else:  # the trainer works to the end; what it left over is closed afterwards
        count, done = 2, threading.Lock()

        def counted(who):
            nonlocal count
            submitter(who)
            with done:
                count -= 1
                if not count:
                    closed.set()

        together(lambda: counted(1), lambda: counted(2), trainer)
    box.close(ENDED)

    ends = Counter(command_id for command_id, _, after in transitions if after in FINAL_STATES)
    assert ends == Counter(set(accepted)), "each accepted command ends, and once"
    assert not any(before in FINAL_STATES for _, before, _ in transitions)
    assert not set(refused) & set(accepted) - {None}
    assert len(drained) == len(set(drained)) and not set(drained) & set(cancelled)
    assert len(cancelled) == len(set(cancelled))
    assert all(record.is_final for record in box.records()) and len(box.records()) <= MAX_RECORDS
    assert not box.pending and box.drain() == []


def test_race_of_submit_and_close(hurry):
    """A command that meets the end is either refused or failed: never accepted and forgotten."""
    outcomes = Counter()
    for number in range(300):
        box = CommandQueue(lambda record: None)

        def submit(box=box):
            try:
                outcome = box.submit("abort", "id").state
            except JobEnding:
                outcome = "refused"
            outcomes[outcome] += 1

        def close(box=box):
            box.close(ENDED)

        together(*((submit, close) if number % 2 else (close, submit)))
        assert set(states(box).values()) <= {"failed"} and not box.pending
    assert sum(outcomes.values()) == 300 and outcomes.keys() <= {"accepted", "refused"}


def test_race_for_one_id(hurry):
    """Eight callers with one id, or without one, start one command."""
    for command_id in ["id", None] * 20:
        box, found = CommandQueue(lambda record: None), []
        together(*[lambda: found.append(box.submit("abort", command_id))] * 8)  # noqa: B023  they end in this round
        assert len({record.command_id for record in found}) == 1 == len(box.drain())


def test_a_record_keeps_who_asked_for_what_and_why(box):
    """Parameters, reason and caller are in the record from the start."""
    by = {"via": "socket", "uid": 1000, "user": "alice", "pid": 7, "program": "python"}
    record = box.submit("save_checkpoint", None, {"evaluate": False}, "before maintenance", by)
    assert (record.params, record.reason, record.requested_by) == ({"evaluate": False}, "before maintenance", by)


def test_equal_pending_commands_have_equal_parameters(box):
    """Without an id a pending command is shared only by one with the same parameters."""
    first = box.submit("save_checkpoint", None, {"evaluate": "auto"})
    assert box.submit("save_checkpoint", None, {"evaluate": "auto"}).command_id == first.command_id
    assert box.submit("save_checkpoint", None, {"evaluate": False}).command_id != first.command_id


def test_one_id_is_one_command_with_its_parameters(box):
    """The same id with other parameters is refused, and nothing is queued."""
    box.submit("save_checkpoint", "id", {"evaluate": "auto"})
    with pytest.raises(InvalidParams, match="with other parameters"):
        box.submit("save_checkpoint", "id", {"evaluate": False})
    assert len(box.records()) == 1
