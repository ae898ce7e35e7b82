"""Your own training loop, made controllable by ten lines: ``python examples/plain_loop.py``."""

import tempfile
from pathlib import Path

import torch

from forgather_control import TrainingJob

model = torch.nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
folder = Path(tempfile.gettempdir()) / "plain_loop"
folder.mkdir(exist_ok=True)

with TrainingJob(job_id="plain_loop", max_steps=1_000_000) as job:
    for step in range(1, 1_000_001):
        features = torch.randn(32, 8)
        loss = (model(features).squeeze() - features.sum(dim=1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            job.log(loss=loss)
        job.step(step)
        if job.should_save:  # a stop saves, too
            path = folder / f"checkpoint-{step}.pt"
            torch.save(model.state_dict(), path)
            job.saved(path)
        if job.should_stop:
            break

print("aborted" if job.aborted else "ended", "at step", step)
