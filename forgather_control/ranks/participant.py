"""One rank's side of the rounds, which ``consensus`` explains. No torch, no thread and no clock in here, either."""

from __future__ import annotations

from ..wire.records import ScheduledCommand
from .messages import Commit, Ready


class Participant:
    """One rank's side of the rounds.

    The training thread alone writes ``step``, without a lock, before it reads ``must_wait``; the owner's lock guards
    the rest.
    """

    def __init__(self, rank: int, step: int = 0) -> None:
        self.rank = rank
        self.step = step
        self.must_wait = False  # whether the end of a step must call ``take``; all that an idle step reads
        self.number = 0  # of the round that waits for its decision or for its step, or the last one there was
        self._decision: Commit | None = None
        self.overdue = False  # whether it trains on without the decision of the round, which may still come

    def tick(self, step: int) -> bool:
        """Note the end of a step; return ``must_wait``. On the training thread, every step.

        Where step numbers do not grow (each epoch starts from 1, say), the count continues from the last one.
        """
        last = self.step
        self.step = step if step > last else last + 1
        return self.must_wait

    def prepare(self, number: int) -> Ready:
        """Hold the training thread at its next step end; a Prepare that comes after its round's end changes nothing."""
        if number > self.number:  # an overdue round was off, or there would be no other one
            self.number, self._decision, self.overdue = number, None, False
            self.must_wait = True  # before the step is read: see above
        return Ready(number, self.rank, self.step)

    def commit(self, decision: Commit) -> bool:
        """Note the decision of a round; one that comes late or twice changes nothing.

        Return whether this rank has missed the round: it trained on, and has passed its step.
        """
        if decision.number > self.number:  # off before its Prepare came, as are all rounds before it
            self.forget()
            self.number = decision.number
        elif decision.number == self.number and (self.undecided or self.overdue):
            self._decision = decision
            self.must_wait = decision.due is not None
            # As in ``prepare``, it is set before the step is read: a step end that is not counted here will wait.
            missed = self.overdue and decision.due is not None and self.step >= decision.due
            self.overdue = False
            if missed:
                self._decision, self.must_wait = None, False
            return missed
        return False

    @property
    def undecided(self) -> bool:
        """Whether the end of a step has to wait."""
        return self.must_wait and self._decision is None

    @property
    def is_decided(self) -> bool:
        """Whether commands wait for their step."""
        return self.must_wait and self._decision is not None

    def overrun(self) -> None:
        """Train on without the decision, which the store does not tell: it may be back in time."""
        if self.undecided:
            self.must_wait, self.overdue = False, True

    def forget(self) -> None:
        """Drop a round that is not decided, because no more will be received of it; one that is decided stands."""
        if self.undecided:
            self.must_wait = False

    def skip(self) -> list[ScheduledCommand] | None:
        """Return the commands of a decided round, if there is one, while training is paused at every rank.

        All ranks advance to its step: none trains until then. It is greater than the step in every Ready, which they
        sent before it was decided.
        """
        if self.is_decided and self._decision is not None and self._decision.due is not None:
            self.step = max(self.step, self._decision.due)
        return self.take()

    def take(self) -> list[ScheduledCommand] | None:
        """Return the commands of a decided round if they are due at this step end, else ``None``."""
        decision = self._decision
        if not self.must_wait or decision is None or decision.due is None or self.step < decision.due:
            return None
        self.must_wait = False
        return decision.commands
