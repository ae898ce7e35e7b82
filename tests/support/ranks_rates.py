"""A plain loop, Hugging Face's and Lightning's trainers on several ranks, for test_rates_of_ranks.

``torchrun -m tests.support.ranks_rates FOLDER`` trains each until it is stopped, then once more without control, with
the changes of the learning rate that clients asked for built in. Each rank prints ``over NAME RANK STEP CHANGES SAME``.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR

from forgather_control import TrainingJob

from ..integrations import test_huggingface, test_lightning
from . import process_group


class Rates:
    """Sees when the rate changes, and by what factor; or changes it itself."""

    def __init__(self) -> None:
        self.changes: list[tuple[int, float]] = []
        self.before = 0.0

    def look(self, optimizer: Any) -> None:
        """Note the rate before commands are applied."""
        self.before = optimizer.param_groups[0]["lr"]

    def compare(self, optimizer: Any, step: int) -> None:
        """Note a change, after that."""
        after = optimizer.param_groups[0]["lr"]
        if after != self.before:
            self.changes.append((step, after / self.before))

    def repeat(self, optimizer: Any, scheduler: Any, step: int) -> None:
        """Make the changes of the controlled run at their steps."""
        for at, factor in self.changes:
            if at == step:
                for group in optimizer.param_groups:
                    group["lr"] *= factor
                scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]


RATES = Rates()


def schedule(optimizer: Any) -> Any:
    """Return one that does not depend on the last step."""
    return LambdaLR(optimizer, lambda step: 1 / (1 + step / 100))


def optimizer_of(model: Any) -> Any:
    """Return one with two parameter groups."""
    first, *others = model.parameters()
    return torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": others, "lr": 0.02}], momentum=0.9)


def hugging_face(folder: Path, steps: int | None) -> tuple[int, list[Any]]:
    """Train: controlled if it is not known for how many ``steps``; return how many, and the weights."""
    trainer: Any = None
    watch = test_huggingface.Watcher

    def look(state: Any, flags: Any) -> None:
        time.sleep(0.005)
        RATES.look(trainer.optimizer)

    if steps is None:
        after = watch(on_step_end=lambda state, flags: RATES.compare(trainer.optimizer, state.global_step))
        callbacks: list[Any] = [watch(on_step_end=look), test_huggingface.ours(job_id="hugging_face"), after]
    else:
        repeat = lambda state, flags: RATES.repeat(trainer.optimizer, trainer.lr_scheduler, state.global_step)  # noqa: E731
        callbacks = [watch(on_step_end=repeat)]
    options = {"max_steps": steps or 100_000, "logging_strategy": "no", "ddp_backend": "gloo"}
    trainer = test_huggingface.make(folder / "hf", *callbacks, **options)
    trainer.train_dataset = test_huggingface.data(400)
    trainer.optimizer = optimizer_of(trainer.model)
    trainer.lr_scheduler = schedule(trainer.optimizer)
    trainer.train()
    return trainer.state.global_step, test_huggingface.weights(trainer.model)


class Model(test_lightning.Tiny):
    """With the optimizer and the scheduler of this module."""

    def configure_optimizers(self) -> Any:
        optimizer = optimizer_of(self)
        return [optimizer], [{"scheduler": schedule(optimizer), "interval": "step"}]


def lightning(folder: Path, steps: int | None) -> tuple[int, list[Any]]:
    """As ``hugging_face``."""
    watch = test_lightning.Watcher

    def look(trainer: Any) -> None:
        time.sleep(0.005)
        RATES.look(trainer.optimizers[0])

    def repeat(trainer: Any) -> None:
        RATES.repeat(trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler, trainer.global_step)

    if steps is None:
        after = watch(on_train_batch_end=lambda trainer: RATES.compare(trainer.optimizers[0], trainer.global_step))
        callbacks: list[Any] = [watch(on_train_batch_end=look), test_lightning.ours(job_id="lightning"), after]
    else:
        callbacks = [watch(on_train_batch_end=repeat)]
    options = {"max_steps": steps or -1, "max_epochs": -1, "strategy": "ddp", "devices": dist.get_world_size()}
    trainer = test_lightning.make(folder, *callbacks, **options)
    model = test_lightning.fit(trainer, Model(0.0), batches=100)
    return trainer.global_step, test_lightning.weights(model)


def plain(folder: Path, steps: int | None) -> tuple[int, list[Any]]:
    """As ``hugging_face``."""
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
    optimizer = optimizer_of(model)
    scheduler, last = schedule(optimizer), 0
    with TrainingJob("plain", enabled=steps is None, save_on_stop=False) as job:
        job.optimizer(optimizer, scheduler)
        for last in range(1, (steps or 10**6) + 1):
            optimizer.zero_grad()
            (model(torch.full((2, 4), last % 7 + dist.get_rank() + 1.0)).square().mean() / 1000).backward()
            optimizer.step()
            scheduler.step()
            if steps is not None:
                RATES.repeat(optimizer, scheduler, last)
                continue
            time.sleep(0.005)
            RATES.look(optimizer)
            job.step(last)
            RATES.compare(optimizer, last)
            if job.should_stop:
                break
    return last, test_lightning.weights(model)


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    trainers: tuple[Callable[[Path, int | None], tuple[int, list[Any]]], ...] = (plain, hugging_face, lightning)
    for train in trainers:
        RATES.changes.clear()
        steps, controlled = train(Path(folder), None)
        _, built_in = train(Path(folder), steps)
        alike = test_huggingface.same(controlled, built_in)
        words = "over", train.__name__, dist.get_rank(), steps, len(RATES.changes), alike
        os.write(1, (" ".join(map(str, words)) + "\n").encode())
    process_group.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
