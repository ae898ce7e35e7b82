"""Reply files: bounded in number, bytes and age, and written when the file system lets."""

from __future__ import annotations

import pytest

from forgather_control.server import limits

from .test_file_requests import Desk, patient


@pytest.fixture
def desk(tmp_path):
    """A desk in a directory of its own."""
    return Desk(tmp_path)


def test_replies_are_kept_within_bounds(desk, monkeypatch):
    """The newest 256, the newest few megabytes, and none that is older than an hour."""
    patient(monkeypatch)
    count = limits.MAX_REPLY_FILES + 10
    for number in range(count):
        desk.ask(f"{number}.json", "echo")
    for _ in range(5):
        desk.tick()
    assert len(desk.lying("replies")) == limits.MAX_REPLY_FILES
    monkeypatch.setattr(limits, "MAX_REPLY_FILES_BYTES", 100_000)
    for name in "abc":
        desk.ask(f"{name}.json", "big", 40_000)
        desk.tick()
    assert {"b.json", "c.json"} <= set(desk.lying("replies")) and "a.json" not in desk.lying("replies")
    monkeypatch.setattr(limits, "REPLY_FILE_TIMEOUT", 0.0)
    desk.tick()
    assert desk.lying("replies") == []


def test_replies_that_were_taken_leave_room(desk, monkeypatch):
    """Replies that were removed do not count, so a program's many do not push out a person's one."""
    patient(monkeypatch)
    desk.put("save_checkpoint")
    desk.tick()
    for number in range(limits.MAX_REPLY_FILES * 2):
        desk.ask("p.json", "echo", number)
        desk.tick()
        (desk.path / "replies" / "p.json").unlink()
    assert desk.lying("replies") == ["save_checkpoint.json"]


def test_a_reply_too_long_says_so(desk):
    """Its request was carried out, and that is what is told."""
    desk.ask("a.json", "big", limits.MAX_REPLY_FILE)
    desk.tick()
    assert "it was carried out, but the reply is longer" in desk.reply("a.json")["error"]["message"]
