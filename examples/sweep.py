"""A sweep that keeps the best run: ``python examples/sweep.py [LEARNING_RATE ...]``.

Each run is a separate process, which is found, compared and changed with the Python API alone. A run that diverges
aborts itself, by a rule.
"""

import math
import subprocess
import sys
import time

from forgather_control import ControlError, abort, connect, get_job_status, graceful_stop

COMPARED_AT = 200  #: the step from which runs are compared

RUN = """
import sys, torch
from forgather_control import TrainingJob

torch.manual_seed(0)
rate = float(sys.argv[2])
model = torch.nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=rate)
rules = [{"when": "loss is nan or loss > 1e9", "do": "abort", "params": {"reason": "it diverged"}}]
with TrainingJob(job_id=sys.argv[1], rules=rules) as job:
    job.optimizer(optimizer)
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
        keep_best(runs)
        for process in runs.values():
            process.wait(30)
    finally:
        for process in runs.values():
            process.kill()


def keep_best(runs: dict[str, "subprocess.Popen[bytes]"]) -> None:
    """Wait until all runs can be compared, abort all but the best; refine that one, and stop it cleanly."""
    losses: dict[str, float] = {}
    deadline = time.monotonic() + 60
    while len(losses) < len(runs):
        if time.monotonic() > deadline:
            raise SystemExit("some runs did not get far enough to be compared")
        time.sleep(0.1)
        for name in runs.keys() - losses.keys():
            if runs[name].poll() is not None:
                losses[name] = math.inf
                print(f"{name}: aborted by its own rule")
            elif (loss := loss_of(name)) is not None:
                losses[name] = loss
    best = min(losses, key=lambda name: losses[name])
    for name in runs:
        if name != best and runs[name].poll() is None:
            record = abort(name, wait="finished", timeout=30)
            print(f"{name}: loss {losses[name]:.4g}, {record.command} {record.state} at step {record.applied_at_step}")
    refine(best)
    record = graceful_stop(best, wait="finished", timeout=30)
    print(f"best: {best}, {record.command} {record.state} at step {record.applied_at_step}")


def refine(job_id: str) -> None:
    """Train a while longer with a tenth of the learning rate."""
    with connect(job_id) as job:
        record = job.command("change_settings", changes={"learning_rate": "x0.1"}, wait="finished", timeout=30)
        rate = (record.result or {})["learning_rate"]
        print(f"{job_id}: learning rate {rate['old']:g} -> {rate['effective']:g} at step {record.applied_at_step}")
        rule = job.call("add_rule", when=f"step >= {(record.applied_at_step or 0) + 100}", do="pause")
        while job.call("status")["status"] != "paused":
            time.sleep(0.1)
        print(f"{job_id}: paused by rule {rule['id']}, loss {job.call('status')['metrics']['loss']:.4g}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["0.0001", "0.01", "10"])
