"""The longest operations of a trace, as JSON on standard output: ``python trace_table.py TRACE``.

Run as a program of its own, because a trace of a large model takes long to read: in the job that would hold the
interpreter's lock. Standard library only; it imports nothing of this package. The trace has the "Trace Event Format"
of Chrome, with complete events (``"ph": "X"``) in microseconds.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from typing import Any

#: The categories of events that are operations, and where they run.
CATEGORIES = {"cpu_op": "cpu", "kernel": "gpu", "gpu_memcpy": "gpu", "gpu_memset": "gpu"}
OPERATIONS = 10


def longest(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the operations that took the most time themselves, without the operations that they called."""
    lanes: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in CATEGORIES:
            lanes[event.get("pid"), event.get("tid")].append(event)
    found: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for lane in lanes.values():
        for event, own in _own_times(lane):
            row = found[event["name"], CATEGORIES[event["cat"]]]
            row[0] += 1
            row[1] += own
            row[2] += event["dur"]
    rows = sorted(found.items(), key=lambda item: -item[1][1])[:OPERATIONS]
    return [
        {"name": name[:200], "device": device, "calls": int(calls), "self_ms": own / 1e3, "total_ms": total / 1e3}
        for (name, device), (calls, own, total) in rows
    ]


def _own_times(lane: list[dict[str, Any]]) -> list[tuple[dict[str, Any], float]]:
    """Return each event of one thread or stream with its duration less those of the events inside it."""
    own: list[float] = []
    lane = sorted(lane, key=lambda event: (event["ts"], -event["dur"]))
    open_ones: list[int] = []
    for index, event in enumerate(lane):
        while open_ones and lane[open_ones[-1]]["ts"] + lane[open_ones[-1]]["dur"] <= event["ts"]:
            open_ones.pop()
        if open_ones:
            own[open_ones[-1]] -= event["dur"]
        own.append(event["dur"])
        open_ones.append(index)
    return list(zip(lane, own))


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8", errors="replace") as file:
        json.dump(longest(json.load(file)["traceEvents"]), sys.stdout)
