"""A training loop with several ranks: ``torchrun --standalone --nproc-per-node 2 examples/ddp_loop.py``.

Every rank makes a ``TrainingJob`` and calls ``step``; only rank 0 writes the checkpoint. SIGTERM to any rank saves and
stops all of them.
"""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from forgather_control import TrainingJob

dist.init_process_group("gloo")  # before the job begins, because it looks for the other ranks
rank = dist.get_rank()
model = DistributedDataParallel(torch.nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
folder = Path(tempfile.gettempdir()) / "ddp_loop"
folder.mkdir(exist_ok=True)

with TrainingJob(job_id="ddp_loop", max_steps=1_000_000, signals={"SIGTERM": "save_and_stop"}) as job:
    for step in range(1, 1_000_001):
        features = torch.randn(32, 8)
        loss = (model(features).squeeze() - features.sum(dim=1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and step % 10 == 0:
            job.log(loss=loss)
        job.step(step)
        if rank == 0 and job.should_save:  # a stop saves, too
            path = folder / f"checkpoint-{step}.pt"
            torch.save(model.module.state_dict(), path)
            job.saved(path)
        if job.should_stop:
            break

print(f"rank {rank} {'aborted' if job.aborted else 'ended'} at step {step}\n", end="", flush=True)
dist.destroy_process_group()
