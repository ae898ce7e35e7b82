"""Rank 0 of several ranks that agree over a store."""

from __future__ import annotations

import itertools
import time
import weakref
from collections.abc import Callable

from .. import states
from ..deadline import Deadline
from ..wire.records import Outcome, ScheduledCommand
from . import consensus, failures, limits
from .channel import Connect, StoreSender
from .group import RankGroupDelegate, RankQuery
from .messages import Answer, Commit, Join, Leave, Message, Prepare, Query, Released, Request, Settled
from .store_group import StoreGroup, propose, settle


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
            state = self._coordinator.state(rank)
            return states.RANK_UNKNOWN if state == states.RANK_SILENT and self._lost is not None else state

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
        with self._lock:
            return [rank for rank in range(1, self.size) if self._coordinator.state(rank) == states.RANK_SILENT]

    # On the threads of the channel...

    def _handle(self, message: Message, sender: StoreSender) -> None:
        match message:
            case Request(command):
                self._delegate.submit(command)
            case Answer(number, rank, answer):
                if (query := self._queries.get(number)) is not None:
                    query.answers[rank] = answer
                    self._delegate.answers_changed()
            case Prepare() | Commit() | Settled() | Released() | Query():
                super()._handle(message, sender)
            case _:
                with self._lock:
                    self._coordinator.receive(message)
        if isinstance(message, Join):
            self._channel.post(lambda sender: self._join(message))  # one thread, so that the last one stays the last
        elif isinstance(message, Leave) and message.fault is not None:
            self._end_rounds(message.fault, sender)

    def _end_rounds(self, why: str, sender: StoreSender) -> None:
        self._lose_agreement(why)
        self._release()
        self._send(self._others(), Released(), sender)

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
                case consensus.AllApplied():
                    self._tell(self._judge(action, sender))
                case consensus.Split(why):
                    self._end_rounds(why, sender)
                case _:
                    self._tell(action)

    def _judge(self, done: consensus.AllApplied, sender: StoreSender) -> consensus.AllApplied:
        """Decide whether what the round did is kept, and tell all ranks, if its last command is atomic."""
        last = self._commands[-1]
        if not self._delegate.is_atomic(last.name):
            return done
        failed = [rank for rank, each in sorted(done.outcomes.items()) if "error" in each.get(last.command_id, {})]
        why = done.fault or (failures.NOT_DONE % ", ".join(map(str, failed)) if failed else None)
        stands = settle(sender, done.number, why)
        self._send((0, *self._others()), Settled(done.number, stands), sender)
        return done if failed else done._replace(fault=stands)

    def _tell(self, action: consensus.Action) -> None:
        match action:
            case consensus.AllApplied(_, outcomes, fault):
                self._delegate.all_applied(self._commands, self._step, outcomes, fault)
            case consensus.NoneApplied():
                self._delegate.put_back(self._commands)
            case consensus.AllReported():
                self._complete(*action)

    def _decide(self, number: int, due: int | None, sender: StoreSender) -> None:
        commands = self._delegate.take() if due is not None else []
        decision = None
        try:
            decision = propose(sender, number, due if commands else None, commands)
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
