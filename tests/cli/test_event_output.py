"""Events as text: one safe line each, whatever they hold."""

from __future__ import annotations

import time

import pytest

from forgather_control.cli import event_output

from .test_output import RECORD, harmless, tricks

BY = {"via": "socket", "uid": 0, "user": "ada", "pid": 7, "program": "bash"}


@pytest.fixture(autouse=True)
def utc(monkeypatch):
    """One time zone, wherever the tests run."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("event", "shown"),
    [
        ({"kind": "started", "job_id": "job", "pid": 5, "step": 0, "world_size": 1}, "pid 5, 1 rank, at step 0"),
        ({"kind": "started", "job_id": "job", "pid": 5, "step": 9, "world_size": 2}, "pid 5, 2 ranks, at step 9"),
        ({"kind": "phase", "phase": "saving"}, "saving"),
        ({"kind": "checkpoint", "step": 9, "path": "/c"}, "step 9: /c"),
        ({"kind": "rank", "state": "joined", "ranks": 2}, "joined: 2 ranks"),
        ({"kind": "rank", "state": "lost", "reason": "rank 1 is gone"}, "lost: rank 1 is gone"),
        ({"kind": "ended", "step": 9, "reason": None}, "at step 9"),
        ({"kind": "ended", "step": 9, "reason": "training ended by KeyError"}, "at step 9: training ended by KeyError"),
        ({"kind": "command", **RECORD}, "save finished at step 7: /c/checkpoint-7"),
        ({"kind": "command", **RECORD, "state": "applied", "result": None}, "save applied at step 7"),
        (
            {
                "kind": "command",
                **RECORD,
                "state": "accepted",
                "applied_at_step": None,
                "requested_by": BY,
                "reason": "why",
            },
            "save accepted, by ada, bash 7, socket: why",
        ),
        (
            {
                "kind": "command",
                **RECORD,
                "state": "failed",
                "result": None,
                "error": {"code": 1, "message": "no room"},
            },
            "save failed at step 7: no room",
        ),
        ({"kind": "new", "fact": 1.5}, "fact 1.5"),
        ({"kind": "phase", "phase": "saving", "lost": 3}, "saving  (3 events before it are missing)"),
    ],
    ids=range(14),
)
def test_lines(event, shown):
    """When, which kind, and the facts."""
    line = event_output.line({"seq": 1, "time": 0.5, **event})
    assert line == f"1970-01-01 00:00:00  {event['kind']:10}  {shown}"


@tricks
@pytest.mark.parametrize("kind", ["started", "phase", "command", "checkpoint", "rank", "ended", "other"])
def test_lines_are_safe(kind, text, wanted):
    """Nothing gets to the terminal raw."""
    names = ("phase", "step", "path", "reason", "state", "command", "pid")
    line = harmless(event_output.line({"seq": 1, "time": 0.0, "kind": kind, **dict.fromkeys(names, text)}), 1)
    assert wanted in line
