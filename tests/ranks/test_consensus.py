"""The rounds through every order of events: two and three ranks exhaustively, eight at random; no torch, no threads.

The objects under test are pure, so all that threads, sockets and clocks do to them is played here, as in
``store_group``: each rank has a receiver, a sender and a training thread, rank 0's receiver and sender carry out the
coordinator's actions one by one, and between any two of them anything else may happen. A state of the whole is a value;
``World.moves`` says what can happen next in it, and each promise is an ``assert`` on the way or at the end.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from forgather_control.ranks import consensus, limits
from forgather_control.ranks.consensus import AllApplied, AllReported, Coordinator, Send, Tally
from forgather_control.ranks.messages import Applied, Commit, Join, Leave, Missed, Prepare, Ready, Reported
from forgather_control.ranks.participant import Participant

#: The torch-free half runs on several Pythons, and these objects are pure: one of them tries every order.
LIGHT = os.environ.get("FORGATHER_TEST_LIGHT") == "1"
IN_SUITE = 25 if LIGHT else 200
#: Seeded random orders of eight ranks; 100,000 take half an hour.
RUNS = int(os.environ.get("ROUNDS_RUNS", IN_SUITE))
SEED = int(os.environ.get("ROUNDS_SEED", "1"))

SAVE, STOP = "s", "c"  # a command's id begins with what it is
#: The coordinator's time before a time-out has passed, and after.
EARLY, LATE = 0.5, 2.0


def awaiting(calls: Any) -> tuple[str, ...]:
    """The commands that are finished when all ranks have reported."""
    return tuple(call[0] for call in calls if call[0].startswith(SAVE))


def outcome(rank: int, number: int) -> str:
    """What a rank answers when it applied a round; every second rank has nothing to tell."""
    return f"{rank}/{number}" if rank % 2 == 0 else ""


# Objects as values...


class Probe(Participant):
    """A participant that lets another thread in at the nth touch of what its training thread touches without a lock."""

    def __init__(self, rank: int, step: int = 0) -> None:
        self.between: list[Callable[[], None] | None] = []
        super().__init__(rank, step)

    def _touch(self) -> None:
        if self.between and (step_in := self.between.pop()) is not None:
            self.between.clear()
            step_in()

    @property
    def step(self) -> int:
        self._touch()
        return self._step

    @step.setter
    def step(self, value: int) -> None:
        self._touch()
        self._step = value

    @property
    def must_wait(self) -> bool:
        self._touch()
        return self._must_wait

    @must_wait.setter
    def must_wait(self, value: bool) -> None:
        self._touch()
        self._must_wait = value

    def prepare_while(self, number: int, step: int, at: int) -> tuple[Ready, bool] | None:
        """Prepare on the receiver; at its nth touch the training thread ends a step. ``None``: there is no nth."""
        ticked = []
        self.between = [lambda: ticked.append(self.tick(step)), *[None] * at]
        answer = self.prepare(number)
        self.between.clear()
        return (answer, ticked[0]) if ticked else None

    def tick_while(self, number: int, step: int, at: int) -> tuple[Ready, bool] | None:
        """The other way round: a step ends, and at the nth touch of that the receiver is asked."""
        answers = []
        self.between = [lambda: answers.append(self.prepare(number)), *[None] * at]
        ticked = self.tick(step)
        self.between.clear()
        return (answers[0], ticked) if answers else None


def freeze(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return (type(value), tuple(sorted(value)))
    if isinstance(value, dict):
        return (dict, tuple(sorted((key, freeze(item)) for key, item in value.items())))
    if isinstance(value, list):
        return (list, tuple(value))
    if isinstance(value, Tally):
        return (Tally, tuple((name, freeze(item)) for name, item in vars(value).items()))
    return value


def thaw(value: Any) -> Any:
    if type(value) is tuple and len(value) == 2 and isinstance(value[0], type):
        kind, items = value
        if kind is Tally:
            tally = Tally()
            vars(tally).update((name, thaw(item)) for name, item in items)
            return tally
        return {key: thaw(item) for key, item in items} if kind is dict else kind(items)
    return value


class Values:
    """Objects of one class as numbers: each state of one has a number, and a call leads from number to number."""

    def __init__(self, kind: type) -> None:
        self._kind = kind
        self._numbers: dict[Any, int] = {}
        self._frozen: list[Any] = []
        self._calls: dict[Any, tuple[int, Any]] = {}
        self._facts: dict[Any, Any] = {}

    def number(self, thing: Any) -> int:
        settle(thing)
        frozen = tuple((name, freeze(value)) for name, value in vars(thing).items() if name != "between")
        if frozen not in self._numbers:
            self._numbers[frozen] = len(self._frozen)
            self._frozen.append(frozen)
        return self._numbers[frozen]

    def thing(self, number: int) -> Any:
        thing = object.__new__(self._kind)
        if issubclass(self._kind, Probe):
            thing.between = []
        vars(thing).update((name, thaw(value)) for name, value in self._frozen[number])
        return thing

    def call(self, number: int, method: str, *args: Any) -> tuple[int, Any]:
        key = (number, method, args)
        if key not in self._calls:
            thing = self.thing(number)
            answer = getattr(thing, method)(*args)
            answer = tuple(answer) if isinstance(answer, list) else answer
            self._calls[key] = self.number(thing), answer
        return self._calls[key]

    def ask(self, number: int, fact: Callable[[Any], Any]) -> Any:
        key = (number, fact)
        if key not in self._facts:
            self._facts[key] = fact(self.thing(number))
        return self._facts[key]


#: There are few states of a participant, however many worlds there are.
PARTICIPANTS = Values(Probe)


def settle(thing: Any) -> None:
    """Forget how far a deadline is: it has passed, or it has not, and any may pass at any moment."""
    if isinstance(thing, Coordinator):
        thing._deadline = EARLY + EARLY if thing._deadline > EARLY else 0.0
        thing._delay = limits.RETRY_DELAY


def undecided(participant: Participant) -> bool:
    return participant.undecided


def number_of(thing: Any) -> int:
    return thing.number


def owed(coordinator: Coordinator) -> bool:
    return coordinator.owed


def missing(coordinator: Coordinator) -> list[int]:
    return coordinator.missing


def silent(coordinator: Coordinator) -> tuple[int, ...]:
    return tuple(rank for rank in sorted(coordinator._ranks) if rank != 0 and coordinator.state(rank) == "silent")


def may_wait(coordinator: Coordinator) -> bool:
    return coordinator.delay(EARLY, True) is not None


# The whole...


class Rank(NamedTuple):
    """One rank. Its receiver and its sender each send to rank 0 in order, but not in step with each other."""

    participant: int
    mode: str = "run"  # run, held, ended, off (it gave up), dead; of rank 0 also closing and over
    passed: int = 0  # the clock of the last step end that is behind it
    steps: int = 0
    applied: tuple[tuple[int, int], ...] = ()  # (round, step)
    owes: tuple[str, ...] = ()  # commands that it applied and has not reported on
    reports: tuple[tuple[str, str], ...] = ()  # (command, "done" or "full", or how it left before: "left", "broken")
    inbox: tuple[Any, ...] = ()
    receiver: tuple[Any, ...] = ()
    sender: tuple[Any, ...] = ()
    giving: tuple[Any, ...] = ()  # the round that it gives up, and then the store's decision
    lost: bool = False  # its channel is closed

    @property
    def trains(self) -> bool:
        return self.mode in ("run", "held")

    def did(self, number: int) -> bool:
        return any(number == done for done, _ in self.applied)


class State(NamedTuple):
    """Everything. ``receiver`` and ``sender``: what those threads of rank 0 still have to do, the next at the end."""

    coordinator: int
    ranks: tuple[Rank, ...]
    decisions: tuple[Any, ...]  # by round - 1: (due, calls), or None
    queue: tuple[Any, ...] = ()
    unsent: tuple[Any, ...] = ()
    receiver: tuple[Any, ...] = ()
    sender: tuple[Any, ...] = ()
    says: tuple[Any, ...] = ()  # what rank 0's sender is to do next
    asked: tuple[Any, ...] = ()  # by round - 1
    log: tuple[Any, ...] = ()
    faults: int = 0

    def rank(self, index: int, **changes: Any) -> State:
        ranks = self.ranks
        return self._replace(ranks=(*ranks[:index], ranks[index]._replace(**changes), *ranks[index + 1 :]))


Moves = Iterator[tuple[str, State]]


class World:
    """What can happen to ``size`` ranks.

    Args:
        numbers: of the steps, as every rank counts them.
        submitted: commands, each at any moment.
        most: how many rounds there may be.
        faults: what may go wrong, ``harm`` times in all.
        early: whether ranks may end before the last step.
        late: whether time may be long, so that somebody's patience ends.
        split: whether anything may happen between two messages to different ranks.
        absent: whether ranks come in one by one.
    """

    def __init__(
        self,
        size: int,
        numbers: tuple[int, ...],
        submitted: tuple[str, ...],
        *,
        most: int = 1,
        faults: tuple[str, ...] = (),
        harm: int = 1,
        early: bool = False,
        late: bool = False,
        split: bool = False,
        absent: bool = False,
        raced: bool = True,
    ) -> None:
        self.size, self.numbers, self.most, self.faults = size, numbers, most, faults
        self.early, self.late, self.split, self.raced = early, late, split, raced
        self.participants, self.coordinators = PARTICIPANTS, Values(Coordinator)
        coordinator = Coordinator(size)
        ranks = [Rank(self.participants.number(Probe(rank))) for rank in range(size)]
        if absent:
            ranks = [rank._replace(sender=(Join(index, ()),)) for index, rank in enumerate(ranks)]
        else:
            for rank in range(size):
                coordinator.receive(Join(rank, {}))
        self.start = State(
            self.coordinators.number(coordinator),
            tuple(ranks),
            (None,) * most,
            unsent=tuple((name, name) for name in submitted),
            says=ranks[0].sender and (("msg", ranks[0].sender[0]),),
            asked=((),) * most,
            faults=harm if faults else 0,
        ).rank(0, sender=())
        self.actors: list[Callable[[State], Moves]] = [self.submit, self.own_receiver, self.own_sender]
        for rank in range(size):
            self.actors.append(functools.partial(self.train, rank=rank))
            if rank:
                self.actors.append(functools.partial(self.listen, rank=rank))
                self.actors.append(functools.partial(self.talk, rank=rank))

    def moves(self, state: State) -> Moves:
        """All that can happen next."""
        for actor in self.actors:
            yield from actor(state)

    # The training threads...

    def train(self, state: State, rank: int) -> Moves:
        me = state.ranks[rank]
        if me.mode == "run":
            yield from self._run(state, rank, me)
        elif me.mode == "held":
            yield from self._hold(state, rank, me)
        elif me.mode == "closing" and self._may_shut_down(state):
            yield (
                f"{rank} shuts the others down",
                state._replace(says=(*state.says, ("shutdown",), ("stop",))).rank(rank, mode="over"),
            )
        elif me.mode == "over" and me.lost and not state.receiver and not state.sender:
            yield f"{rank} is over", self._finish(state).rank(rank, mode="ended")
        if me.trains and state.faults and "dies" in self.faults:
            yield f"{rank} dies", state._replace(faults=state.faults - 1).rank(rank, mode="dead")

    def _may_shut_down(self, state: State) -> bool:
        """Rank 0 reports what it did itself, then waits for the others, but not for ever for a dead one."""
        if any(item[0] == "end" for item in state.says) or state.sender:
            return False
        return not self.coordinators.ask(state.coordinator, owed) or any(other.mode == "dead" for other in state.ranks)

    def _run(self, state: State, rank: int, me: Rank) -> Moves:
        if me.owes:
            yield f"{rank} has stored", self._report(state, rank, "done")
            if state.faults and "keeps not" in self.faults:
                yield f"{rank} could not store", self._report(state._replace(faults=state.faults - 1), rank, "full")
            if state.faults and "gives up" in self.faults:
                yield f"{rank} gives up", self._end(state._replace(faults=state.faults - 1), rank, "broken")
            if self.early:
                yield f"{rank} ends", self._end(state, rank, None)
            return
        if me.steps < len(self.numbers):
            participant, holds = self.participants.call(me.participant, "tick", self.numbers[me.steps])
            yield f"{rank} ends a step", self._ticked(state, rank, participant, holds)
        if me.steps == len(self.numbers) or self.early:
            yield f"{rank} ends", self._end(state, rank, None)
        if state.faults and "gives up" in self.faults:
            yield f"{rank} gives up", self._end(state._replace(faults=state.faults - 1), rank, "broken")

    def _ticked(self, state: State, rank: int, participant: int, holds: bool) -> State:
        steps = state.ranks[rank].steps + 1
        if holds:
            return state.rank(rank, participant=participant, steps=steps, mode="held")
        return self._pass(state.rank(rank, participant=participant, steps=steps), rank)

    def _pass(self, state: State, rank: int) -> State:
        """A step end is behind a rank."""
        me = state.ranks[rank]
        clock = self.participants.thing(me.participant).step
        state = state.rank(rank, mode="run", passed=clock)
        assert self._none_passed(state), f"rank {rank} passes {clock}"
        return state

    def _none_passed(self, state: State) -> bool:
        """No rank is past the step of a round that it has not applied."""
        return all(
            me.did(number)
            for me in state.ranks
            if me.mode not in ("off", "dead")
            for number, decision in enumerate(state.decisions, 1)
            if decision is not None and decision[0] is not None and me.passed >= decision[0]
        )

    def _hold(self, state: State, rank: int, me: Rank) -> Moves:
        if self.participants.ask(me.participant, undecided):
            if self.late and not me.giving:
                number = self.participants.ask(me.participant, number_of)
                state = state.rank(rank, giving=(number,))
                says = (*state.says, ("give", number)) if rank == 0 else state.says
                yield f"{rank} loses patience", state._replace(says=says)
            return
        number = self.participants.ask(me.participant, number_of)
        participant, calls = self.participants.call(me.participant, "take")
        state = state.rank(rank, participant=participant)
        if not calls:
            yield f"{rank} goes on", self._pass(state, rank)
            return
        yield f"{rank} applies {number}", self._apply(state, rank, number, calls)
        if state.faults and "gives up" in self.faults:
            yield f"{rank} cannot apply", self._end(state._replace(faults=state.faults - 1), rank, "broken")

    def _apply(self, state: State, rank: int, number: int, calls: Any) -> State:
        me = state.ranks[rank]
        due, agreed = state.decisions[number - 1]
        clock = self.participants.thing(me.participant).step
        assert calls == agreed, "another list than agreed"
        assert not me.did(number), "a list is applied twice"
        assert me.passed < due <= clock, "not at the first step end at T"
        assert all(clock == at for other in state.ranks for done, at in other.applied if done == number), "not together"
        state = state.rank(rank, applied=(*me.applied, (number, clock)), owes=awaiting(calls))
        return self._pass(self._tell(state, rank, Applied(number, rank, outcome(rank, number))), rank)

    def _report(self, state: State, rank: int, how: str) -> State:
        for command in state.ranks[rank].owes:
            state = self._tell(state, rank, Reported(rank, command, how))
        return self._note_reports(state, rank, how)

    def _note_reports(self, state: State, rank: int, how: str) -> State:
        me = state.ranks[rank]
        return state.rank(rank, owes=(), reports=(*me.reports, *((command, how) for command in me.owes)))

    def _end(self, state: State, rank: int, fault: str | None) -> State:
        state = self._note_reports(state, rank, fault or "left")
        if rank == 0:
            return state._replace(says=(*state.says, ("end", fault))).rank(0, mode="closing")
        clock = self.participants.thing(state.ranks[rank].participant).step
        return self._tell(state, rank, Leave(rank, clock, fault)).rank(rank, mode="off" if fault else "ended")

    def _tell(self, state: State, rank: int, message: Any) -> State:
        if rank == 0:
            return state._replace(says=(*state.says, ("msg", message)))
        me = state.ranks[rank]
        return state if me.lost else state.rank(rank, sender=(*me.sender, message))

    # The receivers and senders of the other ranks...

    def listen(self, state: State, rank: int) -> Moves:
        me = state.ranks[rank]
        if not me.trains or me.lost or not me.inbox:
            return
        message, rest = me.inbox[0], me.inbox[1:]
        state = state.rank(rank, inbox=rest)
        if isinstance(message, Prepare):
            for what, after, answer in self._asked(state, rank, message.number):
                yield f"{rank} is asked{what}", after.rank(rank, receiver=(*me.receiver, answer))
        elif isinstance(message, Commit):
            participant, _ = self.participants.call(me.participant, "commit", message)
            yield f"{rank} hears {message}", state.rank(rank, participant=participant)
        else:
            yield f"{rank} is shut down", self._shut_down(state, rank)

    def _shut_down(self, state: State, rank: int) -> State:
        """Rank 0 has ended: a rank that waits for its decision reads what stands there, so that all obey the same."""
        participant = state.ranks[rank].participant
        if self.participants.ask(participant, undecided):
            number = self.participants.ask(participant, number_of)
            state, decision = self._decide(state, number, (None, ()))
            participant, _ = self.participants.call(participant, "commit", Commit(number, *decision))
        return state.rank(rank, participant=participant, lost=True)

    def _asked(self, state: State, rank: int, number: int) -> Iterator[tuple[str, State, Ready]]:
        """Asked, with the training thread in the middle of nothing, or ending a step meanwhile."""
        me = state.ranks[rank]
        participant, answer = self.participants.call(me.participant, "prepare", number)
        yield "", state.rank(rank, participant=participant), answer
        if not self.raced or me.mode != "run" or me.owes or me.steps >= len(self.numbers):
            return
        for method in ("prepare_while", "tick_while"):
            for at in range(10):
                participant, result = self.participants.call(me.participant, method, number, self.numbers[me.steps], at)
                if result is None:
                    break
                answer, holds = result
                yield f" ({method} {at})", self._ticked(state, rank, participant, holds), answer

    def talk(self, state: State, rank: int) -> Moves:
        me = state.ranks[rank]
        if not me.giving or me.mode == "dead" or me.lost:
            return
        if len(me.giving) == 1:
            state, (due, calls) = self._decide(state, me.giving[0], (None, ()))
            yield f"{rank} proposes off", state.rank(rank, giving=(me.giving[0], due, calls))
        else:
            participant, _ = self.participants.call(me.participant, "commit", Commit(*me.giving))
            yield f"{rank} learns {me.giving}", state.rank(rank, participant=participant, giving=())

    # The store...

    def _decide(self, state: State, number: int, mine: Any) -> tuple[State, Any]:
        """Compare and set."""
        decisions = state.decisions
        if decisions[number - 1] is None:
            state = state._replace(decisions=(*decisions[: number - 1], mine, *decisions[number:]))
            assert self._none_passed(state), "decided for a step that a rank has passed"
        return state, state.decisions[number - 1]

    # Rank 0's server, receiver and sender...

    def submit(self, state: State) -> Moves:
        if state.unsent and state.ranks[0].mode != "dead" and not state.ranks[0].lost:
            state = state._replace(
                queue=(*state.queue, state.unsent[0]), unsent=state.unsent[1:], says=(*state.says, ("advance",))
            )
            yield "a command comes", state

    def own_receiver(self, state: State) -> Moves:
        if state.ranks[0].mode == "dead":
            return
        if state.receiver:
            yield from self._work(state, "receiver")
        elif not state.ranks[0].lost:
            for rank, other in enumerate(state.ranks):
                if other.receiver:
                    after = state.rank(rank, receiver=other.receiver[1:])
                    yield f"0 hears {other.receiver[0]}", self._tell_coordinator(after, "receiver", other.receiver[0])
                if other.sender:
                    after = state.rank(rank, sender=other.sender[1:])
                    yield f"0 hears {other.sender[0]}", self._tell_coordinator(after, "receiver", other.sender[0])

    def own_sender(self, state: State) -> Moves:
        if state.ranks[0].mode == "dead" or (state.ranks[0].lost and not state.sender):
            return
        if state.sender:
            yield from self._work(state, "sender")
        elif state.says:
            yield f"0 says {state.says[0]}", self._say(state._replace(says=state.says[1:]), state.says[0])
        elif self.late and self.coordinators.ask(state.coordinator, may_wait):
            yield from self._advance(state, "sender", LATE)

    def _say(self, state: State, item: Any) -> State:
        if item[0] == "msg":
            return self._tell_coordinator(state, "sender", item[1])
        if item[0] == "advance" or item[0] == "give":
            return state._replace(sender=(item,))
        if item[0] == "end":
            coordinator, _ = self.coordinators.call(state.coordinator, "close", item[1])
            return self._then(state._replace(coordinator=coordinator), "sender", ("advance",))
        if item[0] == "shutdown":
            return self._send(state, self.coordinators.ask(state.coordinator, silent), "over")
        return state.rank(0, lost=True)

    def _tell_coordinator(self, state: State, thread: str, message: Any) -> State:
        coordinator, _ = self.coordinators.call(state.coordinator, "receive", message)
        return self._then(state._replace(coordinator=coordinator), thread, ("advance",))

    def _then(self, state: State, thread: str, *todo: Any) -> State:
        """Have the thread do these next; but a look that finds nothing to do is over at once, to save states."""
        todo = (*getattr(state, thread), *reversed(todo))
        while todo and todo[-1] == ("advance",) and self._nothing_to_do(state):
            todo = todo[:-1]
        return state._replace(**{thread: todo})

    def _nothing_to_do(self, state: State) -> bool:
        if self.late and self.coordinators.ask(state.coordinator, may_wait):
            return False
        return self.coordinators.call(state.coordinator, *self._next(state, EARLY)) == (state.coordinator, ())

    def _next(self, state: State, now: float) -> tuple[Any, ...]:
        pending = bool(state.queue) and self.coordinators.ask(state.coordinator, number_of) < self.most
        return "next", now, pending

    def _work(self, state: State, thread: str) -> Moves:
        """The next thing that the thread has to do."""
        *rest, todo = getattr(state, thread)
        kind, *fields = todo
        state = state._replace(**{thread: tuple(rest)})
        if kind == "advance":
            yield from self._advance(state, thread, EARLY)
            if self.late and self.coordinators.ask(state.coordinator, may_wait):
                yield from self._advance(state, thread, LATE)
        elif kind == "post":
            yield f"0 posts {fields} ({thread})", self._post(state, thread, *fields)
        elif kind == "self" and isinstance(fields[0], Prepare):
            for what, after, answer in self._asked(state, 0, fields[0].number):
                yield f"0 asks itself{what}", self._tell_coordinator(after, thread, answer)
        elif kind == "self":
            participant, _ = self.participants.call(state.ranks[0].participant, "commit", fields[0])
            yield (
                f"0 tells itself {fields[0]}",
                self._then(state.rank(0, participant=participant), thread, ("advance",)),
            )
        elif kind == "propose":
            yield f"0 proposes {fields} ({thread})", self._propose(state, thread, *fields)
        elif kind == "decided":
            yield f"0 learns {fields} ({thread})", self._learn(state, thread, *fields)
        elif kind == "give":
            state, decision = self._decide(state, fields[0], (None, ()))
            yield "0 proposes off", self._then(state, thread, ("given", fields[0], *decision))
        else:
            participant, _ = self.participants.call(state.ranks[0].participant, "commit", Commit(*fields))
            yield f"0 learns {fields}", state.rank(0, participant=participant, giving=())

    def _advance(self, state: State, thread: str, now: float) -> Moves:
        coordinator, actions = self.coordinators.call(state.coordinator, *self._next(state, now))
        state = state._replace(coordinator=coordinator)
        when = ", late" if now == LATE else ""
        yield f"0 looks ({thread}): {actions}{when}", self._push(state, thread, actions, ("advance",))

    def _push(self, state: State, thread: str, actions: Any, *then: Any) -> State:
        todo: list[Any] = []
        for action in actions:
            if isinstance(action, Send):
                ending = any(item[0] == "end" for item in state.says)
                assert state.ranks[0].trains or ending, "a round begins though rank 0 has ended"
                heard = [me for me in state.ranks[1:] if me.mode == "off" and not me.sender]
                assert not heard, "a round begins though a rank trains on without control"
                todo.append(("post", *action))
            elif isinstance(action, consensus.Decide):
                todo.append(("propose", *action))
            else:
                state = self._log(state, action)
        return self._then(state, thread, *todo, *(then if actions else ()))

    def _post(self, state: State, thread: str, ranks: tuple[int, ...], message: Any) -> State:
        others = tuple(rank for rank in ranks if rank != 0)
        if isinstance(message, Prepare) and not state.asked[message.number - 1]:
            asked = state.asked
            asked = (*asked[: message.number - 1], ranks, *asked[message.number :])
            state = state._replace(asked=asked)
        if self.split and others:
            rest = tuple(rank for rank in ranks if rank != others[0])
            return self._then(self._send(state, others[:1], message), thread, ("post", rest, message))
        state = self._send(state, others, message)
        return self._then(state, thread, ("self", message)) if 0 in ranks else state

    def _send(self, state: State, ranks: tuple[int, ...], message: Any) -> State:
        for rank in ranks:
            other = state.ranks[rank]
            if other.trains and not other.lost:  # the others do not receive any more
                state = state.rank(rank, inbox=(*other.inbox, message))
        return state

    def _propose(self, state: State, thread: str, number: int, due: int | None) -> State:
        calls = state.queue if due is not None else ()
        if calls:
            state = state._replace(queue=())
        state, _ = self._decide(state, number, (due, calls) if calls else (None, ()))
        return self._then(state, thread, ("decided", number, calls))

    def _learn(self, state: State, thread: str, number: int, taken: Any) -> State:
        due, calls = state.decisions[number - 1]
        if due is None and taken:
            state = state._replace(queue=(*taken, *state.queue))
        coordinator, post = self.coordinators.call(
            state.coordinator, "decided", Commit(number, due, calls), awaiting(calls), EARLY
        )
        return self._then(state._replace(coordinator=coordinator), thread, ("post", *post))

    # What rank 0 reports of rounds...

    def _log(self, state: State, action: Any) -> State:
        assert all((type(said), said[0]) != (type(action), action[0]) for said in state.log), "said twice"
        if isinstance(action, AllApplied):
            self._check_applied(state, action)
        else:
            self._check_reported(state, action)
        return self._note(state, action)

    @staticmethod
    def _note(state: State, action: Any) -> State:
        return state._replace(log=(*state.log, action._replace(outcomes=freeze(action.outcomes))))

    @staticmethod
    def _check_applied(state: State, action: AllApplied) -> None:
        number, outcomes, fault = action
        asked = {rank: state.ranks[rank] for rank in state.asked[number - 1]}
        idle = [me for me in asked.values() if not me.did(number)]
        assert all(me.mode in ("ended", "off") for me in idle), "applied, but not by all"
        assert (fault is not None) == any(me.mode == "off" for me in idle), f"applied with the fault {fault}"
        done = {rank: outcome(rank, number) for rank, me in asked.items() if me.did(number)}
        assert outcomes == {rank: what for rank, what in done.items() if what}, f"applied with {outcomes}"

    @staticmethod
    def _check_reported(state: State, action: AllReported) -> None:
        command, outcomes, fault = action
        (number,) = (
            number
            for number, decision in enumerate(state.decisions, 1)
            if decision is not None and decision[0] is not None and command in awaiting(decision[1])
        )
        assert any(type(said) is AllApplied and said.number == number for said in state.log), "reported, not applied"
        expected: dict[int, Any] = {}
        failed = False
        for rank in state.asked[number - 1]:
            me = state.ranks[rank]
            how = dict(me.reports).get(command)
            assert how is not None or me.mode in ("ended", "off"), "reported, but not by all"
            if how in ("done", "full"):
                expected[rank] = how
            elif how == "left":
                expected[rank] = {}
            elif how is None and me.mode == "ended":  # it owed a report only if it ended after T was proposed
                expected.update({rank: {}} if rank in outcomes else {})
            else:
                failed = True
        assert outcomes == expected and (fault is not None) == failed, f"reported with {outcomes} and {fault}"

    def _finish(self, state: State) -> State:
        """As ``CoordinatorGroup`` does when rank 0 has waited long enough for the ranks that owe it something."""
        missing_now = self.coordinators.ask(state.coordinator, missing)
        assert bool(missing_now) == self.coordinators.ask(state.coordinator, owed)
        if not missing_now:
            return state
        assert any(other.mode == "dead" for other in state.ranks), "rank 0 ended before the others could report"
        coordinator, actions = self.coordinators.call(state.coordinator, "lose", "missing")
        state = state._replace(coordinator=coordinator)
        for action in actions:
            assert action.fault is not None
            state = self._note(state, action)
        return state

    # When nothing can happen any more...

    def check_end(self, state: State) -> None:
        assert all(me.mode in ("ended", "off", "dead") for me in state.ranks), "a rank waits for ever"
        first = state.ranks[0]
        for number, decision in enumerate(state.decisions, 1):
            if decision is None or decision[0] is None:
                continue
            self._check_round(state, number, awaiting(decision[1]), first)
        if first.mode == "dead":
            return
        agreed = [call for decision in state.decisions if decision and decision[0] is not None for call in decision[1]]
        everything = sorted([*agreed, *state.queue, *state.unsent])
        assert everything == sorted(self.start.unsent), "a command is lost, or comes twice"

    def _check_round(self, state: State, number: int, commands: tuple[str, ...], first: Rank) -> None:
        if first.mode == "dead" or not first.did(number):
            return
        assert any(type(said) is AllApplied and said.number == number for said in state.log), "never called applied"
        reported = {said.command_id for said in state.log if type(said) is AllReported}
        assert reported.issuperset(commands), "never called reported"


def explore(world: World) -> int:
    """Every order; the number of states. A promise that is broken names the way there."""
    seen = {hash(world.start)}
    path: list[str] = []
    stack = [world.moves(world.start)]
    ends = 0
    while stack:
        try:
            label, state = next(stack[-1], (None, None))
            if state is None:
                stack.pop()
                if path:
                    path.pop()
                continue
            mark = hash(state)
            if mark in seen:
                continue
            seen.add(mark)
            following = world.moves(state)
            first = next(following, None)
            if first is None:
                world.check_end(state)
                ends += 1
                continue
        except AssertionError as err:
            raise AssertionError("\n".join([*path, f"{label} ...", str(err)])) from err
        path.append(label or "")
        stack.append(itertools.chain([first], following))
    assert ends
    return len(seen)


# The tests...

HARM = ("gives up", "keeps not")
NUMBERS = [tuple(range(1, 13)), tuple(range(10, 90, 10)), (1, 2, 3, 4, 1, 2, 3, 4), (7, 9), (5, 5, 3, 20, 21)]

WORLDS: dict[str, Callable[[], World]] = {
    "numbers that jump, ends at any step": lambda: World(2, (10, 20, 30), ("s",), early=True),
    "impatience": lambda: World(2, (1,), ("s",), early=True, late=True, split=True),
    "a rank that gives up, and impatience": lambda: World(2, (1,), ("s",), faults=HARM, late=True),
    "a rank that dies": lambda: World(2, (1,), ("c",), faults=("dies",), late=True),
    "two rounds, numbers that begin anew": lambda: World(2, (1, 1), ("s", "c"), most=2),
    "ranks that come one by one": lambda: World(2, (1, 2), ("s",), absent=True),
    "three ranks": lambda: World(3, (1,), ("c",)),
}
#: These take minutes each, and only where RUNS asks for more than the suite does.
LONG: dict[str, Callable[[], World]] = {
    "two steps and impatience": lambda: World(2, (1, 2), ("s",), early=True, late=True, split=True),
    "two rounds and impatience": lambda: World(2, (1,), ("c", "c"), most=2, late=True),
    "two rounds and a rank that gives up": lambda: World(2, (1, 2), ("s", "c"), most=2, faults=HARM),
    "two steps of three ranks": lambda: World(3, (1, 2), ("s",)),
    "three ranks, one of which gives up": lambda: World(3, (1,), ("s",), faults=HARM),
    "three ranks and impatience": lambda: World(3, (1,), ("c",), late=True),
}
if RUNS > IN_SUITE:
    WORLDS.update(LONG)
elif LIGHT:
    WORLDS = {name: WORLDS[name] for name in ("three ranks",)}


@pytest.mark.once
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", WORLDS)
def test_every_order(name):
    """Whatever the order, all apply the same at the same step, no rank waits for ever, and no command is lost."""
    assert explore(WORLDS[name]()) > 5000


class Walk:
    """One random order, in which some threads are slower than others by far."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        choose = self.random.choice
        self.world = World(
            8,
            choose(NUMBERS),
            tuple(choose([f"s{number}", f"c{number}"]) for number in range(self.random.randint(1, 4))),
            most=3,
            faults=choose([(), (*HARM, "dies"), HARM[:1], ("dies",)]),
            harm=choose([1, 2, 4]),
            early=choose([False, True]),
            late=True,
            split=True,
            absent=choose([False, True]),
        )
        weights = [10 ** self.random.uniform(-2, 0) for _ in self.world.actors]
        pace = choose([0.003, 0.03, 0.3])  # of training, compared with messages
        for index, actor in enumerate(self.world.actors):
            if getattr(actor, "func", None) == self.world.train:
                weights[index] *= pace
        self.actors = list(range(len(weights)))
        self.random.shuffle(self.actors)
        self.weights = list(itertools.accumulate(weights[actor] for actor in self.actors))
        self.late = choose([0.0, 0.0, 0.001, 0.01, 0.1])  # how soon a time-out passes
        self.harm = choose([0.001, 0.01, 0.05])  # or ends, or is hurt
        self.path: list[str] = []

    def to_the_end(self) -> State:
        """Until nothing can happen any more."""
        state = self.world.start
        while (move := self._move(state)) is not None:
            self.path.append(move[0])
            state = move[1]
        self.world.check_end(state)
        return state

    def _move(self, state: State) -> tuple[str, State] | None:
        tried: set[int] = set()
        kept_back = None
        for actor in [*self.random.choices(self.actors, cum_weights=self.weights, k=20), *self.actors]:
            if actor in tried:
                continue
            tried.add(actor)
            moves = list(self.world.actors[actor](state))
            for words, chance in ((LATE_WORDS, self.late), (HARM_WORDS, self.harm)):
                if moves and self.random.random() >= chance:
                    kept_back = next((move for move in moves if move[0].endswith(words)), kept_back)
                    moves = [move for move in moves if not move[0].endswith(words)]
            if moves:
                return self.random.choice(moves)
        return kept_back


LATE_WORDS = ("patience", "late")
HARM_WORDS = ("ends", "gives up", "cannot apply", "could not store", "dies")


@pytest.mark.timeout(7200)
def test_random_orders_of_eight_ranks():
    """The same of eight ranks; and all that may become of a round does."""
    became: Counter[str] = Counter()
    for seed in range(SEED, SEED + RUNS):
        walk = Walk(seed)
        try:
            state = walk.to_the_end()
        except AssertionError as err:
            raise AssertionError("\n".join([*walk.path, f"seed {seed}: {err}"])) from err
        became.update(f"{type(said).__name__}, {said.fault and 'not by all'}" for said in state.log)
        for number, decision in enumerate(state.decisions, 1):
            if decision is not None:
                by = sum(rank.did(number) for rank in state.ranks)
                became["off" if decision[0] is None else "by all" if by == 8 else "by some" if by else "by none"] += 1
    assert LIGHT or (min(became.values()) >= 5 and len(became) == 8), became


# One thing at a time...


def coordinator(size: int = 2) -> Coordinator:
    """One that all ranks have joined."""
    made = Coordinator(size)
    for rank in range(size):
        made.receive(Join(rank, {}))
    return made


def decide(of: Coordinator, *steps: int, awaiting: Any = (), now: float = 0.0) -> int:
    """Hold a round in which all ranks are ready, and let what is proposed stand; T."""
    (prepare,) = of.next(now, True)
    assert prepare == Send(tuple(range(len(steps))), Prepare(of.number))
    for rank, step in enumerate(steps):
        assert of.next(now, True) == []
        of.receive(Ready(of.number, rank, step))
    ((number, due),) = of.next(now, True)
    assert of.decided(Commit(number, due, []), awaiting, now) == Send(prepare.ranks, Commit(number, due, []))
    return due


def test_a_step_only_grows():
    """Steps that jump are the clock; those that repeat or begin anew count on from it."""
    participant = Participant(0, 3)
    clocks = []
    for step in (4, 10, 20, 1, 2, 25, 25, -5):
        assert participant.tick(step) is False
        clocks.append(participant.step)
    assert clocks == [4, 10, 20, 21, 22, 25, 26, 27]


def test_a_member_holds_until_it_knows():
    """From the question to the decision; and then once more, where the list is due."""
    participant = Participant(1)
    assert (participant.prepare(1), participant.tick(1), participant.undecided, participant.take()) == (
        Ready(1, 1, 0),
        True,
        True,
        None,
    )
    participant.commit(Commit(1, 3, [["a"]]))
    assert (participant.undecided, participant.take(), participant.tick(2), participant.take()) == (
        False,
        None,
        True,
        None,
    )
    assert (participant.tick(3), participant.take(), participant.take(), participant.tick(4)) == (
        True,
        [["a"]],
        None,
        False,
    )


def test_what_comes_late_or_twice():
    """A decision that is known, an old one, an old question: nothing changes."""
    participant = Participant(0)
    for _ in range(2):
        participant.prepare(1)
        participant.commit(Commit(1, None, []))
    assert (participant.must_wait, participant.prepare(2), participant.undecided) == (False, Ready(2, 0, 0), True)
    participant.commit(Commit(1, 5, [["old"]]))
    assert participant.undecided
    participant.commit(Commit(2, 1, [["new"]]))
    participant.commit(Commit(2, None, []))
    participant.prepare(1)
    assert (participant.tick(1), participant.take(), participant.must_wait) == (True, [["new"]], False)


def test_a_round_that_is_off_before_it_is_asked():
    """Both of rank 0's threads send, so the Commit may overtake the Prepare, which then holds no rank."""
    participant = Participant(0)
    participant.commit(Commit(1, None, []))
    participant.prepare(1)
    assert not participant.tick(1) and not participant.undecided
    participant.prepare(2)
    participant.commit(Commit(3, None, []))
    participant.prepare(3)
    assert not participant.tick(2) and not participant.undecided


def test_no_round_begins_before_all_have_joined():
    """Not even then, if nothing is pending."""
    made = Coordinator(2)
    made.receive(Join(0, {}))
    assert (made.next(0.0, True), made.delay(0.0, True), made.state(1), made.absent) == (
        [],
        None,
        "never joined",
        [1],
    )
    made.receive(Join(1, {}))
    assert (made.next(0.0, False), made.delay(0.0, False), made.state(1)) == ([], None, "silent")
    assert made.next(0.0, True) == [Send((0, 1), Prepare(1))]


def test_who_has_not_acknowledged():
    """From the decision until each rank has answered that it applied the commands, or has left."""
    made = coordinator(3)
    assert made.unacknowledged == []
    decide(made, 1, 2, 3)
    assert made.unacknowledged == [0, 1, 2]
    made.receive(Applied(1, 1, {}))
    made.receive(Leave(2, 5, None))
    assert made.unacknowledged == [0]
    made.receive(Applied(1, 0, {}))
    assert made.next(0.0, False) == [AllApplied(1, {}, None)] and made.unacknowledged == []


def test_the_step_is_past_all_answers():
    """Also past the last step of a rank that left: the others must not apply what it has passed."""
    made = coordinator(3)
    assert decide(made, 4, 9, 7) == 10
    made = coordinator(3)
    made.receive(Leave(2, 12, None))
    made.receive(Leave(1, 5, None))
    assert decide(made, 4) == 13
    made = coordinator(3)
    made.next(0.0, True)
    for rank, clock in enumerate((4, 9, 20)):
        made.receive(Ready(1, rank, clock))
    made.receive(Leave(2, 20, None))
    assert made.next(0.0, True) == [consensus.Decide(1, 21)]


def test_patience_and_pauses():
    """After a round that is off the next one waits, longer each time, up to a minute; a commit ends that."""
    made, now, pauses, held = coordinator(2), 0.0, [], []
    for _ in range(5):
        held.append(now)
        assert made.next(now, True) == [Send((0, 1), Prepare(made.number))]
        made.receive(Ready(made.number, 0, 0))
        assert (made.next(now + limits.READY_TIMEOUT - 0.01, True), made.delay(now, True)) == ([], limits.READY_TIMEOUT)
        now += limits.READY_TIMEOUT
        assert made.next(now, True) == [consensus.Decide(made.number, None)]
        made.decided(Commit(made.number, None, []), (), now)
        pauses.append(made.delay(now, True))
        assert made.next(now + pauses[-1] - 0.01, True) == [] and made.delay(now, False) is None
        now += pauses[-1]
    assert pauses == [1, 8, 60, 60, 60]
    # What docs/limits.md says of a rank that does not answer: each round holds the others until it is called off.
    assert limits.READY_TIMEOUT * sum(at < 60 for at in held) == 15
    assert min(later - earlier for earlier, later in itertools.pairwise(held[2:])) > 60
    assert decide(made, 0, 0, now=now) == 1
    made.receive(Applied(made.number, 0, {}))
    made.receive(Applied(made.number, 1, {}))
    assert made.next(now, True) == [AllApplied(6, {}, None), Send((0, 1), Prepare(7))]
    now += limits.READY_TIMEOUT
    assert made.next(now, True) == [consensus.Decide(made.number, None)]
    made.decided(Commit(made.number, None, []), (), now)
    assert made.delay(now, True) == 1


def test_an_answer_that_comes_too_late_counts_for_nothing():
    """Neither in its own round nor in the next one."""
    made = coordinator(2)
    made.next(0.0, True)
    made.receive(Ready(1, 0, 5))
    assert made.next(limits.READY_TIMEOUT, True) == [consensus.Decide(1, None)]
    made.decided(Commit(1, None, []), (), limits.READY_TIMEOUT)
    made.receive(Ready(1, 1, 50))
    assert made.next(100.0, True) == [Send((0, 1), Prepare(2))]
    made.receive(Ready(1, 1, 50))
    made.receive(Ready(2, 0, 6))
    assert made.next(100.0, True) == []
    made.receive(Ready(2, 1, 7))
    assert made.next(100.0, True) == [consensus.Decide(2, 8)]


def test_what_a_participant_does_before_the_decision_is_noted():
    """A rank that read it in the store may have applied it, or left by a fault, before the coordinator learns it."""
    made = coordinator(4)
    made.next(0.0, True)
    for rank in range(4):
        made.receive(Ready(1, rank, 0))
    assert made.next(0.0, True) == [consensus.Decide(1, 1)]
    made.receive(Applied(1, 1, {"id": "early"}))
    made.receive(Reported(1, "id", "full"))
    made.receive(Leave(2, 1, "broken"))
    made.receive(Leave(3, 1, None))
    made.decided(Commit(1, 1, []), ("id",), 0.0)
    made.receive(Reported(0, "id", "done"))
    assert made.next(0.0, True) == []
    made.receive(Applied(1, 0, {}))
    reported = AllReported("id", {0: "done", 1: "full", 3: {}}, "broken")
    assert made.next(0.0, True) == [AllApplied(1, {1: {"id": "early"}}, "broken"), reported]


def test_an_early_report_on_a_round_that_is_off():
    """It is dropped with the round, and does not count when the command is committed in a later one."""
    made = coordinator(2)
    made.next(0.0, True)
    made.receive(Reported(1, "id", "early"))  # nothing is committed: dropped at once
    made.receive(Ready(1, 0, 0))
    made.receive(Ready(1, 1, 0))
    assert made.next(0.0, True) == [consensus.Decide(1, 1)]
    made.receive(Reported(1, "id", "early"))
    made.decided(Commit(1, None, []), (), 0.0)
    decide(made, 0, 0, awaiting=("id",))
    for rank in range(2):
        made.receive(Applied(2, rank, {}))
    made.receive(Reported(0, "id", "done"))
    assert made.next(0.0, False) == [AllApplied(2, {}, None)] and made.missing == [1]


def test_outcomes_are_collected_by_rank():
    """Those that are empty are left out; a second answer of the same rank changes nothing."""
    made = coordinator(3)
    decide(made, 0, 0, 0)
    made.receive(Applied(1, 2, {"id": "two"}))
    made.receive(Applied(1, 0, {}))
    made.receive(Applied(1, 2, {"id": "again"}))
    assert made.next(0.0, False) == []
    made.receive(Applied(1, 1, {"id": "one"}))
    assert made.next(0.0, False) == [AllApplied(1, {2: {"id": "two"}, 1: {"id": "one"}}, None)]


def test_reports_outlive_their_round():
    """Those of several rounds are open at once; each command is completed, or spoilt, by itself."""
    made = coordinator(2)
    for name in ("one", "two"):
        decide(made, 0, 0, awaiting=(name,))
        for rank in range(2):
            made.receive(Applied(made.number, rank, {}))
        assert made.next(0.0, False) == [AllApplied(made.number, {}, None)]
    assert made.missing == [] and not made.owed
    made.receive(Reported(0, "two", {}))
    assert made.owed and made.missing == [1]
    made.receive(Reported(1, "one", {}))
    made.receive(Reported(1, "two", "full"))
    assert made.next(0.0, False) == [AllReported("two", {0: {}, 1: "full"}, None)]
    made.receive(Leave(1, 5, "it broke, but had reported"))
    made.receive(Reported(0, "one", "done"))
    assert made.next(0.0, False) == [AllReported("one", {1: {}, 0: "done"}, None)] and not made.owed


def test_commands_of_one_round_are_complete_one_by_one():
    """A rank that leaves as it should owes no more reports; one that leaves by a fault spoils those it owes."""
    made = coordinator(3)
    decide(made, 0, 0, 0, awaiting=("save", "profile"))
    for rank in range(3):
        made.receive(Applied(1, rank, {}))
        made.receive(Reported(rank, "save", rank))
    assert made.next(0.0, False) == [AllApplied(1, {}, None), AllReported("save", {0: 0, 1: 1, 2: 2}, None)]
    made.receive(Leave(1, 9, None))
    made.receive(Leave(2, 9, "it broke"))
    assert made.next(0.0, False) == []
    made.receive(Reported(0, "profile", "trace"))
    assert made.next(0.0, False) == [AllReported("profile", {1: {}, 0: "trace"}, "it broke")]


def test_the_end_of_rank_0():
    """A round that is not decided is off, and no other begins."""
    made = coordinator(2)
    made.next(0.0, True)
    made.close(None)
    assert made.owed and made.next(0.0, True) == [consensus.Decide(1, None)]
    made.decided(Commit(1, None, []), (), 0.0)
    assert made.next(1000.0, True) == [] and not made.owed


@pytest.mark.parametrize("fault", [None, "it broke"])
def test_rank_0_ends_with_reports_open(fault):
    """Its own are what a leaving rank's are; it waits for the others, but not for a round that it did not apply."""
    made = coordinator(2)
    decide(made, 0, 0, awaiting=("one",))
    for rank in range(2):
        made.receive(Applied(1, rank, {}))
    assert made.next(0.0, False) == [AllApplied(1, {}, None)]
    decide(made, 0, 0, awaiting=("two",))
    made.close(fault)
    assert made.missing == [1] and made.next(0.0, True) == []
    made.receive(Reported(1, "one", "done"))
    assert made.next(0.0, True) == [AllReported("one", {1: "done"} if fault else {0: {}, 1: "done"}, fault)]
    assert made.missing == [] and not made.owed


def test_a_lost_channel_fails_what_is_open():
    """Also a round whose decision arrives later; what was complete before stays so."""
    made = coordinator(2)
    decide(made, 0, 0, awaiting=("one",))
    for rank in range(2):
        made.receive(Applied(1, rank, {}))
    made.next(0.0, False)
    made.receive(Reported(0, "one", "done"))
    made.next(0.0, True)
    for rank in range(2):
        made.receive(Ready(2, rank, 0))
    assert made.next(0.0, True) == [consensus.Decide(2, 1)]
    assert made.lose("the store has gone") == [AllReported("one", {0: "done"}, "the store has gone")]
    made.decided(Commit(2, 1, []), ("two",), 0.0)
    failed = [AllApplied(2, {}, "the store has gone"), AllReported("two", {}, "the store has gone")]
    assert made.next(1000.0, True) == failed and made.next(1000.0, True) == [] and not made.owed


def test_a_fault_ends_all_agreement():
    """The round that is on is off, and no other begins."""
    made = coordinator(3)
    made.next(0.0, True)
    made.receive(Ready(1, 0, 0))
    made.receive(Leave(1, 0, "it broke"))
    assert made.next(0.0, True) == [consensus.Decide(1, None)]
    made.decided(Commit(1, None, []), (), 0.0)
    assert (made.next(1000.0, True), made.fault, made.state(1), made.state(2)) == (
        [],
        "it broke",
        "unknown",
        "silent",
    )


def test_only_the_first_leave_of_a_rank_counts():
    """A rank whose training has ended cannot lose control any more."""
    made = coordinator(3)
    made.receive(Leave(2, 7, None))
    made.receive(Leave(2, 7, "its channel broke as it was closed"))
    assert made.fault is None and decide(made, 0, 0) == 8


# Tallies...


def test_the_first_answer_of_each_rank_counts():
    """Later ones, and those of ranks that are not asked, change nothing."""
    tally = Tally((0, 2))
    tally.add(2, "two")
    tally.add(2, "again")
    tally.add(1, "one")
    assert (tally.missing, tally.answers) == ({0}, {2: "two"})


def test_a_dropped_rank_answers_nothing_or_is_at_fault():
    """The first fault stands; a rank that has answered is not at fault."""
    tally = Tally(range(4))
    tally.add(0, "done")
    tally.drop(0, "late fault")
    tally.drop(1, None)
    tally.drop(2, "it broke")
    tally.drop(3, "it broke, too")
    assert (tally.missing, tally.answers, tally.fault) == (set(), {0: "done", 1: {}}, "it broke")
    assert tally.ranks == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("due", "missed", "waits"),
    [(None, False, False), (7, False, True), (6, False, True), (5, True, False), (3, True, False)],
)
def test_a_decision_that_comes_after_the_rank_trained_on(due, missed, waits):
    """Off does no harm, a step ahead is kept, and one that was passed is missed, and not applied later."""
    participant = Participant(1)
    participant.tick(3)
    participant.prepare(1)
    participant.overrun()
    assert not participant.undecided and not participant.tick(4) and not participant.tick(5)
    assert participant.commit(consensus.Commit(1, due, [])) == missed
    assert participant.must_wait == waits and participant.tick(6) == waits
    assert (participant.take() is None) == (due != 6)
    assert not participant.commit(consensus.Commit(1, due, [])), "it is said once"


def test_a_new_round_says_that_an_overdue_one_was_off():
    """Else the others would still wait for this rank's answer."""
    participant = Participant(1)
    participant.prepare(1)
    participant.overrun()
    participant.prepare(2)
    assert not participant.commit(consensus.Commit(1, 9, []))
    assert participant.undecided and participant.number == 2


def decided_round(size, awaiting=()):
    """A coordinator whose first round is decided for step 1."""
    made = coordinator(size)
    made.next(0.0, True)
    for rank in range(size):
        made.receive(Ready(1, rank, 0))
    assert made.next(0.0, True) == [consensus.Decide(1, 1)]
    made.decided(Commit(1, 1, []), awaiting, 0.0)
    return made


def test_a_round_that_all_ranks_missed_is_tried_again():
    """Nothing was applied, so nothing is awaited, and the next round begins at once."""
    made = decided_round(2, ("one",))
    made.receive(Missed(1, 1))
    assert made.next(0.0, False) == [] and made.unacknowledged == [0]
    made.receive(Missed(1, 0))
    assert made.next(0.0, False) == [consensus.NoneApplied()] and (made.missing, made.owed) == ([], False)
    assert made.next(0.0, True) == [Send((0, 1), Prepare(2))] and made.fault is None


def test_a_round_that_one_rank_missed_is_the_last():
    """The others have done it: the command has failed, its reports come, and no round begins."""
    made = decided_round(3, ("one",))
    why = f"rank 1 got no answer from the store within {limits.GIVE_UP_TIMEOUT:g} s"
    for message in (Applied(1, 0, {}), Missed(1, 1), Missed(1, 1), Applied(1, 2, {})):
        made.receive(message)
    assert made.next(0.0, True) == [AllApplied(1, {}, why), consensus.Split(why)]
    for rank in (0, 2):
        made.receive(Reported(rank, "one", {}))
    assert made.next(100.0, True) == [AllReported("one", {0: {}, 2: {}}, why)] and made.fault == why


def test_a_rank_that_left_may_have_applied_what_the_others_missed():
    """It is not known that nobody did, so nothing is tried again."""
    made = decided_round(2)
    made.receive(Missed(1, 0))
    made.receive(Leave(1, 1, None))
    applied, split = made.next(0.0, True)
    assert "rank 0" in applied.fault and applied.fault == split.why
    assert made.next(100.0, True) == []


def test_a_miss_of_another_round_changes_nothing():
    """It comes late, or twice."""
    made = decided_round(1)
    made.receive(Missed(2, 0))
    made.receive(Applied(1, 0, {}))
    made.receive(Missed(1, 0))
    assert made.next(0.0, False)[0] == AllApplied(1, {}, None)
