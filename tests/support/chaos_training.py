"""The training runs of test_chaos: they last until a command stops them, and report their weights.

``python -m tests.support.chaos_training FOLDER JOB_ID [PORT]``, alone or under torchrun, is a controlled run. Its
report is ``FOLDER/JOB_ID-RANK.json``. SIGUSR1 makes it fork at whatever line it is, as a data loader does.
``... FOLDER undisturbed STEPS`` trains like one rank and like two, without control, and writes the weights after each
step to ``FOLDER/undisturbed-SIZE.json``.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

#: The least duration of a step in seconds, so that a run lasts as long as the faults without a million steps.
PACE = 0.01
#: Seconds that a child lives, longer than it takes to delete what it inherits.
CHILD_LIFETIME = 0.3


class Training:
    """A small model and its data.

    Args:
        ranks: the ranks whose data this process trains on; the gradients of all are added.
        size: the number of ranks in all.
    """

    def __init__(self, ranks: Iterable[int], size: int) -> None:
        import torch

        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.torch, self.size = torch, size
        self.model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.data = [torch.Generator().manual_seed(1 + rank) for rank in ranks]

    def step(self) -> float:
        """Train on one batch of each rank."""
        self.optimizer.zero_grad()
        for data in self.data:
            features = self.torch.randn(16, 8, generator=data)
            loss = (self.model(features).squeeze() - features.sum(dim=1)).square().mean()
            loss.backward()
        for weights in self.model.parameters():
            if len(self.data) < self.size:
                self.torch.distributed.all_reduce(weights.grad)
            weights.grad /= self.size
        self.optimizer.step()
        return float(loss.detach())

    def digest(self) -> str:
        """Return a digest of all weights."""
        values = [value.view(self.torch.uint8).flatten().tolist() for value in self.model.state_dict().values()]
        return hashlib.sha256(b"".join(map(bytes, values))).hexdigest()


def write(path: Path, value: Any) -> None:
    """Write a file that others see whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    part.rename(path)


class Victim:
    """One rank of a run that can be controlled."""

    def __init__(self, folder: Path, job_id: str, port: int | None) -> None:
        self.folder, self.job_id, self.port = folder, job_id, port
        self.rank, self.size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if self.size > 1:
            import torch.distributed as dist

            dist.init_process_group("gloo")
        self.training = Training([self.rank], self.size)
        self.children: list[int] = []
        self.forks, self.forking = 0, False

    def fork(self, *_: Any) -> None:
        """In a signal handler: fork a child that sleeps and exits."""
        if self.forking:  # Python hangs where a fork interrupts another one
            return
        self.forking = True
        pid = os.fork()
        if pid == 0:
            time.sleep(CHILD_LIFETIME)
            os._exit(0)
        self.children.append(pid)
        self.forks += 1
        self.forking = False

    def reap(self) -> None:
        """Wait for the children that have ended."""
        self.children = [pid for pid in self.children if os.waitpid(pid, os.WNOHANG)[0] == 0]

    def save(self, step: int) -> Path:
        """Write this rank's part of a checkpoint; it appears when it is complete."""
        path = self.folder / "checkpoints" / self.job_id / f"checkpoint-{step}"
        path.mkdir(parents=True, exist_ok=True)
        part = path / f"rank-{self.rank}.part"
        self.training.torch.save(self.training.model.state_dict(), part)
        part.rename(path / f"rank-{self.rank}.pt")
        write(path / f"rank-{self.rank}.json", {"step": step, "digest": self.training.digest()})
        return path

    def train(self, job: Any) -> int:
        """Train until a command stops it; return the last step."""
        step = 0
        while not job.should_stop:
            step += 1
            job.log(loss=self.training.step())
            job.step(step)
            if job.should_save:
                job.saved(self.save(step))
            self.reap()
            time.sleep(PACE)
        return step

    def run(self) -> None:
        """Train, and write the report."""
        from forgather_control import TrainingJob

        signal.signal(signal.SIGUSR1, self.fork)
        with TrainingJob(self.job_id, port=self.port) as job:
            controller = job._controller
            assert controller is not None, "the job cannot be controlled"
            write(self.folder / f"{self.job_id}-{self.rank}.pid", os.getpid())
            steps = self.train(job)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        records = [record.to_json() for record in controller._queue.records()]
        report = {"steps": steps, "digest": self.training.digest(), "forks": self.forks, "records": records}
        write(self.folder / f"{self.job_id}-{self.rank}.json", report)
        if self.size > 1:
            from . import process_group

            process_group.leave()


def undisturbed(folder: Path, steps: int) -> None:
    """Write the weights after each step of runs that are not controlled."""
    for size in (1, 2):
        training = Training(range(size), size)
        found = [training.digest()]
        for _ in range(steps):
            training.step()
            found.append(training.digest())
        write(folder / f"undisturbed-{size}.json", found)


def main(folder: str, job_id: str, number: str | None = None) -> None:
    if job_id == "undisturbed":
        undisturbed(Path(folder), int(number or 0))
    else:
        Victim(Path(folder), job_id, None if number is None else int(number)).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
