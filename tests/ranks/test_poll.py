"""Ranks that poll, on a real process group of gloo."""

from __future__ import annotations

import logging

import pytest

from forgather_control import TrainingJob
from forgather_control.errors import Unsupported
from forgather_control.ranks import failures, limits
from forgather_control.ranks.poll import CollectivePoll

from ..support.harness import needs_torch
from ..support.ranks_groups import one_of_two, run_ranks

pytestmark = needs_torch


def check_outcomes(seen, left=0):
    """All ranks applied the same and left so many keys; rank 0 has every rank's outcomes, reports and facts."""
    assert all(after - before == left for before, after in (rank["keys"] for rank in seen))
    assert all(rank["applied"] == seen[0]["applied"] for rank in seen)
    told = seen[0]["told"]
    applied = {command[1]: what for kind, what in told if kind == "applied" for command in what[0]}
    commands, step, outcomes, fault = applied["user.sample"]
    (name,) = (command[0] for command in commands if command[1] == "user.sample")
    assert {command[1]: command[2] for command in commands}["user.sample"] == {"n": 2}
    assert outcomes == {"1": {name: {"value": 2}}, "2": {name: {"value": 4}}} and fault is None
    assert [step, commands] in seen[0]["applied"]
    assert applied["save_and_stop"][2] == {}
    full = {"error": {"code": -32000, "message": "full"}}
    assert seen[0]["reported"]["save_checkpoint"] == [{"0": {}, "1": {}, "2": full}, None]
    traces = {str(rank): {"value": f"trace of rank {rank}"} for rank in range(3)}
    assert seen[0]["reported"]["profile"] == [traces, None]
    shards = {str(rank): {"value": f"shard of rank {rank}"} for rank in range(3)}
    assert seen[0]["reported"]["save_and_stop"] == [shards, None], "those that come at the end"
    joined = [what for kind, what in told if kind == "joined"]
    assert all(known[str(rank)]["pid"] == rank for known in joined for rank in range(3))
    assert joined[-1] == {str(rank): {"pid": rank, "methods": f"of rank {rank}"} for rank in range(3)}
    assert not any(kind == "joined" for rank in seen[1:] for kind, _ in rank["told"])


def test_outcomes_and_reports_of_ranks_that_poll():
    """Outcomes come with the commands, reports and requests at the next poll; nothing happens between polls."""
    seen = run_ranks(3, poll_steps=3)
    check_outcomes(seen)
    joined = [what for kind, what in seen[0]["told"] if kind == "joined"]
    assert joined[0] == {str(rank): {"pid": rank} for rank in range(3)}
    assert all(step % 3 == 0 for step, _ in seen[0]["applied"])
    applied = {command[1]: step for step, commands in seen[0]["applied"] for command in commands}
    assert seen[0]["reported_at"]["save_checkpoint"] == applied["save_checkpoint"] + 3


def test_a_rank_that_does_not_poll(monkeypatch, tmp_path, jobs_dir, caplog):
    """No collective begins without it; the job says so once, and trains without control."""
    monkeypatch.setattr(limits, "JOIN_TIMEOUT", 0.1)
    monkeypatch.setattr(CollectivePoll, "_sum", lambda self, numbers: pytest.fail("a collective"))
    with one_of_two("FileStore", str(tmp_path / "store"), 2), caplog.at_level(logging.WARNING):
        with TrainingJob("job") as job:
            job.step(1)
        assert not (jobs_dir / "job").exists()
    (warning,) = caplog.records
    assert failures.not_joined([1]) in warning.getMessage() and warning.exc_info is None


def test_ranks_that_begin_too_late_obey_the_first_decision(monkeypatch):
    """No rank polls alone: what the first one found missing stands, though the rank is there by now."""
    monkeypatch.setattr(limits, "JOIN_TIMEOUT", 0.1)
    with one_of_two() as store:
        for rank in (0, 1):
            with pytest.raises(Unsupported, match="rank 1 never joined"):
                CollectivePoll(rank, 2, store).exchange(None)
