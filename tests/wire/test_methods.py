"""The table of methods: complete, checked before any effect, and honest about itself."""

from __future__ import annotations

import ast
import inspect
import json
import math

import pytest

from forgather_control.errors import InternalError, InvalidParams, MethodNotFound
from forgather_control.wire import methods
from forgather_control.wire.jsonrpc import encode
from forgather_control.wire.methods import TABLE, lookup
from forgather_control.wire.records import FINAL, STATES, CommandRecord

from ..support.harness import strict

COMMANDS = {
    "save_checkpoint": (["evaluate", "save"], {"saved"}, "save"),
    "graceful_stop": (["stop"], {"ended"}, "stop"),
    "save_and_stop": (["evaluate", "save", "stop"], {"saved", "ended"}, "save-stop"),
    "abort": (["abort"], {"ended"}, "abort"),
}
QUERIES = {"ping", "authenticate", "status", "get_command", "cancel_command", "list_commands", "list_jobs", "ranks",
           "stacks", "rpc.discover"}  # fmt: skip
RECORD = CommandRecord("id-1", "abort", "accepted", 12.5)

every_command = pytest.mark.parametrize("name", COMMANDS)
every_method = pytest.mark.parametrize("name", TABLE)


class RecordingLoop:
    """A training loop that writes down what it is asked for."""

    def __init__(self):
        self.asked = []

    def __getattr__(self, name):
        assert hasattr(methods.Loop, name), f"{name} is not in the port"
        return lambda: self.asked.append(name.removeprefix("request_"))


class FakeJob:
    """A job that answers with what it was asked."""

    def ping(self):
        return {"pid": 1}

    def status(self):
        return {"global_step": 3}

    def get_command(self, command_id):
        return CommandRecord(command_id, "abort", "applied", 1.0, 7)

    def cancel_command(self, command_id):
        return CommandRecord(command_id, "abort", "cancelled", 1.0)

    def list_commands(self):
        return [RECORD]

    def list_jobs(self):
        return [{"job_id": "job"}]

    def ranks(self, timeout):
        return [{"rank": 0, "waited": timeout}]

    def stacks(self, timeout):
        return [{"rank": 0, "waited": timeout}]


def refusal(name, given):
    """The error that these parameters get."""
    with pytest.raises(InvalidParams) as caught:
        TABLE[name].bind(given)
    return caught.value


def allowed(schema, value):
    """Whether the (small) JSON Schema lets the value pass."""
    kinds = {"string": str, "number": (int, float), "null": type(None)}
    if "enum" in schema:
        return isinstance(value, str) and value in schema["enum"]
    wanted = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if isinstance(value, bool) or not any(isinstance(value, kinds[kind]) for kind in wanted):
        return False
    if isinstance(value, str):
        return schema["minLength"] <= len(value) <= schema["maxLength"]
    return value is None or schema["minimum"] <= value <= schema["maximum"]


# The table...


def test_table_is_the_contract():
    """The methods, what completes each command and the CLI's verbs are those of the contract."""
    assert {name: (set(m.completes), m.verb) for name, m in TABLE.items() if m.is_command} == {
        name: (completes, verb) for name, (_, completes, verb) in COMMANDS.items()
    }
    assert {name for name, method in TABLE.items() if not method.is_command} == QUERIES
    verbs = [method.verb for method in TABLE.values() if method.verb]
    assert len(verbs) == len(set(verbs))


@every_command
def test_command_asks_the_loop(name):
    """A command only raises the flags of its effect, in order (evaluate comes before save)."""
    loop = RecordingLoop()
    assert TABLE[name].run(loop) is None
    assert loop.asked == COMMANDS[name][0]


@pytest.mark.parametrize(
    ("name", "given", "answer"),
    [
        ("ping", [], {"pid": 1}),
        ("status", {}, {"global_step": 3}),
        ("get_command", ["c"], CommandRecord("c", "abort", "applied", 1.0, 7).to_json()),
        ("cancel_command", {"command_id": "c"}, CommandRecord("c", "abort", "cancelled", 1.0).to_json()),
        ("list_commands", [], [RECORD.to_json()]),
        ("list_jobs", [], [{"job_id": "job"}]),
        ("ranks", [], [{"rank": 0, "waited": 5.0}]),
        ("ranks", {"timeout": 0}, [{"rank": 0, "waited": 0.0}]),
        ("stacks", [600], [{"rank": 0, "waited": 600.0}]),
    ],
)
def test_query_is_answered_as_json(name, given, answer):
    """A query answers with JSON values made of what the job says."""
    method = lookup(name)
    assert strict(encode(method.run(FakeJob(), **method.bind(given)))) == answer


@every_method
def test_help_is_there(name):
    """Each method explains itself in one line of a terminal, ending in a full stop."""
    summary = TABLE[name].summary
    assert summary.endswith(".") and "\n" not in summary and 10 < len(summary) <= 100
    assert all(param.doc.endswith(".") for param in TABLE[name].params)


@pytest.mark.parametrize(
    "declare", [lambda: methods.query("ping"), lambda: methods.command("abort", "ended", verb="x")]
)
def test_second_declaration_raises(declare):
    """A method declared twice is a mistake of ours, found at import; the first stays."""
    before = dict(TABLE)
    with pytest.raises(ValueError, match="declared twice"):
        declare()(lambda job: None)
    assert before == TABLE


def test_effects_have_no_io():
    """The module imports nothing that could do I/O, tell the time or know ranks."""
    tree = ast.parse(inspect.getsource(methods))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported <= {"inspect", "math"}


# Names...


@pytest.mark.parametrize(
    "name",
    ["", "Ping", "ping ", "__class__", "__init__.__globals__", "a.b.c", "_private", "rpc.", "rpc.discover.x",
     "run", "bind", "is_command", "request_abort", "x" * 10_000, "\0", "\u202egnip", "\U0001f600"],
)  # fmt: skip
def test_unknown_name(name):
    """A name that is not in the table is nothing else either: no attribute, no dotted path."""
    with pytest.raises(MethodNotFound) as caught:
        lookup(name)
    assert len(caught.value.message) < 800 and caught.value.message.isascii()
    assert caught.value.data == {"methods": sorted(TABLE)}


# Parameters...


@every_method
def test_unknown_parameter_is_refused(name):
    """A misspelt parameter is an error that says what there is, before any effect."""
    error = refusal(name, {"tiemout\x1b": 3})
    assert error.data == {"expected": [param.name for param in TABLE[name].params]}
    assert "'tiemout\\x1b'" in error.message


@every_method
def test_too_many_positions(name):
    """More values than parameters is an error."""
    names = [param.name for param in TABLE[name].params]
    assert refusal(name, ["applied", None, "id", 1][: len(names)] + [1]).data == {"expected": names}


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
    assert TABLE[name].bind(given) == dict(zip(("wait", "timeout", "command_id"), bound))


WRONG = {
    "wait": [None, "", "Applied", "cancelled", 1, True, ["applied"], {"applied": 1}],
    "timeout": [-1, -1e-300, 1e9 + 1, 10**400, True, False, "1", "NaN", [], {}, math.nan, math.inf, -math.inf],
    "command_id": ["", "x" * 129, 5, 1.5, True, [], {}, "a\nb", "\x1b[2J", "\0", "\ud800", "\u202e", "\u2028", "\x7f"],
}
RIGHT = {"wait": list(STATES[:3]), "timeout": [None, 0, -0.0, 1e9, 10**9], "command_id": ["a", " ", "é" * 128]}


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
    """A query that asks all ranks cannot be told to wait for ever: a slot of the server waits with it."""
    error = refusal(name, {"timeout": value})
    assert error.data == {"parameter": "timeout"} and error.message.startswith("timeout must be a number of seconds")


def test_a_later_answer_passes_through():
    """What other ranks still have to say is the exchange's business; the table hands it on as it is."""
    later, job = object(), FakeJob()
    job.ranks = job.stacks = lambda timeout: later
    assert all(TABLE[name].run(job, **TABLE[name].bind([])) is later for name in ("ranks", "stacks"))


@pytest.mark.parametrize(
    "param",
    [methods.WAIT, methods.TIMEOUT, methods.PATIENCE, methods.NEW_ID, methods.KNOWN_ID],
    ids=lambda p: p.name,
)
def test_schema_says_what_is_checked(param):
    """What ``rpc.discover`` promises and what is checked are one rule (but for what prints)."""
    for value in WRONG[param.name] + RIGHT[param.name] + [None]:
        try:
            param.check(value)
            passes = True
        except (TypeError, ValueError):
            passes = False
        printable = not isinstance(value, str) or value.isprintable()
        assert passes == (allowed(param.schema, value) and printable), ascii(value)
    if not param.required:
        assert param.schema["default"] == param.default


# Records...


def test_states():
    """The states are those of the contract, and a record knows which are the last."""
    assert STATES == ("accepted", "applied", "finished", "failed", "cancelled")
    assert [state for state in STATES if CommandRecord("i", "abort", state, 0.0).is_final] == list(STATES[2:])
    assert set(STATES[2:]) == FINAL


def test_record_crosses_the_wire():
    """A record is the same on both sides, and what a newer job adds is left out."""
    record = CommandRecord("i", "save_checkpoint", "finished", 1.5, 7, 2.5, {"step": 7, "path": "p"}, None)
    value = strict(encode({**record.to_json(), "rank": 3, "__class__": "x"}))
    assert CommandRecord.from_json(value) == record
    assert list(record.to_json()) == (
        ["command_id", "command", "state", "requested_at", "applied_at_step", "finished_at", "result", "error"]
    )


@pytest.mark.parametrize(
    "value",
    [None, 5, "x", [], {}, {**RECORD.to_json(), "state": []}, {**RECORD.to_json(), "command": None},
     {**RECORD.to_json(), "error": "no"}, {**RECORD.to_json(), "result": [1]}],
)  # fmt: skip
def test_what_is_no_record(value):
    """Whoever answers like this is no job of ours; the client says so in one error."""
    with pytest.raises(InternalError, match="no command record"):
        CommandRecord.from_json(value)


def test_an_error_without_a_message_is_told():
    """What became of a command is said, though the other side does not say why."""
    assert CommandRecord.from_json({**RECORD.to_json(), "state": "failed", "error": {"code": 1}}).trouble


def test_record_is_frozen():
    """A record that somebody holds does not change under him."""
    with pytest.raises(AttributeError):
        RECORD.state = "finished"


# The OpenRPC document...


def test_discover_is_the_table():
    """``rpc.discover`` lists every method with its parameters, by the required members of OpenRPC 1.3."""
    document = strict(encode(TABLE["rpc.discover"].run(FakeJob())))
    assert document["openrpc"].startswith("1.") and document["info"].keys() >= {"title", "version"}
    assert [method["name"] for method in document["methods"]] == list(TABLE)
    for method in document["methods"]:
        assert method["params"] == [
            {"name": p.name, "description": p.doc, "required": p.required, "schema": p.schema}
            for p in TABLE[method["name"]].params
        ]
        assert method["result"].keys() >= {"name", "schema"} and method["summary"]
        required = [param["required"] for param in method["params"]]
        assert required == sorted(required, reverse=True), "required parameters stand first"
    assert len(json.dumps(document)) < 64 * 1024
