"""What a job sees of its ranks, however they agree; and the two worlds that need no line between them.

Floor 2, training side: imports commands, errors, polled and rounds. A :class:`World` is one rank's view of all of them;
its callers never ask whether anything is distributed:

* :class:`OneProcess`: one rank, for which every agreement holds by itself;
* ``ranks.Ranks``: several, which agree by ``rounds`` over the ``line``; an idle step asks nothing;
* :class:`Polled`: several without a usable store, which ask in a ``polled.Ring`` every so many steps.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

from ..errors import Unsupported
from ..wire import methods
from . import poll
from .consensus import Calls

#: How a command's outcome is told: with ``None``, or with why some rank did not do its part.
Outcome = Callable[["str | None"], None]
#: What ranks that ask one another say, beside commands, when a save of theirs has failed.
_FAULT: Final = "fault"


class Home(Protocol):
    """What a world asks of the job that it is in: of its controller. No method blocks."""

    @property
    def pending(self) -> bool:
        """Whether commands wait to be applied. Any thread; rank 0."""

    def take(self) -> Calls:
        """Take those commands. The thread that decides; rank 0."""

    def put_back(self, calls: Calls) -> None:
        """Queue them again: the round was off."""

    def confirm(self, calls: Calls, step: int, fault: str | None) -> None:
        """All ranks applied them; or not all, and why. Any thread; rank 0."""

    def submit(self, command: str) -> None:
        """A signal on some rank asks for this command. Any thread, no signal handler; rank 0."""

    def about(self) -> dict[str, Any]:
        """What the other ranks are told of this process. Training thread, at the start."""

    def tell(self, what: str) -> dict[str, Any]:
        """What this rank answers to a question. The ear's thread, or the server's."""

    def meet(self, about: dict[int, dict[str, Any]]) -> None:
        """All ranks are there. Any thread; rank 0."""

    def changed(self) -> None:
        """An answer came in. Any thread; rank 0."""

    def cut_off(self, why: str) -> None:
        """Nothing can be agreed any more. Any thread."""


class Inquiry:
    """A question to all ranks, and what has come in so far.

    Attributes:
        answers: by rank; grows on the ear's thread, read on the server's.
    """

    def __init__(self, answers: dict[int, Any]) -> None:
        self.answers = answers


class World(Protocol):
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

    def hear(self, step: int) -> Calls:
        """The commands that all ranks apply after this step; often none."""

    def applied(self, calls: Calls, step: int) -> None:
        """This rank has applied them."""

    def kept(self, fault: str | None = None) -> None:
        """This rank's part of the checkpoints that were asked for is on disk (or it has none), or why it is not."""

    def settle(self, command_id: str, outcome: Outcome) -> None:
        """Call ``outcome`` once all ranks have said ``kept`` for this command. Rank 0."""

    def wanted(self) -> None:
        """A command was queued. Any thread; rank 0."""

    def call(self, command: str) -> None:
        """Have rank 0 submit a command. Any rank, any thread; reentrant, so fit for a signal handler."""

    def inquire(self, what: str) -> Inquiry:
        """Ask all ranks. On the server thread of rank 0."""

    def state(self, rank: int) -> str:
        """What is known of a rank that did not answer: ``silent``, ``ended`` or ``absent``."""

    def about(self, rank: int) -> dict[str, Any]:
        """What a rank said of its process when it began to take part; nothing if it has not. Rank 0, any thread."""

    def close(self, seconds: float, fault: str | None = None) -> None:
        """Take part no more; ``fault`` says why, if training goes on. Waits for what is on its way, for so long."""


class _Alone:
    """What is the same in the worlds that have no line: only rank 0 can be asked."""

    def __init__(self, home: Home, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._home = home
        self._called: deque[str] = deque()  # by signal handlers, whose interrupted thread may hold any lock

    def start(self, fault: str | None = None) -> None:
        if fault is not None:
            return
        self._about = self._home.about()
        self._home.meet({self.rank: self._about})

    def kept(self, fault: str | None = None) -> None:
        pass

    def settle(self, command_id: str, outcome: Outcome) -> None:
        outcome(None)

    def wanted(self) -> None:
        pass

    def call(self, command: str) -> None:
        self._called.append(command)

    def _take_called(self) -> list[str]:
        return [self._called.popleft() for _ in range(len(self._called))]

    def inquire(self, what: str) -> Inquiry:
        return Inquiry({self.rank: self._home.tell(what)})

    def state(self, rank: int) -> str:
        return "silent" if rank == self.rank else "absent"

    def about(self, rank: int) -> dict[str, Any]:
        return self._about if rank == self.rank else {}

    def close(self, seconds: float, fault: str | None = None) -> None:
        pass


class OneProcess(_Alone):
    """A world of one rank."""

    def __init__(self, home: Home) -> None:
        super().__init__(home, 0, 1)

    def due(self, step: int) -> bool:
        """Whether a command is pending, or a signal came."""
        return self._home.pending or bool(self._called)

    def hear(self, step: int) -> Calls:
        """What is pending: what the only rank holds, all ranks hold."""
        for command in self._take_called():
            self._home.submit(command)
        return self._home.take()

    def applied(self, calls: Calls, step: int) -> None:
        """What the only rank applied, all ranks applied."""
        self._home.confirm(calls, step, None)


class Polled(_Alone):
    """Several ranks that ask one another every ``steps`` steps; so many as rank 0 was told."""

    def __init__(self, home: Home, rank: int, size: int, steps: int) -> None:
        super().__init__(home, rank, size)
        self._steps, self._count = steps, 0
        self._outcomes: list[Outcome] = []
        self._closed = False
        names = tuple(method.name for method in methods.TABLE.values() if method.is_command)
        self._ring = poll.Ring((*names, _FAULT))

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

    def hear(self, step: int) -> Calls:
        """Ask. A collective on every rank."""
        calls = self._home.take() if self.rank == 0 else []
        data = json.dumps(calls).encode() if calls else b""
        size, wanted = self._ring.ask(len(data), self._take_called())
        # Whoever asks has taken the step after the last commands, so his part of a checkpoint is written, or failed.
        self._tell(
            f"some rank could not write its part of the checkpoint (of {self.size})" if _FAULT in wanted else None
        )
        if self.rank == 0:
            for command in wanted:
                if command != _FAULT:
                    self._home.submit(command)
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
        """See ``World``."""
        self._closed = True
        self._tell(None)

    def _tell(self, fault: str | None) -> None:
        outcomes, self._outcomes = self._outcomes, []
        for outcome in outcomes:
            outcome(fault)

    def applied(self, calls: Calls, step: int) -> None:
        """All ranks have them, and apply them at this step."""
        if self.rank == 0:
            self._home.confirm(calls, step, None)
