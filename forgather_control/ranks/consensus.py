"""How ranks come to apply the same commands at the same step, without a collective and without asking while idle.

Floor 0: imports nothing of ours; no torch, no thread, no clock of its own, so that a test can drive it
through every order of events. Each object is guarded by its owner's lock, but for the two attributes
that an idle step touches (see :class:`Participant`).

Each rank has a *step*: the number of its last step that is done, which only grows. A *round* carries
one list of commands to all ranks. One key of the store, ``go``, is its decision: it is written once,
by compare-and-set, and holds either (T, commands) or "off". ::

    coordinator (rank 0)                     participant (every rank)
    ask ──────────────────────────────▶ must_wait = True, then reads its clock
        ◀────────────────────────────── at: that clock
    all are in: T = highest + 1
    go := (T, commands) ──────────────▶ a training thread that came to the end of a step in between
                                        goes on; the first step end at T or later applies the commands
        ◀────────────────────────────── did
    all are in: "applied" is true       kept, once its part of a checkpoint is on disk
    all are in: "finished" is true

*Why no rank can pass T.* A participant raises ``must_wait`` before it reads its clock, and a training thread
advances its clock before it reads ``must_wait``. So a step end that the answer does not count is one
at which the thread holds: until it knows the decision it stands at the first step end after its
answer, and no earlier step end is at T or later, as T is greater than every answer. Hence every rank is
still before its first step end at T or later when it learns T, and all apply the list there.

*Why nobody waits for ever.* A thread holds for the answer of watchers, which are not training threads: a
rank that evaluates, saves or hangs in a collective answers all the same. If one does not answer in
``PATIENCE`` seconds, the coordinator proposes "off"; if the coordinator does not decide, the participant proposes it
itself. Whoever's proposal is written first, all obey it: a round that one rank gave up, nobody applies.
A command of a round that is off stays queued, and is tried again.

*Who dies, ends, or gives up.* A rank that ended its training says so, and is asked no more; the others
go on without it. A rank whose control failed while its training goes on ends all agreement: if the
others stopped, it would wait for them in a collective. A rank that dies silently leaves a round "off"
after ``PATIENCE``; its training can have no further step then, and that is its launcher's to notice.
"""

from __future__ import annotations

from typing import Any, Final, Literal, NamedTuple

from .. import states

#: Seconds in which all watchers must have answered. They answer in milliseconds, unless C code holds
#: their interpreter's lock; holding training any longer for them would do more harm than asking again.
PATIENCE: Final = 10.0
#: Seconds from a round that is off to the next one, doubled each time up to the last.
PAUSE: Final = 1.0
MAX_PAUSE: Final = 60.0

#: ``[command_id, command, spare]`` of each command, in the order in which all ranks apply them. ``spare``: stop
#: without saving, as there is a checkpoint that is young enough; rank 0 decides it for all, having one clock.
Calls = list[list[Any]]


# What ranks say to one another...


class Join(NamedTuple):
    """A rank takes part from now on; ``about`` is what it says of its process."""

    rank: int
    about: dict[str, Any]


class Prepare(NamedTuple):
    """To all: where are you? Hold at the end of your next step until this round is decided."""

    number: int


class Ready(NamedTuple):
    """The answer: what was done when ``must_wait`` was already raised."""

    number: int
    rank: int
    step: int


class Commit(NamedTuple):
    """To all: this round is decided; ``due`` is T, or ``None`` if it is off."""

    number: int
    due: int | None
    calls: Calls


class Applied(NamedTuple):
    """A rank applied the commands of the round."""

    number: int
    rank: int


class Reported(NamedTuple):
    """A rank's part of the round's checkpoint is on disk, or will not be: ``fault`` says why."""

    number: int
    rank: int
    fault: str | None


class Leave(NamedTuple):
    """A rank takes part no more after the step ``step``; ``fault`` says why, if its training goes on."""

    rank: int
    step: int
    fault: str | None


# What the coordinator wants done...


class Post(NamedTuple):
    """Send ``message`` to each of ``ranks``."""

    ranks: tuple[int, ...]
    message: Prepare | Commit


class Propose(NamedTuple):
    """Write the round's decision, unless there is one, and tell ``Coordinator.decided`` what stands there.

    ``due`` is T, to be written with the commands that are pending now, or ``None`` for "off".
    """

    number: int
    due: int | None


class AllApplied(NamedTuple):
    """All ranks applied the round; ``fault`` says why not all, if so."""

    number: int
    fault: str | None


class AllReported(NamedTuple):
    """All ranks have written their part of the round's checkpoint; ``fault`` says why not all, if so."""

    number: int
    fault: str | None


Action = Post | Propose | AllApplied | AllReported


class Participant:
    """One rank's side of the rounds.

    ``step`` is written by the training thread alone, without a lock, before it reads ``must_wait``;
    the rest under the owner's lock.
    """

    def __init__(self, rank: int, step: int = 0) -> None:
        self.rank = rank
        self.step = step
        #: Whether the end of a step must be looked at. All that an idle step reads.
        self.must_wait = False
        #: The round that waits for its decision or for its step, or the last one there was.
        self.number = 0
        self._decision: Commit | None = None

    def tick(self, step: int) -> bool:
        """The end of a step: whether it must be looked at. On the training thread, every step.

        Numbers that do not grow (each epoch counted from 1, say) count on from the last.
        """
        last = self.step
        self.step = step if step > last else last + 1
        return self.must_wait

    def prepare(self, number: int) -> Ready:
        """Answer at which step this rank is, and hold at the end of the next one. A late question changes nothing."""
        if number > self.number:
            self.number, self._decision = number, None
            self.must_wait = True  # before the clock is read: see above
        return Ready(number, self.rank, self.step)

    def commit(self, decision: Commit) -> None:
        """The round is decided. What comes late or twice changes nothing."""
        if decision.number > self.number:  # off before its question came, as are all before it
            self.forget()
            self.number = decision.number
        elif decision.number == self.number and self.undecided:
            self._decision = decision
            self.must_wait = decision.due is not None

    @property
    def undecided(self) -> bool:
        """Whether the end of a step has to wait."""
        return self.must_wait and self._decision is None

    def forget(self) -> None:
        """Nothing more will be heard of a round that is not decided; one that is will be carried out."""
        if self.undecided:
            self.must_wait = False

    def take(self) -> Calls | None:
        """At the end of a step, of a decided round: its commands, if they are due; else ``None``."""
        decision = self._decision
        if not self.must_wait or decision is None or decision.due is None or self.step < decision.due:
            return None
        self.must_wait = False
        return decision.calls


class Coordinator:
    """Rank 0's side of the rounds, one at a time. Events go in by methods, :meth:`next` says what is to be done.

    Args:
        size: how many ranks there are.
        patience: seconds for all answers of a round.
    """

    def __init__(self, size: int, patience: float = PATIENCE) -> None:
        self._patience = patience
        self._absent = set(range(size))
        self._gone: set[int] = set()
        self._passed = 0  # the last step of those that are gone
        self._everybody = frozenset(range(size))
        #: Why no round can be held any more.
        self.fault: str | None = None
        self.number = 0
        self._closed = False
        self._phase: Literal["idle", "asking", "deciding", "going"] = "idle"
        self._asked: set[int] = set()
        self._answers: dict[int, int] = {}
        self._deadline = 0.0
        self._pause = PAUSE
        self._waiting: set[int] = set()  # for these to apply the round
        self._unapplied: str | None = None  # why one of them will not
        self._keeping: dict[int, set[int]] = {}  # by round: for these to write their part of its checkpoint
        self._faults: dict[int, str] = {}  # why one of those will not

    # Events...

    def join(self, rank: int) -> None:
        """A rank takes part from now on."""
        self._absent.discard(rank)

    def leave(self, rank: int, step: int, fault: str | None) -> None:
        """A rank takes part no more: what it has passed, the others must not apply."""
        self._passed = max(self._passed, step)
        self._absent.discard(rank)
        self._gone.add(rank)
        if fault is not None:
            self.fault = self.fault or fault
            if rank in self._waiting:
                self._unapplied = self._unapplied or fault
            for number in (number for number, waiting in self._keeping.items() if rank in waiting):
                self._faults.setdefault(number, fault)
        self._asked.discard(rank)
        self._waiting.discard(rank)
        for waiting in self._keeping.values():
            waiting.discard(rank)

    def ready(self, number: int, rank: int, step: int) -> None:
        """A rank answered where it is."""
        if self._phase == "asking" and number == self.number:
            self._answers[rank] = step

    def decided(self, decision: Commit, keeps: bool, now: float) -> Post:
        """What stands in the store as the round's decision; ``keeps``: whether its commands save."""
        if not keeps:
            del self._keeping[decision.number]
            self._faults.pop(decision.number, None)
        if decision.due is None and self._asked and len(self._answers) == len(self._asked):
            self._phase, self._deadline = "idle", now  # all answered, and what was wanted had been taken back
        elif decision.due is None:
            self._phase, self._deadline = "idle", now + self._pause
            self._pause = min(2 * self._pause, MAX_PAUSE)
        else:
            self._phase, self._deadline, self._pause = "going", now, PAUSE
        return Post(tuple(sorted(self._asked)), decision)

    def applied(self, number: int, rank: int) -> None:
        """A rank applied the round."""
        if number == self.number:
            self._waiting.discard(rank)

    def reported(self, number: int, rank: int, fault: str | None) -> None:
        """A rank has written its part of the round's checkpoint, or never will."""
        if number in self._keeping:
            self._keeping[number].discard(rank)
            if fault is not None:
                self._faults.setdefault(number, fault)

    # What follows from them...

    def state(self, rank: int) -> states.RankState:
        """What is known of a rank that says nothing."""
        return (
            states.RANK_ABSENT
            if rank in self._absent
            else states.RANK_ENDED
            if rank in self._gone
            else states.RANK_SILENT
        )

    @property
    def is_going(self) -> bool:
        """Whether commands are on their way that not all ranks have applied."""
        return self._phase == "going"

    @property
    def keeping(self) -> list[int]:
        """The rounds whose checkpoints are not complete."""
        return list(self._keeping)

    @property
    def owes(self) -> bool:
        """Whether rank 0 did its part (or may have) of something of which others have not said that they did theirs."""
        return self._phase == "deciding" or bool(self.missing)

    @property
    def missing(self) -> list[int]:
        """Those others."""
        parts = [self._waiting] if self._phase == "going" else []
        return sorted({rank for part in [*parts, *self._keeping.values()] if 0 not in part for rank in part})

    def next(self, now: float, pending: bool) -> list[Action]:
        """What is to be done. Called again after each event, after what it said is done, and when ``wait`` is over."""
        actions: list[Action] = []
        if self._phase == "asking":
            actions += self._count(now)
        elif self._phase == "going" and not self._waiting:
            self._phase = "idle"
            actions.append(AllApplied(self.number, self._unapplied))
        if self._phase == "idle" and pending and self._may_ask and now >= self._deadline:
            actions += self._ask(now)
        return actions + self._stored()

    def wait(self, now: float, pending: bool) -> float | None:
        """Seconds after which ``next`` may have something to say though nothing happened; ``None``: never."""
        if self._phase == "asking" or (self._phase == "idle" and pending and now < self._deadline):
            return max(0.0, self._deadline - now)
        return None

    @property
    def _may_ask(self) -> bool:
        return not (self._absent or self._closed) and self.fault is None

    def _ask(self, now: float) -> list[Action]:
        self.number += 1
        self._asked, self._answers = set(self._everybody - self._gone), {}
        self._phase, self._deadline = "asking", now + self._patience
        return [Post(tuple(sorted(self._asked)), Prepare(self.number))]

    def _count(self, now: float) -> list[Action]:
        answers = [self._answers[rank] for rank in self._asked if rank in self._answers]
        if self.fault is not None or not self._asked or (len(answers) < len(self._asked) and now >= self._deadline):
            return self._propose(None)
        return self._propose(max(*answers, self._passed) + 1) if len(answers) == len(self._asked) else []

    def _propose(self, due: int | None) -> list[Action]:
        # Who gave the round up reads the decision before it is known here, and does his part, or fails to, at once.
        self._phase, self._unapplied = "deciding", None
        self._waiting, self._keeping[self.number] = set(self._asked), set(self._asked)
        return [Propose(self.number, due)]

    def _stored(self) -> list[Action]:
        over = [number for number, waiting in self._keeping.items() if not waiting and not self._is_on(number)]
        for number in over:
            del self._keeping[number]
        return [AllReported(number, self._faults.pop(number, None)) for number in over]

    def _is_on(self, number: int) -> bool:
        return number == self.number and self._phase in ("deciding", "going")

    def close(self) -> list[Action]:
        """Rank 0 ends: a round that is not decided is off, and no other begins."""
        self._closed = True
        return self._propose(None) if self._phase == "asking" else []
