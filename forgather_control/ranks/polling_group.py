"""The groups of ranks that need no channel between them: of one rank, and of ranks that poll."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from ..deadline import Deadline
from ..errors import Unsupported
from ..wire.records import Outcome, ScheduledCommand
from . import failures, keys, limits, messages
from .group import RankGroup, RankGroupDelegate
from .messages import Join, Message, Reported, Request


class PollingGroup(RankGroup):
    """Ranks that exchange messages every ``steps`` steps, as many as rank 0 was told.

    They cannot be held: a poll is a collective, which must not wait for hours.

    Args:
        exchange: sends a message, or ``None`` for none, to all ranks; returns the messages of all, by rank.
        store: in which a rank that ends leaves its last reports for rank 0; ``None``: there is none.
    """

    no_hold: str | None = "the ranks poll for commands, so that paused ranks could not be told to resume"

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
        self._failed: list[int] = []  # the ranks that could not do the last command
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
        last = commands[-1].command_id
        self._failed = [rank for rank, each in sorted(found.items()) if "error" in each.get(last, {})]
        if self.rank == 0:
            self._reported.update((command_id, {}) for command_id in self._expect_reports(commands))
            self._delegate.all_applied(commands, step, found, None)

    def interrupted(self, commands: list[ScheduledCommand], step: int, outcomes: dict[str, Outcome]) -> None:
        if self.size == 1:  # else the others are in the collective of ``applied``, which would wait for them
            self.applied(commands, step, outcomes)

    def settle(self) -> str | None:
        return failures.NOT_DONE % ", ".join(map(str, self._failed)) if self._failed else None

    def hold(self, seconds: float) -> list[ScheduledCommand]:
        raise Unsupported(self.no_hold or "")

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

    no_hold = None

    def __init__(self, delegate: RankGroupDelegate) -> None:
        super().__init__(delegate, 0, 1, 1, lambda message: {} if message is None else {0: message})
        self._queued = threading.Event()

    def command_queued(self) -> None:
        self._queued.set()

    def hold(self, seconds: float) -> list[ScheduledCommand]:
        self._queued.wait(seconds)
        self._queued.clear()
        return self.receive(0) if self.due(0) else []

    def due(self, step: int) -> bool:
        return self._delegate.pending or bool(self._unsent)

    def _tell_coordinator(self, message: Message) -> None:
        if isinstance(message, Request):
            super()._tell_coordinator(message)  # of a signal handler, whose interrupted thread may hold any lock
        else:
            self._handle([message])
