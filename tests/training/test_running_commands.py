"""Own commands that run: which, where, for how long; and none that has ended."""

from __future__ import annotations

from forgather_control.training.running_commands import RunningCommands
from forgather_control.wire.records import ScheduledCommand


class Group:
    """Rank 0 of three; the test says who has not acknowledged."""

    rank = 0

    def __init__(self, *missing):
        self.missing = list(missing)

    def unacknowledged(self):
        """As ``RankGroup``."""
        return self.missing


ONE, TWO = ScheduledCommand("1", "user.one", {}), ScheduledCommand("2", "user.two", {})


def ranks(running, *missing):
    """The ranks of each command that is reported."""
    return {each["command"]: each["ranks"] for each in running.report(Group(*missing))}


def test_a_command_runs_until_all_ranks_have_acknowledged():
    """Rank 0 knows of itself; of the others it knows that they have not answered."""
    running = RunningCommands()
    assert running.report(Group(1, 2)) == []
    running.begin(ONE)
    (found,) = running.report(Group(0, 1, 2))
    assert found.pop("seconds") >= 0
    assert found == {"command_id": "1", "command": "user.one", "ranks": [0, 1, 2]}
    running.end(ONE)
    running.begin(TWO)
    assert ranks(running, 2) == {"user.one": [2], "user.two": [0, 2]}
    running.end(TWO)
    assert ranks(running, 2) == {"user.one": [2], "user.two": [2]} and ranks(running) == {}
    running.forget()
    assert ranks(running, 1) == {}


def test_what_runs_here_is_not_forgotten():
    """The agreement is lost while rank 0 runs a function that hangs."""
    running = RunningCommands()
    running.begin(ONE)
    running.forget()
    assert ranks(running) == {"user.one": [0]}


def test_built_in_commands_only_set_flags():
    """They are not worth a line."""
    running = RunningCommands()
    running.begin(ScheduledCommand("3", "save_checkpoint", {}))
    assert ranks(running, 1) == {}
    running.end(ScheduledCommand("3", "save_checkpoint", {}))
