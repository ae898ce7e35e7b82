"""The worlds without a line between ranks: one process, which agrees with itself."""

from __future__ import annotations

import pytest

from forgather_control.ranks.group import OneProcess
from forgather_control.training.command_queue import Mailbox
from forgather_control.training.command_tracker import Ledger


class Home:
    """A job's side of a world, with a real mailbox."""

    def __init__(self):
        self.mailbox = Mailbox(lambda: None)
        ledger = Ledger(self.mailbox, 0.0)
        self.take, self.put_back, self.confirm, self.submit = (
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

    def about(self):
        """What it says of its process."""
        return {"host": "here", "pid": 1}

    def meet(self, about):
        """All ranks are there."""
        self.met = about

    def tell(self, what):
        """Its answer."""
        return {"asked": what}


@pytest.fixture
def home():
    """A job of one process."""
    return Home()


@pytest.fixture
def world(home):
    """Its world, begun."""
    made = OneProcess(home)
    made.start()
    return made


def test_one_process_is_all_ranks(home, world):
    """It meets itself, knows itself, and knows nobody else."""
    assert (world.rank, world.size, home.met) == (0, 1, {0: {"host": "here", "pid": 1}})
    assert world.about(0) == home.about() and world.about(1) == {} and world.state(1) == "absent"
    assert world.inquire("ranks").answers == {0: {"asked": "ranks"}}


def test_what_it_holds_all_hold(home, world):
    """A command is due at once, heard once, applied when it is applied, and settled when it says so."""
    assert not world.due(1)
    home.mailbox.submit("save_checkpoint", "id")
    assert world.due(2)
    calls = world.hear(2)
    assert calls == [["id", "save_checkpoint", False]] and not world.due(3)
    world.applied(calls, 2)
    assert (home.mailbox.get("id").state, home.mailbox.get("id").applied_at_step) == ("applied", 2)
    told = []
    world.settle("id", told.append)
    assert told == [None]


def test_a_signal_is_a_command_at_the_next_step(home, world):
    """It is only noted when it comes, as the interrupted thread may hold any lock."""
    world.call("abort")
    assert not home.pending and world.due(1)
    assert [call[1] for call in world.hear(1)] == ["abort"] and not world.due(2)


def test_a_job_that_cannot_start_meets_nobody(home):
    """Its adapter says why; nothing is left to be told."""
    OneProcess(home).start("the job id is taken")
    assert home.met is None
