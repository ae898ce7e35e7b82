"""Several ranks that agree over a store, by the rounds of ``consensus`` over the ``channel``.

The commands travel in the decision of the round itself, so there is no collective at all: no device is synchronised,
no stream or backend matters, and no rank waits for one that is elsewhere.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .. import states
from ..wire.records import Outcome, ScheduledCommand
from . import consensus, failures, keys, limits, messages
from .channel import StoreChannel, StoreSender
from .coordination import Coordination
from .group import RankGroupDelegate, RankQuery
from .messages import Answer, Applied, Commit, Join, Leave, Message, Prepare, Query, Reported, Request, Shutdown
from .report_callbacks import ReportCallback


class StoreGroup:
    """Several ranks that agree over a store.

    ``_lock`` guards the participant, the coordinator (rank 0 has one) and ``_lost``; nothing is sent, and no method of
    ``delegate`` is called, while it is held. The training thread waits on it for a decision.

    Args:
        connect: makes a connection to the store that all ranks share; its keys are private to this training run.
        step: where training begins.
    """

    def __init__(
        self, delegate: RankGroupDelegate, rank: int, size: int, connect: Callable[[], Any], step: int
    ) -> None:
        self.rank, self.size = rank, size
        self._delegate = delegate
        self._lock = threading.Condition()
        self._participant = consensus.Participant(rank, step)
        self._channel = StoreChannel(connect, rank, self._on_message, self._delay, self._on_idle, self._on_lost)
        self._coordination: Coordination | None = None
        if rank == 0:
            self._coordination = Coordination(
                delegate, size, self._lock, self._send, self._channel.post, self._lose_agreement
            )
        self._lost: str | None = None  # why this rank takes part no more
        self._agreement_lost = False  # and the delegate was told
        self._started = False
        self._description: dict[str, Any] = {}
        self._query_numbers = itertools.count(1)
        self._queries: weakref.WeakValueDictionary[int, RankQuery] = weakref.WeakValueDictionary()

    # On the training thread...

    def start(self, fault: str | None = None) -> None:
        """Take part from now on. Without rank 0 the other ranks wait for nothing, because it begins no round."""
        if fault is not None:
            return
        description = self._delegate.describe()  # may raise: before there are threads that would have to end
        self._channel.start()
        self._started = True
        self.describe({**description, **self._description})

    def describe(self, facts: dict[str, Any]) -> None:
        self._description = {**self._description, **facts}
        if self._started:
            self._tell_coordinator(Join(self.rank, self._description))

    def due(self, step: int) -> bool:
        """Return whether a round is on."""
        return self._participant.tick(step)

    def receive(self, step: int) -> list[ScheduledCommand]:
        """Hold until the round is decided; return its commands, if this is the step."""
        if not self._wait(limits.DECISION_TIMEOUT):
            number = self._participant.number
            self._channel.post(lambda sender: self._give_up(number, sender))
            if not self._wait(limits.GIVE_UP_TIMEOUT):  # training goes before agreement
                why = failures.store_silent(self.rank, limits.GIVE_UP_TIMEOUT)
                self._lose(why)
                self._channel.post(lambda sender: self._leave(why, sender))
                self._channel.close(0.0)
        with self._lock:
            return self._participant.take() or []

    def _wait(self, seconds: float) -> bool:
        with self._lock:
            return self._lock.wait_for(lambda: not self._participant.undecided, seconds)

    def applied(self, commands: list[ScheduledCommand], step: int, outcomes: dict[str, Outcome]) -> None:
        if self._coordination is not None:
            self._coordination.step = step
            for command in commands:
                if self._delegate.awaits_report(command.name):
                    self._coordination.callbacks.expect(command.command_id)
        self._tell_coordinator(Applied(self._participant.number, self.rank, outcomes))

    def report(self, command_id: str, outcome: Outcome) -> None:
        self._tell_coordinator(Reported(self.rank, command_id, outcome))

    def when_reported(self, command_id: str, callback: ReportCallback) -> None:
        assert self._coordination is not None
        self._coordination.callbacks.add(command_id, callback)

    def close(self, seconds: float, fault: str | None = None) -> None:
        why = None if fault is None else failures.control_failed(self.rank, fault)
        coordination = self._coordination
        if coordination is None:
            self._tell_coordinator(Leave(self.rank, self._participant.step, why))
            self._channel.close(seconds)
            return
        self._channel.post(lambda sender: coordination.close(why, sender))
        with self._lock:
            self._lock.wait_for(lambda: self._lost is not None or coordination.settled, seconds)
        self._channel.post(self._shut_down_others)
        self._channel.close(seconds)
        coordination.finish(self._lost)

    # On any thread...

    def command_queued(self) -> None:
        """Have a round begin."""
        self._channel.post(self._on_idle)

    def request(self, command: str) -> None:
        self._tell_coordinator(Request(command))

    def query(self, what: str) -> RankQuery:
        """Send a query to every rank that takes part; it answers on its receiver thread, whatever its training does."""
        query = RankQuery({self.rank: self._delegate.answer(what)})
        number = next(self._query_numbers)
        self._queries[number] = query
        ranks = self._others()
        message = messages.encode(Query(number, what))
        self._channel.post(lambda sender: sender.send(ranks, message))
        return query

    def state(self, rank: int) -> states.RankState:
        return states.RANK_SILENT if self._coordination is None else self._coordination.state(rank)

    def description(self, rank: int) -> dict[str, Any]:
        return {} if self._coordination is None else self._coordination.description(rank)

    # Messages, on the threads of the channel...

    def _tell_coordinator(self, message: Message) -> None:
        self._channel.post(lambda sender: self._send((0,), message, sender))

    def _send(self, ranks: tuple[int, ...], message: Message, sender: StoreSender) -> None:
        others = [rank for rank in ranks if rank != self.rank]
        if others:
            sender.send(others, messages.encode(message))
        if self.rank in ranks:
            self._handle(message, sender)

    def _on_message(self, fields: list[Any], sender: StoreSender) -> None:
        self._handle(messages.decode(fields), sender)

    def _handle(self, message: Message, sender: StoreSender) -> None:
        match message:
            case Prepare(number):
                self._prepare(number, sender)
            case Commit():
                self._commit(message)
            case Query(number, what):
                answer = Answer(number, self.rank, self._delegate.answer(what))
                sender.send([0], messages.encode(answer))
            case Answer():
                self._note_answer(message)
            case Request(command):
                self._delegate.submit(command)
            case Shutdown():
                self._on_shutdown(sender)
            case _:
                assert self._coordination is not None
                self._coordination.receive(message)
        self._on_idle(sender)

    def _prepare(self, number: int, sender: StoreSender) -> None:
        with self._lock:
            if self._lost is not None:
                return
            ready = self._participant.prepare(number)
        self._send((0,), ready, sender)

    def _commit(self, decision: Commit) -> None:
        with self._lock:
            self._participant.commit(decision)
            self._lock.notify_all()

    def _give_up(self, number: int, sender: StoreSender) -> None:
        """Propose to call the round off; all ranks obey the first proposal, and this one reads it here."""
        decision = sender.decide(keys.decision(number), [None, []])
        self._commit(messages.decode_decision(number, decision))

    def _note_answer(self, answer: Answer) -> None:
        query = self._queries.get(answer.number)
        if query is not None:
            query.answers[answer.rank] = answer.answer
            self._delegate.answers_changed()

    def _delay(self) -> float | None:
        return None if self._coordination is None else self._coordination.delay()

    def _on_idle(self, sender: StoreSender) -> None:
        if self._coordination is not None:
            self._coordination.advance(sender)

    # The end of rank 0, or of this rank's channel...

    def _shut_down_others(self, sender: StoreSender) -> None:
        sender.send(self._others(), messages.encode(Shutdown()))

    def _others(self) -> list[int]:
        """The other ranks that take part."""
        return [rank for rank in range(self.size) if rank != self.rank and self.state(rank) == states.RANK_SILENT]

    def _on_shutdown(self, sender: StoreSender) -> None:
        """Rank 0 has ended. A rank that is held for its decision reads what stands there, so that all obey the same."""
        if self._participant.undecided:
            self._give_up(self._participant.number, sender)
        with self._lock:
            self._lost = self._lost or "rank 0 has ended"
        self._channel.close(0.0)

    def _on_lost(self, reason: str, sender: StoreSender) -> None:
        """On the thread that broke, whose own sender may still reach the store: a held rank reads the decision."""
        why = failures.lost_connection(self.rank, reason)
        with suppress(Exception):  # boundary: or it may not
            if self._participant.undecided:
                self._give_up(self._participant.number, sender)
        self._lose(why)
        with suppress(Exception):  # boundary: as above
            self._leave(why, sender)

    def _lose(self, why: str) -> None:
        """Take part no more: this rank cannot be reached."""
        with self._lock:
            self._lost = self._lost or why
            self._participant.forget()
            self._lock.notify_all()
        if self._coordination is not None:
            self._coordination.lose(why)
        self._lose_agreement(why)

    def _lose_agreement(self, why: str) -> None:
        with self._lock:
            known, self._agreement_lost = self._agreement_lost, True
        if not known:
            self._delegate.agreement_lost(why)

    def _leave(self, why: str, sender: StoreSender) -> None:
        if self._coordination is not None:
            self._shut_down_others(sender)
        else:
            self._send((0,), Leave(self.rank, self._participant.step, why), sender)
