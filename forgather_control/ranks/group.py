"""What a job sees of its ranks, and the groups that need no channel between them.

A :class:`RankGroup` is one rank's view of all ranks; its callers never test whether anything is distributed:

* :class:`SingleProcess`: one rank, for which every agreement holds by itself;
* ``store_group.StoreGroup``: several ranks that agree over a store; an idle step costs nothing;
* :class:`PollingGroup`: several ranks without a usable store, which exchange messages every so many steps.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

from .. import states
from ..errors import Unsupported
from ..wire.records import Outcome, ScheduledCommand
from . import failures, poll
from .report_callbacks import ReportCallback, ReportCallbacks
from .tally import Tally


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
        self,
        commands: list[ScheduledCommand],
        step: int,
        outcomes: dict[int, dict[str, Outcome]],
        fault: str | None,
    ) -> None:
        """All ranks applied them, or ``fault`` says why not all. Any thread; rank 0.

        Args:
            outcomes: by rank, then by command id; only those that are not empty.
        """

    def awaits_report(self, name: str) -> bool:
        """Whether the command of this name is finished when all ranks have reported. Any thread; alike on all ranks."""

    def submit(self, command: str) -> None:
        """A signal on some rank asks for this command. Any thread, never inside a signal handler; rank 0."""

    def describe(self) -> dict[str, Any]:
        """What the other ranks are told of this process. The training thread, at the start; may raise."""

    def answer(self, what: str) -> dict[str, Any]:
        """This rank's answer to a query. The receiver's thread; on rank 0 the server's."""

    def all_joined(self, descriptions: dict[int, dict[str, Any]]) -> None:
        """All ranks take part, or the description of one changed after that. Any thread; rank 0."""

    def answers_changed(self) -> None:
        """An answer to a query arrived. Any thread; rank 0."""

    def agreement_lost(self, why: str) -> None:
        """No command can be agreed on any more. Any thread; once."""


class RankQuery:
    """A query to all ranks.

    Attributes:
        answers: by rank; grows on the receiver's thread, read on the server's.
    """

    def __init__(self, answers: dict[int, Any]) -> None:
        self.answers = answers


class RankGroup(Protocol):
    """All ranks, seen from one of them. On the training thread, where nothing else is said."""

    rank: int
    size: int

    def start(self, fault: str | None = None) -> None:
        """Take part from now on; with a ``fault``, tell ranks that would wait for this one why it does not.

        Raises:
            Unsupported: ranks poll, and one of the others does not take part.
        """

    def due(self, step: int) -> bool:
        """Return whether ``receive`` must be called. Every rank, at the end of every step; costs next to nothing."""

    def receive(self, step: int) -> list[ScheduledCommand]:
        """Return the commands that all ranks apply after this step; often none."""

    def applied(self, commands: list[ScheduledCommand], step: int, outcomes: dict[str, Outcome]) -> None:
        """Tell rank 0 that this rank applied them.

        Args:
            outcomes: by command id; only those that are not empty.
        """

    def report(self, command_id: str, outcome: Outcome) -> None:
        """Tell rank 0 that this rank's part of a command that awaits reports is complete, or failed."""

    def when_reported(self, command_id: str, callback: ReportCallback) -> None:
        """Call ``callback`` once all ranks have reported on this command, or when it is known that they never will.

        It is called at once, with ``({}, None)``, for a command that awaits no reports; else on any thread. Rank 0,
        after ``applied``.
        """

    def describe(self, facts: dict[str, Any]) -> None:
        """Add facts to what rank 0 knows of this rank."""

    def command_queued(self) -> None:
        """Note that the delegate has a pending command. Any thread; rank 0."""

    def request(self, command: str) -> None:
        """Have rank 0 submit a command. Any rank, any thread; reentrant, so signal handlers may call it."""

    def query(self, what: str) -> RankQuery:
        """Send a query to all ranks. The server thread of rank 0."""

    def state(self, rank: int) -> states.RankState:
        """Return the state of a rank that did not answer a query. Rank 0, any thread."""

    def description(self, rank: int) -> dict[str, Any]:
        """Return what a rank told of itself; nothing before it joined. Rank 0, any thread."""

    def close(self, seconds: float, fault: str | None = None) -> None:
        """Leave; wait at most ``seconds`` for what is on its way. ``fault`` says why, if training continues."""


class _LocalGroup:
    """What is the same in the groups that have no channel: only rank 0 answers queries."""

    def __init__(self, delegate: RankGroupDelegate, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._delegate = delegate
        self._descriptions: dict[int, dict[str, Any]] = {}
        self._requested: deque[str] = deque()  # by signal handlers, whose interrupted thread may hold any lock
        self._callbacks = ReportCallbacks()

    def when_reported(self, command_id: str, callback: ReportCallback) -> None:
        self._callbacks.add(command_id, callback)

    def command_queued(self) -> None:
        pass

    def request(self, command: str) -> None:
        self._requested.append(command)

    def _take_requested(self) -> list[str]:
        return [self._requested.popleft() for _ in range(len(self._requested))]

    def query(self, what: str) -> RankQuery:
        return RankQuery({self.rank: self._delegate.answer(what)})

    def state(self, rank: int) -> states.RankState:
        return states.RANK_SILENT if rank == self.rank else states.RANK_ABSENT

    def description(self, rank: int) -> dict[str, Any]:
        return self._descriptions.get(rank, {})

    def _expect_reports(self, commands: list[ScheduledCommand]) -> list[str]:
        awaiting = [command.command_id for command in commands if self._delegate.awaits_report(command.name)]
        for command_id in awaiting:
            self._callbacks.expect(command_id)
        return awaiting


class SingleProcess(_LocalGroup):
    """A group of one rank."""

    def __init__(self, delegate: RankGroupDelegate) -> None:
        super().__init__(delegate, 0, 1)

    def start(self, fault: str | None = None) -> None:
        if fault is None:
            self.describe(self._delegate.describe())

    def describe(self, facts: dict[str, Any]) -> None:
        self._descriptions = {0: {**self.description(0), **facts}}
        self._delegate.all_joined(self._descriptions)

    def due(self, step: int) -> bool:
        """Return whether a command is pending, or a signal came."""
        return self._delegate.pending or bool(self._requested)

    def receive(self, step: int) -> list[ScheduledCommand]:
        """Return what is pending: what the only rank holds, all ranks hold."""
        for command in self._take_requested():
            self._delegate.submit(command)
        return self._delegate.take()

    def applied(self, commands: list[ScheduledCommand], step: int, outcomes: dict[str, Outcome]) -> None:
        self._expect_reports(commands)
        self._delegate.all_applied(commands, step, {0: outcomes} if outcomes else {}, None)

    def report(self, command_id: str, outcome: Outcome) -> None:
        self._callbacks.complete(command_id, {0: outcome}, None)

    def close(self, seconds: float, fault: str | None = None) -> None:
        self._callbacks.complete_all(None if fault is None else failures.control_failed(0, fault))


class PollingGroup(_LocalGroup):
    """Several ranks that exchange messages every ``steps`` steps, as many as rank 0 was told.

    A message is a JSON object of ``commands`` (of rank 0), ``requests``, ``reports`` and ``facts``, each of which may
    be missing.
    """

    def __init__(self, delegate: RankGroupDelegate, rank: int, size: int, steps: int) -> None:
        super().__init__(delegate, rank, size)
        self._steps, self._count = steps, 0
        self._reports: list[tuple[str, Outcome]] = []  # of this rank, not sent yet
        self._facts: dict[str, Any] = {}  # the same
        self._tallies: dict[str, Tally] = {}  # by command; rank 0
        self._poll = poll.CollectivePoll(rank, size)

    def start(self, fault: str | None = None) -> None:
        """Begin together: a rank that polls alone, or at other steps, would meet others in a collective of theirs."""
        facts: dict[str, Any] = {}
        try:
            if fault is None:
                facts = self._delegate.describe()
        except Exception as err:
            fault = str(err)
            raise
        finally:
            messages = self._poll.exchange({"fault": fault, "steps": self._steps, "facts": facts})
        faulty = [rank for rank, message in messages.items() if message["fault"] is not None]
        if faulty and fault is None:
            raise Unsupported(failures.not_started(faulty))
        self._steps = messages[0]["steps"]
        if fault is None:
            self._note_facts(messages)

    def describe(self, facts: dict[str, Any]) -> None:
        """Send them with the next poll."""
        self._facts.update(facts)

    def due(self, step: int) -> bool:
        """Return whether it is time to poll; the same on all ranks."""
        self._count += 1
        return self._count % self._steps == 0

    def receive(self, step: int) -> list[ScheduledCommand]:
        """Poll. A collective on every rank."""
        mine = {
            "commands": self._delegate.take() if self.rank == 0 else [],
            "requests": self._take_requested(),
            "reports": self._reports,
            "facts": self._facts,
        }
        self._reports, self._facts = [], {}
        messages = self._poll.exchange({name: value for name, value in mine.items() if value} or None)
        if self.rank == 0:
            for message in messages.values():
                for command in message.get("requests", []):
                    self._delegate.submit(command)
            self._note_facts(messages)
            self._note_reports(messages)
        return [ScheduledCommand(*fields) for fields in messages.get(0, {}).get("commands", [])]

    def _note_facts(self, messages: dict[int, Any]) -> None:
        changed = {rank: message["facts"] for rank, message in messages.items() if message.get("facts")}
        if changed and self.rank == 0:
            known = self._descriptions
            self._descriptions = {rank: {**known.get(rank, {}), **changed.get(rank, {})} for rank in range(self.size)}
            self._delegate.all_joined(self._descriptions)

    def _note_reports(self, messages: dict[int, Any]) -> None:
        for rank, message in messages.items():
            for command_id, outcome in message.get("reports", []):
                if command_id in self._tallies:
                    self._tallies[command_id].add(rank, outcome)
        for command_id, tally in list(self._tallies.items()):
            if not tally.missing:
                del self._tallies[command_id]
                self._callbacks.complete(command_id, tally.answers, None)

    def applied(self, commands: list[ScheduledCommand], step: int, outcomes: dict[str, Outcome]) -> None:
        """Exchange the outcomes: all ranks have the commands, and apply them at this step."""
        by_rank = self._poll.exchange(outcomes or None)
        if self.rank == 0:
            for command_id in self._expect_reports(commands):
                self._tallies[command_id] = Tally(range(self.size))
            self._delegate.all_applied(commands, step, by_rank, None)

    def report(self, command_id: str, outcome: Outcome) -> None:
        """Send it with the next poll."""
        self._reports.append((command_id, outcome))

    def close(self, seconds: float, fault: str | None = None) -> None:
        """Complete what is open with what rank 0 knows: a poll here might wait for ranks that do not close."""
        self._note_reports({self.rank: {"reports": self._reports}})
        why = None if fault is None else failures.control_failed(self.rank, fault)
        for command_id, tally in self._tallies.items():
            self._callbacks.complete(command_id, tally.answers, why)
        self._callbacks.complete_all(why)
