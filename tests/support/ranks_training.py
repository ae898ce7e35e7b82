"""The training that test_torchrun disturbs: one job after the other, in every rank that torchrun starts.

``torchrun -m tests.support.ranks_training FOLDER SEED JOBS`` first trains undisturbed, then JOBS jobs that can be
controlled. A job's :class:`Plan` follows from the seed and its number, for the test as for every rank. What
a rank does at present stands in ``now-RANK``; what became of a job, as that rank saw it, in ``NUMBER-RANK.json``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

#: Steps after which gradients are exchanged, so that ranks may drift apart by as many.
SYNCS = (1, 4)
#: The steps of the longest job.
MOST_STEPS = 60
#: Seconds after which a job counts as hanging: every rank then prints its stacks.
HANGS = 60


class Plan(NamedTuple):
    """One job. ``steps``, ``sync`` and so on are steps; what is 0 does not happen."""

    number: int
    seed: int
    steps: int
    sync: int
    evaluate_every: int
    save_every: int
    #: The slowest step, evaluation and save of the slowest rank, in seconds.
    slow: tuple[float, float, float]
    #: Every rank writes its part of a checkpoint, not rank 0 alone.
    sharded: bool
    #: This rank loses its part of the checkpoints at odd steps; -1 for none.
    loses: int
    #: The only rank that logs; -1 for all, each in its own rhythm.
    logs: int
    #: Whether a last checkpoint is saved at the end, unless the job was aborted.
    saves_last: bool
    #: Ask every so many steps instead of never.
    poll_steps: int | None
    #: The control of this rank fails at this step, and training continues; (-1, 0) for none.
    breaks: tuple[int, int]

    @property
    def job_id(self) -> str:
        """As it is found."""
        return f"job-{self.number}"


def plan(seed: int, number: int, size: int) -> Plan:
    """The same plan for the test and for every rank."""
    dice = random.Random(f"{seed} {number} {size}")
    polls, breaks = number % 5 == 4, number % 6 == 5
    sharded = (
        not polls and dice.random() < 0.5
    )  # at the end of training, rank 0 of ranks that poll cannot know whether the others have written
    writers = range(size if sharded else 1)
    steps = dice.randrange(20, MOST_STEPS + 1)
    return Plan(
        number=number,
        seed=seed,
        steps=steps,
        sync=dice.choice(SYNCS),
        evaluate_every=5 if number < 3 else dice.choice([0, 5, 11]),
        save_every=7 if number < 3 else dice.choice([0, 0, 7]),
        slow=(dice.choice([0.001, 0.01]), 0.04, dice.choice([0.01, 0.05])),
        sharded=sharded,
        loses=dice.choice(writers) if not breaks and dice.random() < 0.2 else -1,
        logs=dice.randrange(-1, size),
        saves_last=dice.random() < 0.5,
        poll_steps=dice.choice([1, 3]) if polls and not breaks else None,
        breaks=(dice.randrange(size), dice.randrange(1, steps + 1)) if breaks else (-1, 0),
    )


class Now:
    """What this rank does at present, for the test to read at any moment."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._file = os.open(folder / f"now-{rank}", os.O_CREAT | os.O_WRONLY, 0o600)
        self.number = 0

    def is_(self, word: str, step: int) -> None:
        """Say so."""
        os.pwrite(self._file, f"{self.number} {step} {word}".ljust(48).encode(), 0)


class Rank:
    """One of them, and its model."""

    def __init__(self, folder: Path, seed: int) -> None:
        import torch
        import torch.distributed as dist

        self.torch, self.dist = torch, dist
        dist.init_process_group("gloo")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.folder, self.seed = folder, seed
        self.now = Now(folder, self.rank)
        self.model: Any = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1))
        self.begin()
        self.train(1, 1)  # DDP lays out its buckets anew after the first step, and then adds in another order

    def digest(self) -> str:
        """Of all weights."""
        weights = [bytes(value.view(self.torch.uint8).flatten().tolist()) for value in self.model.state_dict().values()]
        return hashlib.sha256(b"".join(weights)).hexdigest()

    def begin(self) -> None:
        """The same weights and data at the start of each job."""
        self.data = self.torch.Generator().manual_seed(self.seed + self.rank)
        with self.torch.no_grad():
            for weight in self.model.parameters():
                weight.fill_(0.5)
        self.optimizer = self.torch.optim.SGD(self.model.parameters(), 0.05)
        self.optimizer.zero_grad()

    def train(self, step: int, sync: int) -> float:
        """One step; the ranks meet in each ``sync``-th."""
        inputs = self.torch.randn(4, 3, generator=self.data)
        with contextlib.nullcontext() if step % sync == 0 else self.model.no_sync():
            loss = ((self.model(inputs) - inputs.sum()) ** 2).mean()
            loss.backward()
        if step % sync == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return float(loss.detach())

    def undisturbed(self, sync: int) -> list[str]:
        """The weights after each step of a training without control."""
        self.begin()
        found = [self.digest()]
        for step in range(1, MOST_STEPS + 1):
            self.train(step, sync)
            found.append(self.digest())
        return found

    def say(self, name: str, value: Any) -> None:
        """Leave a file, whole from its first moment."""
        path = self.folder / f"{name}-{self.rank}.json"
        path.with_suffix(".part").write_text(json.dumps(value))
        path.with_suffix(".part").rename(path)


class Job:
    """One controlled training, in one rank."""

    def __init__(self, me: Rank, plan: Plan) -> None:
        self.me, self.plan = me, plan
        self.dice = random.Random(f"{plan.number} {me.rank}")  # another rhythm in each rank
        self.applied: list[tuple[int, Any]] = []
        self.flags: list[tuple[int, bool, bool, bool]] = []
        self.step = 0

    def listen(self, group: Any) -> None:
        """Note what this rank applies, where it tells rank 0 of it."""
        tell = group.applied

        def applied(commands: Any, step: int, outcomes: Any) -> None:
            self.applied.append((step, [command[:2] for command in commands]))
            tell(commands, step, outcomes)

        group.applied = applied

    def sleep(self, seconds: float) -> None:
        """At most that long; longer in some ranks than in others."""
        time.sleep(seconds * self.dice.random() * (self.me.rank + 1) / self.me.size)

    def run(self) -> dict[str, Any]:
        """Train to the end, whichever it is."""
        from forgather_control import TrainingJob

        plan, me = self.plan, self.me
        me.begin()
        me.now.number = plan.number
        me.now.is_("before", 0)
        with TrainingJob(plan.job_id, max_steps=plan.steps, poll_steps=plan.poll_steps) as job:
            controller = job._controller
            self.listen(controller._group)
            self.wait_for_the_test()
            for self.step in range(1, plan.steps + 1):
                self.one_step(job)
                if job.should_stop:
                    break
            if plan.saves_last and not job.aborted:
                self.save(job)
            me.now.is_("closing", self.step)
            self.sleep(plan.slow[1])
        me.now.is_("over", self.step)
        return {
            "applied": self.applied,
            "flags": self.flags,
            "steps": self.step,
            "aborted": job.aborted,
            "digest": me.digest(),
            "records": [record.to_json() for record in controller._queue.records()],
        }

    def wait_for_the_test(self) -> None:
        """Until its first commands are on their way."""
        if self.me.rank == 0:
            while not (self.me.folder / f"go-{self.plan.number}").exists():
                time.sleep(0.001)
        self.me.dist.barrier()

    def one_step(self, job: Any) -> None:
        """Train, log, evaluate, apply commands, save; each at its own time in each rank."""
        plan, me, step = self.plan, self.me, self.step
        me.now.is_("last" if step == plan.steps else "training", step)
        self.sleep(plan.slow[0])
        if step == plan.steps:
            time.sleep(0.01)  # or no command would meet it
        loss = me.train(step, plan.sync)
        if plan.logs in (-1, me.rank) and step % (me.rank + 2) == 0:
            job.log(loss=loss)
        if plan.evaluate_every and step % plan.evaluate_every == 0:
            me.now.is_("evaluating", step)
            self.sleep(plan.slow[1])
        job.step(step if (me.rank, step) != plan.breaks else None)
        if job.should_save or job.should_stop:
            self.flags.append((step, job.should_save, job.should_stop, job.aborted))
        if job.should_save or (plan.save_every and step % plan.save_every == 0 and not job.aborted):
            self.save(job)

    def save(self, job: Any) -> None:
        """This rank's part of a checkpoint, if it has one."""
        me, plan = self.me, self.plan
        if me.rank and not plan.sharded:
            return
        me.now.is_("saving", self.step)
        path = me.folder / plan.job_id / f"checkpoint-{self.step}"
        path.mkdir(parents=True, exist_ok=True)
        self.sleep(plan.slow[2])
        if plan.loses == me.rank and self.step % 2:
            job.saved(path / "lost")
            return
        part = path / f"part-{me.rank}"
        part.write_text(json.dumps({"step": self.step, "digest": me.digest()}))
        part.rename(path / f"rank-{me.rank}.json")
        job.saved(path)


def main(folder: str, seed: str, jobs: str) -> None:
    me = Rank(Path(folder), int(seed))
    me.say("undisturbed", {sync: me.undisturbed(sync) for sync in SYNCS})
    for number in range(1, int(jobs) + 1):
        faulthandler.dump_traceback_later(HANGS)
        me.say(str(number), Job(me, plan(me.seed, number, me.size)).run())
    faulthandler.cancel_dump_traceback_later()
    from . import process_group

    process_group.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
