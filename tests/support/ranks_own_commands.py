"""Hugging Face's and Lightning's trainers on several ranks, with a command of the script, for test_own_commands.

``torchrun -m tests.support.ranks_own_commands FOLDER`` trains each until it is stopped, then once more without control,
with the changes that the command made built in. Each rank prints ``over NAME RANK STEP CHANGES SAME``.
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

from ..integrations import test_huggingface, test_lightning
from . import process_group

#: The number of ranks; a single one has no process group.
SIZE = int(os.environ["WORLD_SIZE"])
#: Steps and factors of the run that was controlled.
CHANGES: list[tuple[int, float]] = []


@torch.no_grad()
def scale(context: Any, factor: float = 0.5) -> list[Any]:
    """Multiply all weights; return the step of each rank, and which objects there are."""
    CHANGES.append((context.step, factor))
    multiply(context.model, factor)
    steps = [torch.zeros(1) for _ in range(SIZE)]
    if SIZE > 1:
        dist.all_gather(steps, torch.tensor([float(context.step)]))
    else:
        steps[0] += context.step
    return [[int(step) for step in steps], sorted(vars(context))]


@torch.no_grad()
def multiply(model: Any, factor: float) -> None:
    """Change the weights in place."""
    for weight in model.parameters():
        weight.mul_(factor)


def apply_built_in(step: int, model: Any) -> None:
    """Make the changes of the controlled run at their steps."""
    for at, factor in CHANGES:
        if at == step:
            multiply(model, factor)


def hugging_face(folder: Path, steps: int | None) -> tuple[int, list[Any]]:
    """Train: controlled if it is not known for how many ``steps``; return how many, and the weights."""
    trainer: Any = None
    if steps is None:
        slow = test_huggingface.Watcher(on_step_end=lambda state, flags: time.sleep(0.005))
        callbacks: list[Any] = [slow, test_huggingface.ours(job_id="hugging_face", commands=[scale])]
    else:
        built_in = lambda state, flags: apply_built_in(state.global_step, trainer.model)  # noqa: E731
        callbacks = [test_huggingface.Watcher(on_step_end=built_in)]
    options = {"max_steps": steps or 100_000, "logging_strategy": "no", "ddp_backend": "gloo" if SIZE > 1 else None}
    options["lr_scheduler_type"] = "constant"  # whatever the last step is
    trainer = test_huggingface.make(folder / "hf", *callbacks, **options)
    trainer.train_dataset = test_huggingface.data(400)
    trainer.train()
    return trainer.state.global_step, test_huggingface.weights(trainer.model)


def lightning(folder: Path, steps: int | None) -> tuple[int, list[Any]]:
    """As ``hugging_face``."""
    if steps is None:
        slow = test_lightning.Watcher(on_train_batch_end=lambda trainer: time.sleep(0.005))
        callbacks: list[Any] = [slow, test_lightning.ours(job_id="lightning", commands=[scale])]
    else:
        built_in = lambda trainer: apply_built_in(trainer.global_step, trainer.lightning_module)  # noqa: E731
        callbacks = [test_lightning.Watcher(on_train_batch_end=built_in)]
    options = {"max_steps": steps or -1, "max_epochs": -1, "strategy": "ddp" if SIZE > 1 else "auto", "devices": SIZE}
    trainer = test_lightning.make(folder, *callbacks, **options)
    model = test_lightning.fit(trainer, test_lightning.Tiny(0.0), batches=100)
    return trainer.global_step, test_lightning.weights(model)


def main(folder: str) -> None:
    trainers: tuple[Callable[[Path, int | None], tuple[int, list[Any]]], ...] = (hugging_face, lightning)
    for train in trainers:
        CHANGES.clear()
        steps, controlled = train(Path(folder), None)
        _, built_in = train(Path(folder), steps)
        alike = test_huggingface.same(controlled, built_in)
        words = "over", train.__name__, os.environ["RANK"], steps, len(CHANGES), alike
        os.write(1, (" ".join(map(str, words)) + "\n").encode())
    process_group.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
