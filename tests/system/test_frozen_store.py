"""torchrun's agent, which serves the store of the ranks, stops for a while: control comes back with it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from forgather_control import ControlError, connect

from ..support.harness import SOON, needs_torch, until
from ..support.torchrun import Torchrun

#: The same with time-outs of 0.2 s. In the round, rank 1 stops the agent when it has been asked to be ready.
LOOP = """
import os, signal, sys
from pathlib import Path
import torch.distributed as dist
from forgather_control import TrainingJob
from forgather_control.ranks import limits, participant

folder, way = Path(sys.argv[1]), sys.argv[2]
limits.DECISION_TIMEOUT = limits.GIVE_UP_TIMEOUT = 0.2
dist.init_process_group("gloo")
rank, prepare = dist.get_rank(), participant.Participant.prepare

def stops_the_agent(self, number):
    try:
        return prepare(self, number)
    finally:
        if (folder / "now").exists():
            os.rename(folder / "now", folder / "done")
            os.kill(os.getppid(), signal.SIGSTOP)

if way == "in the round" and rank == 1:
    participant.Participant.prepare = stops_the_agent
with TrainingJob("job", save_on_stop=False) as job:
    step = 0
    while not job.should_stop:
        step += 1
        dist.barrier()
        job.step(step)
        if job.should_save:
            path = folder / f"{step}-{rank}"
            path.touch()
            job.saved(path)
dist.destroy_process_group()
"""


def status() -> dict[str, Any] | None:
    """What the job answers, once all of its ranks take part."""
    try:
        with connect("job", SOON) as client:
            found = client.call("status")
    except ControlError:
        return None
    return None if found.get("ranks_not_joined") else found


@needs_torch
@pytest.mark.once
@pytest.mark.parametrize("way", ["before the round", "in the round"])
def test_control_comes_back_with_the_store(tmp_path: Path, jobs_dir: Path, way: str) -> None:
    """The ranks train on meanwhile; the command is carried out once, by both at one step, and so is the next one."""
    script = tmp_path / "train.py"
    script.write_text(LOOP)
    with Torchrun(str(script), str(tmp_path), way, ranks=2) as run:
        agent = psutil.Process(run.popen.pid)
        run.until(lambda: (status() or {"global_step": 0})["global_step"] > 1)
        with connect("job", SOON) as client:
            client.call("save_checkpoint", wait="finished", timeout=SOON)
            if way == "in the round":
                (tmp_path / "now").touch()
            else:
                agent.suspend()
            saved = client.call("save_checkpoint")["command_id"]
            try:
                until(lambda: agent.status() == psutil.STATUS_STOPPED)
                step = client.call("status")["global_step"]
                until(lambda: client.call("status")["global_step"] > step + 20)
                assert client.call("get_command", command_id=saved)["state"] == "accepted"
            finally:
                os.kill(agent.pid, signal.SIGCONT)
            until(lambda: client.call("get_command", command_id=saved)["state"] == "finished")
            assert client.call("graceful_stop", wait="finished", timeout=SOON)["state"] == "finished"
        assert run.end(2 * SOON) == 0
    steps = [sorted(path.name.split("-")[0] for path in tmp_path.glob(f"*-{rank}")) for rank in range(2)]
    assert steps[0] == steps[1] and len(steps[0]) == 2
