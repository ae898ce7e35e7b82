"""Rank 0's part of a store group: it carries out what the coordinator asks for.

Its methods run on the two threads of rank 0's channel, ``settled`` and ``finish`` on the training thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .. import states
from ..wire.records import ScheduledCommand
from . import consensus, failures, keys, messages
from .channel import StoreSender
from .group import RankGroupDelegate
from .messages import Applied, Commit, Join, Leave, Prepare, Ready, Reported
from .report_callbacks import ReportCallbacks


class Coordination:
    """The rounds of all ranks, driven by the messages and the clock of rank 0.

    Args:
        lock: guards the coordinator; nothing is sent, and no method of ``delegate`` is called, while it is held. It is
            notified after each event.
        send: sends a message to these ranks, rank 0 among them.
        post: has a task called on the channel's sender thread.
        on_fault: called with the reason when a rank left that trains on without control.
    """

    def __init__(
        self,
        delegate: RankGroupDelegate,
        size: int,
        lock: threading.Condition,
        send: Callable[[tuple[int, ...], Prepare | Commit, StoreSender], None],
        post: Callable[[Callable[[StoreSender], None]], None],
        on_fault: Callable[[str], None],
    ) -> None:
        self._delegate, self._size, self._lock = delegate, size, lock
        self._send, self._post, self._on_fault = send, post, on_fault
        self._coordinator = consensus.Coordinator(size)
        self._commands: list[ScheduledCommand] = []  # of the last committed round
        self._closed = False  # the coordinator is
        self._descriptions: dict[int, dict[str, Any]] = {}
        self.callbacks = ReportCallbacks()
        #: The step at which rank 0 applied the last commands.
        self.step = 0

    @contextmanager
    def _locked(self) -> Iterator[consensus.Coordinator]:
        with self._lock:
            yield self._coordinator
            self._lock.notify_all()

    # Events...

    def receive(self, message: Join | Ready | Applied | Reported | Leave) -> None:
        """Note what a rank sent."""
        with self._locked() as coordinator:
            coordinator.receive(message)
        if isinstance(message, Join):
            self._post(lambda sender: self._join(message))  # on one thread, so that the last description stays the last
        elif isinstance(message, Leave) and message.fault is not None:
            self._on_fault(message.fault)

    def _join(self, message: Join) -> None:
        self._descriptions = {**self._descriptions, message.rank: message.description}
        if len(self._descriptions) == self._size:
            self._delegate.all_joined(self._descriptions)

    def lose(self, why: str) -> None:
        """Rank 0 receives nothing any more: what is not known to be done by all ranks has failed."""
        with self._locked() as coordinator:
            coordinator.lose(why)
            actions = coordinator.completed()
        for action in actions:
            self._tell(action)

    # Rounds...

    def delay(self) -> float | None:
        """Return the seconds after which to call ``advance`` though nothing happened; ``None`` for never."""
        pending = self._delegate.pending
        with self._lock:
            return self._coordinator.delay(time.monotonic(), pending)

    def advance(self, sender: StoreSender) -> None:
        """Do what is to be done, until there is nothing."""
        while True:
            pending = self._delegate.pending
            with self._locked() as coordinator:
                actions = coordinator.next(time.monotonic(), pending)
            if not actions:
                return
            self._carry_out(actions, sender)

    def _carry_out(self, actions: list[consensus.Action], sender: StoreSender) -> None:
        for action in actions:
            if isinstance(action, consensus.Send):
                self._send(action.ranks, action.message, sender)
                self._post(lambda sender: None)  # after each task the sender thread calls ``delay`` anew
            elif isinstance(action, consensus.Decide):
                self._decide(action, sender)
            else:
                self._tell(action)

    def _tell(self, action: consensus.Action) -> None:
        if isinstance(action, consensus.AllApplied):
            self._delegate.all_applied(self._commands, self.step, action.outcomes, action.fault)
        elif isinstance(action, consensus.AllReported):
            self.callbacks.complete(*action)

    def _decide(self, proposal: consensus.Decide, sender: StoreSender) -> None:
        commands = self._delegate.take() if proposal.due is not None else []
        mine = [proposal.due, commands] if commands else [None, []]
        due = None
        try:
            due, agreed = sender.decide(keys.decision(proposal.number), mine)
        finally:  # also where the store has gone: they must not be lost
            if due is None and commands:
                self._delegate.put_back(commands)
        decision = messages.decode_decision(proposal.number, [due, agreed])
        awaiting = [command.command_id for command in decision.commands if self._delegate.awaits_report(command.name)]
        with self._locked() as coordinator:
            self._commands = decision.commands
            send = coordinator.decided(decision, awaiting, time.monotonic())
        self._carry_out([send], sender)

    # The end of rank 0...

    def close(self, fault: str | None, sender: StoreSender) -> None:
        """Begin no more rounds; rank 0 has reported all that it will."""
        with self._locked() as coordinator:
            actions = coordinator.close(fault)
        self._carry_out(actions, sender)
        self.advance(sender)
        with self._locked():
            self._closed = True

    @property
    def settled(self) -> bool:
        """Whether all that rank 0 did is known to be done by the other ranks. Under the lock."""
        return self._closed and not self._coordinator.owed

    def finish(self, lost: str | None) -> None:
        """Fail what other ranks have not reported by now, or cannot as the channel is lost. After it is closed."""
        missing = self._coordinator.missing
        why = lost or failures.not_reported(missing or range(1, self._size))
        if missing or lost:
            self.lose(why)
        self.callbacks.complete_all(why)

    # Ranks...

    def state(self, rank: int) -> states.RankState:
        """Return the state of a rank that did not answer."""
        with self._lock:
            return self._coordinator.state(rank)

    def description(self, rank: int) -> dict[str, Any]:
        """Return what a rank told of itself."""
        return self._descriptions.get(rank, {})
