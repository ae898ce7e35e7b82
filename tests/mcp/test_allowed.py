"""What ``--allow`` means: each acting verb by its name, limited to settings and commands, also inside rules."""

from __future__ import annotations

import pytest

from forgather_control.errors import CommandRefused, InvalidParams
from forgather_control.mcp import allowed
from forgather_control.mcp.allowed import Allowed
from forgather_control.wire.builtin import BUILTIN


def test_the_words():
    """Verbs, each perhaps with names; a verb without a name is not limited, whatever else is given."""
    names = Allowed.parse("save, stop,set:learning_rate,set:weight_decay,run:sample,run,").names
    assert names == {
        "save": None,
        "stop": None,
        "set": frozenset({"learning_rate", "weight_decay"}),
        "run": None,
    }
    assert Allowed.parse("run,run:sample").names == {"run": None}
    assert Allowed.parse("").names == {}


@pytest.mark.parametrize(
    "text, says",
    [
        ("sav", "did you mean save?"),
        ("save_checkpoint", "knows no verb 'save_checkpoint'"),
        ("*", "choose from save, stop,"),
        ("all", "knows no verb"),
        ("status", "status only reads"),
        ("wait", "wait only reads"),
        ("save:x", "behind the colon of set and run"),
        ("set:", "behind the colon of set and run"),
    ],
)
def test_wrong_words(text, says):
    """Each says what is wrong, and what there is."""
    with pytest.raises(InvalidParams, match=says.replace("?", r"\?")):
        Allowed.parse(text)


def test_nothing_acts_unless_it_is_named():
    """Every method that acts has a word, is refused without it, and allowed with it; abort is no exception."""
    for word, method in allowed.ACTING.items():
        params = {"changes": {}} if method == "change_settings" else {"do": "ping"}
        with pytest.raises(CommandRefused, match=f"without --allow {word}"):
            Allowed.parse(",".join(other for other in allowed.ACTING if other != word)).check(method, params)
        Allowed.parse(word).check(method, params)
    commands = {method.name for method in BUILTIN.values() if method.is_command}
    acting = {"cancel_command", "add_rule", "remove_rule"}
    assert {*allowed.ACTING.values()} == commands | acting
    for method in BUILTIN.keys() - commands - acting:
        Allowed().check(method, {})


@pytest.mark.parametrize(
    "words, method, params, refused",
    [
        ("set:learning_rate", "change_settings", {"changes": {"learning_rate": 1}}, None),
        ("set:learning_rate", "change_settings", {"changes": {"learning_rate": 1, "max_steps": 2}}, "set:max_steps"),
        ("run:sample", "user.sample", {}, None),
        ("run:sample", "user.delete", {}, "run:delete"),
        ("save", "user.sample", {}, "run:sample"),
        ("run", "user.anything", {}, None),
        ("save", "unknown", {}, "unknown"),
        ("when,save", "add_rule", {"do": "save_checkpoint"}, None),
        ("when,save", "add_rule", {"do": "abort"}, "abort"),
        ("when,save", "add_rule", {"do": "user.sample"}, "run:sample"),
        ("when,set:a", "add_rule", {"do": "change_settings", "params": {"changes": {"b": 1}}}, "set:b"),
        ("when,set:a", "add_rule", {"do": "change_settings", "params": {"changes": {"a": 1}}}, None),
        ("when", "add_rule", {}, "None"),
    ],
)
def test_names_and_rules(words, method, params, refused):
    """A word that is limited allows no other name; a rule gives only commands that are allowed themselves."""
    if refused is None:
        Allowed.parse(words).check(method, params)
        return
    with pytest.raises(CommandRefused, match=f"without --allow {refused}"):
        Allowed.parse(words).check(method, params)


@pytest.mark.parametrize("params", [{"changes": ["b"]}, {"changes": "b"}])
def test_what_cannot_be_judged(params):
    """Settings that are no object are refused here, not sent on."""
    with pytest.raises(InvalidParams, match="changes must be an object"):
        Allowed.parse("set:a").check("change_settings", params)
    with pytest.raises(InvalidParams, match="changes must be an object"):
        Allowed.parse("when,set:a").check("add_rule", {"do": "change_settings", "params": params})
