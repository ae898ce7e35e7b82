"""Several ranks that agree by rounds over the line.

The commands travel in the decision of the round itself, so that there is no collective at all: no
device is synchronised, no stream or backend matters, and a rank that is elsewhere waits for nobody.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from .. import states
from ..wire import builtin
from . import consensus
from .channel import StoreChannel, StoreSender
from .consensus import Calls
from .group import Outcome, RankGroupDelegate, RankQuery

log = logging.getLogger("forgather_control")

#: Rounds that rank 0 remembers, for checkpoints that are still being written.
_ROUNDS: Final = 256


class StoreGroup:
    """Several ranks that agree over the line.

    ``_lock`` guards the participant, the coordinator (rank 0 has one) and what belongs to their rounds; nothing is
    sent, and no method of ``delegate`` is called, while it is held. The training thread waits on it for a decision.

    Args:
        connect: makes a connection to the store that all ranks share, private to this run.
        step: where training begins.
    """

    def __init__(
        self, delegate: RankGroupDelegate, rank: int, size: int, connect: Callable[[], Any], step: int
    ) -> None:
        self.rank, self.size = rank, size
        self._delegate = delegate
        self._lock = threading.Condition()
        self._participant = consensus.Participant(rank, step)
        self._coordinator = consensus.Coordinator(size) if rank == 0 else None
        self._line = StoreChannel(connect, rank, self._on_message, self._pause, self._advance, self._on_cut)
        self._cut: str | None = None
        self._saving: list[int] = []  # rounds whose checkpoint this rank has not reported; training thread only
        # Of rank 0...
        self._calls: dict[int, Calls] = {}  # of each decided round, until all is said
        self._ended = False  # all that this rank did is said
        self._step = 0  # at which this rank applied the last of them
        self._outcomes: dict[int, list[Outcome]] = {}
        self._stored: dict[int, str | None] = {}
        self._abouts: dict[int, dict[str, Any]] = {}
        self._questions = itertools.count(1)
        self._inquiries: weakref.WeakValueDictionary[int, RankQuery] = weakref.WeakValueDictionary()

    # On the training thread...

    def start(self, fault: str | None = None) -> None:
        """Take part from now on. Without rank 0 the others wait for nothing: it never asks."""
        if fault is not None:
            return
        here = consensus.Join(self.rank, self._delegate.describe())  # before there are threads that would have to end
        self._line.start()
        self._tell_coordinator(here)

    def due(self, step: int) -> bool:
        """Whether a round is on."""
        return self._participant.tick(step)

    def receive(self, step: int) -> Calls:
        """Hold until the round is decided; its commands, if this is the step."""
        if not self._wait(1.5 * consensus.PATIENCE):
            number = self._participant.number
            self._line.say(lambda voice: self._give_up(number, voice))
            if not self._wait(consensus.PATIENCE):
                self._lose("the store does not answer")  # training goes before agreement
                self._line.say(lambda voice: self._part("the store did not answer", voice))
                self._line.close(0.0)
        with self._lock:
            return self._participant.take() or []

    def _wait(self, seconds: float) -> bool:
        with self._lock:
            return self._lock.wait_for(lambda: not self._participant.undecided, seconds)

    def applied(self, calls: Calls, step: int) -> None:
        """Tell rank 0."""
        number = self._participant.number
        with self._lock:
            self._step = step
            self._calls.setdefault(number, calls)  # who gave the round up may know them before its coordinator does
        if _saves(calls):
            self._saving.append(number)
        self._tell_coordinator(consensus.Applied(number, self.rank))

    def kept(self, fault: str | None = None) -> None:
        """Tell rank 0, of all rounds that wait for it."""
        why = None if fault is None else f"rank {self.rank}: {fault}"
        for number in self._saving:
            self._tell_coordinator(consensus.Reported(number, self.rank, why))
        self._saving.clear()

    def settle(self, command_id: str, outcome: Outcome) -> None:
        """See ``RankGroup``; a command that no round carried is not held up by one."""
        with self._lock:
            numbers = (number for number, calls in self._calls.items() if any(call[0] == command_id for call in calls))
            number = next(numbers, None)
            if number is not None and number not in self._stored and _saves(self._calls[number]):
                self._outcomes.setdefault(number, []).append(outcome)
                return
            fault = None if number is None else self._stored.get(number)
        outcome(fault)

    def close(self, seconds: float, fault: str | None = None) -> None:
        """See ``RankGroup``."""
        self.kept(fault)
        if self._coordinator is None:
            fault = None if fault is None else f"rank {self.rank}: {fault}"
            self._tell_coordinator(consensus.Leave(self.rank, self._participant.step, fault))
        else:
            self._line.say(self._end_round)
            with self._lock:
                self._lock.wait_for(lambda: self._cut is not None or self._is_settled(), seconds)
            self._line.say(self._dismiss)
        self._line.close(seconds)
        self._name_missing()

    def _is_settled(self) -> bool:
        """Whether all that this rank did is said, by it and by the others."""
        return self._coordinator is not None and self._ended and not self._coordinator.owes

    # On any thread...

    def command_queued(self) -> None:
        """Have a round begin."""
        self._line.say(self._advance)

    def request(self, command: str) -> None:
        """Tell rank 0."""
        self._line.say(lambda voice: self._deliver(0, ["call", command], voice))

    def query(self, what: str) -> RankQuery:
        """Ask every rank that is there; it answers on its ear's thread, whatever its training does."""
        inquiry = RankQuery({self.rank: self._delegate.answer(what)})
        number = next(self._questions)
        self._inquiries[number] = inquiry
        present = self._others()
        message = ["question", number, what]
        self._line.say(lambda voice: voice.send(present, message))
        return inquiry

    def state(self, rank: int) -> str:
        """What is known of a rank that did not answer."""
        with self._lock:
            return states.RANK_SILENT if self._coordinator is None else self._coordinator.state(rank)

    def description(self, rank: int) -> dict[str, Any]:
        """What a rank said of its process."""
        return self._abouts.get(rank, {})

    # Messages, on the threads of the line...

    @contextmanager
    def _leading(self) -> Iterator[consensus.Coordinator]:
        """The coordinator, under the lock; whoever waits for it looks again."""
        assert self._coordinator is not None
        with self._lock:
            yield self._coordinator
            self._lock.notify_all()

    def _tell_coordinator(self, message: tuple[Any, ...]) -> None:
        self._line.say(lambda voice: self._deliver(0, _wire(message), voice))

    def _deliver(self, rank: int, message: list[Any], voice: StoreSender) -> None:
        if rank == self.rank:
            self._on_message(message, voice)
        else:
            voice.send([rank], message)

    def _on_message(self, message: list[Any], voice: StoreSender) -> None:
        kind, *fields = message
        _HANDLERS[kind](self, voice, *fields)
        if self._coordinator is not None:
            self._advance(voice)

    def _on_prepare(self, voice: StoreSender, number: int) -> None:
        with self._lock:
            if self._cut is not None:
                return
            answer = self._participant.prepare(number)
        self._deliver(0, _wire(answer), voice)

    def _on_commit(self, voice: StoreSender, number: int, due: int | None, calls: Calls) -> None:
        with self._lock:
            self._participant.commit(consensus.Commit(number, due, calls))
            self._lock.notify_all()

    def _on_ready(self, voice: StoreSender, *fields: Any) -> None:
        with self._leading() as coordinator:
            coordinator.ready(*fields)

    def _on_applied(self, voice: StoreSender, *fields: Any) -> None:
        with self._leading() as coordinator:
            coordinator.applied(*fields)

    def _on_reported(self, voice: StoreSender, *fields: Any) -> None:
        with self._leading() as coordinator:
            coordinator.reported(*fields)

    def _on_leave(self, voice: StoreSender, rank: int, step: int, fault: str | None) -> None:
        with self._leading() as coordinator:
            coordinator.leave(rank, step, fault)
        if fault is not None:
            self._delegate.agreement_lost(fault)

    def _on_join(self, voice: StoreSender, rank: int, about: dict[str, Any]) -> None:
        with self._leading() as coordinator:
            coordinator.join(rank)
        self._abouts[rank] = about
        if len(self._abouts) == self.size:
            self._delegate.all_joined(self._abouts)

    def _on_call(self, voice: StoreSender, command: str) -> None:
        self._delegate.submit(command)

    def _on_question(self, voice: StoreSender, number: int, what: str) -> None:
        voice.send([0], ["answer", number, self.rank, self._delegate.answer(what)])

    def _on_answer(self, voice: StoreSender, number: int, rank: int, answer: Any) -> None:
        inquiry = self._inquiries.get(number)
        if inquiry is not None:
            inquiry.answers[rank] = answer
            self._delegate.answers_changed()

    def _on_over(self, voice: StoreSender) -> None:
        """Rank 0 has ended. Who is held for its decision reads what stands there, so that all obey the same."""
        if self._participant.undecided:
            self._give_up(self._participant.number, voice)
        with self._lock:
            self._cut = self._cut or "rank 0 has ended"
        self._line.close(0.0)

    def _on_cut(self, why: str, voice: StoreSender) -> None:
        """On the thread that broke, whose own voice may still reach the store: who is held learns the decision."""
        with suppress(Exception):  # border: or it may not
            if self._participant.undecided:
                self._give_up(self._participant.number, voice)
        self._lose(why)
        with suppress(Exception):  # border: as above
            self._part(why, voice)

    def _lose(self, why: str) -> None:
        """Take part no more, as this rank cannot be reached."""
        with self._lock:
            self._cut = self._cut or why
            self._participant.forget()
            if self._coordinator is not None:
                self._coordinator.fault = self._coordinator.fault or why
            self._lock.notify_all()
        self._delegate.agreement_lost(why)
        self._blame(f"no rank can be asked any more: {why}")

    def _part(self, why: str, voice: StoreSender) -> None:
        if self._coordinator is not None:
            self._dismiss(voice)
        else:
            gone = consensus.Leave(self.rank, self._participant.step, f"rank {self.rank} is cut off: {why}")
            self._deliver(0, _wire(gone), voice)

    # Rounds, on the threads of the line...

    def _give_up(self, number: int, voice: StoreSender) -> None:
        self._on_commit(voice, number, *voice.decide(f"go/{number}", [None, []]))

    def _pause(self) -> float | None:
        if self._coordinator is None:
            return None
        with self._lock:
            return self._coordinator.wait(time.monotonic(), self._delegate.pending)

    def _advance(self, voice: StoreSender) -> None:
        """Do what is to be done, until there is nothing."""
        while True:
            with self._leading() as coordinator:
                actions = coordinator.next(time.monotonic(), self._delegate.pending)
            if not actions:
                return
            for action in actions:
                self._do(action, voice)

    def _do(self, action: consensus.Action, voice: StoreSender) -> None:
        if isinstance(action, consensus.Post):
            self._post(action, voice)
        elif isinstance(action, consensus.Propose):
            self._propose(action, voice)
        elif isinstance(action, consensus.AllApplied):
            self._delegate.all_applied(self._calls.get(action.number, []), self._step, action.fault)
        else:
            self._store(action.number, action.fault)

    def _store(self, number: int, fault: str | None) -> None:
        with self._lock:
            self._stored[number] = fault
            outcomes = self._outcomes.pop(number, [])
        for outcome in outcomes:
            outcome(fault)

    def _post(self, post: consensus.Post, voice: StoreSender) -> None:
        message = _wire(post.message)
        voice.send([rank for rank in post.ranks if rank != self.rank], message)
        if self.rank in post.ranks:
            self._on_message(message, voice)
        self._line.say(_look_at_the_clock)

    def _propose(self, proposal: consensus.Propose, voice: StoreSender) -> None:
        calls = self._delegate.take() if proposal.due is not None else []
        mine = [proposal.due, calls] if calls else [None, []]
        due, agreed = None, []
        try:
            due, agreed = voice.decide(f"go/{proposal.number}", mine)
        finally:  # where the store is gone, too, they must not be lost
            if due is None and calls:
                self._delegate.put_back(calls)
        with self._leading() as coordinator:
            self._calls[proposal.number] = agreed
            post = coordinator.decided(consensus.Commit(proposal.number, due, agreed), _saves(agreed), time.monotonic())
            self._forget_rounds(coordinator.number - _ROUNDS)
        self._post(post, voice)

    def _forget_rounds(self, up_to: int) -> None:
        for number in [number for number in self._calls if number <= up_to]:
            del self._calls[number]
            self._stored.pop(number, None)
            self._outcomes.pop(number, None)

    # The end of rank 0...

    def _end_round(self, voice: StoreSender) -> None:
        with self._leading() as coordinator:
            self._ended = True
            actions = coordinator.close()
        for action in actions:
            self._do(action, voice)

    def _dismiss(self, voice: StoreSender) -> None:
        voice.send(self._others(), ["over"])

    def _others(self) -> list[int]:
        """The ranks that take part, but for this one."""
        return [rank for rank in range(self.size) if rank != self.rank and self.state(rank) == states.RANK_SILENT]

    def _name_missing(self) -> None:
        """Whoever has not said that he did his part by now: what he owes is not done."""
        missing = self._coordinator.missing if self._coordinator is not None else []
        if missing:
            self._blame(f"rank {', '.join(map(str, missing))} did not say before rank 0 ended that it did its part")

    def _blame(self, fault: str) -> None:
        """What is not known to be done by all has failed."""
        coordinator = self._coordinator
        if coordinator is None:
            return
        if coordinator.is_going:
            self._delegate.all_applied(self._calls.get(coordinator.number, []), self._step, fault)
        for number in coordinator.keeping:
            self._store(number, fault)


def _saves(calls: Calls) -> bool:
    return any("saved" in builtin.BUILTIN[call[1]].finishes_when for call in calls)


def _wire(message: tuple[Any, ...]) -> list[Any]:
    """A message of ``rounds`` as it travels: its kind, then its fields."""
    return [type(message).__name__.lower(), *message]


def _look_at_the_clock(voice: StoreSender) -> None:
    """Nothing to say, but how long the mouth may wait has changed."""


_HANDLERS: Final[dict[str, Callable[..., None]]] = {
    "join": StoreGroup._on_join,
    "prepare": StoreGroup._on_prepare,
    "ready": StoreGroup._on_ready,
    "commit": StoreGroup._on_commit,
    "applied": StoreGroup._on_applied,
    "reported": StoreGroup._on_reported,
    "leave": StoreGroup._on_leave,
    "call": StoreGroup._on_call,
    "question": StoreGroup._on_question,
    "answer": StoreGroup._on_answer,
    "over": StoreGroup._on_over,
}
