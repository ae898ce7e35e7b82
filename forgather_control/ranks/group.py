"""What a job sees of its ranks, however they agree; and the two groups that need no line between them.

A :class:`RankGroup` is one rank's view of all of them;
its callers never ask whether anything is distributed:

* :class:`SingleProcess`: one rank, for which every agreement holds by itself;
* ``ranks.StoreGroup``: several, which agree by ``rounds`` over the ``line``; an idle step asks nothing;
* :class:`PollingGroup`: several without a usable store, which ask in a ``polled.CollectivePoll`` every so many steps.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

from .. import states
from ..errors import Unsupported
from ..wire import builtin
from . import poll
from .consensus import Calls

#: How a command's outcome is told: with ``None``, or with why some rank did not do its part.
Outcome = Callable[["str | None"], None]
#: What ranks that ask one another say, beside commands, when a save of theirs has failed.
_FAULT: Final = "fault"


class RankGroupDelegate(Protocol):
    """What a group asks of the job that it is in: of its controller. No method blocks."""

    @property
    def pending(self) -> bool:
        """Whether commands wait to be applied. Any thread; rank 0."""

    def take(self) -> Calls:
        """Take those commands. The thread that decides; rank 0."""

    def put_back(self, calls: Calls) -> None:
        """Queue them again: the round was off."""

    def all_applied(self, calls: Calls, step: int, fault: str | None) -> None:
        """All ranks applied them; or not all, and why. Any thread; rank 0."""

    def submit(self, command: str) -> None:
        """A signal on some rank asks for this command. Any thread, no signal handler; rank 0."""

    def describe(self) -> dict[str, Any]:
        """What the other ranks are told of this process. Training thread, at the start."""

    def answer(self, what: str) -> dict[str, Any]:
        """What this rank answers to a question. The ear's thread, or the server's."""

    def all_joined(self, about: dict[int, dict[str, Any]]) -> None:
        """All ranks are there. Any thread; rank 0."""

    def answers_changed(self) -> None:
        """An answer came in. Any thread; rank 0."""

    def agreement_lost(self, why: str) -> None:
        """Nothing can be agreed any more. Any thread."""


class RankQuery:
    """A question to all ranks, and what has come in so far.

    Attributes:
        answers: by rank; grows on the ear's thread, read on the server's.
    """

    def __init__(self, answers: dict[int, Any]) -> None:
        self.answers = answers


class RankGroup(Protocol):
    """All ranks, seen from one of them. On the training thread, where nothing else is said."""

    rank: int
    size: int

    def start(self, fault: str | None = None) -> None:
        """Take part from now on; or, on rank 0, not at all, and why.

        Raises:
            Unsupported: rank 0 does not.
        """

    def due(self, step: int) -> bool:
        """The end of a step: whether there may be something to hear. Every rank, every step; costs next to nothing."""

    def receive(self, step: int) -> Calls:
        """The commands that all ranks apply after this step; often none."""

    def applied(self, calls: Calls, step: int) -> None:
        """This rank has applied them."""

    def kept(self, fault: str | None = None) -> None:
        """This rank's part of the checkpoints that were asked for is on disk (or it has none), or why it is not."""

    def settle(self, command_id: str, outcome: Outcome) -> None:
        """Call ``outcome`` once all ranks have said ``kept`` for this command. Rank 0."""

    def command_queued(self) -> None:
        """A command was queued. Any thread; rank 0."""

    def request(self, command: str) -> None:
        """Have rank 0 submit a command. Any rank, any thread; reentrant, so fit for a signal handler."""

    def query(self, what: str) -> RankQuery:
        """Ask all ranks. On the server thread of rank 0."""

    def state(self, rank: int) -> str:
        """What is known of a rank that did not answer: ``silent``, ``ended`` or ``absent``."""

    def description(self, rank: int) -> dict[str, Any]:
        """What a rank said of its process when it began to take part; nothing if it has not. Rank 0, any thread."""

    def close(self, seconds: float, fault: str | None = None) -> None:
        """Take part no more; ``fault`` says why, if training goes on. Waits for what is on its way, for so long."""


class _LocalGroup:
    """What is the same in the worlds that have no line: only rank 0 can be asked."""

    def __init__(self, delegate: RankGroupDelegate, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._delegate = delegate
        self._called: deque[str] = deque()  # by signal handlers, whose interrupted thread may hold any lock

    def start(self, fault: str | None = None) -> None:
        if fault is not None:
            return
        self._about = self._delegate.describe()
        self._delegate.all_joined({self.rank: self._about})

    def kept(self, fault: str | None = None) -> None:
        pass

    def settle(self, command_id: str, outcome: Outcome) -> None:
        outcome(None)

    def command_queued(self) -> None:
        pass

    def request(self, command: str) -> None:
        self._called.append(command)

    def _take_called(self) -> list[str]:
        return [self._called.popleft() for _ in range(len(self._called))]

    def query(self, what: str) -> RankQuery:
        return RankQuery({self.rank: self._delegate.answer(what)})

    def state(self, rank: int) -> str:
        return states.RANK_SILENT if rank == self.rank else states.RANK_ABSENT

    def description(self, rank: int) -> dict[str, Any]:
        return self._about if rank == self.rank else {}

    def close(self, seconds: float, fault: str | None = None) -> None:
        pass


class SingleProcess(_LocalGroup):
    """A group of one rank."""

    def __init__(self, delegate: RankGroupDelegate) -> None:
        super().__init__(delegate, 0, 1)

    def due(self, step: int) -> bool:
        """Whether a command is pending, or a signal came."""
        return self._delegate.pending or bool(self._called)

    def receive(self, step: int) -> Calls:
        """What is pending: what the only rank holds, all ranks hold."""
        for command in self._take_called():
            self._delegate.submit(command)
        return self._delegate.take()

    def applied(self, calls: Calls, step: int) -> None:
        """What the only rank applied, all ranks applied."""
        self._delegate.all_applied(calls, step, None)


class PollingGroup(_LocalGroup):
    """Several ranks that ask one another every ``steps`` steps; so many as rank 0 was told."""

    def __init__(self, delegate: RankGroupDelegate, rank: int, size: int, steps: int) -> None:
        super().__init__(delegate, rank, size)
        self._steps, self._count = steps, 0
        self._outcomes: list[Outcome] = []
        self._closed = False
        names = tuple(method.name for method in builtin.BUILTIN if method.is_command)
        self._ring = poll.CollectivePoll((*names, _FAULT))

    def start(self, fault: str | None = None) -> None:
        """Begin together: a rank that asks alone, or in another rhythm, would meet others in a collective of theirs."""
        faults, self._steps = self._ring.sum([int(fault is not None), self._steps if self.rank == 0 else 0])
        if faults and fault is None:
            raise Unsupported("rank 0 could not be made controllable; its log says why")
        super().start(fault)

    def due(self, step: int) -> bool:
        """Whether it is time to ask; the same on all ranks."""
        self._count += 1
        return self._count % self._steps == 0

    def receive(self, step: int) -> Calls:
        """Ask. A collective on every rank."""
        calls = self._delegate.take() if self.rank == 0 else []
        data = json.dumps(calls).encode() if calls else b""
        size, wanted = self._ring.ask(len(data), self._take_called())
        # Whoever asks has taken the step after the last commands, so his part of a checkpoint is written, or failed.
        self._tell(
            f"some rank could not write its part of the checkpoint (of {self.size})" if _FAULT in wanted else None
        )
        if self.rank == 0:
            for command in wanted:
                if command != _FAULT:
                    self._delegate.submit(command)
        shared: Calls = self._ring.share(data, size) if size else []
        return shared

    def kept(self, fault: str | None = None) -> None:
        """That it is on disk is known at the next question; that it is not has to be said there."""
        if fault is not None:
            self._called.append(_FAULT)

    def settle(self, command_id: str, outcome: Outcome) -> None:
        """At the next question; at the end, when there is none, on the word of rank 0."""
        self._outcomes.append(outcome)
        if self._closed:
            self._tell(None)

    def close(self, seconds: float, fault: str | None = None) -> None:
        """See ``RankGroup``."""
        self._closed = True
        self._tell(None)

    def _tell(self, fault: str | None) -> None:
        outcomes, self._outcomes = self._outcomes, []
        for outcome in outcomes:
            outcome(fault)

    def applied(self, calls: Calls, step: int) -> None:
        """All ranks have them, and apply them at this step."""
        if self.rank == 0:
            self._delegate.all_applied(calls, step, None)
