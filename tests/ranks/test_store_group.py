"""Several ranks on one store, in threads of one process; and once on a process group of gloo."""

from __future__ import annotations

import gc
import itertools
import json
import logging
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from forgather_control.errors import JobEnding
from forgather_control.ranks import failures, keys, limits
from forgather_control.ranks.channel import StoreSender
from forgather_control.ranks.coordinator_group import CoordinatorGroup
from forgather_control.ranks.store_group import StoreGroup
from forgather_control.wire.records import Outcome, ScheduledCommand

from ..support.harness import MS, SOON, needs_torch, until
from ..support.ranks_delegate import ATOMIC, REPORTED, Delegate, Record
from ..support.ranks_groups import connector, run_ranks
from .test_poll import check_outcomes

# torch asks the name server for the name of 127.0.0.1 at each connection; a slow refusal costs seconds.
os.environ.setdefault("RES_OPTIONS", "attempts:0")

#: Seeded runs of real threads; each takes some tens of milliseconds.
THREAD_RUNS = int(os.environ.get("RANKS_RUNS", "12"))

STOPS = ("save_and_stop", "graceful_stop", "abort")


def group(delegate: Delegate, rank: int, size: int, connect: Callable[[], Any]) -> StoreGroup:
    """The group that ``select_group`` chooses where there is a store."""
    return (CoordinatorGroup if rank == 0 else StoreGroup)(delegate, rank, size, connect, 0)


class Rank:
    """A rank that trains in a thread: ``steps`` of them, each as long as ``pace`` says, and what it applied."""

    def __init__(self, connect: Callable[[], Any], rank: int, size: int, steps: int = 10**9) -> None:
        self.delegate = Delegate(rank)
        self.group = self.delegate.group = group(self.delegate, rank, size, connect)
        self.rank, self.steps, self.step = rank, steps, 0
        self.pace: Callable[[int], None] = lambda step: time.sleep(0.3 * MS)
        self.effect: Callable[[ScheduledCommand, int], Outcome] = lambda command, step: {}
        self.work: Callable[[ScheduledCommand, int], Outcome | None] = lambda command, step: {}  # None: reports later
        self.applied: list[tuple[int, Any]] = []
        self.fault: str | None = None
        self.holds = 0
        self.stop = self.paused = self.has_left = False
        self.settled: list[str | None] = []  # why atomic commands were undone
        self.thread = threading.Thread(target=self.train, name=f"rank-{rank}")
        self.errors: list[BaseException] = []

    def begin(self) -> Rank:
        self.group.start()
        self.thread.start()
        return self

    def train(self) -> None:
        try:
            for step in range(1, self.steps + 1):
                if self.stop:
                    break
                self.pace(step)
                self.end_step(step)
            self.end()
        except BaseException as err:  # a thread's failure is the test's
            self.errors.append(err)
            raise

    def end_step(self, step: int) -> None:
        self.step = step
        if not self.group.due(step):
            return
        self.holds += 1
        if commands := self.group.receive(step):
            self.apply(commands, step)
        while self.paused and not self.stop and self.group.agrees:
            if commands := self.group.hold(SOON):
                self.apply(commands, step)

    def apply(self, commands: list[ScheduledCommand], step: int) -> None:
        outcomes = {command.command_id: self.effect(command, step) for command in commands}
        self.group.applied(commands, step, {name: outcome for name, outcome in outcomes.items() if outcome})
        self.applied.append((step, commands))
        if commands[-1].name in ATOMIC and not self.has_left:
            self.settled.append(self.group.settle())
        for command in commands:
            self.paused = {"pause": True, "resume": False}.get(command.name, self.paused)
        self.stop |= any(command.name in STOPS for command in commands)
        for command in commands:
            if command.name in REPORTED:
                self.report(command, step)

    def report(self, command: ScheduledCommand, step: int) -> None:
        outcome = self.work(command, step)
        if self.rank == 0 and command.name not in STOPS:
            self.finish_when_reported(command.command_id, step)
        if outcome is not None:
            self.group.report(command.command_id, outcome)

    def finish_when_reported(self, command_id: str, step: int) -> None:
        def finish(outcomes: dict[int, Outcome], fault: str | None) -> None:
            errors = [f"rank {rank}: {outcome['error']}" for rank, outcome in outcomes.items() if "error" in outcome]
            values = {rank: outcome["value"] for rank, outcome in outcomes.items() if "value" in outcome}
            error = fault or next(iter(errors), None)
            self.delegate.finish(command_id, {"step": step, **({"values": values} if values else {})}, error)

        self.group.when_reported(command_id, finish)

    def end(self) -> None:
        self.group.close(SOON, self.fault)
        for step, commands in self.applied if self.rank == 0 else ():
            for command in commands:
                if command.name in STOPS:
                    self.finish_when_reported(command.command_id, step)
        self.delegate.close("training ended")

    def order(self, name: str, **params: Any) -> str:
        """Submit it as a client would; its id."""
        return self.delegate.order(name, **params)

    def record(self, command_id: str) -> Record:
        return self.delegate.records[command_id]

    def state(self, command_id: str) -> str:
        return self.record(command_id).state


@pytest.fixture
def store(request: pytest.FixtureRequest) -> Callable[[], Any]:
    """Connections to a store of this test."""
    import torch.distributed as dist

    store: Any = dist.HashStore()
    if not hasattr(store, "clone"):  # an older torch
        store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    connect = connector(store)
    return lambda: dist.PrefixStore("run", connect())


@contextmanager
def training(connect: Callable[[], Any], size: int, *, begin: bool = True, **options: Any) -> Iterator[list[Rank]]:
    """Ranks that train; on exit all have ended, and none of their threads is left."""
    made = [Rank(connect, rank, size, **options) for rank in range(size)]
    try:
        for rank in made if begin else ():
            rank.begin()
        yield made
    finally:
        for rank in made:
            rank.stop = True
        for rank in made:
            if rank.thread.ident is not None:
                rank.thread.join(SOON)
        assert not any(rank.thread.is_alive() for rank in made)
        assert not any(rank.errors for rank in made)
    threads = [thread for rank in made for thread in rank.group._channel._threads]
    until(lambda: not any(thread.is_alive() for thread in threads))


def is_final(rank: Rank) -> bool:
    return all(record.is_final for record in rank.delegate.records.values())


class Pack:
    """What a collective does to ranks: no step ends before all others have begun the one ``drift`` before it."""

    def __init__(self, made: list[Rank], dice: random.Random) -> None:
        self.drift, self.began = dice.choice([0, 0, 3, 50]), [0.0] * len(made)
        self.changed = threading.Condition()
        for rank in made:
            rank.pace = self.pace(rank.rank, random.Random(dice.random()), dice.choice([0.0, 0.2, 1.0]) * MS)

    def pace(self, rank: int, dice: random.Random, base: float) -> Callable[[int], None]:
        odd = dice.choice([0.0, 0.02, 0.2])

        def step(number: int) -> None:
            time.sleep(base + (5 * MS if dice.random() < odd else 0.0))
            with self.changed:
                self.began[rank] = number
                self.changed.notify_all()
                assert self.changed.wait_for(lambda: min(self.began) >= number - self.drift, SOON), (
                    "a rank waits for ever"
                )

        return step

    def leave(self, rank: int) -> None:
        """A rank is in no collective any more."""
        with self.changed:
            self.began[rank] = float("inf")
            self.changed.notify_all()


# All or nothing...


def broken(command: ScheduledCommand, step: int) -> Outcome:
    return {"error": {"code": 1, "message": "no"}}


@needs_torch
@pytest.mark.parametrize("ranks", [(), (1,), (0,), (0, 1, 2)], ids=str)
def test_what_one_rank_cannot_do_is_undone_on_all(store, ranks):
    """Each rank is told before its next step; without a failure what was done stays."""
    with training(store, 3, begin=False) as made:
        for rank in made:
            rank.effect = broken if rank.rank in ranks else rank.effect
            rank.begin()
        ids = [made[0].order("change_settings", number=number) for number in range(3)]
        until(lambda: all(len(rank.settled) == 3 for rank in made))
        why = failures.NOT_DONE % ", ".join(map(str, ranks)) if ranks else None
        assert [rank.settled for rank in made] == [[why] * 3] * 3
        until(lambda: all(made[0].state(name) != "accepted" for name in ids))
        assert {len(commands) for _, commands in made[0].applied} == {1}  # each is settled before the next one
        assert all(rank in made[0].record(ids[0]).outcomes for rank in ranks)
    same(made)


@needs_torch
def test_a_rank_that_is_late_has_the_change_undone(store, monkeypatch):
    """The others train on after a while, with what was before; so does the late rank, however late it is."""
    monkeypatch.setattr(limits, "SETTLE_TIMEOUT", 30 * MS)
    late = threading.Event()
    with training(store, 3, begin=False) as made:
        made[2].effect = lambda command, step: (late.wait(SOON), {})[1]
        for rank in made:
            rank.begin()
        name = made[0].order("change_settings")
        until(lambda: all(rank.settled for rank in made[:2]))
        step = made[0].step
        until(lambda: made[0].step > step + 3)
        late.set()
        until(lambda: bool(made[2].settled) and made[0].record(name).is_final)
        assert all(rank.settled == [failures.NOT_SETTLED % (30 * MS)] for rank in made)
        assert failures.NOT_SETTLED % (30 * MS) in (made[0].record(name).error or "")
    same(made)


@needs_torch
def test_a_change_is_undone_where_control_fails_on_a_rank(store):
    """The rank that leaves owes its answer, and the others do not wait for it."""
    with training(store, 2, begin=False) as made:

        def leave(command, step):
            made[1].group.close(0.0, "it broke")
            made[1].has_left = True
            return {}

        made[1].effect = leave
        for rank in made:
            rank.begin()
        made[0].order("change_settings")
        until(lambda: bool(made[0].settled))
        assert made[0].settled == ["rank 1: it broke"]


# A pause...


@needs_torch
@pytest.mark.parametrize("size", [2, 4])
def test_commands_of_a_pause_are_applied_by_ranks_that_stand_still(store, size):
    """All at one step, in order; after it commands still come at one step on all ranks."""
    with training(store, size) as made:
        first = made[0]
        first.order("pause")
        until(lambda: all(rank.paused for rank in made))
        steps = [rank.step for rank in made]
        assert len(set(steps)) == 1
        for number in range(5):
            saved = first.order("save_checkpoint", number=number)
            until(lambda saved=saved: first.state(saved) == "finished")
        assert [rank.step for rank in made] == steps
        first.order("resume")
        until(lambda: all(rank.step > steps[0] + 20 for rank in made))
        saved = first.order("save_checkpoint")
        until(lambda: first.state(saved) == "finished")
        first.order("pause")
        until(lambda: all(rank.paused for rank in made))
        first.order("graceful_stop")
        until(lambda: not any(rank.thread.is_alive() for rank in made))
    same(made)


@needs_torch
def test_a_pause_ends_where_no_command_can_be_agreed_on(store):
    """A rank whose control failed lets all of them go: no resume would reach it."""
    with training(store, 3) as made:
        made[0].order("pause")
        until(lambda: all(rank.paused for rank in made))
        steps = [rank.step for rank in made]
        made[2].group._channel.post(lambda sender: made[2].group._leave("rank 2: it broke", sender))
        until(lambda: all(rank.step > steps[0] for rank in made[:2]))
        made[2].group._release()


# What all ranks do alike...


@needs_torch
@pytest.mark.parametrize("seed", range(THREAD_RUNS))
def test_random_commands_to_real_threads(store, seed):
    """Two to eight ranks, uneven, apply the same lists at the same steps; every record ends as it really did."""
    dice = random.Random(seed)
    size, steps = dice.choice([2, 3, 5, 8]), dice.choice([5, 60, 10**9])
    words = [dice.choice([*STOPS, *["save_checkpoint"] * 12]) for _ in range(dice.randint(1, 12))]
    with training(store, size, begin=False, steps=steps) as made:
        Pack(made, dice)
        first, ids = made[0], []
        for rank in dice.sample(made, size):
            rank.begin()
        for word in [*words, "graceful_stop"]:
            at = first.step + dice.choice([0, 0, 1, 7])
            until(lambda at=at: first.step >= at or not first.thread.is_alive())
            try:
                ids.append(first.order(word))
            except JobEnding:
                break
        for rank in made:
            rank.thread.join(SOON)
    same(made)
    true_records(first, ids)


def same(made: list[Rank]) -> None:
    assert all(rank.applied == made[0].applied for rank in made), [rank.applied for rank in made]
    names = [command.command_id for _, commands in made[0].applied for command in commands]
    assert len(names) == len(set(names)), "applied twice"
    assert all(rank.group._channel._threads[0].is_alive() is False for rank in made)


def true_records(first: Rank, ids: list[str]) -> None:
    steps = {command.command_id: step for step, commands in first.applied for command in commands}
    for name in ids:
        record = first.record(name)
        if name in steps:
            assert (record.state, record.applied_at_step, record.result) == (
                "finished",
                steps[name],
                {"step": steps[name]},
            )
        else:
            assert (record.state, record.error) == ("failed", "training ended"), record


@needs_torch
def test_an_idle_step_holds_no_rank(store):
    """While nothing is pending, no step end is looked at, and the store gets no key."""
    with training(store, 3, steps=300) as made:
        until(lambda: all(not rank.thread.is_alive() for rank in made))
        assert [rank.holds for rank in made] == [0, 0, 0]
        assert made[0].delegate.notes("joined") == [{rank: {"pid": rank} for rank in range(3)}]


@needs_torch
def test_a_rank_that_takes_long_is_known(store):
    """The effect of a command lasts on one rank; rank 0 knows which, and none once it is done."""
    go = threading.Event()
    with training(store, 3) as made:
        made[2].effect = lambda command, step: {"value": go.wait(SOON)}
        name = made[0].order("user.sample")
        until(lambda: made[0].group.unacknowledged() == [2])
        assert made[0].state(name) == "accepted"
        go.set()
        until(lambda: made[0].state(name) != "accepted" and made[0].group.unacknowledged() == [])
        made[0].order("graceful_stop")


@needs_torch
def test_a_rank_that_is_not_there_yet(store):
    """Commands wait for it, and no rank is held; once it joins they are applied."""
    with training(store, 3, begin=False) as made:
        for rank in made[:2]:
            rank.begin()
        name = made[0].order("graceful_stop")
        begun = made[1].step
        until(lambda: made[1].step > begun + 100)
        assert [made[0].state(name), made[0].holds, made[1].holds] == ["accepted", 0, 0]
        assert made[0].group.not_joined() == [2] and made[0].group.obstacle() is None
        made[0].group._join_by = 0.0
        assert made[0].group.obstacle() == failures.not_joined([2])
        assert [made[0].group.state(rank) for rank in range(3)] == ["silent", "silent", "never joined"]
        made[2].pace = lambda step: None if step < made[0].step else time.sleep(0.3 * MS)
        made[2].begin()
        until(lambda: all(rank.applied for rank in made))
        assert made[0].group.not_joined() == [] and made[0].group.obstacle() is None
    same(made)
    assert made[0].state(name) == "finished"


@needs_torch
@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_0_that_never_joins(store, monkeypatch, caplog, size):
    """The first of the other ranks says so, once; all of them train."""
    monkeypatch.setattr(limits, "JOIN_TIMEOUT", 0.1)
    with training(store, size, begin=False) as (_, *others), caplog.at_level(logging.WARNING):
        for rank in others:
            rank.begin()
        until(lambda: caplog.records)
        for rank in others:
            begun, other = rank.step, rank
            until(lambda begun=begun, other=other: other.step > begun + 100)
            assert rank.holds == 0
    assert [entry.getMessage() for entry in caplog.records] == [failures.NOT_JOINED % failures.not_joined([0])]


@needs_torch
def test_a_rank_0_that_joins_is_not_missed(store, monkeypatch, caplog):
    """A rank that comes first looks for it once more at the time-out."""
    monkeypatch.setattr(limits, "JOIN_TIMEOUT", 0.1)
    with training(store, 2, begin=False) as (first, other), caplog.at_level(logging.WARNING):
        other.begin()
        until(lambda: other.group._watches)
        first.begin()
        until(lambda: not other.group._watches)
    assert not caplog.records


@needs_torch
def test_a_rank_that_ended_before_rank_0_joined(store):
    """It is known to have joined and left, so commands do not wait for it."""
    with training(store, 2, begin=False) as (first, other):
        other.steps = 3
        other.begin()
        other.thread.join(SOON)
        first.begin()
        name = first.order("graceful_stop")
        first.thread.join(SOON)
    assert first.state(name) == "finished" and first.group.state(1) == "ended" and first.group.not_joined() == []


@needs_torch
def test_many_runs_leave_no_descriptors_and_no_keys():
    """Though a rank comes when the other has left, or leaves before the rounds, and garbage is not collected."""
    import torch.distributed as dist

    base = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    connect = connector(base)
    gc.disable()
    try:
        for run in range(60):
            with training(lambda run=run: dist.PrefixStore(str(run), connect()), 2, begin=False) as made:
                first, second = made if run % 2 else reversed(made)
                first.begin()
                if run % 10 < 2:
                    first.stop = True
                    first.thread.join(SOON)
                second.begin()
                if run % 10 >= 2:
                    made[0].group.query("ranks")
                    made[1].stop = run % 10 == 2
                    until(lambda made=made: not made[1].stop or made[0].group.state(1) == "ended")
                    made[0].order("save_checkpoint")
                    made[0].order("graceful_stop")
                    until(lambda made=made: all(rank.applied or rank.stop for rank in made))
            if run == 0:
                files, stored = len(os.listdir("/proc/self/fd")), base.num_keys()
        until(lambda: len(os.listdir("/proc/self/fd")) <= files)  # the store's thread closes its ends
        assert base.num_keys() == stored
    finally:
        gc.enable()


@needs_torch
def test_applied_waits_for_the_slowest(store):
    """A rank that is long in its step, or in its save, holds up the word, and none of the others."""
    at_step, at_save = threading.Event(), threading.Event()
    with training(store, 2, begin=False) as made:
        first, slow = made
        slow.pace = lambda step: at_step.wait(SOON) and time.sleep(0.3 * MS)
        slow.work = lambda command, step: {} if at_save.wait(SOON) else {"error": "too late"}
        for rank in made:
            rank.begin()
        name = first.order("save_checkpoint")
        until(lambda: first.applied and first.step > first.applied[0][0] + 50)
        assert first.state(name) == "accepted"
        at_step.set()
        until(lambda: first.state(name) == "applied")
        begun = first.step
        until(lambda: first.step > begun + 50)
        assert first.state(name) == "applied"
        at_save.set()
        until(lambda: first.state(name) == "finished")
    same(made)


@needs_torch
def test_commands_that_come_while_a_round_is_on(store):
    """They make up the next one, in their order; taking one back that waits is known to all."""
    at_step = threading.Event()
    with training(store, 2, begin=False) as made:
        first, slow = made
        slow.pace = lambda step: at_step.wait(SOON) and time.sleep(0.3 * MS)
        for rank in made:
            rank.begin()
        names = [first.order("save_checkpoint")]
        until(lambda: first.applied)
        names += [first.order("save_and_stop"), first.order("abort"), first.order("graceful_stop")]
        first.delegate.cancel(names[2])
        at_step.set()
        until(lambda: all(len(rank.applied) == 2 for rank in made))
    same(made)
    assert [[command.command_id for command in commands] for _, commands in first.applied] == [
        names[:1],
        [names[1], names[3]],
    ]
    assert [first.state(name) for name in names] == ["finished", "finished", "cancelled", "finished"]


@needs_torch
def test_outcomes_and_reports_by_rank(store):
    """Rank 0 gets what each rank did: at once with the commands, and later for those that await reports."""
    later = threading.Event()
    with training(store, 3, begin=False) as made:
        for rank in made:
            rank.effect = lambda command, step, rank=rank.rank: {"value": command.params["n"] * rank} if rank else {}
            rank.work = lambda command, step, rank=rank.rank: {"value": f"trace {rank}"}
        made[2].work = lambda command, step: later.wait(SOON) and {"value": "late"}
        for rank in made:
            rank.begin()
        sample = made[0].order("user.sample", n=3)
        until(lambda: made[0].state(sample) == "applied")
        assert made[0].record(sample).outcomes == {rank: {sample: {"value": 3 * rank}} for rank in (1, 2)}
        profile = made[0].order("profile", n=1)
        until(lambda: made[0].state(profile) == "applied")
        begun = made[0].step
        until(lambda: made[0].step > begun + 50)
        assert made[0].state(profile) == "applied"
        later.set()
        until(lambda: made[0].state(profile) == "finished")
        assert made[0].record(profile).result["values"] == {0: "trace 0", 1: "trace 1", 2: "late"}
    same(made)


@needs_torch
def test_a_rank_that_ends_owes_no_reports(store):
    """What it had not reported counts as done; the others' reports are complete without it."""
    with training(store, 3, begin=False) as made:
        made[1].work = lambda command, step: setattr(made[1], "stop", True)
        for rank in made:
            rank.begin()
        name = made[0].order("profile")
        until(lambda: made[0].record(name).is_final)
        assert (made[0].state(name), made[0].record(name).error) == ("finished", None)


@needs_torch
def test_rank_0_waits_for_reports_only_so_long(store):
    """As it ends, a report that does not come fails its command, and the sentence names the rank."""
    never = threading.Event()
    with training(store, 2, begin=False) as made:
        made[1].work = lambda command, step: never.wait(SOON) and {}
        end = made[0].group.close
        made[0].group.close = lambda seconds, fault: end(50 * MS, fault)
        for rank in made:
            rank.begin()
        name = made[0].order("save_checkpoint")
        until(lambda: made[0].state(name) == "applied")
        made[0].stop = True
        until(lambda: made[0].record(name).is_final)
        assert made[0].record(name).error.startswith("it is unknown whether rank 1 completed it")
        never.set()


@needs_torch
@pytest.mark.parametrize("gone", [False, True])
def test_rank_0_waits_as_long_as_a_rank_lives(store, monkeypatch, gone):
    """It ends at once if the process has ended, and the sentence names the rank; else it waits for the report."""
    monkeypatch.setattr(limits, "LOOK_PERIOD", 20 * MS)
    monkeypatch.setattr(limits, "CLOSE_TIMEOUT", 200 * MS)
    release, looked = threading.Event(), threading.Event()
    with training(store, 2, begin=False) as made:
        made[1].work = lambda command, step: release.wait(SOON) and {}
        is_gone = made[0].delegate.is_gone
        made[0].delegate.is_gone = lambda rank: (is_gone(rank), looked.set())[0]
        for rank in made:
            rank.begin()
        name = made[0].order("save_checkpoint")
        until(lambda: made[0].state(name) == "applied")
        made[0].stop = True
        if gone:
            made[0].delegate.gone.add(1)
            made[0].thread.join(SOON / 2)
            assert made[0].record(name).error.startswith("it is unknown whether rank 1 completed it")
        else:
            made[0].thread.join(2 * limits.CLOSE_TIMEOUT)
            assert made[0].state(name) == "applied" and looked.is_set()
        release.set()
        made[0].thread.join(SOON)
        assert gone or made[0].state(name) == "finished"


@needs_torch
def test_rank_0_does_not_wait_for_a_store_that_hangs(store, monkeypatch):
    """Nothing is owed, but it cannot know: it waits only so long as for its channel."""
    monkeypatch.setattr(limits, "CLOSE_TIMEOUT", 50 * MS)
    release = threading.Event()
    with training(store, 2) as made:
        until(lambda: made[0].delegate.notes("joined"))
        made[0].group._channel.post(lambda sender: release.wait(2 * SOON) and None)
        made[0].stop = True
        made[0].thread.join(SOON / 2)
        assert not made[0].thread.is_alive()
        release.set()


@needs_torch
def test_facts_are_added_to_descriptions(store):
    """Rank 0 is told whenever one changes, after all have joined; the last one told is complete."""
    with training(store, 3, begin=False) as made:
        made[1].group.describe({"early": True})
        for rank in made:
            rank.begin()
        until(lambda: made[0].delegate.notes("joined"))
        for rank in made:
            rank.group.describe({"methods": rank.rank})
        facts = {rank: {"pid": rank, "methods": rank} for rank in range(3)}
        facts[1]["early"] = True
        until(lambda: made[0].delegate.notes("joined")[-1] == facts)
        assert made[0].group.description(1) == facts[1] and len(made[0].delegate.notes("joined")) == 4


@needs_torch
@pytest.mark.parametrize("clones", [True, False])
def test_outcomes_and_reports_of_real_ranks(clones):
    """The same in processes of their own, on a process group of gloo, also where stores cannot be cloned."""
    import torch.distributed as dist

    clones = clones and hasattr(dist.Store, "clone")
    check_outcomes(run_ranks(3, clones=clones), left=not clones)


# Ranks that end, give up, or receive nothing...


@needs_torch
@pytest.mark.parametrize("size", [2, 3])
def test_a_stop_is_not_blamed_on_a_rank_that_is_behind(store, size):
    """Rank 0 applies a stop and closes at once, the others a little later: it waits for them. Time and again."""
    for turn in range(15):
        with training(lambda turn=turn: prefixed(store, turn), size, begin=False) as made:
            for rank in made[1:]:
                rank.pace = lambda step: time.sleep(2 * MS)
            for rank in made:
                rank.begin()
            until(lambda: all(rank.step for rank in made))
            name = made[0].order("graceful_stop")
            made[0].thread.join(SOON)
            record = made[0].record(name)
            assert (record.state, record.applied_at_step) == ("finished", made[0].step), record
        same(made)


def prefixed(connect: Callable[[], Any], name: object) -> Any:
    """A channel of its own in the same store."""
    import torch.distributed as dist

    return dist.PrefixStore(str(name), connect())


@needs_torch
def test_a_rank_that_ends_early(store):
    """The others agree without it."""
    with training(store, 3, begin=False) as made:
        made[2].steps = 5
        for rank in made:
            rank.begin()
        until(lambda: made[0].group.state(2) == "ended")
        name = made[0].order("save_checkpoint")
        until(lambda: made[0].state(name) == "finished")
        made[0].order("graceful_stop")
        until(lambda: all(len(rank.applied) == 2 for rank in made[:2]))
    same(made[:2])
    assert not made[2].applied


@needs_torch
def test_a_rank_that_gives_up(store):
    """It trains on without control: what waits fails, nothing more is agreed on, and no rank is held."""
    with training(store, 3, begin=False) as made:
        made[1].steps, made[1].fault = 5, "it broke"
        for rank in made:
            rank.begin()
        until(lambda: made[0].delegate.notes("lost") == ["rank 1: it broke"])
        with pytest.raises(JobEnding, match="it broke"):
            made[0].order("save_checkpoint")
        begun = made[2].step
        until(lambda: made[2].step > begun + 100)
    assert not any(rank.applied for rank in made)


@needs_torch
def test_a_rank_that_gives_up_with_a_list_in_hand(store):
    """The others have applied it, and the record names the rank that has not."""
    at_step = threading.Event()
    with training(store, 2, begin=False) as made:
        first, broken = made
        broken.fault = "it broke"

        def pace(step: int) -> None:
            assert at_step.wait(SOON)
            broken.stop = True
            raise ZeroDivisionError

        broken.pace = pace
        broken.train = lambda: (suppressed(broken.pace, 1), broken.end())
        broken.thread = threading.Thread(target=broken.train)
        for rank in made:
            rank.begin()
        name = first.order("save_checkpoint")
        until(lambda: first.applied)
        at_step.set()
        until(lambda: first.record(name).is_final)
        assert "rank 1: it broke" in first.record(name).error
        assert first.state(name) == "failed"


def suppressed(call: Callable[..., Any], *args: Any) -> None:
    try:
        call(*args)
    except ZeroDivisionError:
        pass


@needs_torch
def test_a_shard_that_is_not_written(store):
    """A rank reports that its part of the checkpoint failed: the save has failed, and all train on."""
    with training(store, 3, begin=False) as made:
        made[2].work = lambda command, step: {"error": "the disk is full"}
        for rank in made:
            rank.begin()
        name = made[0].order("save_checkpoint")
        until(lambda: made[0].record(name).is_final)
        record = made[0].record(name)
        assert (record.state, record.error) == ("failed", "rank 2: the disk is full")
        assert record.applied_at_step == made[0].applied[0][0]
        later = made[0].order("graceful_stop")
        until(lambda: all(len(rank.applied) == 2 for rank in made))
    same(made)
    assert made[0].state(later) == "finished"


@needs_torch
def test_a_rank_that_gives_up_before_its_shard_is_written(store):
    """It never reports that it is, so the save has failed."""
    with training(store, 2, begin=False) as made:
        first, broken = made
        broken.fault = "it broke"
        broken.work = lambda command, step: setattr(broken, "stop", True)
        for rank in made:
            rank.begin()
        name = first.order("save_checkpoint")
        until(lambda: first.record(name).is_final)
        assert (first.state(name), "it broke" in first.record(name).error) == ("failed", True)


@needs_torch
def test_a_rank_whose_control_cannot_start(store):
    """What its delegate raises comes out, and no thread is left that would have to end."""
    rank = Rank(store, 1, 2)
    rank.delegate.describe = lambda: {}["nothing"]
    with pytest.raises(KeyError):
        rank.group.start()
    assert not any(thread.is_alive() for thread in rank.group._channel._threads)


# A broken channel...


class Torn:
    """A store some of whose calls do not come back, or fail; the rest is the real one's."""

    def __init__(self, store: Any, **calls: Callable[..., Any]) -> None:
        self._store = store
        vars(self).update(calls)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def refused(*_: Any) -> Any:
    raise RuntimeError("Connection reset by peer\n frame #0 ...")


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A held rank waits longer than any test, so no time-out lets it continue."""
    monkeypatch.setattr(limits, "DECISION_TIMEOUT", 10 * SOON)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A held rank gives up at once, until this is called."""
    monkeypatch.setattr(limits, "DECISION_TIMEOUT", 50 * MS)
    monkeypatch.setattr(limits, "GIVE_UP_TIMEOUT", 50 * MS)

    def calm() -> None:
        for name in ("DECISION_TIMEOUT", "GIVE_UP_TIMEOUT"):
            monkeypatch.setattr(limits, name, 10 * SOON)

    return calm


def torn(rank: Rank, connect: Callable[[], Any]) -> None:
    """Have a rank speak over another store."""
    rank.group = rank.delegate.group = group(rank.delegate, rank.rank, rank.group.size, connect)


def goes_on(*made: Rank) -> None:
    """Fails if one of them is held."""
    begun = [rank.step for rank in made]
    until(lambda: all(rank.step > then + 20 for rank, then in zip(made, begun)))


class Coordinator:
    """Rank 0, played by hand: the test chooses what it sends, and in which order."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        self.store, self.heard = connect(), 0
        self.sender = StoreSender(connect)
        self.sender.connect()

    def send(self, *message: Any) -> None:
        self.sender.send([1], list(message))

    def hear(self) -> Any:
        self.heard += 1
        return json.loads(self.store.get(keys.message(0, self.heard)))


@contextmanager
def one_rank(connect: Callable[[], Any]) -> Iterator[tuple[Coordinator, Rank]]:
    """A coordinator, and rank 1, which is held at the end of its next step: round 1 is asked, and T is decided."""
    coordinator, rank = Coordinator(connect), Rank(connect, 1, 2)
    rank.begin()
    try:
        assert coordinator.hear() == ["join", 1, {"pid": 1}]
        coordinator.send("prepare", 1)
        kind, number, who, clock = coordinator.hear()
        assert (kind, number, who) == ("ready", 1, 1)
        coordinator.due = clock + 5
        coordinator.commands = [ScheduledCommand("name", "save_checkpoint", {"evaluate": "auto"})]
        until(lambda: rank.holds)
        yield coordinator, rank
    finally:
        rank.stop = True
        rank.thread.join(SOON)
        assert not rank.thread.is_alive() and not rank.errors


@needs_torch
def test_a_shutdown_overtakes_the_decision(store, patient):
    """Rank 0 ends after its decision and before the Commit: a held rank reads the decision in the store, and obeys."""
    with one_rank(store) as (coordinator, rank):
        coordinator.sender.decide(keys.decision(1), [coordinator.due, coordinator.commands])
        coordinator.send("leave", 0, 9, None)
        until(lambda: rank.applied)
        assert rank.applied == [(coordinator.due, coordinator.commands)]
        goes_on(rank)


@needs_torch
def test_a_shutdown_while_nothing_is_decided(store, patient):
    """The round is off from then on, no rank is held, and the store may go: nothing waits for it any more."""
    with one_rank(store) as (coordinator, rank):
        coordinator.send("leave", 0, 9, None)
        goes_on(rank)
        until(lambda: not any(thread.is_alive() for thread in rank.group._channel._threads))
        assert (
            coordinator.sender.decide(keys.decision(1), [coordinator.due, coordinator.commands]) == [None, []]
            and not rank.applied
        )


@needs_torch
def test_a_prepare_that_comes_too_late(store, patient):
    """A round is off before a rank receives its Prepare: the rank is not held, and a later round is not forgotten."""
    with one_rank(store) as (coordinator, rank):
        coordinator.send("commit", 2, None, [])
        goes_on(rank)
        coordinator.send("prepare", 2)
        goes_on(rank)
        coordinator.send("prepare", 3)
        while (answer := coordinator.hear())[:2] != ["ready", 3]:
            pass
        coordinator.send("commit", 3, answer[3] + 50, coordinator.commands)
        coordinator.send("prepare", 1)
        until(lambda: rank.applied)
        assert rank.applied == [(answer[3] + 50, coordinator.commands)]


@needs_torch
def test_a_rank_that_is_lost_takes_part_no_more(store, patient):
    """A Prepare that reaches it neither holds it nor is answered."""
    with one_rank(store) as (coordinator, rank):
        rank.group._lose("it broke")
        coordinator.send("prepare", 2)
        coordinator.send("query", 1, "ranks")
        assert coordinator.hear()[0] == "answer"
        goes_on(rank)


@needs_torch
def test_a_round_that_the_receiver_began_ends_in_time(store, patient, monkeypatch):
    """Rank 0's sender, which waits for nothing, learns of the time-out: a rank that is silent does not hold rank 0."""
    first = Rank(store, 0, 2)
    other, sender = store(), StoreSender(store)
    sender.connect()
    heard = itertools.count(1)
    hear = lambda: json.loads(other.get(keys.message(1, next(heard))))  # noqa: E731
    first.begin()
    try:
        sender.send([0], ["join", 1, {"pid": 1}])
        until(lambda: first.delegate.notes("joined"))
        first.order("save_checkpoint")
        assert hear() == ["prepare", 1]
        sender.send([0], ["ready", 1, 1, 0])
        assert hear()[:2] == ["commit", 1]
        until(lambda: first.group._coordinator._applied.missing == {1})
        first.order("save_checkpoint")
        until(lambda: first.group._channel._queue.empty())
        monkeypatch.setattr(limits, "READY_TIMEOUT", 50 * MS)
        sender.send([0], ["applied", 1, 1, {}])
        assert hear() == ["prepare", 2] and hear() == ["commit", 2, None, []]
        goes_on(first)
    finally:
        first.stop = True
        sender.send([0], ["leave", 1, 9, None])
        first.thread.join(SOON)
        assert not first.thread.is_alive() and not first.errors


@needs_torch
def test_the_store_breaks_as_a_round_is_decided(store, patient):
    """The commands that were taken fail at once; no rank is held; the delegate is told once."""
    with training(store, 2, begin=False) as made:
        torn(made[0], lambda: Torn(store(), compare_set=refused))
        for rank in made:
            rank.begin()
        name = made[0].order("save_checkpoint")
        until(lambda: made[0].record(name).is_final)
        assert "Connection reset by peer" in made[0].record(name).error
        goes_on(*made)
        why = "rank 0 lost its connection to the store (RuntimeError: Connection reset by peer)"
        assert made[0].delegate.notes("lost") == [why]
        assert made[0].group.state(1) == "unknown"  # it can no longer be asked
    assert not any(rank.applied for rank in made)


@needs_torch
def test_a_leader_that_falls_silent_after_asking(store, hasty):
    """A held rank calls the round off itself, through the store; rank 0, when it is back, obeys, and tries again."""
    back, real = threading.Event(), store()

    def stuck(*args: Any) -> Any:
        assert back.wait(SOON)
        return real.compare_set(*args)

    with training(store, 3, begin=False) as made:
        torn(made[0], lambda: Torn(store(), compare_set=stuck))
        made[0].pace = lambda step: back.wait(SOON) and time.sleep(0.3 * MS)  # in a long step
        for rank in made:
            rank.begin()
        name = made[0].order("graceful_stop")
        until(lambda: all(rank.holds for rank in made[1:]))
        goes_on(*made[1:])
        assert real.get(keys.decision(1)) == b"[null, []]" and made[0].state(name) == "accepted"
        hasty()
        back.set()
        until(lambda: all(rank.applied for rank in made))
    same(made)
    assert made[0].state(name) == "finished"


@needs_torch
def test_a_rank_is_told_before_the_coordinator(store, hasty, monkeypatch):
    """Rank 0 has written its decision and not heard so when another, out of patience, has read it and done its part."""
    monkeypatch.setattr(limits, "GIVE_UP_TIMEOUT", 10 * SOON)
    back, real = threading.Event(), store()

    def late(*args: Any) -> Any:  # else the decision might be its own
        until(lambda: real.check([keys.decision(1)]))
        return real.compare_set(*args)

    def stuck(*args: Any) -> Any:
        written = real.compare_set(*args)
        assert back.wait(SOON)
        return written

    def send(key: str, data: str) -> None:
        real.set(key, data)
        if (
            '"prepare"' in data
        ):  # so that it is the sender that decides, and the receiver that hears what comes too early
            until(lambda: 1 in made[0].group._coordinator._steps)

    with training(store, 2, begin=False) as made:
        torn(made[0], lambda: Torn(store(), compare_set=stuck, set=send))
        torn(made[1], lambda: Torn(store(), compare_set=late))
        made[0].pace = lambda step: back.wait(SOON) and time.sleep(0.3 * MS)  # in a long step
        for rank in made:
            rank.begin()
        until(lambda: made[0].delegate.notes("joined"))
        name = made[0].order("save_checkpoint")
        until(lambda: made[1].applied)
        count = int(real.add(keys.count(0), 0))
        until(lambda: made[0].group._channel._next > count)
        hasty()
        back.set()
        until(lambda: made[0].state(name) == "finished")
    same(made)


@needs_torch
def test_a_receiver_breaks_while_its_rank_is_held(store, patient):
    """Its sender still reads what was decided: the rank does as the others do, and they learn that it is lost."""
    asked, real = [], store()

    def get(key: str) -> bytes:
        if asked:
            raise RuntimeError("Connection reset by peer")
        data = real.get(key)
        asked.extend([1] if b"prepare" in data else [])
        return data

    with training(store, 2, begin=False) as made:
        torn(made[1], lambda: Torn(store(), get=get))
        for rank in made:
            rank.begin()
        name = made[0].order("save_checkpoint")
        until(lambda: made[0].record(name).is_final)
        goes_on(*made)
        message = made[0].record(name).error
        assert "rank 1 lost its connection to the store (RuntimeError: Connection reset by peer)" in message
    assert made[1].applied in ([], made[0].applied) and len(made[0].applied) == len(made[1].applied)


@needs_torch
def test_a_store_that_answers_one_rank_no_more(store, hasty):
    """Training goes before agreement; but then it ends, and what this rank missed is not done there later."""
    back, real = threading.Event(), store()

    def stuck(*args: Any) -> Any:
        assert back.wait(SOON)
        return real.compare_set(*args)

    def get(key: str) -> bytes:
        data = real.get(key)
        if b"commit" in data:
            back.wait(SOON)
        return data

    def long_until_decided(step: int) -> None:  # so that rank 0 is not held, and the step is one that rank 1 will pass
        until(lambda: step > 1 or real.check([keys.decision(1)]))
        time.sleep(0.3 * MS)

    with training(store, 2, begin=False) as made:
        torn(made[1], lambda: Torn(store(), get=get, compare_set=stuck))
        made[0].pace = long_until_decided
        for rank in made:
            rank.begin()
        name = made[0].order("save_checkpoint")
        until(lambda: made[1].holds)
        goes_on(made[1])
        back.set()
        until(lambda: made[0].record(name).is_final)
        assert "rank 1" in made[0].record(name).error
        with pytest.raises(JobEnding, match="rank 1"):
            made[0].order("save_checkpoint")
        until(lambda: not made[1].group.agrees)
        goes_on(*made)
        assert len(made[0].applied) == 1 and made[1].applied == []


class Frozen:
    """A store whose calls wait until a gate is open; a call that found some words closes it, once."""

    def __init__(self, real: Any, gate: threading.Event, closed_by: list[tuple[str, bytes]]) -> None:
        self.real, self.gate, self.closed_by = real, gate, closed_by

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            found = getattr(self.real, name)(*args)
            if self.closed_by and self.closed_by[0][0] == name and self.closed_by[0][1] in found:
                self.closed_by.clear()
                self.gate.clear()
                return found
            assert self.gate.wait(2 * SOON)
            return found

        return call


@needs_torch
@pytest.mark.parametrize(
    "frozen",
    [None, ("get", b"prepare"), ("compare_set", b"")],
    ids=["before the round", "in the round", "as it is decided"],
)
def test_control_comes_back_with_a_store_that_was_frozen(store, hasty, frozen):
    """No rank is held for long, and the command that was given meanwhile is applied by all when the store is back."""
    gate, closed_by = threading.Event(), [frozen] if frozen else []
    gate.set()
    with training(store, 3, begin=False) as made:
        for rank in made:
            torn(rank, lambda: Frozen(store(), gate, closed_by))
            rank.begin()
        until(lambda: bool(made[0].delegate.notes("joined")))
        if not frozen:
            gate.clear()
        name = made[0].order("save_checkpoint")
        until(lambda: not gate.is_set())
        goes_on(*made)
        assert not any(rank.group._lost for rank in made)
        gate.set()
        hasty()
        until(lambda: made[0].state(name) == "finished")
        later = made[0].order("graceful_stop")
        until(lambda: made[0].record(later).is_final)
        for rank in made:
            rank.thread.join(SOON)
    same(made)
    assert not any(rank.delegate.notes("lost") for rank in made)


@needs_torch
def test_the_channel_breaks_with_a_list_on_its_way(store, patient):
    """Rank 0 has applied it and receives no more acknowledgements: its record fails at once, not at the end."""
    at_step, broken, real = threading.Event(), threading.Event(), store()

    def get(key: str) -> bytes:
        data = real.get(key)
        return data if not broken.is_set() else refused()

    with training(store, 2, begin=False) as made:
        torn(made[0], lambda: Torn(store(), get=get))
        made[1].pace = lambda step: at_step.wait(SOON) and time.sleep(0.3 * MS)
        for rank in made:
            rank.begin()
        name = made[0].order("save_checkpoint")
        until(lambda: made[0].applied)
        broken.set()
        made[1].group.request("graceful_stop")
        until(lambda: made[0].record(name).is_final)
        assert "Connection reset by peer" in made[0].record(name).error
        at_step.set()
        until(lambda: made[1].applied)
        goes_on(*made)
    same(made)


# Signals and questions...


@needs_torch
def test_any_rank_may_call(store):
    """A signal's command, from each rank and in the middle of its steps, becomes one that all apply."""
    with training(store, 3, begin=False) as made:
        for rank in made:
            rank.begin()
        for rank in made:
            before = len(made[0].applied)
            rank.group.request("save_checkpoint")
            until(lambda before=before: len(made[0].applied) > before)
        until(lambda: is_final(made[0]))
        made[2].group.request("graceful_stop")
        until(lambda: all(rank.stop for rank in made))
    same(made)
    assert [commands[0].name for _, commands in made[0].applied] == ["save_checkpoint"] * 3 + ["graceful_stop"]


@needs_torch
def test_calls_in_a_signal_handler(store):
    """Hundreds of signals that interrupt the training thread anywhere, in a hold, too, neither block nor raise."""
    with training(store, 2, begin=False) as made:
        first, other = made
        first.thread = threading.Thread()  # it trains here, where signals are handled
        first.group.start()
        other.begin()
        seen = []
        before = signal.signal(signal.SIGALRM, lambda *_: (seen.append(1), first.group.request("save_checkpoint")))
        signal.setitimer(signal.ITIMER_REAL, MS, MS)
        try:
            step = 0
            end = time.monotonic() + SOON
            while len(seen) < 200 or len(first.applied) < 20:
                assert time.monotonic() < end
                step += 1
                first.pace(step)
                first.end_step(step)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        until(lambda: len(other.applied) >= len(first.applied))
        other.stop = True
        first.end()
    common = min(len(rank.applied) for rank in made)
    assert first.applied[:common] == other.applied[:common] and common >= 20


@needs_torch
def test_a_question_to_all(store):
    """All answer, one of them late, whatever their training does; no rank is held."""
    late, at_step = threading.Event(), threading.Event()
    with training(store, 4, begin=False) as made:
        made[1].pace = lambda step: at_step.wait(SOON)
        made[2].delegate.reply = lambda what: late.wait(SOON) and {"late": what}
        made[3].steps = 3
        for rank in made:
            rank.begin()
        until(lambda: made[0].group.state(3) == "ended")
        sent = store().add(keys.count(3), 0)
        first = made[0].group.query("ranks")
        until(lambda: 1 in first.answers)
        second = made[0].group.query("stacks")
        until(lambda: 1 in second.answers)
        assert first.answers == {rank: {"rank": rank, "what": "ranks"} for rank in (0, 1)}
        assert [made[0].group.state(rank) for rank in range(4)] == ["silent", "silent", "silent", "ended"]
        late.set()
        until(lambda: 2 in first.answers and 2 in second.answers)
        assert (first.answers[2], second.answers[2]) == ({"late": "ranks"}, {"late": "stacks"})
        assert store().add(keys.count(3), 0) == sent  # no message stays in the inbox of a rank that has ended
        assert made[0].delegate.notes("answers")
        assert made[0].group.description(1) == {"pid": 1} and not any(rank.holds for rank in made)
        at_step.set()
