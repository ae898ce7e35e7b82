"""Two-phase commit of commands: all ranks apply the same list at the same step, and an idle step costs nothing.

No torch, no thread and no clock in here, so that a test can drive it through every order of events. The owner's lock
guards each object, except for the two attributes that an idle step touches (see :class:`Participant`).

Each rank has a *step*: the number of its last finished step, which only grows. A *round* carries one list of commands
to all ranks. Its decision is one key of the store: written once, by compare-and-set, it holds either (T, commands) or
"off". ::

    coordinator (rank 0)                     participant (every rank)
    Prepare ──────────────────────────▶ sets must_wait, then reads its step
            ◀────────────────────────── Ready: that step
    all are ready: T = highest step + 1
    decision := (T, commands)
    Commit ───────────────────────────▶ a training thread that was held at the end of a step continues;
                                        the first step end at T or later applies the commands
            ◀────────────────────────── Applied, with the outcomes
    all have applied: "applied"
            ◀────────────────────────── Reported: its part of one command is complete (a checkpoint, say)
    all have reported: "finished"

*Why no rank can pass T.* A participant sets ``must_wait`` before it reads its step, and a training thread advances its
step before it reads ``must_wait``. So the thread holds at every step end that the Ready does not count: until it has
the decision it stands at the first step end after its Ready, and no earlier step end is at T or later, because T is
greater than every step in a Ready. Hence every rank is still before its first step end at T or later when it receives
T, and all apply the list there.

*Why no rank waits for ever.* A held thread waits only for the other ranks' receiver threads, which are not training
threads: a rank that evaluates, saves or hangs in a collective answers all the same. If one does not answer within
``READY_TIMEOUT``, the coordinator proposes "off"; if the coordinator does not decide within ``DECISION_TIMEOUT``, the
participant proposes it. All obey the proposal that is written first, so no rank applies a round that one rank called
off. The commands of a round that is off stay queued and are tried again.

*Ranks that end, give up or die.* A rank whose training ended sends Leave; the others continue without it, and it owes
no more reports. A rank whose control failed while its training continues ends all agreement: if the others stopped, it
would wait for them in a collective. A rank that dies silently leaves a round "off" after ``READY_TIMEOUT``; its
training can have no further step then, and its launcher must notice.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

from .. import states
from ..wire.records import Outcome, ScheduledCommand
from . import limits
from .messages import Applied, Commit, Join, Leave, Prepare, Ready, Reported
from .tally import Tally

# What the coordinator wants done...


class Send(NamedTuple):
    """Send ``message`` to each of ``ranks``."""

    ranks: tuple[int, ...]
    message: Prepare | Commit


class Decide(NamedTuple):
    """Write the round's decision, unless there is one, and pass what stands there to ``Coordinator.decided``.

    ``due`` is T, to be written with the commands that are pending now, or ``None`` for "off".
    """

    number: int
    due: int | None


class AllApplied(NamedTuple):
    """All ranks applied the round, with these non-empty outcomes by rank; ``fault`` says why not all, if so."""

    number: int
    outcomes: dict[int, dict[str, Outcome]]
    fault: str | None


class AllReported(NamedTuple):
    """All ranks reported on the command, with these outcomes by rank; ``fault`` says why some never will, if so."""

    command_id: str
    outcomes: dict[int, Outcome]
    fault: str | None


Action = Send | Decide | AllApplied | AllReported


class Participant:
    """One rank's side of the rounds.

    The training thread alone writes ``step``, without a lock, before it reads ``must_wait``; the owner's lock guards
    the rest.
    """

    def __init__(self, rank: int, step: int = 0) -> None:
        self.rank = rank
        self.step = step
        #: Whether the end of a step must call ``take``. All that an idle step reads.
        self.must_wait = False
        #: The round that waits for its decision or for its step, or the last one there was.
        self.number = 0
        self._decision: Commit | None = None

    def tick(self, step: int) -> bool:
        """Note the end of a step; return ``must_wait``. On the training thread, every step.

        Where step numbers do not grow (each epoch starts from 1, say), the count continues from the last one.
        """
        last = self.step
        self.step = step if step > last else last + 1
        return self.must_wait

    def prepare(self, number: int) -> Ready:
        """Hold the training thread at its next step end; a Prepare that comes after its round's end changes nothing."""
        if number > self.number:
            self.number, self._decision = number, None
            self.must_wait = True  # before the step is read: see above
        return Ready(number, self.rank, self.step)

    def commit(self, decision: Commit) -> None:
        """Note the decision of a round; one that comes late or twice changes nothing."""
        if decision.number > self.number:  # off before its Prepare came, as are all rounds before it
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
        """Drop a round that is not decided, because no more will be received of it; one that is decided stands."""
        if self.undecided:
            self.must_wait = False

    def take(self) -> list[ScheduledCommand] | None:
        """Return the commands of a decided round if they are due at this step end, else ``None``."""
        decision = self._decision
        if not self.must_wait or decision is None or decision.due is None or self.step < decision.due:
            return None
        self.must_wait = False
        return decision.commands


class Coordinator:
    """Rank 0's side of the rounds, one at a time.

    Messages go in by :meth:`receive`; :meth:`next` returns what is to be done.

    Args:
        size: the number of ranks.
        timeout: seconds in which all ranks must be ready.
    """

    def __init__(self, size: int, timeout: float = limits.READY_TIMEOUT) -> None:
        self._ranks, self._timeout = frozenset(range(size)), timeout
        self._absent = set(self._ranks)
        self._left: dict[int, str | None] = {}  # why, if not as it should
        self._passed = 0  # the last step of those that left
        #: Why there can be no more rounds.
        self.fault: str | None = None
        self.number = 0
        self._closed = self._lost = False
        self._phase: Literal["idle", "preparing", "deciding", "committed"] = "idle"
        self._asked: set[int] = set()
        self._steps: dict[int, int] = {}  # by rank that is ready
        self._deadline = 0.0
        self._delay = limits.RETRY_DELAY
        self._applied = Tally()  # of this round
        self._reports: dict[str, Tally] = {}  # by command
        self._commands: list[str] = []  # of this round, that await reports
        self._early: list[Reported] = []  # on commands that are not known yet

    # Events...

    def receive(self, message: Join | Ready | Applied | Reported | Leave) -> None:
        """Note what a rank sent."""
        match message:
            case Join():
                self._absent.discard(message.rank)
            case Ready():
                if self._phase == "preparing" and message.number == self.number:
                    self._steps[message.rank] = message.step
            case Applied():
                if message.number == self.number:
                    self._applied.add(message.rank, message.outcomes)
            case Reported():
                self._report(message)
            case Leave():
                self._leave(message)

    def _report(self, report: Reported) -> None:
        tally = self._reports.get(report.command_id)
        if tally is not None:
            tally.add(report.rank, report.outcome)
        elif self._phase == "deciding":  # a rank that gave the round up reads the decision before it is known here
            self._early.append(report)

    def _leave(self, leave: Leave) -> None:
        if leave.rank in self._left:
            return
        self._passed = max(self._passed, leave.step)  # the others must not apply what this rank has passed
        self._absent.discard(leave.rank)
        self._asked.discard(leave.rank)
        self._applied.drop(leave.rank, leave.fault)
        self._drop(leave.rank, leave.fault)
        self.fault = self.fault or leave.fault

    def _drop(self, rank: int, fault: str | None) -> None:
        self._left[rank] = fault
        for command_id, tally in self._reports.items():
            if rank not in self._applied.missing or command_id not in self._commands:  # rank 0 may not have applied it
                tally.drop(rank, fault)

    def decided(self, decision: Commit, awaiting: Iterable[str], now: float) -> Send:
        """Note what stands in the store as the round's decision; ``awaiting``: its commands that await reports."""
        if decision.due is not None:
            self._phase, self._deadline, self._delay = "committed", now, limits.RETRY_DELAY
            self._expect_reports(awaiting)
        elif self._asked and len(self._steps) == len(self._asked):
            self._phase, self._deadline = "idle", now  # all were ready, but the commands had been cancelled
        else:
            self._phase, self._deadline = "idle", now + self._delay
            self._delay = min(2 * self._delay, limits.MAX_RETRY_DELAY)
        self._early.clear()
        return Send(tuple(sorted(self._asked)), decision)

    def _expect_reports(self, awaiting: Iterable[str]) -> None:
        self._commands = list(awaiting)
        for command_id in self._commands:
            self._reports[command_id] = Tally(self._applied.ranks)
        for report in self._early:
            self._report(report)
        for rank, fault in self._left.items():
            self._drop(rank, fault)
        if self._lost:
            self.lose(self.fault or "")

    def lose(self, why: str) -> None:
        """Rank 0 receives nothing any more: there are no more rounds, and what is missing will not come."""
        self.fault, self._lost = self.fault or why, True
        for tally in (self._applied, *self._reports.values()):
            for rank in list(tally.missing):
                tally.drop(rank, why)

    def close(self, fault: str | None) -> list[Action]:
        """End rank 0: it owes no more reports, a round that is not decided is off, and there are no more."""
        self._closed = True
        self._drop(0, fault)
        return self._decide(None) if self._phase == "preparing" else []

    # What follows from them...

    def state(self, rank: int) -> states.RankState:
        """Return the state of a rank that did not answer."""
        if rank in self._absent:
            return states.RANK_ABSENT
        return states.RANK_ENDED if rank in self._left else states.RANK_SILENT

    @property
    def owed(self) -> bool:
        """Whether rank 0 did its part (or may have) of something, and other ranks have not answered that they did."""
        return self._phase == "deciding" or bool(self.missing)

    @property
    def missing(self) -> list[int]:
        """Those other ranks."""
        tallies = [self._applied] if self._phase == "committed" else []
        tallies += self._reports.values()
        return sorted({rank for tally in tallies if 0 not in tally.missing for rank in tally.missing})

    def next(self, now: float, pending: bool) -> list[Action]:
        """Return what is to be done. Call it after each event, after its actions are done, and after ``delay``.

        Args:
            now: the time in seconds, on any clock that only grows.
            pending: whether commands are queued.
        """
        actions = self._count(now) if self._phase == "preparing" else self.completed()
        may_begin = pending and not self._absent and not self._closed and self.fault is None
        if self._phase == "idle" and may_begin and now >= self._deadline:
            actions += self._prepare(now)
        return actions

    def delay(self, now: float, pending: bool) -> float | None:
        """Return the seconds after which ``next`` may return actions though nothing happened; ``None`` for never."""
        if self._phase == "preparing" or (self._phase == "idle" and pending and now < self._deadline):
            return max(0.0, self._deadline - now)
        return None

    def completed(self) -> list[Action]:
        """Return what all ranks have applied, or reported on, since the last call."""
        actions: list[Action] = []
        if self._phase == "committed" and not self._applied.missing:
            self._phase, self._commands = "idle", []
            outcomes = {rank: answer for rank, answer in self._applied.answers.items() if answer}
            actions.append(AllApplied(self.number, outcomes, self._applied.fault))
        for command_id, tally in list(self._reports.items()):
            if not tally.missing and command_id not in self._commands:  # applied comes before finished
                del self._reports[command_id]
                actions.append(AllReported(command_id, tally.answers, tally.fault))
        return actions

    def _prepare(self, now: float) -> list[Action]:
        self.number += 1
        self._asked, self._steps = set(self._ranks - self._left.keys()), {}
        self._phase, self._deadline = "preparing", now + self._timeout
        return [Send(tuple(sorted(self._asked)), Prepare(self.number))]

    def _count(self, now: float) -> list[Action]:
        steps = [self._steps[rank] for rank in self._asked if rank in self._steps]
        if self.fault is not None or not self._asked or (len(steps) < len(self._asked) and now >= self._deadline):
            return self._decide(None)
        return self._decide(max(*steps, self._passed) + 1) if len(steps) == len(self._asked) else []

    def _decide(self, due: int | None) -> list[Action]:
        # A rank that gave the round up may apply it, or leave, before the decision is known here.
        self._phase, self._applied = "deciding", Tally(self._asked)
        return [Decide(self.number, due)]
