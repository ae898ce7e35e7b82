"""Two-phase commit of commands: all ranks apply the same list at the same step, and an idle step costs nothing.

No torch, no thread and no clock in here, so that a test can drive it through every order of events. The owner's lock
guards each object, except for the two attributes that an idle step touches (see ``participant``).

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

While training is *paused* at a step, every rank waits for the next decision there, and advances to its T without
training. A rank that was let go for one step, to save or to evaluate, waits again at the end of the next one.

*All or nothing.* A command that some rank could not carry out may have to be undone on the others (an atomic one; it is
the last of its round). When all have sent Applied, rank 0 writes a second key in the same way: keep, or why not. Each
training thread is held until it reads that, but proposes "not" after ``SETTLE_TIMEOUT``.

*Why no rank waits for ever.* A held thread waits only for the other ranks' receiver threads, which are not training
threads: a rank that evaluates, saves or hangs in a collective answers all the same. If one does not answer within
``READY_TIMEOUT``, the coordinator proposes "off"; if the coordinator does not decide within ``DECISION_TIMEOUT``, the
participant proposes it. All obey the proposal that is written first, so no rank applies a round that one rank called
off. The commands of a round that is off stay queued and are tried again.

*A store that does not answer.* A rank that gets no answer to its proposal within ``GIVE_UP_TIMEOUT`` trains on. When
the answer comes, a round that is off has done no harm, and one whose T lies ahead is applied there. A rank that has
passed T does not apply it, and says so. If all ranks have passed it, the commands are tried again; if only some, the
others did what this one did not, and control is over.

*Ranks that end, give up or die.* A rank whose training ended sends Leave; the others continue without it, and it owes
no more reports. A rank whose control failed while its training continues ends all agreement: if the others stopped, it
would wait for them in a collective. A rank that dies silently leaves a round "off" after ``READY_TIMEOUT``; its
training can have no further step then, and its launcher must notice.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Literal, NamedTuple

from .. import states
from ..wire.records import Outcome
from . import failures, limits
from .messages import Applied, Commit, Join, Leave, Missed, Prepare, Ready, Reported
from .tally import Tally


class Send(NamedTuple):
    """Action: send ``message`` to each of ``ranks``."""

    ranks: tuple[int, ...]
    message: Prepare | Commit


class Decide(NamedTuple):
    """Action: write the round's decision, unless there is one, and pass what stands there to ``decided``."""

    number: int
    due: int | None  # T, to be written with the commands that are pending now, or ``None`` for "off"


class AllApplied(NamedTuple):
    """Result: all ranks applied the round; ``fault`` says why not all, if so."""

    number: int
    outcomes: dict[int, dict[str, Outcome]]  # by rank; only those that are not empty
    fault: str | None


class NoneApplied(NamedTuple):
    """Result: all ranks missed the round: its commands are to be tried again."""


class Split(NamedTuple):
    """Result: some ranks missed what the others applied, so that there are no more rounds."""

    why: str


class AllReported(NamedTuple):
    """Result: all ranks reported on the command; ``fault`` says why some never will, if so."""

    command_id: str
    outcomes: dict[int, Outcome]
    fault: str | None


Action = Send | Decide | AllApplied | NoneApplied | Split | AllReported


class Coordinator:
    """Rank 0's side of the rounds, one at a time: events go in, and ``next`` returns what is to be done."""

    def __init__(self, size: int) -> None:
        self._ranks = frozenset(range(size))
        self._absent = set(self._ranks)
        self._left: dict[int, str | None] = {}  # why, if not as it should
        self._passed = 0  # the last step of those that left
        self.fault: str | None = None  # why there can be no more rounds
        self._lost: str | None = None  # why nothing more can be received
        self.closed = False
        self.number = 0
        self._phase: Literal["idle", "preparing", "deciding", "committed"] = "idle"
        self._asked: set[int] = set()
        self._steps: dict[int, int] = {}  # by rank that is ready
        self._deadline = 0.0
        self._delay = limits.RETRY_DELAY
        self._applied = Tally()  # of this round
        self._missed: set[int] = set()
        self._reports: dict[str, Tally] = {}  # by command
        self._commands: list[str] = []  # of this round, that await reports
        self._early: list[Reported] = []  # on commands that are not known yet

    def receive(self, message: Join | Ready | Applied | Missed | Reported | Leave) -> None:
        """Note what a rank sent."""
        match message:
            case Join(rank):
                self._absent.discard(rank)
            case Ready(number, rank, step) if self._phase == "preparing" and number == self.number:
                self._steps[rank] = step
            case Applied(number, rank, outcomes) if number == self.number:
                self._applied.add(rank, outcomes)
            case Missed(number, rank) if number == self.number and rank in self._applied.missing:
                self._applied.add(rank, {})
                self._missed.add(rank)
            case Reported(rank, command_id, outcome) if command_id in self._reports:
                self._reports[command_id].add(rank, outcome)
            case Reported() if self._phase == "deciding":  # of a rank that gave the round up and read the decision
                self._early.append(message)
            case Leave(rank, step, fault) if rank not in self._left:
                self._passed = max(self._passed, step)  # the others must not apply what this rank has passed
                self._absent.discard(rank)
                self._asked.discard(rank)
                self._applied.drop(rank, fault)
                self._drop(rank, fault)
                self.fault = self.fault or fault

    def _drop(self, rank: int, fault: str | None) -> None:
        self._left[rank] = fault
        for command_id, tally in self._reports.items():
            if rank not in self._applied.missing or command_id not in self._commands:  # rank 0 may not have applied it
                tally.drop(rank, fault)

    def decided(self, decision: Commit, awaiting: Iterable[str], now: float) -> Send:
        """Note what stands in the store as the round's decision; ``awaiting``: its commands that await reports."""
        if decision.due is not None:
            self._phase, self._deadline, self._delay = "committed", now, limits.RETRY_DELAY
            self._commands = list(awaiting)
            self._reports.update((command_id, Tally(self._applied.ranks)) for command_id in self._commands)
            for report in self._early:
                self.receive(report)
            for rank, fault in self._left.items():
                self._drop(rank, fault)
        elif self._asked and len(self._steps) == len(self._asked):
            self._phase, self._deadline = "idle", now  # all were ready, but the commands had been cancelled
        else:
            self._phase, self._deadline = "idle", now + self._delay
            self._delay = min(limits.RETRY_FACTOR * self._delay, limits.MAX_RETRY_DELAY)
        self._early.clear()
        return Send(tuple(sorted(self._asked)), decision)

    def lose(self, why: str) -> list[Action]:
        """Rank 0 receives nothing any more: there are no more rounds, and what is missing will not come."""
        self.fault, self._lost = self.fault or why, why
        return self._completed()

    def close(self, fault: str | None) -> None:
        """End rank 0: it owes no more reports, a round that is not decided is off, and there are no more."""
        self.closed = True
        self._drop(0, fault)

    def state(self, rank: int) -> states.RankState:
        """Return the state of a rank that did not answer."""
        if rank in self._absent:
            return states.RANK_NEVER_JOINED
        if rank in self._left:
            return states.RANK_ENDED if self._left[rank] is None else states.RANK_UNKNOWN
        return states.RANK_SILENT

    @property
    def absent(self) -> list[int]:
        """The other ranks that never joined: until they do, no round begins."""
        return sorted(self._absent - {0})

    @property
    def unacknowledged(self) -> list[int]:
        """The ranks that have not answered that they applied the last commands."""
        return sorted(self._applied.missing) if self._phase == "committed" else []

    @property
    def owed(self) -> bool:
        """Whether rank 0 did its part (or may have) of something, and other ranks have not answered that they did."""
        return self._phase in ("preparing", "deciding") or bool(self.missing)

    @property
    def missing(self) -> list[int]:
        """Those other ranks."""
        tallies = [self._applied] if self._phase == "committed" else []
        tallies += self._reports.values()
        return sorted({rank for tally in tallies if 0 not in tally.missing for rank in tally.missing})

    def next(self, now: float, pending: bool) -> list[Action]:
        """Return what is to be done. Call it after each event, after its actions are done, and after ``delay``.

        ``now`` is in seconds, on any clock that only grows; ``pending`` says whether commands are queued.
        """
        if self._phase == "preparing":
            return self._count(now)
        actions = self._completed()
        may_begin = pending and not self._absent and not self.closed and self.fault is None
        if self._phase == "idle" and may_begin and now >= self._deadline:
            self.number += 1
            self._asked, self._steps = set(self._ranks - self._left.keys()), {}
            self._phase, self._deadline = "preparing", now + limits.READY_TIMEOUT
            actions.append(Send(tuple(sorted(self._asked)), Prepare(self.number)))
        return actions

    def delay(self, now: float, pending: bool) -> float | None:
        """Return the seconds after which ``next`` may return actions though nothing happened; ``None`` for never."""
        if self._phase == "preparing" or (self._phase == "idle" and pending and now < self._deadline):
            return max(0.0, self._deadline - now)
        return None

    def _completed(self) -> list[Action]:
        """Return what all ranks have applied, or reported on, since the last call."""
        actions: list[Action] = []
        for tally in (self._applied, *self._reports.values()) if self._lost else ():
            for rank in list(tally.missing):
                tally.drop(rank, self._lost)
        if self._phase == "committed" and not self._applied.missing:
            actions += self._concluded()
            self._phase, self._commands = "idle", []
        for command_id, tally in list(self._reports.items()):
            if not tally.missing and command_id not in self._commands:  # applied comes before finished
                del self._reports[command_id]
                actions.append(AllReported(command_id, tally.answers, tally.fault))
        return actions

    def _concluded(self) -> list[Action]:
        if self._missed == self._applied.ranks:
            self._reports = {name: tally for name, tally in self._reports.items() if name not in self._commands}
            return [NoneApplied()]
        outcomes = {rank: answer for rank, answer in self._applied.answers.items() if answer}
        if not self._missed:
            return [AllApplied(self.number, outcomes, self._applied.fault)]
        why = failures.STORE_SILENT % (min(self._missed), limits.GIVE_UP_TIMEOUT)
        self.fault = self.fault or why
        for rank, name in itertools.product(self._missed, self._commands):
            self._reports[name].drop(rank, why)
        return [AllApplied(self.number, outcomes, self._applied.fault or why), Split(why)]

    def _count(self, now: float) -> list[Action]:
        steps = [self._steps[rank] for rank in self._asked if rank in self._steps]
        is_off = self.closed or self.fault is not None or not self._asked
        all_ready = len(steps) == len(self._asked)
        if not is_off and not all_ready and now < self._deadline:
            return []
        due = max(*steps, self._passed) + 1 if all_ready and not is_off else None
        # A rank that gave the round up may apply it, or leave, before the decision is known here.
        self._phase, self._applied, self._missed = "deciding", Tally(self._asked), set()
        return [Decide(self.number, due)]
