"""Values and failures of commands: what JSON can carry, how long it may be, and how it is shown."""

from __future__ import annotations

import json
import math

import pytest

from forgather_control.errors import CommandFailed, CommandRefused
from forgather_control.training import limits, outcomes
from forgather_control.wire import jsonrpc
from forgather_control.wire.limits import MAX_DEPTH
from forgather_control.wire.records import CommandRecord

from ..support.harness import strict


def nested(depth):
    """A list in a list, so deep."""
    found = 1
    for _ in range(depth):
        found = [found]
    return found


def circle():
    """A list in itself."""
    found = []
    found.append(found)
    return found


@pytest.mark.parametrize(
    ("returned", "arrives"),
    [
        (None, None),
        (1.5, 1.5),
        ((1, "ä"), [1, "ä"]),
        ({1: {None: True}}, {"1": {"null": True}}),
        (nested(MAX_DEPTH), nested(MAX_DEPTH)),
        (10**308, 10**308),
        ("\ud800", "\ud800"),
        ("x" * (limits.MAX_VALUE - 2), "x" * (limits.MAX_VALUE - 2)),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_what_json_carries(returned, arrives):
    """It arrives as JSON has it, and what a client gets can be parsed by any program."""
    assert outcomes.value("user.f", returned) == arrives
    assert jsonrpc.parse_incoming(jsonrpc.response(1, [[[[[arrives]]]]])).result is not None
    strict(jsonrpc.encode(arrives))


def test_numbers_that_json_lacks_travel_as_text():
    """NaN and the infinities stay what they are until they are written."""
    assert math.isnan(outcomes.value("user.f", math.nan))
    assert strict(jsonrpc.encode(outcomes.value("user.f", [math.nan, -math.inf]))) == ["NaN", "-Infinity"]


@pytest.mark.parametrize(
    ("returned", "why"),
    [
        (object(), "Object of type object is not JSON serializable"),
        ({1: {2}}, "not JSON serializable"),
        ({(1, 2): 3}, "keys must be"),
        (circle(), "Circular"),
        (nested(MAX_DEPTH + 1), f"nested deeper than {MAX_DEPTH}"),
        (nested(100_000), "nested too deeply"),
        (10**309, "beyond the range of a double"),
        (10**5000, "."),
        ("x" * (limits.MAX_VALUE - 1), f"returned {limits.MAX_VALUE + 1} bytes of JSON, more than {limits.MAX_VALUE}"),
        ("ä" * (limits.MAX_VALUE // 6 + 1), "bytes of JSON"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else type(value).__name__,
)
def test_what_json_does_not_carry(returned, why):
    """The error names the command and what is wrong."""
    with pytest.raises(CommandFailed, match=why) as caught:
        outcomes.value("user.f", returned)
    assert str(caught.value).startswith("user.f returned ") and len(str(caught.value)) < 300


class Broken(Exception):
    """An exception that cannot be printed."""

    def __str__(self):
        raise RuntimeError("no text")


class Remote(Exception):
    """An error of another library, with a code of its own that JSON cannot carry, as grpc's have."""

    def code(self):
        return 5


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("no"), CommandFailed.code, "ValueError: no"),
        (CommandRefused("not now"), CommandRefused.code, "not now"),
        (Broken(), CommandFailed.code, "Broken: (its text cannot be read)"),
        (KeyError("x" * 5000), CommandFailed.code, "KeyError: '" + "x" * 989),
        (CommandFailed(5), CommandFailed.code, "5"),
        (Remote("gone"), CommandFailed.code, "Remote: gone"),
    ],
    ids=repr,
)
def test_failures(error, code, message):
    """Whatever a function raises has a code and a short text."""
    assert outcomes.failure(error) == {"error": {"code": code, "message": message}}


def test_the_message_of_several_ranks():
    """Equal messages are told once, with their ranks; rank 0's without."""
    fail = {rank: outcomes.failure(ValueError(text)) for rank, text in enumerate("aabb")}
    assert outcomes.error_text(fail) == "ValueError: a; rank 2, 3: ValueError: b"
    assert outcomes.error_text({0: {"value": 1}, 1: {}}) is None


@pytest.mark.parametrize("value", ["x" * 5000, ["x"] * 1100, {"a": [{"b": "x" * 4000, "c": list(range(100))}]}])
def test_a_long_value_is_left_out_of_lists(value):
    """The record is otherwise whole, and says that something is missing; the original stays as it is."""
    record = CommandRecord("id", "user.f", "finished", 1.0, 5, 2.0, {"value": value})
    shown = outcomes.brief(record)
    assert shown["result"] == {"value_omitted": True} and record.result == {"value": value}
    assert {**shown, "result": record.result} == record.to_json()


@pytest.mark.parametrize("result", [None, {}, {"value": None}, {"value": "x" * 4000}, {"path": "x" * 5000}])
def test_other_records_are_shown_whole(result):
    """A short value, a path, nothing."""
    record = CommandRecord("id", "user.f", "finished", 1.0, 5, 2.0, result)
    assert outcomes.brief(record) == record.to_json() and json.dumps(outcomes.brief(record))
