"""The table of a trace: what took the most time itself."""

from __future__ import annotations

import json
import subprocess
import sys

from forgather_control.training import trace_table
from forgather_control.training.trace_table import longest


def event(name, ts, dur, tid=1, cat="cpu_op", **more):
    """A complete event, in microseconds."""
    return {"ph": "X", "name": name, "cat": cat, "pid": 1, "tid": tid, "ts": ts, "dur": dur, **more}


def test_time_in_called_operations_is_theirs():
    """An operation is longer than those it calls, and is not what takes the time."""
    rows = longest(
        [event("outer", 0, 1100), event("inner", 100, 700), event("inner", 850, 50), event("leaf", 150, 600)]
    )
    assert [(row["name"], row["calls"], row["self_ms"], row["total_ms"]) for row in rows] == [
        ("leaf", 1, 0.6, 0.6), ("outer", 1, 0.35, 1.1), ("inner", 2, 0.15, 0.75),
    ]  # fmt: skip


def test_threads_and_devices_are_apart():
    """What overlaps on another thread or stream is not inside."""
    rows = longest([event("a", 0, 100), event("b", 10, 50, tid=2), event("a", 20, 30, tid=7, cat="kernel")])
    assert [(row["name"], row["device"], row["self_ms"]) for row in rows] == [
        ("a", "cpu", 0.1), ("b", "cpu", 0.05), ("a", "gpu", 0.03),
    ]  # fmt: skip


def test_only_operations_count():
    """Not the steps, the metadata, or the Python functions of a trace."""
    assert (
        longest([event("ProfilerStep#1", 0, 9, cat="user_annotation"), {"ph": "M", "name": "process_name"}, {}]) == []
    )


def test_there_are_only_so_many():
    """The longest."""
    rows = longest([event(f"op{number}", number * 1000, number + 1) for number in range(30)])
    assert [row["name"] for row in rows] == [f"op{number}" for number in range(29, 19, -1)]


def test_as_a_program(tmp_path):
    """It needs no package."""
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": [event("a", 0, 1)]}))
    done = subprocess.run(
        [sys.executable, "-I", trace_table.__file__, str(tmp_path / "trace.json")], capture_output=True
    )
    assert json.loads(done.stdout)[0]["name"] == "a", done.stderr
