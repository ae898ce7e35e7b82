"""Profiles of real runs: written whole, at the agreed step, or refused in words; training goes on either way."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from forgather_control import CommandRefused, ControlError, TrainingJob, connect
from forgather_control.training import limits, profiler

from ..support.harness import MS, SOON, needs_torch, until

JOB = "profiled"


class Loop:
    """A plain loop with a small model, on a thread of its own."""

    def __init__(self, folder):
        import torch

        self.torch, self.folder, self.step, self.work = torch, folder, 0, lambda: None
        torch.manual_seed(0)
        self.model = torch.nn.Linear(8, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01)
        self.ready, self.go = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.train)

    def train(self):
        """Train until a client says stop."""
        with TrainingJob(JOB, output_dir=self.folder, save_on_stop=False) as job:
            self.ready.set()
            while not job.should_stop:
                self.one_step()
                job.step(self.step)

    def one_step(self):
        """Train one step."""
        self.work()
        self.go.wait(1 * MS)
        self.step += 1
        self.optimizer.zero_grad()
        self.model(self.torch.full((4, 8), float(self.step % 7))).mean().backward()
        self.optimizer.step()

    def __enter__(self):
        self.thread.start()
        assert self.ready.wait(SOON)
        self.client = connect(JOB)
        return self

    def __exit__(self, *exc):
        with suppress(ControlError):  # it may have ended
            self.client.call("abort")
        self.client.close()
        self.thread.join(SOON)
        assert not self.thread.is_alive()

    def profile(self, steps=3, wait="finished"):
        """Ask for a profile."""
        return self.client.call("profile", steps=steps, wait=wait, timeout=SOON)

    def files(self):
        """What was written."""
        return sorted(path.name for path in (self.folder / "profiles").glob("*"))


@pytest.fixture
def loop(tmp_path, jobs_dir):
    """A loop that trains."""
    with Loop(tmp_path) as loop:
        yield loop


@needs_torch
def test_a_profile_is_a_private_trace_with_its_operations(loop):
    """One file, named after the step; the longest operations, and what it cost."""
    record = loop.profile()
    result = record["result"]
    (path,) = map(Path, result["paths"])
    assert path == loop.folder / "profiles" / f"{JOB}-step{record['applied_at_step']}-rank0.json"
    assert path.stat().st_mode & 0o777 == 0o600 and [path.stat().st_size] == result["sizes"]
    assert json.loads(path.read_text())["traceEvents"] and loop.files() == [path.name]
    assert "aten::addmm" in {row["name"] for row in result["operations"]} and len(result["operations"]) <= 10
    assert result["steps"] == 3 and 0 < result["seconds_lost"] < SOON and "note" not in result
    assert loop.profile()["state"] == "finished" and len(loop.files()) == 2


@needs_torch
def test_training_is_the_same_with_it(loop):
    """The weights are those of a run without a profile."""
    loop.profile()
    loop.client.call("graceful_stop", wait="finished")
    loop.thread.join(SOON)
    other = Loop(loop.folder)
    other.go.set()
    for _ in range(loop.step):
        other.one_step()
    assert all(map(loop.torch.equal, loop.model.parameters(), other.model.parameters()))


@needs_torch
def test_one_at_a_time(loop):
    """A second one is refused until the first is written."""
    first = loop.profile(50, "applied")
    with pytest.raises(CommandRefused, match="another profile is under way"):
        loop.profile()
    until(lambda: loop.client.call("get_command", command_id=first["command_id"])["state"] == "finished")
    assert loop.profile()["state"] == "finished"


@needs_torch
def test_the_scripts_own_profiler(loop):
    """Ours does not begin while that is active."""
    active = loop.torch.profiler.profile(activities=[loop.torch.profiler.ProfilerActivity.CPU])
    done, began = threading.Event(), threading.Event()

    def work():
        if not began.is_set():
            active.start()
            began.set()
        if done.is_set():
            active.stop()
            loop.work = lambda: None

    loop.work = work
    assert began.wait(SOON)
    record = loop.profile()
    done.set()
    assert record["state"] == "failed" and "a profiler of the training script is active" in record["error"]["message"]
    until(lambda: loop.work is not work)
    assert loop.profile()["state"] == "finished"


@needs_torch
@pytest.mark.parametrize("end", ["graceful_stop", "abort"])
def test_training_ends_in_the_middle(tmp_path, jobs_dir, end):
    """What was recorded is written, with a note; an abort writes nothing."""
    with Loop(tmp_path) as loop:
        answers = []
        with connect(JOB) as other:
            thread = threading.Thread(
                target=lambda: answers.append(other.call("profile", steps=50, wait="finished", timeout=SOON))
            )
            thread.start()
            until(lambda: [r["state"] for r in loop.client.call("list_commands")] == ["applied"])
            step = loop.step
            until(lambda: loop.step > step + 2)
            loop.client.call(end)
            thread.join(SOON)
    (record,) = answers
    if end == "abort":
        assert record["state"] == "failed" and "no profile was written: training ended" in record["error"]["message"]
        assert loop.files() == []
    else:
        assert record["result"]["note"].startswith("training ended after") and record["result"]["steps"] < 50
        assert loop.files() == [Path(record["result"]["paths"][0]).name]


@needs_torch
def test_it_ends_in_time(loop, monkeypatch):
    """Steps that take too long would fill the memory."""
    monkeypatch.setattr(limits, "PROFILE_SECONDS", 0.0)
    result = loop.profile(50)["result"]
    assert result["steps"] == 1 and result["note"] == "stopped after 1 of 50 steps, as they took too long"


@needs_torch
def test_a_pause_is_no_part_of_it(loop, monkeypatch):
    """Its steps do not take longer for it."""
    monkeypatch.setattr(limits, "PROFILE_SECONDS", 1000 * MS)
    client = loop.client
    client.call("pause", wait="finished")
    record = loop.profile(2, wait="applied")
    began = client.call("status")["seconds_since_step"]
    until(lambda: client.call("status")["seconds_since_step"] > began + 1100 * MS)
    client.call("resume", wait="finished")
    result = until(lambda: client.call("get_command", command_id=record["command_id"])["result"])
    assert result["steps"] == 2 and "note" not in result


@needs_torch
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a full disk needs root")
def test_a_full_disk(tmp_path, jobs_dir):
    """The command fails, nothing is left, and training continues."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(mounted)]).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with Loop(mounted) as loop:
            record = loop.profile()
            assert record["state"] == "failed" and "is the disk full?" in record["error"]["message"]
            step = loop.step
            until(lambda: loop.step > step)
            assert loop.files() == []
    finally:
        subprocess.run(["umount", "-l", str(mounted)], check=True)


@needs_torch
def test_a_folder_that_cannot_be_written(tmp_path, jobs_dir):
    """As above."""
    (tmp_path / "profiles").write_text("a file")
    with Loop(tmp_path) as loop:
        record = loop.profile()
        assert record["state"] == "failed" and "the profile was not written" in record["error"]["message"]


@needs_torch
def test_a_table_that_cannot_be_made(loop, monkeypatch):
    """The trace is there all the same."""
    monkeypatch.setattr(profiler.sys, "executable", "/nowhere/python")
    result = loop.profile()["result"]
    assert result["operations"] == [] and Path(result["paths"][0]).exists()


@needs_torch
@pytest.mark.parametrize("steps", [0, 51, 1.5, "3", None])
def test_wrong_numbers_of_steps(loop, steps):
    """From 1 to 50."""
    with pytest.raises(ValueError, match="steps must be a whole number of steps from 1 to 50"):
        loop.profile(steps)


def test_without_torch(jobs_dir, monkeypatch):
    """Refused at once."""
    monkeypatch.delitem(profiler.sys.modules, "torch", raising=False)
    with TrainingJob(JOB), connect(JOB) as client, pytest.raises(CommandRefused, match="has not loaded torch"):
        client.call("profile")
