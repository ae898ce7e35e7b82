"""The text of ``status``: up to date, and written once for each change."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from forgather_control.client.api import connect
from forgather_control.training import status_cache
from forgather_control.training.limits import PROCESS_STATS_AGE, STATUS_AGE
from forgather_control.training.status_cache import StatusCache

from ..support.harness import running_loop, until


class Facts:
    """What is told, counted."""

    def __init__(self, monkeypatch):
        self.at, self.step, self.told, self.asked = 1000.0, 0, 0, 0
        monkeypatch.setattr(status_cache, "time", SimpleNamespace(monotonic=lambda: self.at))
        self.cache = StatusCache(self.tell, lambda: self.step, self.figures)

    def tell(self):
        self.told += 1
        return {"step": self.step, "at": self.at}

    def figures(self):
        self.asked += 1
        return {"rss": self.asked, "device": None}

    def read(self):
        return json.loads(self.cache.text())


@pytest.fixture
def facts(monkeypatch):
    return Facts(monkeypatch)


def test_it_is_written_once_a_change(facts):
    """A thousand requests between two steps cost one writing; the next step shows at once."""
    texts = {facts.cache.text() for _ in range(1000)}
    assert len(texts) == 1 and facts.told == facts.asked == 1
    facts.step = 1
    assert facts.read()["step"] == 1
    assert facts.told == 2


def test_time_is_a_change(facts):
    """What depends on the time is never older than ``STATUS_AGE``, though nothing else changes."""
    begin = facts.read()["at"]
    facts.at += 0.9 * STATUS_AGE
    assert facts.read()["at"] == begin
    facts.at += 0.2 * STATUS_AGE
    assert facts.read()["at"] == facts.at


def test_figures_are_asked_for_seldom(facts):
    """However fast training steps, the system is asked seldom; figures that it does not know are left out."""
    for _ in range(100):
        facts.step += 1
        assert facts.read().keys() == {"step", "at", "rss"}
    assert facts.asked == 1
    facts.at += PROCESS_STATS_AGE
    assert facts.read()["rss"] == 2


def test_a_change_while_it_is_written_is_told_next(facts):
    """The mark is read before the facts: what changes in between is told again, not missed."""
    tell = facts.tell

    def told():
        found = tell()
        facts.step = 7
        return found

    facts.cache._build = told
    assert facts.read()["step"] == 0
    assert facts.read()["step"] == 7


def test_what_is_logged_shows_at_once(jobs_dir):
    """A real job: each change of its values is in the next answer, however soon that is asked."""
    with running_loop() as run, connect("job") as job:
        until(lambda: job.call("status")["global_step"] > 0)
        for value in range(50):
            run.job.log(mine=value)
            assert job.call("status")["metrics"]["mine"] == value
