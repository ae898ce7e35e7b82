"""The ledger: each applied command ends as its row of the table says, once all ranks did their part."""

from __future__ import annotations

import pytest

from forgather_control.training.command_queue import Mailbox
from forgather_control.training.command_tracker import Ledger
from forgather_control.training.loop_actions import RequestedActions
from forgather_control.wire.builtin import BUILTIN
from forgather_control.wire.records import ScheduledCommand

COMMANDS = [method.name for method in BUILTIN if method.is_command]


class Ranks:
    """A group of which each side is written down: what this rank said, and what waits for the others."""

    size = 2

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.said = []
        self.outcomes = {}

    def applied(self, commands, step, outcomes):
        """As ``RankGroup``."""
        self.said.append(("applied", [command.command_id for command in commands], step))

    def report(self, command_id, outcome):
        """As ``RankGroup``."""
        self.said.append((command_id, outcome))

    def when_reported(self, command_id, callback):
        """As ``RankGroup``; the test says when the others are done."""
        self.outcomes[command_id] = callback

    def all_done(self):
        """The others have done their part of everything."""
        while self.outcomes:
            self.outcomes.pop(next(iter(self.outcomes)))({}, None)


@pytest.fixture
def box():
    """Where rank 0 has its records."""
    return Mailbox(lambda: None)


@pytest.fixture
def group():
    """Rank 0 of two."""
    return Ranks()


def apply(ledger, box, group, *commands, step=1):
    """Submit each command under its own name, and apply them all at one step."""
    requested = RequestedActions()
    for command in commands:
        box.submit(command, command)
    calls = ledger.take()
    ledger.apply(calls, requested, step, group)
    ledger.confirm(calls, step, None)
    return requested


def test_a_save_is_over_once_the_others_have_written_theirs(box, group):
    """Not when rank 0 has; its result is that of rank 0."""
    ledger = Ledger(box, 0.0)
    apply(ledger, box, group, "save_checkpoint", step=7)
    ledger.saved(7, "/c-7", group)
    assert box.get("save_checkpoint").state == "applied" and group.said[-1] == ("save_checkpoint", {})
    group.outcomes["save_checkpoint"]({}, None)
    record = box.get("save_checkpoint")
    assert (record.state, record.applied_at_step, record.result["path"]) == ("finished", 7, "/c-7")


def test_a_save_that_another_rank_could_not_finish_has_failed(box, group):
    """With what rank 0 did save, and the other's reason."""
    ledger = Ledger(box, 0.0)
    apply(ledger, box, group, "save_checkpoint")
    ledger.saved(1, "/c-1", group)
    group.outcomes["save_checkpoint"]({0: {}, 1: {"error": {"code": -32000, "message": "disk full"}}}, None)
    record = box.get("save_checkpoint")
    assert (
        record.state == "failed" and record.error["message"] == "rank 1: disk full" and record.result["path"] == "/c-1"
    )


@pytest.mark.parametrize("command", ["graceful_stop", "save_and_stop", "abort"])
def test_a_stop_is_over_when_training_has_ended(box, group, command):
    """Not before; until then the job is stopping."""
    ledger = Ledger(box, 0.0)
    apply(ledger, box, group, command, step=3)
    if command == "save_and_stop":
        ledger.saved(3, "/c-3", group)
    assert ledger.ends and box.get(command).state == "applied" and not group.outcomes
    ledger.end(3, None, group)
    group.outcomes[command]({}, None)
    path = "/c-3" if command == "save_and_stop" else None
    assert (box.get(command).state, box.get(command).result["path"]) == ("finished", path)
    assert box.get(command).result["step"] == 3 and not ledger.ends


@pytest.mark.parametrize("command", COMMANDS)
def test_training_that_raised_fails_what_waited_for_it(box, group, command):
    """Each command that is not over says what ended the run."""
    ledger = Ledger(box, 0.0)
    apply(ledger, box, group, command)
    ledger.fail_saves(group, "training ended by ValueError", "training ended by ValueError")
    assert box.get(command).state == "applied", "all ranks applied it: that is told first"
    group.all_done()
    ledger.end(1, "training ended by ValueError", group)
    record = box.get(command)
    assert record.state == "failed" and "ValueError" in record.error["message"]


def test_an_abort_fails_the_saves_before_it(box, group):
    """No checkpoint is written after it, so they will not come."""
    ledger = Ledger(box, 0.0)
    apply(ledger, box, group, "save_checkpoint", "abort")
    group.all_done()
    assert box.get("save_checkpoint").state == "failed" and "abort" in box.get("save_checkpoint").error["message"]
    assert box.get("abort").state == "applied"


def test_a_save_that_fails_takes_no_other_stop_with_it(box, group):
    """A save-and-stop failed; a stop beside it is finished when training ends."""
    ledger = Ledger(box, 0.0)
    apply(ledger, box, group, "save_and_stop", "graceful_stop")
    ledger.fail_saves(group, "disk full", "disk full")
    assert group.said[-1][0] == "save_and_stop" and group.said[-1][1]["error"]["message"] == "disk full"
    group.all_done()
    assert box.get("save_and_stop").state == "failed"
    ledger.end(1, None, group)
    group.outcomes["graceful_stop"]({}, None)
    assert list(group.outcomes) == ["graceful_stop"] and box.get("graceful_stop").state == "finished"


def test_another_rank_has_no_records(box):
    """It runs the same effects and reports its part; the mailbox is rank 0's."""
    ledger, group, requested = Ledger(box, 0.0), Ranks(rank=1), RequestedActions()
    calls = [
        ScheduledCommand("id", "save_checkpoint", {"evaluate": "auto"}),
        ScheduledCommand("other", "graceful_stop", {}),
    ]
    ledger.apply(calls, requested, 4, group)
    assert requested.save and requested.stop and group.said == [("applied", ["id", "other"], 4)]
    ledger.saved(4, "/c-4", group)
    ledger.saves_nothing(group)
    ledger.fail_saves(group, "late", "late")
    ledger.end(4, None, group)
    assert group.said[1:] == [("id", {})]
    assert group.outcomes == {} and box.records() == []


def test_what_not_all_ranks_applied_has_failed(box):
    """The truth is told, though some did."""
    ledger = Ledger(box, 0.0)
    box.submit("abort", "abort")
    ledger.confirm(ledger.take(), 5, "rank 1 did not say that it did its part")
    assert box.get("abort").state == "failed" and "not all ranks" in box.get("abort").error["message"]


def test_what_is_put_back_is_taken_again(box):
    """A round that was off loses nothing."""
    ledger = Ledger(box, 0.0)
    box.submit("abort", "abort")
    calls = ledger.take()
    ledger.put_back(calls)
    assert ledger.take() == calls == [("abort", "abort", {}, False)]


def test_only_a_signals_save_and_stop_is_spared(box, group):
    """And only while a checkpoint is young; its record then names that one."""
    ledger = Ledger(box, 1e6)
    ledger.submit("save_and_stop")
    assert [call.skip_save for call in ledger.take()] == [False], "there is no checkpoint yet"
    ledger.saved(2, "/c-2", group)
    for command, by_signal, spared in (("save_checkpoint", True, False), ("abort", False, False)):
        ledger.submit(command) if by_signal else box.submit(command, None)
        assert [call.skip_save for call in ledger.take()] == [spared]


def test_a_spared_stop_names_the_checkpoint_there_is(box, group):
    """It ends as a stop does, and saves nothing."""
    ledger, requested = Ledger(box, 1e6), RequestedActions()
    ledger.saved(2, "/c-2", group)
    ledger.submit("save_and_stop")
    (call,) = calls = ledger.take()
    ledger.apply(calls, requested, 3, group)
    assert call.skip_save and requested.stop and requested.skip_save and not requested.save
    ledger.end(3, None, group)
    group.outcomes[call.command_id]({}, None)
    assert box.get(call.command_id).result == {"step": 2, "path": "/c-2", "seconds": 0.0}


def test_a_signal_that_comes_too_late_is_one_warning(box, caplog):
    """The mailbox is closed: nothing is raised into the thread that decides."""
    from forgather_control.errors import JobEnding

    box.close(JobEnding("training ended"))
    Ledger(box, 0.0).submit("abort")
    (warning,) = caplog.records
    assert "in vain" in warning.getMessage()
