"""Step counter, speed and time left: right where they are known, absent where they are not."""

from __future__ import annotations

import json
import math
import sys
import threading
from types import SimpleNamespace

import pytest

from forgather_control.training import limits, progress
from forgather_control.training.progress import Progress, RunState
from forgather_control.wire.jsonrpc import encode

from ..support.harness import SOON, strict

EMPTY = {"epoch": None, "steps_per_second": None, "eta_seconds": None, "seconds_since_step": None}


@pytest.fixture
def now(monkeypatch):
    """The clock, in the test's hands."""
    hands = SimpleNamespace(at=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: hands.at))
    return hands


def run(now, counter, steps, seconds, epoch=None):
    """So many steps of so many seconds each."""
    for step in range(counter.step + 1, counter.step + 1 + steps):
        now.at += seconds
        counter.beat(step, epoch)


@pytest.mark.parametrize(("end", "known"), [(None, None), (0, None), (-1, None), (100, 100)])
def test_before_the_first_step(end, known):
    """Before the first step there is no speed, no time left, and no guess of either."""
    report = Progress(25, end).report()
    assert report == {**EMPTY, "global_step": 25, "max_steps": known, "progress": 0.25 if known else None}


def test_one_step_has_no_speed(now):
    """One beat is a place, not a speed: how long the first step took is not known."""
    counter = Progress(0, 10)
    counter.beat(1, 0.1)
    now.at += 3
    assert counter.report() == {
        **EMPTY, "global_step": 1, "max_steps": 10, "progress": 0.1, "epoch": 0.1, "seconds_since_step": 3.0
    }  # fmt: skip


@pytest.mark.parametrize("seconds", [0.001, 0.5, 1.0, 7.0, 3600.0])
def test_steady_speed(now, seconds):
    """A steady loop shows its speed and the time that is left, whether a step takes a millisecond or an hour."""
    counter = Progress(0, 1000)
    run(now, counter, 200, seconds, epoch=1.5)
    report = counter.report()
    assert report["steps_per_second"] == pytest.approx(1 / seconds, rel=1e-3)
    assert report["eta_seconds"] == pytest.approx(800 * seconds, rel=1e-3)
    assert (report["global_step"], report["progress"], report["epoch"]) == (200, 0.2, 1.5)


def test_resumed_job(now):
    """A job that begins at step 5,000 counts its speed from there."""
    counter = Progress(5000, 6000)
    run(now, counter, 11, 2.0)
    assert counter.report()["steps_per_second"] == pytest.approx(0.5)


@pytest.mark.parametrize("seconds", [0.25, 5.0])
def test_speed_forgets(now, seconds):
    """A slow start is forgotten: the speed is that of the last minute, or of the last 60 steps."""
    counter = Progress(0, None)
    run(now, counter, 100, 30.0)
    run(now, counter, 300, seconds)
    assert counter.report()["steps_per_second"] == pytest.approx(1 / seconds, rel=0.02)


def test_speed_is_of_a_minute(now):
    """A short stall among fast steps weighs no more than it took: the last minute counts, not the last steps."""
    counter = Progress(0, None)
    run(now, counter, 3000, 0.01)
    run(now, counter, 20, 0.1)
    assert counter.report()["steps_per_second"] == pytest.approx(3020 / 32, rel=0.01)


def test_samples_are_bounded(now):
    """A million steps keep no more than a minute's samples."""
    counter = Progress(0, None)
    run(now, counter, 20_000, 0.5)
    assert len(counter._samples) <= limits.SPEED_SAMPLES


def test_a_job_that_hangs(now):
    """While nothing moves, the silence grows and nothing else changes."""
    counter = Progress(0, 100)
    run(now, counter, 50, 1.0)
    before = counter.report()
    now.at += 10_000
    assert counter.report() == {**before, "seconds_since_step": 10_000.0}


@pytest.mark.parametrize(("step", "share"), [(0, 0.0), (100, 1.0), (150, 1.0), (-5, 0.0)])
def test_beyond_the_end(now, step, share):
    """More steps than were announced, or fewer than none: progress stays within 0 and 1, time left above 0."""
    counter = Progress(0, 100)
    run(now, counter, 1, 1.0)
    counter.beat(1, None)
    now.at += 1
    counter.beat(step, None)
    report = counter.report()
    assert report["progress"] == share and report["global_step"] == step
    assert report["eta_seconds"] is None or report["eta_seconds"] >= 0


def test_steps_that_go_back(now):
    """A trainer that starts again at 0 has no negative speed, and soon a right one."""
    counter = Progress(0, 1000)
    run(now, counter, 100, 1.0)
    counter.beat(0, None)
    assert counter.report()["steps_per_second"] is None and counter.report()["eta_seconds"] is None
    run(now, counter, 100, 1.0)
    assert counter.report()["steps_per_second"] == pytest.approx(1.0)


def test_clock_that_stands(now):
    """Steps without any time between them are no division by zero."""
    counter = Progress(0, 10)
    run(now, counter, 5, 0.0)
    assert counter.report()["steps_per_second"] is None


@pytest.mark.parametrize("epoch", [None, 0, 1.5, math.nan, math.inf])
def test_report_is_json(now, epoch):
    """Whatever epoch a trainer claims, the report goes over the wire."""
    counter = Progress(0, 3)
    run(now, counter, 3, 1.0, epoch)
    assert strict(encode(counter.report())).keys() == EMPTY.keys() | {"global_step", "max_steps", "progress"}


def test_reader_never_waits_nor_tears():
    """Read from another thread while it counts, a report never mixes two steps."""
    counter, done = Progress(0, 10**9), threading.Event()

    def train():
        for step in range(1, 40_000):
            counter.beat(step, float(step))
        done.set()

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread = threading.Thread(target=train)
    thread.start()
    try:
        last = 0
        while not done.is_set():
            report = counter.report()
            assert report["epoch"] is None or report["epoch"] == report["global_step"] >= last
            assert report["seconds_since_step"] is None or report["seconds_since_step"] >= 0
            last = report["global_step"]
    finally:
        thread.join(SOON)
        sys.setswitchinterval(before)
    assert not thread.is_alive() and counter.step == 39_999


# The state of a run: its status, its events, and what status reports of it...


@pytest.fixture
def state():
    """A run of ten steps."""
    return RunState(0, 10, lambda: None)


def phases(state):
    """The phases that were published."""
    lines = state.events.subscribe(0, ["phase"]).pull(1 << 20).splitlines()
    return [json.loads(line)["params"]["phase"] for line in lines]


def test_each_change_of_the_word_is_one_event(state):
    """The same phase again is none; stopping is one, too."""
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


def test_an_evaluation_knows_its_time_left(state, now):
    """From the batches that are done; the loader's length is asked for once; it ends with the phase."""
    asked = []
    state.evaluate_batch(lambda: asked.append(1))  # outside of an evaluation
    assert "evaluation" not in state.report()
    state.note("evaluating")
    assert state.report()["evaluation"] == {"seconds": 0, "batches": 0, "total_batches": None, "eta_seconds": None}
    for _ in range(4):
        now.at += 2
        state.note("evaluating")
        state.evaluate_batch(lambda: asked.append(10) or 10)
    assert state.report()["evaluation"] == {"seconds": 8, "batches": 4, "total_batches": 10, "eta_seconds": 12}
    assert asked == [10]
    state.note("training")
    assert "evaluation" not in state.report()


def test_an_evaluation_of_unknown_length_has_no_time_left(state, now):
    """Only how long it takes."""
    state.note("evaluating")
    now.at += 3
    state.evaluate_batch(lambda: None)
    assert state.report()["evaluation"] == {"seconds": 3, "batches": 1, "total_batches": None, "eta_seconds": None}


def test_an_evaluation_of_more_batches_than_its_loader_said_has_no_time_left(state):
    """A length that was wrong counts no more."""
    state.note("evaluating")
    for known in (2, 2, None):
        state.evaluate_batch(lambda: 2)
        assert state.report()["evaluation"]["total_batches"] == known
    assert state.report()["evaluation"]["eta_seconds"] is None


def test_batches_are_samples(state, monkeypatch):
    """A batch of an evaluation is progress, though no step is done; its end alone is none."""
    monkeypatch.setattr(limits, "EVENT_SAMPLE_PERIOD", 0.0)
    subscriber = state.events.subscribe(None, ["progress"])
    state.note("evaluating")
    list(subscriber.take())
    state.evaluate_batch(lambda: 4)
    (event,) = subscriber.take()
    assert event["evaluation"]["batches"] == 1 and event["evaluation"]["total_batches"] == 4
    state.note("training")
    assert list(subscriber.take()) == []
