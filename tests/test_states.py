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
}
CONSTANTS = {name: value for name, value in vars(states).items() if name.isupper()}


@pytest.mark.parametrize("group", GROUPS)
def test_a_type_lists_the_constants_of_its_group(group):
    """In the same order, and each constant is named after its word."""
    members = {name: value for name, value in CONSTANTS.items() if name.startswith(f"{group}_")}
    assert tuple(members.values()) == typing.get_args(GROUPS[group])
    assert all(name == f"{group}_{value.upper()}" for name, value in members.items())


def test_each_constant_belongs_to_a_group():
    """No word stands alone."""
    assert {name.split("_")[0] for name in CONSTANTS} == GROUPS.keys()
