"""What each command requests of the training loop."""

from __future__ import annotations

import itertools

import pytest

from forgather_control.errors import CommandRefused
from forgather_control.training.loop_actions import RequestedActions
from forgather_control.wire import builtin
from forgather_control.wire.methods import COMMON_NAMES


def requested_by(command: str, **params: object) -> RequestedActions:
    """The requests of one command, with these parameters of its own."""
    requested = RequestedActions()
    assert not requested.any
    method = builtin.BUILTIN[command]
    defaults = {p.name: p.default for p in method.params if p.name not in COMMON_NAMES}
    method.run(requested, **{**defaults, **params})
    return requested


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ("save_checkpoint", {"save", "evaluate_first"}),
        ("evaluate", {"evaluate"}),
        ("graceful_stop", {"stop"}),
        ("save_and_stop", {"save", "evaluate_first", "stop"}),
        ("abort", {"abort"}),
    ],
)
def test_requests_of_the_commands(command, wanted):
    """Each command sets its flags and no others."""
    requested = requested_by(command)
    assert {name for name, value in vars(requested).items() if value} == wanted
    assert requested.any


@pytest.mark.parametrize("command", ["save_checkpoint", "save_and_stop"])
@pytest.mark.parametrize("evaluate", [False, "auto", True])
def test_whether_a_save_evaluates_first(command, evaluate):
    """The parameter is kept as it is until the save is done."""
    requested = requested_by(command, evaluate=evaluate)
    assert requested.save and requested.evaluate_first is evaluate
    requested.saved()
    assert not requested.save and requested.evaluate_first is False


def test_of_several_saves_one_that_evaluates_decides():
    """In any order true is stronger than auto, and auto than false; a save that is done does not count."""
    for order in itertools.permutations([False, "auto", True]):
        requested = RequestedActions()
        requested.request_save(True)
        requested.saved()
        for number, evaluate in enumerate(order):
            requested.request_save(evaluate)
            assert requested.evaluate_first is max(order[: number + 1], key=[False, "auto", True].index)


def test_an_evaluation_and_whether_it_counts():
    """It is requested until it is done; of several at one step, one that counts decides."""
    requested = requested_by("evaluate", counted=True)
    assert requested.evaluate and requested.counted
    requested.request_evaluate(False)
    assert requested.counted
    requested.evaluated()
    assert not requested.any and not requested.counted


def test_a_signals_evaluation_is_refused_at_its_step():
    """It is not checked when it is queued; the effect fails then, and with it the command."""
    requested = RequestedActions(evaluation_counter="EarlyStopping")
    with pytest.raises(CommandRefused, match="EarlyStopping counts evaluations"):
        requested.request_evaluate()
    assert not requested.any
    requested.request_evaluate(counted=True)
    assert requested.evaluate


def test_the_end_without_a_save():
    """``request_end`` stops and spares the last checkpoint."""
    requested = RequestedActions()
    requested.request_end()
    assert requested.stop and requested.skip_save and requested.any and not requested.save


def test_what_a_run_cannot_do():
    """An evaluation without data, before a save, too; and one that would be counted; all else is possible."""
    requested = RequestedActions()
    assert requested.cannot("save", {"evaluate": True}) is None
    requested.no_evaluation = "there is no data"
    assert requested.cannot("save", {"evaluate": True}) == "there is no data"
    assert requested.cannot("save", {"evaluate": "auto"}) is requested.cannot("save", {}) is None
    assert requested.cannot("evaluate", {}) == requested.cannot("evaluate", {"counted": True}) == "there is no data"
    requested = RequestedActions(evaluation_counter="EarlyStopping")
    assert "EarlyStopping counts evaluations" in str(requested.cannot("evaluate", {"counted": False}))
    assert requested.cannot("evaluate", {"counted": True}) is requested.cannot("save", {"evaluate": True}) is None
    assert requested.cannot("stop", {}) is requested.cannot("abort", {}) is None
