"""Hugging Face's Trainer on several ranks, for test_torchrun: ``torchrun -m tests.support.ranks_hf FOLDER``.

Trains one job after the other, each until somebody ends it. What a rank saw of a job is in ``NAME-RANK.json``.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..integrations.test_huggingface import Events, Watcher, data, make, ours
from . import process_group

#: By name: how its Trainer is set up, and after how many steps each of the two ranks logs by itself (0: never).
JOBS: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "rank-0-logs": ({"save_strategy": "no"}, (3, 0)),
    "both-log": ({"save_strategy": "steps", "save_steps": 50}, (3, 7)),
    "best": (
        {
            "save_strategy": "steps",
            "save_steps": 40,
            "eval_strategy": "steps",
            "eval_steps": 20,
            "load_best_model_at_end": True,
        },
        (0, 5),
    ),
    "no-strategy": ({"save_strategy": "no"}, (2, 1)),
    "aborted": ({"save_strategy": "steps", "save_steps": 4}, (1, 2)),
}
#: Far more steps than any job takes.
STEPS = 100_000


def run(folder: Path, name: str) -> dict[str, Any]:
    """Train one, and say what this rank saw of it."""
    options, rhythms = JOBS[name]
    rank = int(os.environ["RANK"])
    events, control = Events(), ours(job_id=name)
    rhythm = rhythms[rank]
    trainer: Any = None

    def step_end(state: Any, flags: Any) -> None:
        time.sleep(0.004 * rank)
        if rhythm and state.global_step % rhythm == 0:
            trainer.log({f"of_rank_{rank}": float(state.global_step)})

    # The Trainer's own log is a collective, which must not be due on one rank alone: so it is off.
    trainer = make(
        folder / name,
        Watcher(on_step_end=step_end, on_prediction_step=lambda state, flags: time.sleep(0.02 * rank)),
        control,
        events,
        max_steps=STEPS,
        logging_strategy="no",
        logging_steps=rhythm or 10,
        ddp_backend="gloo",
        **options,
    )
    trainer.train_dataset = data(400)
    trainer.train()
    weights = b"".join(value.numpy().tobytes() for value in trainer.model.state_dict().values())
    return {
        "steps": trainer.state.global_step,
        "saves": events.steps("save"),
        "evaluations": events.steps("evaluate"),
        "aborted": control.aborted,
        "digest": hashlib.sha256(weights).hexdigest(),
    }


def main(folder: str) -> None:
    for name in JOBS:
        report = run(Path(folder), name)
        path = Path(folder) / f"{name}-{dist.get_rank()}.json"
        path.with_suffix(".part").write_text(json.dumps(report))
        path.with_suffix(".part").rename(path)
    process_group.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
