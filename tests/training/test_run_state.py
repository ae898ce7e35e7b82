"""The state of a run: its word, its events, and what status reports of it."""

from __future__ import annotations

import json

import pytest

from forgather_control.training.run_state import RunState


@pytest.fixture
def state():
    """A run of ten steps."""
    return RunState(0, 10, lambda: None)


def phases(state):
    """The phases that were published."""
    lines = state.events.subscribe(0, ["phase"]).pull(1 << 20).splitlines()
    return [json.loads(line)["params"]["phase"] for line in lines]


def test_each_change_of_the_word_is_one_event(state):
    """The same phase again is none; stopping and the end are told, too."""
    for phase in ("training", "training", "saving", "training", "training"):
        state.note(phase)
    state.note(ending=True)
    state.note("saving")
    state.note("training")
    assert phases(state) == ["training", "saving", "training", "stopping", "saving", "stopping"]


@pytest.mark.parametrize("phase", ["starting", "training", "evaluating", "saving"])
def test_the_word_is_stopping_only_between_the_steps(state, phase):
    """While a stop is applied a save or an evaluation is still called by its name."""
    state.note(phase)
    state.note(ending=True)
    assert state.status == ("stopping" if phase == "training" else phase)
    state.ended = True
    assert state.status == "ended"


def test_the_mark_differs_whenever_the_report_does(state):
    """A step, a phase or a log changes it."""
    marks = [state.mark()]
    state.progress.beat(1, None)
    marks.append(state.mark())
    state.note("training")
    marks.append(state.mark())
    state.log({"loss": 1})
    marks.append(state.mark())
    assert len(set(map(str, marks))) == 4


def test_samples_have_step_speed_and_values_on_the_host(state):
    """Progress and metrics are read without touching a device."""

    class OnDevice:
        def item(self):
            raise AssertionError("read from the device")

    state.progress.beat(3, 0.5)
    state.log({"loss": 0.25, "slow": OnDevice()})
    subscriber = state.events.subscribe(None, ["progress", "metrics"])
    progress, metrics = (json.loads(line)["params"] for line in subscriber.pull(1 << 20).splitlines())
    assert (progress["kind"], progress["step"], progress["epoch"], progress["max_steps"]) == ("progress", 3, 0.5, 10)
    assert (metrics["kind"], metrics["step"], metrics["metrics"]) == ("metrics", 3, {"loss": 0.25})
