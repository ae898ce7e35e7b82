"""What a step with nothing pending costs the training loop, in one run beside an empty call: ``tox -e bench``.

Aim: at most 2 microseconds. Rounds of the variants alternate, the median of the rounds counts.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from types import SimpleNamespace
from typing import Any

os.environ["FORGATHER_JOBS_DIR"] = tempfile.mkdtemp(prefix="bench")

from forgather_control import TrainerControlCallback, TrainingJob

ROUNDS, CALLS = 60, 5_000
AIM_US = 2.0


def empty(**_: Any) -> None:
    """What any hook costs by being called."""


def timed(call: Any) -> float:
    """Microseconds a call, over one round."""
    begin = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - begin) / CALLS * 1e6


def main() -> None:
    job = TrainingJob("plain", max_steps=1000)
    callback = TrainerControlCallback("hf")
    state = SimpleNamespace(global_step=5, max_steps=1000, epoch=0.5)
    control = SimpleNamespace(should_save=False, should_evaluate=False, should_training_stop=False)
    # The real Trainer passes these, and passing them is part of what a hook costs.
    extra = dict.fromkeys(
        ("model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader")
    )
    callback.on_train_begin(None, state, control, **extra)
    with job:
        variants = {
            "empty call": lambda: empty(),
            "empty hook with the Trainer's arguments": lambda: empty(args=None, state=state, control=control, **extra),
            "TrainingJob.step": lambda: job.step(5),
            "TrainerControlCallback.on_step_end": lambda: callback.on_step_end(None, state, control, **extra),
            "TrainingJob.log of two floats": lambda: job.log(loss=0.5, rate=1e-3),
        }
        rounds: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(ROUNDS):
            for name, call in variants.items():
                rounds[name].append(timed(call))
    callback.on_train_end(None, state, control, **extra)
    base = statistics.median(rounds["empty call"])
    print(f"{'nothing pending':42} {'median us':>10} {'best us':>8} {'over an empty call':>19} {'aim':>6}")
    for name, values in rounds.items():
        middle = statistics.median(values)
        aim = f"{AIM_US:g} us" if "step" in name else ""
        print(f"{name:42} {middle:10.3f} {min(values):8.3f} {middle - base:16.3f} us {aim:>6}")


if __name__ == "__main__":
    main()
