"""One rule: its parameters, its reason, what is told of it, and the rules of a script."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest

from forgather_control import InvalidParams, MethodNotFound
from forgather_control.training import limits
from forgather_control.training.loop_actions import RequestedActions
from forgather_control.training.progress import RunState
from forgather_control.training.rule import Rule, check, declared
from forgather_control.wire.builtin import BUILTIN

SAVE = {"when": "loss > 1", "do": "save_checkpoint"}
#: What each rule says that waits.
ENDS = "the rule ends with this job"


def rule(when="loss > 1", do="save_checkpoint", not_before=None, **params):
    """A rule of a client."""
    return Rule(when, do, params, not_before, {"via": "rule"})


def note(when="loss > 1", do="save_checkpoint", logs=None, epoch=None, **facts):
    """What is told of a rule, beside that it ends with the job."""
    state = RunState(0, None, lambda: None)
    state.log(logs or {})
    state.progress.beat(1, epoch)
    found = rule(when, do)
    found.watch.feed({name: value for name, value in state.metrics.items() if type(value) is float})
    listed = found.listed(state, RequestedActions(**facts))["note"]
    assert listed.endswith(ENDS)
    return listed.removesuffix(ENDS).removesuffix("; ")


def test_its_reason_names_it():
    """With the condition, and what the caller gave as a reason; the list shows the latter among the parameters."""
    plain, reasoned = rule("loss>2.0 for 3"), rule(reason="it diverged", evaluate=True)
    assert (plain.why, reasoned.why) == ("rule 0: loss > 2 for 3", "rule 0: loss > 1: it diverged")
    listed = reasoned.listed(RunState(0, None, lambda: None), RequestedActions())
    assert listed["params"] == {"evaluate": True, "reason": "it diverged"} and reasoned.params == {"evaluate": True}


@pytest.mark.parametrize(
    ("logs", "expected"),
    [
        ({}, "loss was never logged so far"),
        ({"lss": 1.0}, "loss was never logged so far (did you mean lss?)"),
        ({"loss": 1.0}, ""),
        ({"loss": float("nan")}, ""),
        ({"loss": "high"}, "loss is no number, so no rule can see it"),
        ({"loss": None}, "loss is no number, so no rule can see it"),
        ({"loss": True}, "loss is no number, so no rule can see it"),
        ({"loss": [1.0, 2.0]}, "loss is no number, so no rule can see it"),
    ],
)
def test_metrics_that_it_does_not_see(logs, expected):
    """It says so, and which name may be meant."""
    assert note(logs=logs) == expected


def test_a_tensor_on_a_device():
    """As it is held: with a number that is not read; the note says what to log."""

    class Tensor(SimpleNamespace):
        def item(self):
            raise AssertionError("the device was read")

    state = RunState(0, None, lambda: None)
    state.metrics = {"loss": Tensor()}
    found = rule().listed(state, RequestedActions())["note"]
    assert found == f"loss is logged as a tensor on a device, which no rule reads; log loss.item() instead; {ENDS}"


def test_other_notes():
    """NaN that the trainer filters, an epoch that is not known, a stop that saves nothing."""
    nan = {"nan_filter": "NaN is left out", "logs": {"loss": 1.0, "grad_norm": 2.0}}
    assert note("loss is nan or loss is nan for 2", **nan) == "NaN is left out"
    assert note("loss > 1", **nan) == note("grad_norm is nan", **nan) == ""
    assert (note("epoch > 1"), note("epoch > 1", epoch=0.5)) == ("no epoch is known so far", "")
    assert note("step > 1", "graceful_stop", no_stop_save="no disk") == "nothing will be saved: no disk"
    assert note("step > 1", "save_and_stop", no_stop_save="no disk") == note("step > 1", "graceful_stop") == ""


def test_it_may_be_due_before_its_command_can_be_given():
    """Until the ranks have compared what each registered."""
    waiting = rule("step > 1")
    waiting.begun, waiting.is_due = True, True
    assert "its condition was true" in waiting.listed(RunState(0, None, lambda: None), RequestedActions())["note"]
    assert waiting.next_value("step", 5) == 0 and waiting.counts_steps


def test_from_which_step_on_it_must_be_looked_at():
    """Before it begins, from the step at which it does."""
    waiting = rule("step > 5 and loss > 1", not_before=3)
    assert waiting.counts_steps and waiting.next_value("step", 1) == 3
    waiting.begun = True
    assert waiting.next_value("step", 3) == 5 and waiting.counts_steps
    other = rule("loss > 1")
    other.begun = True
    assert not other.counts_steps


# Parameters...


def test_parameters_are_those_of_the_command():
    """With defaults, and the one of all commands that is about the record."""
    assert check(BUILTIN["save_checkpoint"], {}) == {"evaluate": "auto"}
    assert check(BUILTIN["pause"], {"seconds": 3, "reason": "x"}) == {"seconds": 3.0, "reason": "x"}
    for name in ("wait", "timeout", "command_id", "expires_at"):
        with pytest.raises(InvalidParams, match=f"a rule takes no {name}, as no caller waits"):
            check(BUILTIN["save_checkpoint"], {name: None})
    with pytest.raises(InvalidParams, match=r"status is none; use one of save_checkpoint, .* or user\.NAME"):
        check(BUILTIN["status"], {})
    with pytest.raises(InvalidParams, match="reason must be"):
        check(BUILTIN["abort"], {"reason": "x" * 1001})


# Rules of a script...


def test_what_a_script_declares():
    """With all parameters of ``add_rule``; those of its own commands are checked when these are registered."""
    assert declared([]) == declared(()) == []
    given = [SAVE, {"when": "loss > 1", "do": "user.sample", "params": {"n": object}, "not_before": 3}]
    before = copy.deepcopy(given)
    assert declared(given) == [
        {**SAVE, "params": {"evaluate": "auto"}, "not_before": None},
        {"when": "loss > 1", "do": "user.sample", "params": {"n": object}, "not_before": 3},
    ]
    assert given == before


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ([{}], "needs when"),
        ([{**SAVE, "when": "loss"}], "needs one of"),
        ([{**SAVE, "when": 3}], "when must be a string"),
        ([{**SAVE, "do": "ping"}], "ping is none"),
        ([{**SAVE, "params": {"evaluate": 3}}], "evaluate must be"),
        ([{**SAVE, "params": []}], "params must be an object"),
        ([{**SAVE, "until": 1}], "add_rule has no parameter 'until'"),
        ([{**SAVE, "not_before": -1}], "not_before must be"),
        ([{**SAVE, "not_before": "5"}], "not_before must be"),
        (["loss > 1"], "a rule is a mapping"),
        (SAVE, "rules must be a list of mappings"),
        ("loss > 1", "rules must be a list of mappings"),
        (None, "rules must be a list of mappings"),
        ([SAVE] * (limits.MAX_RULES + 1), "at most 32 rules, not 33"),
    ],
)
def test_wrong_rules_of_a_script(rules, words):
    """They raise where they are written."""
    with pytest.raises(InvalidParams, match=words):
        declared(rules)


def test_a_command_that_there_is_not():
    """No method of this version, nor one of the script's."""
    with pytest.raises(MethodNotFound, match="'sav'"):
        declared([{**SAVE, "do": "sav"}])
