"""The event log as a file: appended whole or not at all, bounded, and read without trust."""

from __future__ import annotations

import json
import os

import pytest

from forgather_control import states
from forgather_control.jobs import event_log, limits, private_files


def line(seq, **facts):
    return json.dumps({"seq": seq, "time": 1.5, "kind": "phase", **facts}).encode() + b"\n"


@pytest.fixture
def place(tmp_path):
    """A private directory with a log of one line."""
    tmp_path.chmod(0o700)
    (tmp_path / "events.jsonl").write_bytes(line(1))
    (tmp_path / "events.jsonl").chmod(0o600)
    return tmp_path


def append(place, lines):
    with private_files.opened(str(place)) as directory:
        return event_log.append(directory, lines)


def test_the_kinds_that_are_written():
    """Those of the contract: all but progress and metrics."""
    assert event_log.LOGGED == ("started", "phase", "command", "checkpoint", "rank", "ended")
    assert set(event_log.LOGGED) < set(states.EVENT_KINDS)


def test_lines_are_added(place):
    """And read in the order in which they were written."""
    assert append(place, line(2) + line(3))
    assert [event["seq"] for event in event_log.read(str(place))] == [1, 2, 3]


@pytest.mark.parametrize("kind", ["none", "link", "fifo", "two names"])
def test_what_is_no_log_of_ours_is_not_written_to(place, kind):
    """The caller then begins one, which takes the name."""
    path, other = place / "events.jsonl", place / "other"
    path.unlink()
    if kind != "none":
        other.write_text("precious")
    {"none": lambda: None, "fifo": lambda: os.mkfifo(path), "link": lambda: path.symlink_to(other),
     "two names": lambda: os.link(other, path)}[kind]()  # fmt: skip
    assert not append(place, line(2))
    assert kind == "none" or other.read_text() == "precious"


def test_a_log_is_bounded(place, monkeypatch):
    """The first line stays, the older half goes, and the first one that is kept says how many are missing."""
    monkeypatch.setattr(limits, "MAX_EVENT_LOG", 4000)
    for seq in range(2, 1000):
        assert append(place, line(seq)) and (place / "events.jsonl").stat().st_size <= 4000
    events = event_log.read(str(place))
    assert events[0]["seq"] == 1 and events[-1]["seq"] == 999 and len(events) > 30
    assert events[1]["lost"] == events[1]["seq"] - 2 and not any("lost" in event for event in events[2:])


def test_a_full_disk_leaves_whole_lines(place, monkeypatch):
    """What could not be written whole is cut off again, and an error."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:7]))
    with pytest.raises(OSError, match="No space"):
        append(place, line(2))
    assert (place / "events.jsonl").read_bytes() == line(1)


@pytest.mark.parametrize(
    "bad",
    [
        b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"seq":0,"time":1,"kind":"phase"}',
        b'{"seq":1,"time":"now","kind":"phase"}', b'{"seq":1,"time":NaN,"kind":"phase"}',
        b'{"seq":1,"time":1,"kind":"metrics"}', b'{"seq":1,"time":1,"kind":["phase"]}',
        b'{"seq":true,"time":1,"kind":"phase"}', b'{"seq":1,"time":1,"kind":"phase","lost":"x"}', b"9" * 10_000,
    ],
)  # fmt: skip
def test_lines_that_hold_no_event_are_left_out(bad):
    """Half a line, other JSON, and members of the wrong kind; the lines around them are read."""
    assert [event["seq"] for event in event_log.parse(line(1) + bad + b"\n" + line(2))] == [1, 2]


def test_only_files_of_this_user_are_read(place):
    """One that other users may write, or that is too long, is refused; none is an empty log."""
    (place / "events.jsonl").chmod(0o622)
    with pytest.raises(ValueError, match="other users"):
        event_log.read(str(place))
    (place / "events.jsonl").chmod(0o600)
    (place / "events.jsonl").write_bytes(b"\n" * (limits.MAX_EVENT_LOG + 1))
    with pytest.raises(ValueError, match="longer"):
        event_log.read(str(place))
    (place / "events.jsonl").unlink()
    assert event_log.read(str(place)) == []
