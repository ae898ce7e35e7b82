"""The worlds without a line between ranks: one process, which agrees with itself."""

from __future__ import annotations

import pytest

from forgather_control.ranks.group import SingleProcess
from forgather_control.training.command_queue import Mailbox
from forgather_control.training.command_tracker import Ledger


class Delegate:
    """A job's side of a group, with a real mailbox."""

    def __init__(self):
        self.mailbox = Mailbox(lambda: None)
        ledger = Ledger(self.mailbox, 0.0)
        self.take, self.put_back, self.all_applied, self.submit = (
            ledger.take,
            ledger.put_back,
            ledger.confirm,
            ledger.submit,
        )
        self.met = None

    @property
    def pending(self):
        """Whether commands wait."""
        return self.mailbox.pending

    def describe(self):
        """What it says of its process."""
        return {"host": "here", "pid": 1}

    def all_joined(self, about):
        """All ranks are there."""
        self.met = about

    def answer(self, what):
        """Its answer."""
        return {"asked": what}


@pytest.fixture
def delegate():
    """A job of one process."""
    return Delegate()


@pytest.fixture
def group(delegate):
    """Its group, begun."""
    made = SingleProcess(delegate)
    made.start()
    return made


def test_one_process_is_all_ranks(delegate, group):
    """It meets itself, knows itself, and knows nobody else."""
    assert (group.rank, group.size, delegate.met) == (0, 1, {0: {"host": "here", "pid": 1}})
    assert group.description(0) == delegate.describe() and group.description(1) == {} and group.state(1) == "absent"
    assert group.query("ranks").answers == {0: {"asked": "ranks"}}


def test_what_it_holds_all_hold(delegate, group):
    """A command is due at once, heard once, applied when it is applied, and settled when it says so."""
    assert not group.due(1)
    delegate.mailbox.submit("save_checkpoint", "id")
    assert group.due(2)
    calls = group.receive(2)
    assert calls == [["id", "save_checkpoint", False]] and not group.due(3)
    group.applied(calls, 2)
    assert (delegate.mailbox.get("id").state, delegate.mailbox.get("id").applied_at_step) == ("applied", 2)
    told = []
    group.settle("id", told.append)
    assert told == [None]


def test_a_signal_is_a_command_at_the_next_step(delegate, group):
    """It is only noted when it comes, as the interrupted thread may hold any lock."""
    group.request("abort")
    assert not delegate.pending and group.due(1)
    assert [call[1] for call in group.receive(1)] == ["abort"] and not group.due(2)


def test_a_job_that_cannot_start_meets_nobody(delegate):
    """Its adapter says why; nothing is left to be told."""
    SingleProcess(delegate).start("the job id is taken")
    assert delegate.met is None
