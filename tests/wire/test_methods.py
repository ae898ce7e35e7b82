"""The method table: its rows, the check of parameters, and what a job may add."""

from __future__ import annotations

import math

import pytest

from forgather_control.errors import InvalidParams, MethodNotFound
from forgather_control.states import COMMAND_STATES
from forgather_control.wire import methods, schemas
from forgather_control.wire.builtin import BUILTIN
from forgather_control.wire.jsonrpc import encode
from forgather_control.wire.methods import Method, MethodTable, Param

from ..support.harness import strict

COMMANDS = [m.name for m in BUILTIN.values() if m.is_command and not any(param.required for param in m.params)]
every_command = pytest.mark.parametrize("name", COMMANDS)
every_method = pytest.mark.parametrize("name", list(BUILTIN))


def refusal(name, given):
    """The error that these parameters get."""
    with pytest.raises(InvalidParams) as caught:
        BUILTIN[name].bind(given)
    return caught.value


def example(name="user.sample", *params):
    """A method that a job could add."""
    return Method(name, "Do something.", params, "CommandRecord", lambda job: None, frozenset({"applied"}))


def test_a_job_adds_methods_to_its_own_table():
    """An added method is found, the built-in table stays as it is, and a name is taken once."""
    table = MethodTable(BUILTIN)
    table.add(example())
    assert table["user.sample"].name == "user.sample" and "user.sample" not in BUILTIN
    assert list(table) == [*BUILTIN, "user.sample"]
    for taken in ("user.sample", "ping"):
        with pytest.raises(ValueError, match="declared twice"):
            table.add(example(taken))


def test_a_frozen_table_takes_no_more():
    """After the first step nothing can be added."""
    table = MethodTable(BUILTIN)
    table.frozen = True
    with pytest.raises(ValueError, match="fixed at the first step"):
        table.add(example())
    assert "user.sample" not in table


def test_ranks_can_compare_what_was_added():
    """The digests tell methods of one name apart by their parameters; built-in ones are not among them."""
    one, two, same = MethodTable(BUILTIN), MethodTable(BUILTIN), MethodTable(BUILTIN)
    one.add(example())
    same.add(example())
    two.add(example("user.sample", Param("n", {"type": "integer", "default": 1}, "How many.")))
    assert MethodTable(BUILTIN).added() == {}
    assert one.added() == same.added() != two.added()
    assert one.added().keys() == two.added().keys() == {"user.sample"}


# Names...


@pytest.mark.parametrize(
    "name",
    ["", "Ping", "ping ", "__class__", "__init__.__globals__", "a.b.c", "_private", "rpc.", "rpc.discover.x",
     "run", "bind", "is_command", "request_abort", "x" * 10_000, "\0", "\u202egnip", "\U0001f600"],
)  # fmt: skip
def test_unknown_name(name):
    """A name that is not in the table is nothing else either: no attribute, no dotted path."""
    with pytest.raises(MethodNotFound) as caught:
        BUILTIN[name]
    assert len(caught.value.message) < 800 and caught.value.message.isascii()
    assert caught.value.data == {"methods": sorted(BUILTIN)}


# Parameters...


@every_method
def test_unknown_parameter_is_refused(name):
    """A misspelt parameter is an error that lists the parameters, before any effect."""
    error = refusal(name, {"tiemout\x1b": 3})
    assert error.data == {"expected": [param.name for param in BUILTIN[name].params]}
    assert "'tiemout\\x1b'" in error.message


@every_method
def test_too_many_positions(name):
    """More values than parameters is an error."""
    names = [param.name for param in BUILTIN[name].params]
    assert refusal(name, ["applied", None, "id", None, None, 1, 1][: len(names)] + [1]).data == {"expected": names}


@pytest.mark.parametrize("given", [{}, []])
@pytest.mark.parametrize("name", ["get_command", "cancel_command"])
def test_required_parameter(name, given):
    """What has no default must be given."""
    assert "command_id" in refusal(name, given).message


@every_command
@pytest.mark.parametrize(
    ("given", "bound"),
    [
        ({}, ("accepted", None, None)),
        ([], ("accepted", None, None)),
        (["finished"], ("finished", None, None)),
        (["applied", 2, "me"], ("applied", 2.0, "me")),
        ({"timeout": 0, "command_id": None}, ("accepted", 0.0, None)),
        ({"command_id": "x" * 128, "wait": "applied", "timeout": 1e9}, ("applied", 1e9, "x" * 128)),
        ({"command_id": "żółw/../ 1"}, ("accepted", None, "żółw/../ 1")),
    ],
)
def test_parameters_bind(name, given, bound):
    """By name, by position, or left out: every parameter has its checked value."""
    found = BUILTIN[name].bind(given)
    assert {param: found[param] for param in ("wait", "timeout", "command_id")} == dict(
        zip(("wait", "timeout", "command_id"), bound)
    )
    assert found.keys() == {param.name for param in BUILTIN[name].params}


WRONG = {
    "wait": [None, "", "Applied", "cancelled", 1, True, ["applied"], {"applied": 1}],
    "timeout": [-1, -1e-300, 1e9 + 1, 10**400, True, False, "1", "NaN", [], {}, math.nan, math.inf, -math.inf],
    "command_id": ["", "x" * 129, 5, 1.5, True, [], {}, "a\nb", "\x1b[2J", "\0", "\ud800", "\u202e", "\u2028", "\x7f"],
}
RIGHT = {"wait": list(COMMAND_STATES[:3]), "timeout": [None, 0, -0.0, 1e9, 10**9], "command_id": ["a", " ", "é" * 128]}


@every_command
@pytest.mark.parametrize(("param", "value"), [(param, value) for param in WRONG for value in WRONG[param]], ids=ascii)
def test_wrong_value(name, param, value):
    """A value out of its domain is named in the error, short and harmless."""
    error = refusal(name, {param: value})
    assert error.data == {"parameter": param}
    assert error.message.startswith(f"{param} must be ")
    assert error.message.isascii() and error.message.isprintable() and len(error.message) < 250
    strict(encode(error.message))


@pytest.mark.parametrize("name", ["ranks", "stacks"])
@pytest.mark.parametrize("value", [None, *WRONG["timeout"], 600.1], ids=ascii)
def test_wrong_patience(name, value):
    """A query to all ranks cannot wait for ever: it keeps a slot of the server busy."""
    error = refusal(name, {"timeout": value})
    assert error.data == {"parameter": "timeout"} and error.message.startswith("timeout must be a number of seconds")


@pytest.mark.parametrize("param", methods.COMMON, ids=lambda param: param.name)
def test_every_command_has_the_common_parameters(param):
    """They come in one order, behind what is required, and none of them is."""
    place = methods.COMMON.index(param)
    for name in COMMANDS:
        params = BUILTIN[name].params
        required = sum(each.required for each in params)
        assert params[required + place] is param
    assert not param.required and schemas.check(param.schema, param.default) == param.default
