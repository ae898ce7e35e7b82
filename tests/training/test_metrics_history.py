"""The history of metrics: the whole run in bounded memory, real values only, nothing of a device, and cheap to keep."""

from __future__ import annotations

import itertools
import math
import threading
import time
import tracemalloc

import pytest

from forgather_control.training import limits, metrics_history
from forgather_control.training.controller import Controller
from forgather_control.training.loop_actions import RequestedActions
from forgather_control.training.metrics_history import MetricsHistory
from forgather_control.training.options import ControlOptions

from ..support.harness import Wire, needs_torch, running_loop, until

CAPACITY = limits.HISTORY_POINTS // limits.HISTORY_NAMES


@pytest.fixture
def history():
    return MetricsHistory()


@pytest.fixture
def job():
    """A published controller whose training thread is this one."""
    controller = Controller(ControlOptions("job"), RequestedActions(), step=0, max_steps=100)
    controller.start()
    yield controller
    controller.close()


def fill(history, count, names=("loss",)):
    """Log so many times, the step as the value."""
    for step in range(count):
        history.log(step, dict.fromkeys(names, float(step)))


def test_points_are_step_time_and_value(history, monkeypatch):
    """In the order in which they were logged, each metric by itself."""
    monkeypatch.setattr(metrics_history.time, "time", iter([10.0, 11.0]).__next__)
    history.log(1, {"loss": 0.5, "epoch": 1})
    history.log(2, {"loss": 0.25})
    assert history.report(None, 200) == {"loss": [[1, 10.0, 0.5], [2, 11.0, 0.25]], "epoch": [[1, 10.0, 1.0]]}


@pytest.mark.parametrize("count", [1, CAPACITY, CAPACITY + 1, 3 * CAPACITY, 20 * CAPACITY + 7])
def test_the_whole_run_at_even_resolution(history, count):
    """However long the run, the first and the last point are there, real ones, with even gaps between the others."""
    fill(history, count)
    points = history.report(["loss"], limits.HISTORY_POINTS)["loss"]
    steps = [step for step, _, _ in points]
    assert steps[0] == 0 and steps[-1] == count - 1 and len(steps) <= CAPACITY + 1
    assert len(steps) > min(count - 1, CAPACITY // 2)
    assert all(step == value for step, _, value in points)
    gaps = {later - step for step, later in itertools.pairwise(steps[:-1])}
    assert len(gaps) <= 1 and all(gap & (gap - 1) == 0 for gap in gaps)


@pytest.mark.parametrize("most", [1, 2, 3, 7, 200])
def test_no_more_points_than_asked_for(history, most):
    """With the last one in any case, and the first one where there are two."""
    fill(history, 1000)
    steps = [step for step, _, _ in history.report(["loss"], most)["loss"]]
    assert len(steps) == most and steps[-1] == 999 and (most == 1 or steps[0] == 0)
    assert steps == sorted(set(steps))


def test_only_numbers_are_kept(history):
    """Texts, booleans and what is too large for a double are left out; NaN and the infinities are numbers."""
    history.log(1, {"text": "a", "flag": True, "none": None, "huge": 10**400, "nan": math.nan, "inf": -math.inf})
    found = history.report(None, 10)
    assert found.keys() == {"nan", "inf"} and math.isnan(found["nan"][0][2]) and found["inf"][0][2] == -math.inf


def test_names_without_points(history):
    """A name that is asked for and was never logged has none."""
    history.log(1, {"loss": 1.0})
    assert history.report(["lost"], 10) == {"lost": []} and history.report([], 10) == {}


def test_names_are_bounded(history):
    """The metric that was not logged for the longest time goes, and those that are logged stay."""
    for number in range(2 * limits.MAX_NAMES):
        history.log(number, {"loss": 1.0, f"name {number}": 1.0})
    found = history.report(None, 10)
    assert len(found) == limits.MAX_NAMES and len(found["loss"]) == 10
    assert set(found) - {"loss"} == {f"name {number}" for number in range(257, 512)}


@pytest.mark.parametrize("names", [1, 16, 17, 256])
def test_memory_is_bounded(names):
    """At most 1 MiB, also at the moment at which arrays are replaced, with the longest names."""
    wanted = ["\N{GREEK SMALL LETTER ALPHA}" * (limits.MAX_TEXT - 3) + f"{number:3}" for number in range(names)]
    tracemalloc.start()
    try:
        history = MetricsHistory()
        for step in range(3 * CAPACITY * 16 // max(16, names) + 5):
            history.log(step, {str(name): float(step) for name in wanted})
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert all(len(points) > 50 for points in history.report(None, 10_000).values())


def test_a_log_is_cheap(history):
    """A log of ten metrics takes less than 50 microseconds of this thread, those that halve arrays included."""
    names = [f"metric {number}" for number in range(10)]
    held, worst = dict.fromkeys(names, 0.5), 0.0
    begin = time.thread_time()
    for step in range(4 * CAPACITY):
        before = time.thread_time()
        history.log(step, held)
        worst = max(worst, time.thread_time() - before)
    assert (time.thread_time() - begin) / (4 * CAPACITY) < 50e-6 and worst < 5e-3


def test_a_reader_beside_the_training_thread(history):
    """Each answer is ordered and complete, whatever is logged meanwhile."""
    done = threading.Event()

    def train():
        fill(history, 30 * CAPACITY, ("loss", "accuracy"))
        done.set()

    thread = threading.Thread(target=train)
    thread.start()
    while not done.is_set():
        for points in history.report(None, 10_000).values():
            steps = [step for step, _, _ in points]
            assert steps[0] == 0 and steps == sorted(set(steps)) and all(step == value for step, _, value in points)
    thread.join()


def test_clients_ask_for_it(job, jobs_dir):
    """By names and points; NaN travels as a string; wrong parameters are refused."""
    with Wire(jobs_dir / "job" / "control.sock") as wire:
        assert wire.call("metrics_history")["result"] == {}
        for step in range(1, 6):
            job.log({"loss": 1 / step, "norm": math.nan, "note": "text"})
            job.step(step)
        found = wire.call("metrics_history", {"names": ["loss"], "points": 3})["result"]
        assert [step for step, _, _ in found["loss"]] == [0, 2, 4] and found.keys() == {"loss"}
        assert wire.call("metrics_history")["result"]["norm"][0][2] == "NaN"
        for params in ({"points": 0}, {"points": 10_001}, {"names": "loss"}, {"names": [1]}, {"name": "loss"}):
            assert wire.call("metrics_history", params)["error"]["code"] == -32602


def test_a_real_loop(jobs_dir):
    """The values that the loop logs."""
    with running_loop() as run, Wire(jobs_dir / "job" / "control.sock") as wire:
        until(lambda: run.steps >= 5)
        points = wire.call("metrics_history")["result"]["loss"]
        assert points[0][2] == 1.0 and all(value == 1 / (step + 1) for step, _, value in points)


@needs_torch
def test_tensors_of_a_device_are_never_read(history):
    """A number on the processor is read when it is logged, as for status; one on a device is left out."""
    import torch

    from forgather_control.training import metrics

    class OnDevice:
        """As metrics.CudaNumber: reading it would wait for the device."""

        def item(self):
            raise AssertionError("a device was read")

    held = {**metrics.hold({"loss": torch.tensor(2.0)}), "device": OnDevice()}
    history.log(1, held)
    found = history.report(None, 10)
    assert [value for _, _, value in found["loss"]] == [2.0] and "device" not in found
