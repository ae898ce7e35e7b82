"""The words for states: constants and types agree."""

from __future__ import annotations

import typing

import pytest

from forgather_control import states

GROUPS = {
    "PROCESS": states.ProcessState,
    "KILL": states.KillOutcome,
    "JOB": states.JobState,
    "RANK": states.RankState,
    "COMMAND": states.CommandState,
    "STATUS": states.TrainingStatus,
    "VIA": states.Via,
    "EVENT": states.EventKind,
    "ENDING": states.Ending,
}
WORDS = {name: value for name, value in vars(states).items() if name.isupper() and isinstance(value, str)}


@pytest.mark.parametrize("group", GROUPS)
def test_a_type_lists_the_constants_of_its_group(group):
    """In the same order, and each constant is named after its word."""
    members = {name: value for name, value in WORDS.items() if name.startswith(f"{group}_")}
    assert tuple(members.values()) == typing.get_args(GROUPS[group])
    assert all(name == f"{group}_{value.upper().replace(' ', '_')}" for name, value in members.items())


def test_each_word_belongs_to_a_group():
    """No constant stands alone; what a command waits for needs no type."""
    assert {name.split("_")[0] for name in WORDS} == {*GROUPS, "WHEN"}


def test_final_and_awaited_states_are_states():
    """A command's final states are the last three, and a caller can wait for the first three."""
    assert sorted(states.FINAL_STATES) == ["cancelled", "failed", "finished"]
    assert states.AWAITED_STATES == ("accepted", "applied", "finished")
    assert {value for name, value in WORDS.items() if name.startswith("WHEN_")} > {*states.RANK_REPORTS}
