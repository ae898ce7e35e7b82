"""Command records, and the form in which commands reach the ranks."""

from __future__ import annotations

import json

import pytest

from forgather_control import states
from forgather_control.errors import InternalError
from forgather_control.wire.jsonrpc import encode
from forgather_control.wire.records import CommandRecord, ScheduledCommand

from ..support.harness import strict

RECORD = CommandRecord("id-1", "abort", "accepted", 12.5)


def test_a_scheduled_command_survives_the_way_over_json():
    """It travels between the ranks as a JSON array and comes back equal."""
    command = ScheduledCommand("id", "save_checkpoint", {"evaluate": "auto"}, True)
    assert ScheduledCommand(*json.loads(json.dumps(command))) == command


def test_a_record_knows_its_final_states():
    """A record is final when nothing more will happen to its command."""
    final = [state for state in states.COMMAND_STATES if CommandRecord("i", "abort", state, 0.0).is_final]
    assert final == ["finished", "failed", "cancelled"] and set(final) == states.FINAL_STATES


def test_record_crosses_the_wire():
    """A record is the same on both sides, and what a newer job adds is left out."""
    record = CommandRecord("i", "save_checkpoint", "finished", 1.5, 7, 2.5, {"step": 7, "path": "p"}, None)
    value = strict(encode({**record.to_json(), "rank": 3, "__class__": "x"}))
    assert CommandRecord.from_json(value) == record
    assert list(record.to_json()) == (
        [
            "command_id",
            "command",
            "state",
            "requested_at",
            "applied_at_step",
            "finished_at",
            "result",
            "error",
            "params",
            "reason",
            "requested_by",
        ]
    )


@pytest.mark.parametrize(
    "value",
    [None, 5, "x", [], {}, {**RECORD.to_json(), "state": []}, {**RECORD.to_json(), "command": None},
     {**RECORD.to_json(), "error": "no"}, {**RECORD.to_json(), "result": [1]},
     {**RECORD.to_json(), "requested_at": "now"}, {**RECORD.to_json(), "applied_at_step": 1.5},
     {**RECORD.to_json(), "params": None}, {**RECORD.to_json(), "requested_by": "me"}],
)  # fmt: skip
def test_what_is_no_record(value):
    """A peer that answers like this is no job of ours, and the client raises one error."""
    with pytest.raises(InternalError, match="no command record"):
        CommandRecord.from_json(value)


def test_an_error_without_a_message_is_shown():
    """A failed command without a reason is still shown as failed."""
    assert CommandRecord.from_json({**RECORD.to_json(), "state": "failed", "error": {"code": 1}}).trouble


def test_what_became_of_a_command_in_one_sentence():
    """A failed command names its reason, a cancelled one that it was not applied; the others are no trouble."""
    failed = RECORD._replace(state="failed", error={"code": -32002, "message": "no space left"})
    assert failed.trouble == "abort failed: no space left"
    assert RECORD._replace(state="cancelled").trouble == "abort was cancelled before it was applied"
    assert RECORD.trouble is RECORD._replace(state="finished").trouble is None


def test_a_record_without_optional_members_is_one():
    """A job of protocol 1 sends none of params, reason and requested_by."""
    first = {name: value for name, value in RECORD.to_json().items() if name not in ("params", "reason")}
    assert CommandRecord.from_json(first) == RECORD


def test_record_is_frozen():
    """A record that was returned does not change."""
    with pytest.raises(AttributeError):
        RECORD.state = "finished"


def test_how_it_is_shown():
    """In one line, and as a table that escapes what a client gave."""
    assert repr(RECORD) == "<CommandRecord abort accepted>"
    saved = RECORD._replace(command="save_checkpoint", state="finished", applied_at_step=7, result={"path": "/p"})
    assert repr(saved) == "<CommandRecord save_checkpoint finished at step 7: /p>"
    failed = saved._replace(state="failed", result=None, error={"code": 1, "message": "no"}, reason="<b>")
    assert repr(failed) == "<CommandRecord save_checkpoint failed at step 7: no>"
    assert "<th>reason</th><td>&lt;b&gt;</td>" in failed._repr_html_() and "finished_at" not in failed._repr_html_()
