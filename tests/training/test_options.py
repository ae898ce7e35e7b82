"""The options of a controlled job: each is checked when they are made, hours before it would matter."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

from forgather_control.errors import BadJobId, InvalidParams
from forgather_control.training.options import ControlOptions

JOB = "job"


def test_options_are_a_value():
    """They cannot be changed after the check, they compare and pickle, and each has its default."""
    options = ControlOptions(JOB, signals={"SIGTERM": "abort"})
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.port = 1  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(options)) == options != ControlOptions()
    assert ControlOptions().enabled and ControlOptions().tcp_options() is None


@pytest.mark.parametrize("job_id", ["", "../up", "-x", ".x", "a" * 129, "a b"])
def test_a_bad_id_is_refused_at_once(job_id):
    """A job id that cannot be one raises when the options are made, not when training has begun."""
    with pytest.raises(BadJobId):
        ControlOptions(job_id)


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "10", float("nan")])
def test_poll_steps_are_checked_when_the_options_are_made(steps):
    """Not hours later, when the ranks first meet."""
    with pytest.raises(InvalidParams, match="poll_steps must be"):
        ControlOptions(JOB, poll_steps=steps)


@pytest.mark.parametrize("seconds", [-1, True, "10", float("nan"), 1e10, None])
@pytest.mark.parametrize("name", ["fresh_seconds", "close_timeout"])
def test_seconds_are_checked_when_the_options_are_made(name, seconds):
    """Times are numbers of seconds."""
    with pytest.raises(InvalidParams, match=f"{name} must be"):
        ControlOptions(JOB, **{name: seconds})


@pytest.mark.parametrize(
    "given",
    [{"port": 65536}, {"port": True}, {"port": "8900"}, {"port": 0, "host": ""}, {"keyfile": "k"}, {"certfile": 1}],
)
def test_the_port_is_checked_when_the_options_are_made(given):
    """What cannot be one, and what cannot belong to it, even where it is turned off; the files are looked at later."""
    for enabled in (True, False):
        with pytest.raises(InvalidParams):
            ControlOptions(JOB, **{"port": 0, **given}, enabled=enabled)
    ControlOptions(JOB, port="auto", certfile="/no/file")


@pytest.mark.parametrize("signals", [{"SIGKILL": "abort"}, {"SIGTERM": "status"}, ["SIGTERM"]])
def test_signals_are_checked_when_the_options_are_made(signals):
    """No signal that cannot be handled, no command that there is not."""
    with pytest.raises(InvalidParams):
        ControlOptions(JOB, signals=signals)


@pytest.mark.parametrize("rules", [[{"when": "loss", "do": "abort"}], [{"when": "loss > 1", "do": "ping"}], "loss > 1"])
def test_rules_are_checked_when_the_options_are_made(rules):
    """As far as they can be without a run."""
    with pytest.raises(InvalidParams):
        ControlOptions(JOB, rules=rules)
    ControlOptions(JOB, rules=[{"when": "loss is nan", "do": "user.sample"}])
