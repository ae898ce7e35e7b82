"""Callbacks on reports: once each, early or late."""

from __future__ import annotations

from forgather_control.ranks import limits
from forgather_control.ranks.report_callbacks import ReportCallbacks


def test_callbacks_are_called_once_with_the_result():
    """Those that wait, and those that come later."""
    callbacks, told = ReportCallbacks(), []
    callbacks.expect("id")
    for number in range(2):
        callbacks.add("id", lambda outcomes, fault, number=number: told.append((number, outcomes, fault)))
    assert told == []
    callbacks.complete("id", {1: {"value": 1}}, "rank 0 broke")
    callbacks.complete_all("late")
    assert told == [(number, {1: {"value": 1}}, "rank 0 broke") for number in range(2)]
    callbacks.expect("id")  # complete already: it is not held back again
    callbacks.add("id", lambda outcomes, fault: told.append(fault))
    assert told[2:] == ["rank 0 broke"]


def test_a_command_that_awaits_nothing_is_complete():
    """Its callbacks are called at once."""
    told = []
    ReportCallbacks().add("id", lambda *result: told.append(result))
    assert told == [({}, None)]


def test_the_end_completes_all_that_is_open():
    """With what is known of it: nothing."""
    callbacks, told = ReportCallbacks(), []
    for name in ("one", "two"):
        callbacks.expect(name)
        callbacks.add(name, lambda outcomes, fault: told.append((outcomes, fault)))
    callbacks.complete_all("rank 1 had not reported")
    assert told == [({}, "rank 1 had not reported")] * 2


def test_results_are_kept_within_a_bound():
    """The oldest go."""
    callbacks = ReportCallbacks()
    for number in range(limits.MAX_RESULTS + 1):
        callbacks.complete(str(number), {0: {"value": number}}, None)
    told = []
    for number in (0, 1, limits.MAX_RESULTS):
        callbacks.add(str(number), lambda outcomes, fault: told.append(outcomes))
    assert told == [{}, {0: {"value": 1}}, {0: {"value": limits.MAX_RESULTS}}]
