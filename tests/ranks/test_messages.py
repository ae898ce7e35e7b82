"""Messages between ranks: each arrives as it was sent."""

from __future__ import annotations

import json
from typing import get_args

import pytest

from forgather_control.ranks import messages
from forgather_control.wire.records import ScheduledCommand

EXAMPLES = [
    messages.Join(1, {"pid": 7, "host": None}),
    messages.Prepare(1),
    messages.Ready(1, 2, 30),
    messages.Commit(1, 31, [ScheduledCommand("id", "save_checkpoint", {"evaluate": "auto"}, True)]),
    messages.Commit(2, None, []),
    messages.Settled(1, "rank 1 could not do it"),
    messages.Released(),
    messages.Applied(1, 2, {"id": {"value": [1, "text"]}}),
    messages.Missed(1, 2),
    messages.Reported(2, "id", {"error": {"code": 1, "message": "full"}}),
    messages.Leave(1, 40, "it broke"),
    messages.Request("abort"),
    messages.Query(1, "stacks"),
    messages.Answer(1, 2, {"stacks": None}),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_was_sent(message):
    """Through JSON, with the commands of a decision as what they are."""
    arrived = messages.decode(json.loads(json.dumps(messages.encode(message))))
    assert arrived == message and type(arrived) is type(message)
    if isinstance(message, messages.Commit):
        assert all(type(command) is ScheduledCommand for command in arrived.commands)


def test_every_kind_has_an_example():
    """None is left out."""
    assert {type(example) for example in EXAMPLES} == set(get_args(messages.Message))


@pytest.mark.parametrize("fields", [["unknown"], ["ready", 1], ["commit", 1, 2]])
def test_what_is_no_message_is_an_error(fields):
    """The channel then counts as broken."""
    with pytest.raises((KeyError, TypeError, ValueError)):
        messages.decode(fields)
