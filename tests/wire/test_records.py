"""Command records, and the form in which commands reach the ranks."""

from __future__ import annotations

import json

from forgather_control.wire.records import ScheduledCommand


def test_a_scheduled_command_survives_the_way_over_json():
    """It travels between the ranks as a JSON array and comes back equal."""
    command = ScheduledCommand("id", "save_checkpoint", {"evaluate": "auto"}, True)
    assert ScheduledCommand(*json.loads(json.dumps(command))) == command
