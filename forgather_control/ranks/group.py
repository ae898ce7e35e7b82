"""What a job sees of its ranks, and the groups that need no channel between them.

A :class:`RankGroup` is one rank's view of all ranks; its callers never test whether anything is distributed:

* :class:`SingleProcess`: one rank, for which every agreement holds by itself;
* ``store_group.StoreGroup``: several ranks that agree over a store; an idle step costs nothing;
* :class:`PollingGroup`: several ranks without a usable store, which exchange messages every so many steps.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from .. import states
from ..deadline import Deadline
from ..errors import Unsupported
from ..wire.records import Outcome, ScheduledCommand
from . import failures, keys, limits, messages
from .messages import Join, Message, Reported, Request

#: Called with what the ranks reported on one command, by rank, and why not all ranks ever will, if so.
ReportCallback = Callable[[dict[int, Outcome], "str | None"], None]


class RankGroupDelegate(Protocol):
    """What a group asks of the job that it belongs to: of its controller. No method blocks or raises."""

    @property
    def pending(self) -> bool:
        """Whether commands wait to be applied. Any thread; rank 0."""

    def take(self) -> list[ScheduledCommand]:
        """Take those commands. The thread that decides a round; rank 0."""

    def put_back(self, commands: list[ScheduledCommand]) -> None:
        """Queue them again, because the round was called off. As above."""

    def all_applied(
        self, commands: list[ScheduledCommand], step: int, outcomes: dict[int, dict[str, Outcome]], fault: str | None
    ) -> None:
        """All ranks applied them, with these non-empty outcomes, or a fault says why not all. Any thread; rank 0."""

    def awaits_report(self, name: str) -> bool:
        """Whether the command of this name is finished when all ranks have reported. Any thread; alike on all ranks."""

    def submit(self, command: str) -> None:
        """A signal on some rank asks for this command. Any thread, never inside a signal handler; rank 0."""

    def describe(self) -> dict[str, Any]:
        """What the other ranks are told of this process. The training thread, at the start; may raise."""

    def is_gone(self, rank: int) -> bool:
        """Whether the process of a rank is proven to have ended. The training thread; rank 0."""

    def answer(self, what: str) -> dict[str, Any]:
        """This rank's answer to a query. The receiver's thread; on rank 0 the server's."""

    def all_joined(self, descriptions: dict[int, dict[str, Any]]) -> None:
        """All ranks take part, or the description of one changed after that. Any thread; rank 0."""

    def answers_changed(self) -> None:
        """An answer to a query arrived. Any thread; rank 0."""

    def agreement_lost(self, why: str) -> None:
        """No command can be agreed on any more. Any thread; once."""


@dataclass
class RankQuery:
    """A query to all ranks; ``answers``, by rank, grow on the receiver's thread."""

    answers: dict[int, Any]


class RankGroup(ABC):
    """All ranks, seen from one of them. On the training thread, where nothing else is said."""

    def __init__(self, delegate: RankGroupDelegate, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._delegate = delegate
        self._started = False
        self._facts: dict[str, Any] = {}
        self._descriptions: dict[int, dict[str, Any]] = {}  # rank 0
        #: By command that awaits reports: the arguments of its callbacks. Rank 0.
        self._results: dict[str, Future[tuple[dict[int, Outcome], str | None]]] = {}

    @abstractmethod
    def start(self, fault: str | None = None) -> None:
        """Take part from now on; with a ``fault``, tell ranks that would wait for this one that it does not.

        Raises:
            Unsupported: ranks poll, and one of the others does not take part.
        """

    @abstractmethod
    def due(self, step: int) -> bool:
        """Return whether ``receive`` must be called. Every rank, at the end of every step; costs next to nothing."""

    @abstractmethod
    def receive(self, step: int) -> list[ScheduledCommand]:
        """Return the commands that all ranks apply after this step; often none."""

    @abstractmethod
    def applied(self, commands: list[ScheduledCommand], step: int, outcomes: dict[str, Outcome]) -> None:
        """Tell rank 0 that this rank applied them; ``outcomes``, by command id, are those that are not empty."""

    def interrupted(self, commands: list[ScheduledCommand], step: int, outcomes: dict[str, Outcome]) -> None:
        """As ``applied``, where this rank's training is about to end by an exception: it must not wait for others."""
        self.applied(commands, step, outcomes)

    def report(self, command_id: str, outcome: Outcome) -> None:
        """Tell rank 0 that this rank's part of a command that awaits reports is complete, or failed."""
        self._tell_coordinator(Reported(self.rank, command_id, outcome))

    def when_reported(self, command_id: str, callback: ReportCallback) -> None:
        """Call ``callback``, on any thread, once all ranks have reported on this command, or never will. Rank 0.

        After ``applied``. For a command that awaits no reports it is called at once, with ``({}, None)``.
        """
        result = self._results.get(command_id)
        if result is None:
            callback({}, None)
        else:
            result.add_done_callback(lambda done: callback(*done.result()))

    def describe(self, facts: dict[str, Any]) -> None:
        """Add facts to what rank 0 knows of this rank."""
        self._facts = {**self._facts, **facts}
        if self._started:
            self._tell_coordinator(Join(self.rank, self._facts))

    def command_queued(self) -> None:  # noqa: B027 - only some groups need to be told
        """Note that the delegate has a pending command. Any thread; rank 0."""

    def request(self, command: str) -> None:
        """Have rank 0 submit a command. Any rank, any thread; reentrant, so signal handlers may call it."""
        self._tell_coordinator(Request(command))

    def query(self, what: str) -> RankQuery:
        """Send a query to all ranks that can be reached. The server thread of rank 0."""
        return RankQuery({self.rank: self._delegate.answer(what)})

    def state(self, rank: int) -> states.RankState:
        """Return the state of a rank that did not answer a query. Rank 0, any thread."""
        return states.RANK_SILENT if rank == self.rank else states.RANK_UNKNOWN

    def not_joined(self) -> list[int]:
        """Return the ranks that never joined. Rank 0, any thread."""
        return []

    def unacknowledged(self) -> list[int]:
        """Return the ranks that may still be applying the last commands that rank 0 began. As above."""
        return [rank for rank in range(self.size) if rank != self.rank]

    def obstacle(self) -> str | None:
        """Return why no command can be agreed on until that changes; ``None`` if nothing is in the way. As above."""
        return None

    def description(self, rank: int) -> dict[str, Any]:
        """Return what a rank told of itself; nothing before it joined. Rank 0, any thread."""
        return self._descriptions.get(rank, {})

    @abstractmethod
    def close(self, seconds: float, fault: str | None = None) -> None:
        """Leave; rank 0 waits at most ``seconds`` for what others owe. ``fault`` says why, if training continues."""

    @abstractmethod
    def _tell_coordinator(self, message: Message) -> None:
        """Send a message to rank 0, without blocking. Any thread; reentrant."""

    def _awaiting(self, commands: list[ScheduledCommand]) -> list[str]:
        return [command.command_id for command in commands if self._delegate.awaits_report(command.name)]

    def _expect_reports(self, commands: list[ScheduledCommand]) -> list[str]:
        """Hold back the callbacks of those commands that await reports; return their ids."""
        awaiting = self._awaiting(commands)
        for command_id in awaiting:
            self._results.setdefault(command_id, Future())
        return awaiting

    def _complete(self, command_id: str, outcomes: dict[int, Outcome], fault: str | None) -> None:
        """Call the callbacks of a command, unless that was done, and keep its result for later ones. Any thread."""
        with suppress(InvalidStateError):
            self._results.setdefault(command_id, Future()).set_result((outcomes, fault))
        done = [each for each, result in list(self._results.items()) if result.done()]
        for oldest in done[: -limits.MAX_RESULTS]:
            self._results.pop(oldest, None)

    def _join(self, message: Join) -> None:
        self._descriptions = {**self._descriptions, message.rank: message.description}
        if len(self._descriptions) == self.size:
            self._delegate.all_joined(self._descriptions)


class PollingGroup(RankGroup):
    """Ranks that exchange messages every ``steps`` steps, as many as rank 0 was told.

    Args:
        exchange: sends a message, or ``None`` for none, to all ranks; returns the messages of all, by rank.
        store: in which a rank that ends leaves its last reports for rank 0; ``None``: there is none.
    """

    def __init__(
        self,
        delegate: RankGroupDelegate,
        rank: int,
        size: int,
        steps: int,
        exchange: Callable[[Any], dict[int, Any]],
        store: Any = None,
    ) -> None:
        super().__init__(delegate, rank, size)
        self._steps, self._count, self._exchange, self._store = steps, 0, exchange, store
        self._unsent: deque[Message] = deque()  # to rank 0
        self._reported: dict[str, dict[int, Outcome]] = {}  # by command that awaits reports, by rank; rank 0

    def start(self, fault: str | None = None) -> None:
        """Begin together: a rank that polls alone, or at other steps, would meet others in a collective of theirs."""
        try:
            if fault is None:
                self.describe(self._delegate.describe())
        except Exception as err:
            fault = str(err)
            raise
        finally:
            found = self._exchange({"fault": fault, "steps": self._steps, "facts": self._facts})
        faulty = [rank for rank, message in found.items() if message["fault"] is not None]
        if faulty and fault is None:
            raise Unsupported(failures.NOT_STARTED % ", ".join(map(str, faulty)))
        self._steps, self._started = found[0]["steps"], True
        for rank, message in found.items() if self.rank == 0 and fault is None else ():
            self._join(Join(rank, message["facts"]))

    def due(self, step: int) -> bool:
        self._count += 1
        return self._count % self._steps == 0

    def receive(self, step: int) -> list[ScheduledCommand]:
        """Poll: rank 0 sends the commands, the others their messages to rank 0. A collective on every rank."""
        unsent = [self._unsent.popleft() for _ in range(len(self._unsent))]
        if self.rank == 0:
            self._handle(unsent)
            found = self._exchange(self._delegate.take() or None)
        else:
            found = self._exchange([messages.encode(message) for message in unsent] or None)
        commands = [ScheduledCommand(*fields) for fields in found.pop(0, [])]
        if self.rank == 0:
            self._handle(messages.decode(fields) for sent in found.values() for fields in sent)
        return commands

    def _handle(self, sent: Iterable[Message]) -> None:
        for message in sent:
            match message:
                case Request(command):
                    self._delegate.submit(command)
                case Join():
                    self._join(message)
                case Reported(rank, command_id, outcome) if command_id in self._reported:
                    outcomes = self._reported[command_id]
                    outcomes.setdefault(rank, outcome)
                    if len(outcomes) == self.size:
                        self._complete(command_id, self._reported.pop(command_id), None)

    def applied(self, commands: list[ScheduledCommand], step: int, outcomes: dict[str, Outcome]) -> None:
        found = self._exchange(outcomes or None)  # all ranks have the commands, and apply them at this step
        if self.rank == 0:
            self._reported.update((command_id, {}) for command_id in self._expect_reports(commands))
            self._delegate.all_applied(commands, step, found, None)

    def interrupted(self, commands: list[ScheduledCommand], step: int, outcomes: dict[str, Outcome]) -> None:
        if self.size == 1:  # else the others are in the collective of ``applied``, which would wait for them
            self.applied(commands, step, outcomes)

    def close(self, seconds: float, fault: str | None = None) -> None:
        # No poll: it might wait for ranks that do not close.
        reports = [message for message in self._unsent if isinstance(message, Reported)]
        if self.rank == 0:
            self._handle(reports)
            self._await_reports(seconds if fault is None and self._store is not None else 0.0)
            for command_id, outcomes in self._reported.items():
                why = failures.control_failed(self.rank, fault) or failures.not_reported(self._missing())
                self._complete(command_id, outcomes, why)
        elif reports and self._store is not None:
            with suppress(RuntimeError):  # the store has gone; rank 0 waits only so long
                self._store.set(keys.reports(self.rank), json.dumps([messages.encode(report) for report in reports]))

    def _missing(self) -> list[int]:
        return [rank for rank in range(self.size) if any(rank not in known for known in self._reported.values())]

    def _await_reports(self, seconds: float) -> None:
        deadline, gone = Deadline(seconds), False
        while (missing := self._missing()) and not gone and not deadline.passed():
            time.sleep(limits.REPORTS_PERIOD)
            gone = all(map(self._delegate.is_gone, missing))  # before the last look
            for key in map(keys.reports, missing):
                if self._store.check([key]):
                    self._handle(map(messages.decode, json.loads(self._store.get(key))))
                    self._store.delete_key(key)

    def _tell_coordinator(self, message: Message) -> None:
        self._unsent.append(message)


class SingleProcess(PollingGroup):
    """One rank: what it holds all ranks hold, so nothing waits for the next poll."""

    def __init__(self, delegate: RankGroupDelegate) -> None:
        super().__init__(delegate, 0, 1, 1, lambda message: {} if message is None else {0: message})

    def due(self, step: int) -> bool:
        return self._delegate.pending or bool(self._unsent)

    def _tell_coordinator(self, message: Message) -> None:
        if isinstance(message, Request):
            super()._tell_coordinator(message)  # of a signal handler, whose interrupted thread may hold any lock
        else:
            self._handle([message])
