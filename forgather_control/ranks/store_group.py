"""Several ranks that agree over a store, by the rounds of ``consensus`` over the ``channel``.

The commands travel in the decision of the round itself, so there is no collective at all: no device is synchronised,
no stream or backend matters, and no rank waits for one that is elsewhere.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import Any

from ..wire.records import Outcome, ScheduledCommand
from . import failures, keys, limits, messages
from .channel import Connect, StoreChannel, StoreSender
from .group import RankGroup, RankGroupDelegate
from .messages import Answer, Applied, Commit, Leave, Message, Missed, Prepare, Query, Released, Settled
from .participant import Participant

log = logging.getLogger("forgather_control")


class StoreGroup(RankGroup):
    """A rank of several that agree over a store; rank 0 has a ``CoordinatorGroup``.

    ``_lock`` guards the participant, the coordinator and ``_lost``; nothing is sent, and no method of ``delegate`` is
    called, while it is held. The training thread waits on it for a decision. ``connect`` is to the store that all ranks
    share, under keys that are private to this training run; training begins at ``step``.
    """

    def __init__(self, delegate: RankGroupDelegate, rank: int, size: int, connect: Connect, step: int) -> None:
        super().__init__(delegate, rank, size)
        self._lock = threading.Condition()
        self._participant = Participant(rank, step)
        self._channel = StoreChannel(connect, rank, self._on_message, self._on_idle, self._on_lost, self._on_end)
        self._join_by = time.monotonic() + limits.JOIN_TIMEOUT
        self._watches = False  # whether rank 0 joins; on one of the ranks, until that is known
        self._lost: str | None = None  # why this rank takes part no more
        self._released = False  # whether there will be no more rounds
        self._number = 0  # of the last round that this rank applied
        self._settled: tuple[int, str | None] = 0, None  # the last verdict, and of which round
        self._undone = 0  # the round that this rank undid before it knew the verdict
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
                with self._lock:
                    self._participant.overrun()
        with self._lock:
            return self._participant.take() or []

    def _wait(self, seconds: float) -> bool:
        with self._lock:
            return self._lock.wait_for(lambda: not self._participant.undecided, seconds)

    @property
    def agrees(self) -> bool:
        return self._lost is None and not self._released

    @property
    def is_broken(self) -> bool:
        return self._released or self._agreement_lost.locked()

    def hold(self, seconds: float) -> list[ScheduledCommand]:
        with self._lock:
            self._lock.wait_for(lambda: self._participant.is_decided or not self.agrees, seconds)
            return self._participant.skip() or []

    def applied(self, commands: list[ScheduledCommand], step: int, outcomes: dict[str, Outcome]) -> None:
        self._number = self._participant.number
        self._tell_coordinator(Applied(self._number, self.rank, outcomes))

    def settle(self) -> str | None:
        if not self._await_verdict(limits.SETTLE_TIMEOUT):
            self._channel.post(self._give_up_settling)
            if not self._await_verdict(limits.GIVE_UP_TIMEOUT):
                with self._lock:
                    self._undone = self._number
                return failures.STORE_SILENT % (self.rank, limits.GIVE_UP_TIMEOUT)
        with self._lock:
            number, why = self._settled
            return why if number == self._number else self._lost

    def _await_verdict(self, seconds: float) -> bool:
        with self._lock:
            return self._lock.wait_for(lambda: self._settled[0] == self._number or self._lost is not None, seconds)

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
                self._commit(message, sender)
            case Settled(number, why):
                self._note_verdict(number, why, sender)
            case Released():
                self._release()
            case Query(number, what):
                self._send((0,), Answer(number, self.rank, self._delegate.answer(what)), sender)
            case Leave():  # of rank 0: a held rank reads what stands in the store, so that all obey the same decision
                self._give_up(sender)
                with self._lock:
                    self._lost = self._lost or "rank 0 has ended"
                    self._lock.notify_all()
                self._channel.close(0.0)

    def _commit(self, decision: Commit, sender: StoreSender) -> None:
        with self._lock:
            missed = self._participant.commit(decision)
            self._lock.notify_all()
        if missed:
            self._send((0,), Missed(decision.number, self.rank), sender)

    def _give_up(self, sender: StoreSender) -> None:
        """Propose to call off a round that holds this rank; all obey the first proposal, and this one reads it here."""
        if self._participant.undecided or self._participant.overdue:
            self._commit(propose(sender, self._participant.number), sender)

    def _give_up_settling(self, sender: StoreSender) -> None:
        number = self._number
        self._note_verdict(number, settle(sender, number, failures.NOT_SETTLED % limits.SETTLE_TIMEOUT), sender)

    def _note_verdict(self, number: int, why: str | None, sender: StoreSender) -> None:
        with self._lock:
            self._settled = number, why
            differs = why is None and self._undone == number
            self._lock.notify_all()
        if differs:  # the others kept what this rank undid, as the store did not answer it in time
            why = failures.STORE_SILENT % (self.rank, limits.GIVE_UP_TIMEOUT)
            self._lose(why)
            self._leave(why, sender)
            self._channel.close(0.0)

    def _release(self) -> None:
        with self._lock:
            self._released = True
            self._lock.notify_all()

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


def settle(sender: StoreSender, number: int, why: str | None) -> str | None:
    """Propose to keep what a round did, or why not; return what was proposed first."""
    stands: str | None = sender.decide(keys.verdict(number), why)
    return stands


def propose(sender: StoreSender, number: int, due: int | None = None, commands: Iterable[Any] = ()) -> Commit:
    """Propose a round's decision, "off" unless more is given; return the one that was proposed first."""
    return messages.decode_commit(number, *sender.decide(keys.decision(number), [due, list(commands)]))
