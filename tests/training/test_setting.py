"""The declaration of one setting: what is wrong raises, and what does not fit is refused."""

from __future__ import annotations

import pytest

from forgather_control.errors import CommandRefused, InvalidParams
from forgather_control.training.setting import Setting, declared


@pytest.mark.parametrize("text", ["x1e400", "x1e300", float("inf"), float("nan")])
def test_a_value_is_finite(text):
    """Whatever its limits are."""
    setting = Setting("free", get=lambda: 1e300, set=lambda value: None, type=float)
    with pytest.raises(CommandRefused, match="free must be a finite number"):
        setting.wanted(text, 1e300)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": ""}, "name must be 1 to 64"),
        ({"name": "a b"}, "name must be 1 to 64"),
        ({"get": None}, "get of the setting x must be a function"),
        ({"set": 1}, "set of the setting x must be a function"),
        ({"type": list}, "type of the setting x"),
        ({"minimum": "0"}, "minimum of the setting x must be a finite number, not '0'"),
        ({"minimum": True}, "minimum of the setting x must be a finite number"),
        ({"maximum": float("nan")}, "maximum of the setting x must be a finite number"),
        ({"maximum": 10**400}, "maximum of the setting x must be a finite number"),
        ({"doc": None}, "doc of the setting x must be a text"),
        ({"maximun": 1}, "a setting takes name, get, set"),
    ],
)
def test_wrong_declarations(arguments, words):
    """They raise where they are made."""
    with pytest.raises(InvalidParams, match=words):
        declared([{"name": "x", "get": lambda: 1, "set": lambda value: None, **arguments}])


ONE = {"name": "x", "get": lambda: 1, "set": lambda value: None}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (5, "settings must be a list of settings, or what each takes by its name"),
        ({"x": 5}, "settings must be a list of settings, or what each takes by its name"),
        (None, "settings must be a list of settings, or what each takes by its name"),
        (["x"], "a setting is a mapping with name, get, set and more, not 'x'"),
        ([ONE, ONE], "the setting x is declared twice"),
    ],
)
def test_what_is_no_declaration(found, words):
    """It says what is expected."""
    with pytest.raises(InvalidParams, match=words):
        declared(found)
