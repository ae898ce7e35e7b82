"""The group of one process, which agrees with itself; a polling group needs real ranks (test_poll). And callbacks."""

from __future__ import annotations

import pytest

from forgather_control.ranks import limits
from forgather_control.ranks.polling_group import PollingGroup, SingleProcess
from forgather_control.wire.records import ScheduledCommand

from ..support.harness import SOON
from ..support.ranks_delegate import Delegate


@pytest.fixture
def delegate():
    """A job of one process."""
    return Delegate()


@pytest.fixture
def group(delegate):
    """Its group, started."""
    made = delegate.group = SingleProcess(delegate)
    made.start()
    return made


def test_one_process_is_all_ranks(delegate, group):
    """It joins itself, knows itself, and no other rank."""
    assert (group.rank, group.size, delegate.notes("joined")) == (0, 1, [{0: {"pid": 0}}])
    assert group.description(0) == delegate.describe() and group.description(1) == {} and group.state(1) == "unknown"
    assert group.query("ranks").answers == {0: {"rank": 0, "what": "ranks"}}


def test_what_it_holds_all_hold(delegate, group):
    """A command is due at once, received once with its parameters, and applied with its outcome."""
    assert not group.due(1)
    name = delegate.order("user.sample", n=2)
    assert group.due(2)
    commands = group.receive(2)
    assert commands == [(name, "user.sample", {"n": 2}, False)] and not group.due(3)
    group.applied(commands, 2, {name: {"value": "text"}})
    assert delegate.notes("applied") == [(commands, 2, {0: {name: {"value": "text"}}}, None)]
    told = []
    group.when_reported(name, lambda *result: told.append(result))
    assert told == [({}, None)]


def test_a_rank_whose_training_is_interrupted(delegate, group):
    """One rank alone still has its commands applied; one of several that poll does not wait for the others."""
    name = delegate.order("user.sample")
    commands = group.receive(1)
    group.interrupted(commands, 1, {name: {"error": {"code": 1, "message": "Ctrl-C"}}})
    assert delegate.notes("applied") == [(commands, 1, {0: {name: {"error": {"code": 1, "message": "Ctrl-C"}}}}, None)]
    asked = []
    PollingGroup(Delegate(1), 1, 2, 1, asked.append).interrupted(commands, 1, {})
    assert asked == []


def test_ranks_that_have_not_acknowledged(group):
    """Of ranks that poll none is known to have applied anything before all have."""
    assert group.unacknowledged() == []
    assert PollingGroup(Delegate(1), 1, 3, 1, lambda message: {}).unacknowledged() == [0, 2]


def test_a_command_that_awaits_its_report(delegate, group):
    """Those that wait for the report are called with it, and those that come later, too."""
    name = delegate.order("save_checkpoint")
    told = []
    commands = group.receive(1)
    group.applied(commands, 1, {})
    assert delegate.notes("applied") == [(commands, 1, {}, None)]
    group.when_reported(name, lambda *result: told.append(result))
    assert told == []
    group.report(name, {"value": 3})
    group.when_reported(name, lambda *result: told.append(result))
    assert told == [({0: {"value": 3}}, None)] * 2


@pytest.mark.parametrize("fault", [None, "it broke"])
def test_the_end_of_training_completes_what_is_open(delegate, group, fault):
    """With the reason, where training continues; else it is unknown."""
    name = delegate.order("save_checkpoint")
    group.applied(group.receive(1), 1, {})
    told = []
    group.when_reported(name, lambda *result: told.append(result))
    group.close(1.0, fault)
    ((outcomes, why),) = told
    assert outcomes == {} and why == "rank 0: it broke" if fault else "it is unknown whether rank 0" in why


def test_a_signal_is_a_command_at_the_next_step(delegate, group):
    """It is only noted when it comes, as the interrupted thread may hold any lock."""
    group.request("abort")
    assert not delegate.pending and group.due(1)
    assert [command.name for command in group.receive(1)] == ["abort"] and not group.due(2)


def test_facts_are_added_to_the_description(delegate, group):
    """The delegate gets the new description."""
    group.describe({"methods": "digest"})
    assert delegate.notes("joined")[1:] == [{0: {"pid": 0, "methods": "digest"}}]
    assert group.description(0) == {"pid": 0, "methods": "digest"}


def test_a_job_that_cannot_start_joins_nothing(delegate):
    """Its integration says why; the delegate is not called."""
    SingleProcess(delegate).start("the job id is taken")
    assert delegate.told == []


# Ranks that poll, at their end...


class Store(dict):
    """That of torch.distributed, as far as it is used; the test acts at each look."""

    on_look = None

    def check(self, names):
        """As ``Store.check``."""
        if self.on_look is not None:
            self.on_look()
        return all(name in self for name in names)

    set, get, delete_key = dict.__setitem__, dict.__getitem__, dict.__delitem__


def last_words(delegate, store, seconds=SOON):
    """What rank 0 of two knows of a save after its end; rank 1 had not reported at the last poll."""
    told = []
    group = delegate.group = PollingGroup(delegate, 0, 2, 1, lambda message: {}, store)
    name = delegate.order("save_checkpoint")
    group.applied(delegate.take(), 1, {})
    group.when_reported(name, lambda *result: told.append(result))
    group.report(name, {})
    group.close(seconds)
    return told


def test_rank_0_waits_for_the_last_reports_of_ranks_that_poll(delegate):
    """There is no next poll: they stand in the store, and are removed from it."""
    store = Store()
    other = PollingGroup(Delegate(1), 1, 2, 1, lambda message: {}, store)
    other.report("save_checkpoint-1", {"value": 1})
    store.on_look = lambda: store or other.close(SOON)
    assert last_words(delegate, store) == [({0: {}, 1: {"value": 1}}, None)] and not store


@pytest.mark.parametrize("case", ["slow", "gone", "no store"])
def test_what_a_rank_that_polls_did_may_be_unknown(delegate, case):
    """It takes longer, its process ended, or there is nothing to ask: the record says so and names the rank."""
    if case == "gone":
        delegate.gone.add(1)
    ((outcomes, why),) = last_words(delegate, None if case == "no store" else Store(), 0.1 if case == "slow" else SOON)
    assert outcomes == {0: {}} and "it is unknown whether rank 1 completed it" in why


# Callbacks on reports: once each, early or late...


def save(name):
    """A command that awaits reports."""
    return ScheduledCommand(name, "save_checkpoint", {})


def test_callbacks_are_called_once_with_the_result(group):
    """Those that wait, and those that come later."""
    told = []
    group._expect_reports([save("id")])
    for number in range(2):
        group.when_reported("id", lambda outcomes, fault, number=number: told.append((number, outcomes, fault)))
    assert told == []
    group._complete("id", {1: {"value": 1}}, "rank 0 broke")
    group._complete("id", {}, "late")
    assert told == [(number, {1: {"value": 1}}, "rank 0 broke") for number in range(2)]
    group._expect_reports([save("id")])  # complete already: it is not held back again
    group.when_reported("id", lambda outcomes, fault: told.append(fault))
    assert told[2:] == ["rank 0 broke"]


def test_a_command_that_awaits_nothing_is_complete(group):
    """Its callbacks are called at once."""
    told = []
    group.when_reported("id", lambda *result: told.append(result))
    assert told == [({}, None)]


def test_the_end_completes_all_that_is_open(delegate, group):
    """With what is known of it: nothing."""
    told = []
    for number in range(2):
        group.applied([delegate.records[delegate.order("save_checkpoint", number=number)].command], 1, {})
    for (command,), *_ in delegate.notes("applied"):
        group.when_reported(command.command_id, lambda outcomes, fault: told.append((outcomes, fault)))
    group.close(0.0, "it broke")
    assert told == [({}, "rank 0: it broke")] * 2


def test_results_are_kept_within_a_bound(group):
    """The oldest go."""
    for number in range(limits.MAX_RESULTS + 1):
        group._complete(str(number), {0: {"value": number}}, None)
    told = []
    for number in (0, 1, limits.MAX_RESULTS):
        group.when_reported(str(number), lambda outcomes, fault: told.append(outcomes))
    assert told == [{}, {0: {"value": 1}}, {0: {"value": limits.MAX_RESULTS}}]
