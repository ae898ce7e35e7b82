"""The built-in methods: complete, without side effects of their own, and answered as JSON."""

from __future__ import annotations

import ast
import inspect

import pytest

from forgather_control.wire import builtin
from forgather_control.wire.builtin import BUILTIN
from forgather_control.wire.jsonrpc import encode
from forgather_control.wire.methods import COMMON_NAMES
from forgather_control.wire.records import CommandRecord

from ..support.harness import strict

COMMANDS = {
    "save_checkpoint": (["save"], {"saved"}, ("save",), "save"),
    "graceful_stop": (["stop"], {"ended"}, ("stop",), "stop"),
    "save_and_stop": (["save", "stop"], {"saved", "ended"}, ("save", "stop"), "save-stop"),
    "abort": (["abort"], {"ended"}, ("abort",), "abort"),
}
QUERIES = {"ping", "authenticate", "status", "get_command", "cancel_command", "list_commands", "list_jobs", "ranks",
           "stacks", "subscribe", "unsubscribe"}  # fmt: skip
RECORD = CommandRecord("id-1", "abort", "accepted", 12.5)

every_command = pytest.mark.parametrize("name", COMMANDS)
every_method = pytest.mark.parametrize("name", [method.name for method in BUILTIN])


class RecordingLoop:
    """A training loop that records what it is asked for."""

    def __init__(self):
        self.asked = []

    def __getattr__(self, name):
        assert hasattr(builtin.TrainingLoop, name), f"{name} is not in the protocol"
        return lambda *params: self.asked.append(name.removeprefix("request_"))


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

    def subscribe(self, since, kinds):
        return {"next": since, "kinds": kinds}

    def unsubscribe(self):
        return {"subscribed": False}


# The table...


def test_table_is_the_contract():
    """The methods, what completes each command and the CLI's verbs are those of the contract."""
    assert {m.name: (set(m.finishes_when), m.needs, m.verb) for m in BUILTIN if m.is_command} == {
        name: (finishes_when, needs, verb) for name, (_, finishes_when, needs, verb) in COMMANDS.items()
    }
    assert {method.name for method in BUILTIN if not method.is_command} == QUERIES
    verbs = [method.verb for method in BUILTIN if method.verb]
    assert len(verbs) == len(set(verbs))


@every_command
def test_command_asks_the_loop(name):
    """A command only raises the flags of its effect, in order (the save comes before the stop)."""
    loop, method = RecordingLoop(), BUILTIN[name]
    own = {param.name: param.default for param in method.params if param.name not in COMMON_NAMES}
    assert method.run(loop, **own) is None
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
        ("subscribe", [3, ["phase"]], {"next": 3, "kinds": ["phase"]}),
        ("unsubscribe", {}, {"subscribed": False}),
    ],
)
def test_query_is_answered_as_json(name, given, answer):
    """A query answers with JSON values made of what the job says."""
    method = BUILTIN.lookup(name)
    assert strict(encode(method.run(FakeJob(), **method.bind(given)))) == answer


@every_method
def test_help_is_there(name):
    """Each method explains itself in one line of a terminal, ending in a full stop."""
    summary = BUILTIN[name].summary
    assert summary.endswith(".") and "\n" not in summary and 10 < len(summary) <= 100
    assert all(param.doc.endswith(".") for param in BUILTIN[name].params)


def test_an_answer_that_comes_later_passes_through():
    """The table passes on what other ranks still have to answer, as it is."""
    later, job = object(), FakeJob()
    job.ranks = job.stacks = lambda timeout: later
    assert all(BUILTIN[name].run(job, **BUILTIN[name].bind([])) is later for name in ("ranks", "stacks"))


def test_effects_have_no_io():
    """The module imports nothing that could do I/O, read the time or know ranks."""
    tree = ast.parse(inspect.getsource(builtin))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
