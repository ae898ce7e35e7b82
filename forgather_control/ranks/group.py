"""What a job sees of its ranks.

A :class:`RankGroup` is one rank's view of all ranks; its callers never test whether anything is distributed:

* ``polling_group.SingleProcess``: one rank, for which every agreement holds by itself;
* ``polling_group.PollingGroup``: several ranks without a usable store, which exchange messages every so many steps;
* ``store_group.StoreGroup``: several ranks that agree over a store; an idle step costs nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from .. import states
from ..wire.records import Outcome, ScheduledCommand
from . import limits
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

    def is_atomic(self, name: str) -> bool:
        """Whether all ranks carry out the command of this name, or none. As below."""

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

    @abstractmethod
    def settle(self) -> str | None:
        """Return why what the last command did must be undone on all ranks; ``None`` if all could do it.

        Every rank, after ``applied``, where that command is atomic. Holds training until that is known, boundedly.
        """

    @abstractmethod
    def hold(self, seconds: float) -> list[ScheduledCommand]:
        """Wait at most ``seconds`` for commands while training is paused on all ranks; return them, often none."""

    #: Why training cannot be paused; ``None`` if it can.
    no_hold: str | None = None

    @property
    def agrees(self) -> bool:
        """Whether commands can still reach all ranks."""
        return True

    @property
    def is_broken(self) -> bool:
        """Whether control has failed, so that no command will reach all ranks; not at the end of training."""
        return False

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
