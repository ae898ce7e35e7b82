"""Several ranks that agree over a store, by the rounds of ``consensus`` over the ``channel``.

The commands travel in the decision of the round itself, so there is no collective at all: no device is synchronised,
no stream or backend matters, and no rank waits for one that is elsewhere.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from typing import Any

from .. import states
from ..deadline import Deadline
from ..wire.records import Outcome, ScheduledCommand
from . import consensus, failures, keys, limits, messages
from .channel import Connect, StoreChannel, StoreSender
from .group import RankGroup, RankGroupDelegate, RankQuery
from .messages import Answer, Applied, Commit, Join, Leave, Message, Prepare, Query, Request

log = logging.getLogger("forgather_control")


class StoreGroup(RankGroup):
    """A rank of several that agree over a store; rank 0 has a :class:`CoordinatorGroup`.

    ``_lock`` guards the participant, the coordinator and ``_lost``; nothing is sent, and no method of ``delegate`` is
    called, while it is held. The training thread waits on it for a decision. ``connect`` is to the store that all ranks
    share, under keys that are private to this training run; training begins at ``step``.
    """

    def __init__(self, delegate: RankGroupDelegate, rank: int, size: int, connect: Connect, step: int) -> None:
        super().__init__(delegate, rank, size)
        self._lock = threading.Condition()
        self._participant = consensus.Participant(rank, step)
        self._channel = StoreChannel(connect, rank, self._on_message, self._on_idle, self._on_lost, self._on_end)
        self._join_by = time.monotonic() + limits.JOIN_TIMEOUT
        self._watches = False  # whether rank 0 joins; on one of the ranks, until that is known
        self._lost: str | None = None  # why this rank takes part no more
        self._agreement_lost = threading.Lock()  # acquired for good by the thread that tells the delegate so

    def start(self, fault: str | None = None) -> None:
        """Take part from now on. Without rank 0 the other ranks wait for nothing, because it begins no round."""
        if fault is not None:
            return
        facts = self._delegate.describe()  # may raise: before there are threads that would have to end
        self._channel.start()
        self._channel.post(self._enter)
        self._started = True
        self.describe({**facts, **self._facts})

    def due(self, step: int) -> bool:
        return self._participant.tick(step)

    def receive(self, step: int) -> list[ScheduledCommand]:
        """Hold until the round is decided; return its commands, if this is the step."""
        if not self._wait(limits.DECISION_TIMEOUT):
            self._channel.post(self._give_up)
            if not self._wait(limits.GIVE_UP_TIMEOUT):  # training goes before agreement
                why = failures.STORE_SILENT % (self.rank, limits.GIVE_UP_TIMEOUT)
                self._lose(why)
                self._channel.post(lambda sender: self._leave(why, sender))
                self._channel.close(0.0)
        with self._lock:
            return self._participant.take() or []

    def _wait(self, seconds: float) -> bool:
        with self._lock:
            return self._lock.wait_for(lambda: not self._participant.undecided, seconds)

    def applied(self, commands: list[ScheduledCommand], step: int, outcomes: dict[str, Outcome]) -> None:
        self._tell_coordinator(Applied(self._participant.number, self.rank, outcomes))

    def close(self, seconds: float, fault: str | None = None) -> None:
        self._channel.post(lambda sender: self._leave(failures.control_failed(self.rank, fault), sender))
        self._channel.close(limits.CLOSE_TIMEOUT)

    # On the threads of the channel...

    def _tell_coordinator(self, message: Message) -> None:
        self._channel.post(lambda sender: self._send((0,), message, sender))

    def _send(self, ranks: Collection[int], message: Message, sender: StoreSender) -> None:
        sender.send([rank for rank in ranks if rank != self.rank], messages.encode(message))
        if self.rank in ranks:
            self._handle(message, sender)

    def _on_message(self, fields: list[Any], sender: StoreSender) -> None:
        self._handle(messages.decode(fields), sender)
        self._on_idle(sender)

    def _handle(self, message: Message, sender: StoreSender) -> None:
        match message:
            case Prepare(number):
                with self._lock:
                    ready = None if self._lost else self._participant.prepare(number)
                if ready is not None:
                    self._send((0,), ready, sender)
            case Commit():
                self._commit(message)
            case Query(number, what):
                self._send((0,), Answer(number, self.rank, self._delegate.answer(what)), sender)
            case Leave():  # of rank 0: a held rank reads what stands in the store, so that all obey the same decision
                self._give_up(sender)
                with self._lock:
                    self._lost = self._lost or "rank 0 has ended"
                self._channel.close(0.0)

    def _commit(self, decision: Commit) -> None:
        with self._lock:
            self._participant.commit(decision)
            self._lock.notify_all()

    def _give_up(self, sender: StoreSender) -> None:
        """Propose to call off a round that holds this rank; all obey the first proposal, and this one reads it here."""
        if self._participant.undecided:
            self._commit(_propose(sender, self._participant.number))

    def _enter(self, sender: StoreSender) -> None:
        self._watches = sender.add(keys.JOINED, 1) == 1

    def _on_idle(self, sender: StoreSender) -> float | None:
        """Warn, on the first rank alone, if rank 0 never joined: then it has not read its first message."""
        delay = self._join_by - time.monotonic()
        if not self._watches or delay > 0:
            return delay if self._watches else None
        self._watches = False
        if sender.has(keys.message(0, 1)):
            log.warning(failures.NOT_JOINED, failures.not_joined([0]))
        return None

    def _on_end(self, received: int, sender: StoreSender) -> None:
        sender.add(keys.received(self.rank), received)
        if self.rank == 0:
            sender.add(keys.ROUNDS, self._participant.number)
        if sender.add(keys.LEFT, 1) == self.size:
            sender.sweep(self.size)

    def _on_lost(self, reason: str, sender: StoreSender) -> None:
        """On the thread that broke, whose own sender may still reach the store: a held rank reads the decision."""
        why = failures.LOST_CONNECTION % (self.rank, reason)
        with suppress(Exception):  # boundary: or it may not
            self._give_up(sender)
        self._lose(why)
        with suppress(Exception):  # boundary: as above
            self._leave(why, sender)

    def _lose(self, why: str) -> None:
        """Take part no more: this rank cannot be reached."""
        with self._lock:
            self._lost = self._lost or why
            self._participant.forget()
            self._lock.notify_all()
        self._lose_agreement(why)

    def _lose_agreement(self, why: str) -> None:
        if self._agreement_lost.acquire(blocking=False):
            self._delegate.agreement_lost(why)

    def _leave(self, why: str | None, sender: StoreSender) -> None:
        self._send((0,), Leave(self.rank, self._participant.step, why), sender)


class CoordinatorGroup(StoreGroup):
    """Rank 0: it also coordinates the rounds, driven by the messages to it and its clock, and sends the queries."""

    def __init__(self, delegate: RankGroupDelegate, rank: int, size: int, connect: Connect, step: int) -> None:
        super().__init__(delegate, rank, size, connect, step)
        self._coordinator = consensus.Coordinator(size)
        self._commands: list[ScheduledCommand] = []  # of the last committed round
        self._step = step  # at which rank 0 applied the last commands
        self._query_numbers = itertools.count(1)
        self._queries: weakref.WeakValueDictionary[int, RankQuery] = weakref.WeakValueDictionary()

    def applied(self, commands: list[ScheduledCommand], step: int, outcomes: dict[str, Outcome]) -> None:
        self._step = step
        self._expect_reports(commands)
        super().applied(commands, step, outcomes)

    def close(self, seconds: float, fault: str | None = None) -> None:
        """Begin no more rounds, and wait for what the other ranks owe; what they have not reported then has failed."""
        coordinator = self._coordinator
        self._channel.post(lambda sender: self._close_coordinator(fault))
        if self._holds(lambda: coordinator.closed, limits.CLOSE_TIMEOUT):  # else the store hangs
            deadline, gone = Deadline(seconds), False
            while not self._holds(lambda: not coordinator.owed, min(limits.LOOK_PERIOD, deadline.left() or 0.0)):
                if gone or deadline.passed():
                    break
                gone = bool(missing := self._missing()) and all(map(self._delegate.is_gone, missing))
        super().close(seconds, fault)
        missing = self._missing()
        why = self._lost or failures.not_reported(missing or range(1, self.size))
        if missing or self._lost:
            self._fail_missing(why)
        for command_id in list(self._results):
            self._complete(command_id, {}, why)

    def _missing(self) -> list[int]:
        with self._lock:
            return self._coordinator.missing

    def _holds(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Return whether that became true in time; also once nothing more is received."""
        with self._lock:
            return bool(self._lock.wait_for(lambda: self._lost or condition(), seconds))

    def command_queued(self) -> None:
        self._channel.post(lambda sender: None)  # ``_on_idle`` is called after each task

    def query(self, what: str) -> RankQuery:
        """Send a query to every rank that takes part; it answers on its receiver thread, whatever its training does."""
        query, number = super().query(what), next(self._query_numbers)
        self._queries[number] = query
        self._channel.post(lambda sender: self._send(self._others(), Query(number, what), sender))
        return query

    def state(self, rank: int) -> states.RankState:
        with self._lock:
            return self._coordinator.state(rank)

    def not_joined(self) -> list[int]:
        with self._lock:
            return self._coordinator.absent

    def unacknowledged(self) -> list[int]:
        with self._lock:
            return self._coordinator.unacknowledged

    def obstacle(self) -> str | None:
        missing = self.not_joined()
        return failures.not_joined(missing) if missing and time.monotonic() >= self._join_by else None

    def _others(self) -> list[int]:
        """The other ranks that take part."""
        return [rank for rank in range(1, self.size) if self.state(rank) == states.RANK_SILENT]

    # On the threads of the channel...

    def _handle(self, message: Message, sender: StoreSender) -> None:
        match message:
            case Request(command):
                self._delegate.submit(command)
            case Answer(number, rank, answer):
                if (query := self._queries.get(number)) is not None:
                    query.answers[rank] = answer
                    self._delegate.answers_changed()
            case Prepare() | Commit() | Query():
                super()._handle(message, sender)
            case _:
                with self._lock:
                    self._coordinator.receive(message)
        if isinstance(message, Join):
            self._channel.post(lambda sender: self._join(message))  # one thread, so that the last one stays the last
        elif isinstance(message, Leave) and message.fault is not None:
            self._lose_agreement(message.fault)

    def _lose(self, why: str) -> None:
        super()._lose(why)
        self._fail_missing(why)

    def _fail_missing(self, why: str) -> None:
        """Fail what is not known to be done by all ranks, because rank 0 receives nothing any more."""
        with self._lock:
            actions = self._coordinator.lose(why)
        for action in actions:
            self._tell(action)

    def _leave(self, why: str | None, sender: StoreSender) -> None:
        self._send(self._others(), Leave(self.rank, self._participant.step, why), sender)

    def _on_idle(self, sender: StoreSender) -> float | None:
        """Carry out the coordinator's actions; return the seconds after which a time-out may cause more."""
        while True:
            pending = self._delegate.pending
            with self._lock:
                now = time.monotonic()
                actions = self._coordinator.next(now, pending)
                delay = self._coordinator.delay(now, pending)
                self._lock.notify_all()  # close may wait for the event that came before
            if not actions:
                return delay
            self._carry_out(actions, sender)

    def _carry_out(self, actions: list[consensus.Action], sender: StoreSender) -> None:
        for action in actions:
            match action:
                case consensus.Send(ranks, message):
                    self._send(ranks, message, sender)
                    self.command_queued()  # the sender thread may have to wait for another deadline now
                case consensus.Decide(number, due):
                    self._decide(number, due, sender)
                case _:
                    self._tell(action)

    def _tell(self, action: consensus.Action) -> None:
        match action:
            case consensus.AllApplied(_, outcomes, fault):
                self._delegate.all_applied(self._commands, self._step, outcomes, fault)
            case consensus.AllReported():
                self._complete(*action)

    def _decide(self, number: int, due: int | None, sender: StoreSender) -> None:
        commands = self._delegate.take() if due is not None else []
        decision = None
        try:
            decision = _propose(sender, number, due if commands else None, commands)
        finally:  # also where the store has gone: they must not be lost
            if commands and (decision is None or decision.due is None):
                self._delegate.put_back(commands)
        awaiting = self._awaiting(decision.commands)
        with self._lock:
            self._commands = decision.commands
            send = self._coordinator.decided(decision, awaiting, time.monotonic())
        self._carry_out([send], sender)

    def _close_coordinator(self, fault: str | None) -> None:
        with self._lock:
            self._coordinator.close(failures.control_failed(self.rank, fault))


def _propose(sender: StoreSender, number: int, due: int | None = None, commands: Iterable[Any] = ()) -> Commit:
    """Propose a round's decision, "off" unless more is given; return the one that was proposed first."""
    return messages.decode_commit(number, *sender.decide(keys.decision(number), [due, list(commands)]))
