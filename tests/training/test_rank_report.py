"""The reporter: one row for each rank, also for those that do not answer."""

from __future__ import annotations

import os
import subprocess
import threading
import time

import pytest

from forgather_control.jobs import rank_processes
from forgather_control.processes.liveness import current_process
from forgather_control.ranks.group import RankQuery
from forgather_control.server.dispatcher import PENDING, Deferred
from forgather_control.training.progress import Progress
from forgather_control.training.rank_report import RankReporter

from ..support.harness import MS, SOON, running_loop, until

ROW = {"rank", "host", "pid", "state", "step", "seconds_since_step", "rss_bytes", "device", "device_memory_bytes"}


class Ranks:
    """Rank 0's view of several, whose answers the test gives."""

    rank = 0

    def __init__(self, reporter, *states):
        self.size, self.states = len(states), list(states)
        self.inquiry = None
        self._reporter = reporter

    def query(self, what):
        """As ``RankGroup``."""
        self.inquiry = RankQuery({0: self._reporter.answer(what)})
        return self.inquiry

    def state(self, rank):
        """As ``RankGroup``."""
        return self.states[rank]

    def description(self, rank):
        """As ``RankGroup``; an absent rank has said nothing."""
        return {} if self.states[rank] == "absent" else {"host": f"node{rank}", "pid": 100 + rank}


@pytest.fixture
def reporter():
    """Of a rank that is at step 5, and whose training thread is this one."""
    progress = Progress(0, 10)
    progress.beat(5, None)
    made = RankReporter(progress, threading.get_ident)
    yield made
    made.close()


def test_a_process_that_has_ended_is_gone(reporter):
    """A rank that runs is not, nor is one that nothing is known of."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    mine = current_process()._asdict()
    assert not reporter.is_gone(1)
    reporter.all_joined({0: mine, 1: {**mine, "pid": ended.pid}})
    assert [reporter.is_gone(rank) for rank in range(3)] == [False, True, False]


def test_one_rank_answers_at_once(reporter):
    """There is no other rank to wait for."""
    (row,) = reporter.ask(Ranks(reporter, "silent"), "ranks", 5.0)
    assert row.keys() == ROW and (row["rank"], row["state"], row["step"]) == (0, "answering", 5)
    assert row["pid"] == os.getpid() and row["rss_bytes"] > 1 << 20 and row["seconds_since_step"] < SOON


def test_the_answer_waits_for_the_others_and_no_longer(reporter):
    """It does not wait for ranks that have ended or never joined."""
    group = Ranks(reporter, "silent", "silent", "ended", "absent")
    later = reporter.ask(group, "ranks", SOON)
    assert isinstance(later, Deferred) and later.poll() is PENDING
    group.inquiry.answers[1] = {"host": "node1", "pid": 101, "step": 4}
    rows = later.poll()
    assert [row["state"] for row in rows] == ["answering", "answering", "ended", "absent"]
    assert [row["step"] for row in rows] == [5, 4, None, None]
    assert [row["pid"] for row in rows] == [os.getpid(), 101, 102, None]


def test_who_is_late_is_silent(reporter):
    """At the deadline its row has what is known of it, and the other ranks' rows are complete."""
    group = Ranks(reporter, "silent", "silent")
    later = reporter.ask(group, "stacks", 20 * MS)
    rows = until(lambda: (answer := later.poll()) is not PENDING and answer)
    assert time.monotonic() >= later.deadline
    assert [row["state"] for row in rows] == ["answering", "silent"]
    assert (rows[1]["host"], rows[1]["pid"], rows[1]["stacks"]) == ("node1", 101, None)


def test_the_stacks_begin_with_the_thread_that_trains(reporter):
    """And they are this test's."""
    (row,) = reporter.ask(Ranks(reporter, "silent"), "stacks", 5.0)
    first = row["stacks"].split("\n\n")[0]
    assert "test_the_stacks_begin_with_the_thread_that_trains" in first and "MainThread" in first


def test_the_threads_of_the_control_are_hidden_unless_asked_for(reporter):
    """Those of training are all there, and whole, in both answers."""
    stop = threading.Event()
    names = ("forgather-control", "loader", "forgather-receiver")
    threads = [threading.Thread(target=stop.wait, name=name) for name in names]
    for thread in threads:
        thread.start()
    try:
        shown, full = (
            reporter.ask(Ranks(reporter, "silent"), what, 5.0)[0]["stacks"] for what in ("stacks", "all stacks")
        )
    finally:
        stop.set()
    for thread in threads:
        thread.join()
    assert shown.count("forgather-") == 0 and all(name in full for name in names)
    kept = [block for block in full.split("\n\n") if " forgather-" not in block]
    assert any("loader" in block for block in kept) and shown.rstrip("\n").split("\n\n") == [
        block.rstrip("\n") for block in kept
    ]


def test_stacks_of_many_ranks_fit_into_one_reply(reporter, monkeypatch):
    """Each has its share of the room."""
    monkeypatch.setattr("forgather_control.training.limits.MAX_STACKS", 1000)
    group = Ranks(reporter, *["silent"] * 10)
    later = reporter.ask(group, "stacks", SOON)
    group.inquiry.answers.update({rank: {"stacks": "x" * 5000} for rank in range(1, 10)})
    assert sum(len(row["stacks"]) for row in later.poll()) <= 1000


def test_a_rank_that_cannot_tell_says_nothing(reporter, monkeypatch, caplog):
    """An exception there would cut the line between the ranks."""
    monkeypatch.setattr("forgather_control.processes.usage.process_stats", lambda: 1 / 0)
    assert reporter.answer("ranks") == {} and "ZeroDivisionError" in caplog.text


def test_the_file_has_the_process_of_each_rank(reporter, tmp_path):
    """Each rank's process as it said it, in order."""
    me = {**current_process()._asdict(), "stack_fd": 7}
    reporter.all_joined({1: {**me, "pid": 4711}, 0: me})
    reporter.write(str(tmp_path))
    (tmp_path / "jobs").mkdir()
    os.rename(tmp_path / rank_processes.RANKS_FILE, tmp_path / "jobs" / rank_processes.RANKS_FILE)
    ranks = rank_processes.read(str(tmp_path), "jobs")
    assert [(rank.rank, rank.pid, rank.stack_fd) for rank in ranks] == [(0, os.getpid(), 7), (1, 4711, 7)]
    assert ranks[0].identity == current_process()


def test_a_file_that_cannot_be_written_is_one_warning(reporter, tmp_path, caplog):
    """Training has no use for it."""
    reporter.all_joined({0: current_process()._asdict()})
    reporter.write(str(tmp_path / "nowhere"))
    (warning,) = caplog.records
    assert rank_processes.RANKS_FILE in warning.getMessage()


def test_a_running_job_has_the_file_until_it_ends(jobs_dir):
    """As soon as it can be found, and whenever its directory is restored."""
    with running_loop("job"):
        path = jobs_dir / "job" / rank_processes.RANKS_FILE
        until(path.exists)
        assert rank_processes.read(str(jobs_dir), "job")[0].pid == os.getpid() and path.stat().st_mode & 0o777 == 0o600
    assert not path.exists()
