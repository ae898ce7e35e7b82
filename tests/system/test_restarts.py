"""torchrun restarts the workers: the job keeps its id, and waiting clients get an error."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

import forgather_control
from forgather_control.errors import JobDead

from ..support.harness import SOON, needs_torch, until

#: Rank 0 of the first run is killed at the step after the file "now" appears; the loop never saves.
LOOP = """
import os, signal, sys, time
import torch.distributed as dist
from forgather_control import TrainingJob

turn = os.environ["TORCHELASTIC_RESTART_COUNT"]
# Without a prefix for each run gloo may take addresses of the run before from torchrun's store, and hang.
store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", store=dist.PrefixStore(turn, store), rank=rank, world_size=size)
first = turn == "0"
with TrainingJob("job", max_steps=10**6) as job:
    for step in range(1, 10**6):
        time.sleep(0.01)
        dist.barrier()
        if first and rank == 0 and os.path.exists(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        job.step(step)
        if job.should_stop:
            break
dist.destroy_process_group()
"""


def _pid() -> int | None:
    return next((job.pid for job in forgather_control.list_jobs() if job.state == "live"), None)


@needs_torch
def test_restarted_workers_keep_the_job(tmp_path):
    """A waiting client learns that the process ended; the next client finds the new process under the same id."""
    script, now = tmp_path / "train.py", tmp_path / "now"
    script.write_text(LOOP)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    answers: list[object] = []

    def wait() -> None:
        try:
            answers.append(forgather_control.save_checkpoint("job", wait="finished"))
        except Exception as err:
            answers.append(err)

    with subprocess.Popen([*torchrun, "--max-restarts", "1", script, now], stderr=subprocess.PIPE, text=True) as run:
        before = until(_pid, 3 * SOON)
        waiter = threading.Thread(target=wait)
        waiter.start()
        until(lambda: forgather_control.get_job_status("job")["commands"])
        now.touch()
        waiter.join(3 * SOON)
        after = until(lambda: (pid := _pid()) not in (None, before) and pid, 3 * SOON)
        assert forgather_control.get_job_status("job")["pid"] == after and after != before
        assert forgather_control.graceful_stop("job", wait="finished", timeout=SOON).state == "finished"
        assert run.wait(2 * SOON) == 0
    (answer,) = answers
    assert isinstance(answer, JobDead) and str(before) in str(answer), answer
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)
