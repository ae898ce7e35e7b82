"""A plain loop on several ranks that is changed while it runs, for test_change.

``torchrun -m tests.support.ranks_change FOLDER SECONDS`` trains until it is stopped, in a process group whose
collectives time out after SECONDS. Then it trains once more, without control, with the same learning rate at each step.
What a rank saw is in ``rank-RANK.json``.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from forgather_control import TrainingJob

from . import process_group


class Training:
    """The same from each start: a model, its optimizer and its data."""

    def __init__(self) -> None:
        self.data = torch.Generator().manual_seed(dist.get_rank())
        linear = torch.nn.Linear(3, 1)
        with torch.no_grad():
            for weight in linear.parameters():
                weight.fill_(0.5)
        self.model: Any = torch.nn.parallel.DistributedDataParallel(linear)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3)

    def step(self) -> None:
        """Train one."""
        inputs = torch.randn(4, 3, generator=self.data)
        self.optimizer.zero_grad()
        ((self.model(inputs) - inputs.sum()) ** 2).mean().backward()
        self.optimizer.step()

    @property
    def rate(self) -> float:
        """The learning rate."""
        return float(self.optimizer.param_groups[0]["lr"])

    @rate.setter
    def rate(self, value: float) -> None:
        self.optimizer.param_groups[0]["lr"] = value

    def digest(self) -> str:
        """Of all weights."""
        return hashlib.sha256(
            b"".join(weight.numpy().tobytes() for weight in self.model.state_dict().values())
        ).hexdigest()


def picky(value: float) -> None:
    """Refuse a value on rank 1 only."""
    if dist.get_rank() == 1 and value > 1:
        raise ValueError("rank 1 does not want it")


def stuck(value: float) -> Callable[[], None]:
    """Refuse a value on rank 1 only, and to restore it on rank 0."""
    picky(value)

    def restore() -> None:
        raise OSError("no way back")

    return restore


def main(folder: str, seconds: str) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=float(seconds)))
    training, rates, path = Training(), [], Path(folder) / "checkpoint"
    one_of_each = {"rank": float(dist.get_rank())}
    with TrainingJob("changed", save_on_stop=False, output_dir=folder) as job:
        job.setting("rate", get=lambda: training.rate, set=lambda value: setattr(training, "rate", value), minimum=0)
        job.setting("picky", get=lambda: 1.0, set=picky)
        job.setting("stuck", get=lambda: 1.0, set=stuck)
        job.setting("rank", get=lambda: one_of_each["rank"], set=lambda value: None, type=float)

        @job.command
        def add(a: int, b: int = 1) -> int:
            """Add two numbers."""
            return a + b

        while not job.should_stop:
            rates.append(training.rate)
            training.step()
            job.step(len(rates))
            if job.should_save and dist.get_rank() == 0:
                path.touch()
                job.saved(path)
    same = Training()
    for rate in rates:
        same.rate = rate
        same.step()
    said = {"steps": len(rates), "rates": sorted({*rates}), "same": same.digest() == training.digest()}
    part = Path(folder) / f"rank-{dist.get_rank()}.part"
    part.write_text(json.dumps({**said, "changes": [n for n in range(1, len(rates)) if rates[n] != rates[n - 1]]}))
    part.rename(part.with_suffix(".json"))
    process_group.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
