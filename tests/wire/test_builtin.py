"""The built-in methods: complete, without side effects of their own, and answered as JSON."""

from __future__ import annotations

import ast
import inspect

import pytest

from forgather_control.training.job_queries import JobQueries
from forgather_control.wire import builtin
from forgather_control.wire.builtin import BUILTIN
from forgather_control.wire.methods import COMMON_NAMES

COMMANDS = {
    "save_checkpoint": (["save"], {"saved"}, ("save",), "save"),
    "graceful_stop": (["stop"], {"ended"}, ("stop",), "stop"),
    "save_and_stop": (["save", "stop"], {"saved", "ended"}, ("save", "stop"), "save-stop"),
    "abort": (["abort"], {"ended"}, ("abort",), "abort"),
    "evaluate": (["evaluate"], {"evaluated"}, ("evaluate",), "evaluate"),
    "pause": (["pause"], {"applied"}, ("pause",), "pause"),
    "resume": (["resume"], {"applied"}, (), "resume"),
    "profile": (["profile"], {"reported"}, ("profile",), "profile"),
    "change_settings": (["change_settings"], {"reported"}, ("settings",), "set"),
}
QUERIES = {"ping", "authenticate", "status", "get_command", "cancel_command", "list_commands", "list_jobs", "ranks",
           "stacks", "list_settings", "add_rule", "remove_rule",
           "list_rules", "metrics_history", "subscribe", "unsubscribe"}  # fmt: skip

every_command = pytest.mark.parametrize("name", COMMANDS)
every_method = pytest.mark.parametrize("name", list(BUILTIN))


class RecordingLoop:
    """A training loop that records what it is asked for."""

    def __init__(self):
        self.asked = []

    def __getattr__(self, name):
        assert hasattr(builtin.TrainingLoop, name), f"{name} is not in the protocol"
        return lambda *params: self.asked.append(name.removeprefix("request_"))


# The table...


def test_table_is_the_contract():
    """The methods, what completes each command and the CLI's verbs are those of the contract."""
    assert {m.name: (set(m.finishes_when), m.needs, m.verb) for m in BUILTIN.values() if m.is_command} == {
        name: (finishes_when, needs, verb) for name, (_, finishes_when, needs, verb) in COMMANDS.items()
    }
    assert {method.name for method in BUILTIN.values() if not method.is_command} == QUERIES
    verbs = [method.verb for method in BUILTIN.values() if method.verb]
    assert len(verbs) == len(set(verbs))


@every_command
def test_command_asks_the_loop(name):
    """A command only raises the flags of its effect, in order (the save comes before the stop)."""
    loop, method = RecordingLoop(), BUILTIN[name]
    own = {param.name: param.default for param in method.params if param.name not in COMMON_NAMES}
    assert method.run(loop, **own) is None
    assert loop.asked == COMMANDS[name][0]


@every_method
def test_help_is_there(name):
    """Each method explains itself in one line of a terminal, ending in a full stop."""
    summary = BUILTIN[name].summary
    assert summary.endswith(".") and "\n" not in summary and 10 < len(summary) <= 100
    assert all(param.doc.endswith(".") for param in BUILTIN[name].params)


def test_every_query_has_its_answer():
    """The class that answers has a method for each query, with the parameters of the table."""
    for method in BUILTIN.values():
        if not method.is_command:
            names = list(inspect.signature(getattr(JobQueries, method.name)).parameters)
            assert names == ["self", *(param.name for param in method.params)], method.name


def test_effects_have_no_io():
    """The module imports nothing that could do I/O, read the time or know ranks."""
    tree = ast.parse(inspect.getsource(builtin))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
