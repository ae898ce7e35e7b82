"""Ranks that poll, on a real process group of gloo."""

from __future__ import annotations

from ..support.harness import needs_torch
from ..support.ranks_groups import run_ranks

pytestmark = needs_torch


def check_outcomes(seen):
    """All ranks applied the same; rank 0 has every rank's outcomes, reports and facts."""
    assert all(rank["applied"] == seen[0]["applied"] for rank in seen)
    told = seen[0]["told"]
    applied = {command[1]: what for kind, what in told if kind == "applied" for command in what[0]}
    commands, step, outcomes, fault = applied["user.sample"]
    (name,) = (command[0] for command in commands if command[1] == "user.sample")
    assert {command[1]: command[2] for command in commands}["user.sample"] == {"n": 2}
    assert outcomes == {"1": {name: {"value": 2}}, "2": {name: {"value": 4}}} and fault is None
    assert [step, commands] in seen[0]["applied"]
    assert applied["graceful_stop"][2] == {}
    full = {"error": {"code": -32000, "message": "full"}}
    assert seen[0]["reported"]["save_checkpoint"] == [{"0": {}, "1": {}, "2": full}, None]
    traces = {str(rank): {"value": f"trace of rank {rank}"} for rank in range(3)}
    assert seen[0]["reported"]["profile"] == [traces, None]
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
