"""A sweep that aborts the runs with the worse metrics: ``python examples/sweep.py [LEARNING_RATE ...]``.

Each run is a separate process, which is found and compared with the Python API alone.
"""

import math
import subprocess
import sys
import time

from forgather_control import ControlError, abort, get_job_status, graceful_stop

COMPARED_AT = 200  #: the step from which runs are compared

RUN = """
import sys, torch
from forgather_control import TrainingJob

torch.manual_seed(0)
rate = float(sys.argv[2])
model = torch.nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=rate)
with TrainingJob(job_id=sys.argv[1]) as job:
    step = 0
    while not job.should_stop:
        features = torch.randn(64, 8)
        loss = (model(features).squeeze() - features.sum(dim=1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 10 == 0:
            job.log(loss=loss)
        job.step(step)
"""


def loss_of(job_id: str) -> float | None:
    """Return the loss of a run that has reached ``COMPARED_AT``; ``None`` before that."""
    try:
        status = get_job_status(job_id)
    except ControlError:
        return None
    return float(status["metrics"]["loss"]) if status["global_step"] >= COMPARED_AT else None


def main(rates: list[str]) -> None:
    runs = {f"sweep-{rate}": subprocess.Popen([sys.executable, "-c", RUN, f"sweep-{rate}", rate]) for rate in rates}
    try:
        keep_best(list(runs))
        for process in runs.values():
            process.wait(30)
    finally:
        for process in runs.values():
            process.kill()


def keep_best(names: list[str]) -> None:
    """Wait until all runs can be compared, abort all but the best, and stop that one cleanly."""
    losses: dict[str, float] = {}
    deadline = time.monotonic() + 60
    while len(losses) < len(names):
        if time.monotonic() > deadline:
            raise SystemExit("some runs did not get far enough to be compared")
        time.sleep(0.1)
        for name in names:
            loss = loss_of(name)
            if name not in losses and loss is not None:
                losses[name] = math.inf if math.isnan(loss) else loss
    best = min(losses, key=lambda name: losses[name])
    for name in names:
        record = (graceful_stop if name == best else abort)(name, wait="finished", timeout=30)
        print(f"{name}: loss {losses[name]:.4g}, {record.command} {record.state} at step {record.applied_at_step}")
    print("best:", best)


if __name__ == "__main__":
    main(sys.argv[1:] or ["0.0001", "0.01", "10"])
