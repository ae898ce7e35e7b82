"""Jobs of several real ranks under torchrun, however they agree: over the store, by polling, with a shared file."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from forgather_control import connect, errors

from ..support.harness import SOON, cli, needs_torch, until
from ..support.torchrun import START, Torchrun

SCRIPT = """
import logging, os, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from forgather_control import TrainingJob
from forgather_control.ranks import limits

dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
folder = Path(sys.argv[1])

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

class Handler(logging.Handler):
    def emit(self, record):
        say("log", rank, record.levelname, record.getMessage())

logging.getLogger("forgather_control").addHandler(Handler())
logging.getLogger("forgather_control").setLevel(logging.INFO)
say("pid", rank, os.getpid())

def train(job_id, *, together=True, breaks_at=0, **options):
    with TrainingJob(job_id, max_steps=10**6, **options) as job:
        for step in range(1, 10**6):
            if together:
                dist.all_reduce(torch.ones(1))
            time.sleep(0.004 if step % size == rank else 0.001)
            if rank == 0:
                job.log(loss=1 / step)
            if step == breaks_at and rank == 1:
                raise ArithmeticError(job_id)
            if step % 25 == 0:
                time.sleep(0.03 * rank)  # evaluation of unequal length
            job.step(step)
            if job.should_save:
                where = folder / f"{job_id}-{step}"
                where.mkdir(exist_ok=True)
                time.sleep(0.1 * rank)
                if job_id == "torn" and rank == 1:
                    raise ArithmeticError(job_id)
                (where / str(rank)).touch()
                job.saved(where)
            if job.should_stop or ("parts" in job_id and (folder / "enough").exists()):
                break
    say("over", job_id, rank, step, job.aborted)

for job_id in sys.argv[2:]:
    if job_id == "file":
        dist.destroy_process_group()
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    try:
        if "parts" in job_id:
            limits.JOIN_TIMEOUT = 0.2
            train(f"{job_id}-{rank}", together=False, poll_steps=5 if job_id == "polled-parts" else None)
            continue
        train(
            job_id,
            together=job_id not in ("breaks", "torn"),
            breaks_at=20 if job_id == "breaks" else 0,
            poll_steps=5 if job_id == "polled" else None,
        )
    except ArithmeticError:
        say("broke", job_id, rank)
    dist.barrier()
dist.destroy_process_group()
say("end", rank)
"""


@contextmanager
def torchrun(folder: Path, size: int, *jobs: str) -> Iterator[Torchrun]:
    script = folder / "train.py"
    script.write_text(SCRIPT)
    with Torchrun(str(script), str(folder), *jobs, ranks=size) as run:
        yield run


def job(run: Torchrun, job_id: str) -> Any:
    """A connection to the job, once it trains."""

    def found() -> Any:
        try:
            return connect(job_id)
        except errors.ControlError:
            return None

    client = run.until(found)
    run.until(lambda: client.call("status")["global_step"] > 30)
    return client


def said(run: Torchrun, *words: Any) -> list[list[str]]:
    """The lines that begin with these words."""
    start = [str(word) for word in words]
    return [line.split() for line in run.output.splitlines() if line.split()[: len(start)] == start]


def all_ended_alike(run: Torchrun, job_id: str, size: int, aborted: bool) -> int:
    """Every rank has left this job at one step; that step."""
    run.until(lambda: len(said(run, "over", job_id)) == size)
    over = sorted(said(run, "over", job_id))
    assert [line[2:] for line in over] == [[str(rank), over[0][3], str(aborted)] for rank in range(size)]
    return int(over[0][3])


def is_whole(path: str, size: int) -> bool:
    """Whether every rank's part of the checkpoint is there."""
    return sorted(os.listdir(path)) == [str(rank) for rank in range(size)]


@needs_torch
def test_two_real_ranks(tmp_path):
    """One start, many jobs: over the store, polled, with a file; saved, stopped, aborted; two whose rank 1 raises."""
    with torchrun(tmp_path, 2, "line", "abort", "polled", "breaks", "torn", "file") as run:
        with job(run, "line"):
            saved = cli("save", "line", "--wait", "--json")
            assert saved.returncode == 0, saved.stderr
            record = json.loads(saved.stdout)
            assert record["state"] == "finished" and is_whole(record["result"]["path"], 2), record
        assert cli("stop", "line", "--wait").returncode == 0
        step = all_ended_alike(run, "line", 2, False)
        assert step > record["applied_at_step"] == record["result"]["step"]

        with job(run, "abort") as client:
            assert client.call("status")["metrics"].keys() == {"loss"}
            assert cli("abort", "abort", "--force", "--wait").returncode == 0
        all_ended_alike(run, "abort", 2, True)

        with job(run, "polled") as client:
            record = client.call("save_checkpoint", wait="finished")
            assert record["applied_at_step"] % 5 == 0 and is_whole(record["result"]["path"], 2)
            client.call("graceful_stop", wait="applied")
        assert all_ended_alike(run, "polled", 2, False) % 5 == 0

        with job(run, "breaks") as client:
            run.until(lambda: said(run, "broke", "breaks", 1))
            record = client.call("save_checkpoint", wait="finished", timeout=SOON)
            assert os.listdir(record["result"]["path"]) == ["0"]
            client.call("graceful_stop", wait="applied", timeout=SOON)
        run.until(lambda: said(run, "over", "breaks", 0))

        with job(run, "torn") as client:
            record = client.call("save_checkpoint", wait="finished", timeout=SOON)
            assert (record["state"], record["error"]["message"]) == (
                "failed",
                "rank 1: training ended by ArithmeticError",
            )
            assert os.listdir(record["result"]["path"]) == ["0"]
            client.call("graceful_stop", wait="applied", timeout=SOON)
        run.until(lambda: said(run, "over", "torn", 0))

        with job(run, "file") as client:
            record = client.call("save_checkpoint", wait="finished")
            assert record["applied_at_step"] % 50 == 0 and is_whole(record["result"]["path"], 2)
            client.call("save_and_stop", wait="applied")
        all_ended_alike(run, "file", 2, False)
        assert run.end(START) == 0
        output = run.output
    assert len(re.findall("^end", output, re.M)) == 2 and "Traceback" not in output
    ways = [line.partition(" INFO ")[2] for line in output.splitlines() if re.match("log . INFO ranks ", line)]
    over_the_store = (
        "ranks agree on commands over torch.distributed's TCPStore; they do not communicate while no command is pending"
    )
    assert ways == [
        over_the_store,
        over_the_store,
        "ranks poll one another for commands every 5 steps: poll_steps=5 was given",
        over_the_store,
        over_the_store,
        "ranks poll one another for commands every 50 steps: a FileStore cannot wake a waiting rank",
    ]
    assert not re.search("^log . (WARNING|ERROR)", output, re.M), output


@needs_torch
def test_four_real_ranks_and_one_is_killed(tmp_path):
    """They save and stop alike; and when one of them is killed, waiting clients get an error, and no process stays."""
    with torchrun(tmp_path, 4, "job", "killed") as run:
        with job(run, "job") as client:
            record = client.call("save_and_stop", wait="finished")
            assert is_whole(record["result"]["path"], 4)
        assert all_ended_alike(run, "job", 4, False) == record["applied_at_step"]
        with job(run, "killed") as client:
            pids = [int(pid) for _, _, pid in said(run, "pid")]
            (victim,) = [int(pid) for _, rank, pid in said(run, "pid") if rank == "3"]
            os.kill(victim, signal.SIGKILL)
            with pytest.raises(errors.ControlError):
                while True:
                    client.call("save_checkpoint", wait="finished")
        assert run.end(START) != 0
        until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))


@needs_torch
def test_trainings_in_sub_groups_of_one_process_group(tmp_path):
    """Each has a job id and ranks of its own: one warning, which names the others, and each trains to its end."""
    with torchrun(tmp_path, 2, "parts", "polled-parts") as run:
        with job(run, "parts-0") as client:
            run.until(lambda: client.call("status") and len(re.findall("Control is off", run.output)) == 2)
            with pytest.raises(errors.CommandRefused, match="rank 1 never joined"):
                client.call("graceful_stop")
        (tmp_path / "enough").touch()
        assert run.end(START) == 0
        output = run.output
        over = said(run, "over")
    assert sorted(line[1] for line in over) == ["parts-0", "parts-1", "polled-parts-0", "polled-parts-1"]
    assert all(line[4] == "False" for line in over)
    for rank in (0, 1):
        first, second = re.findall(f"^log {rank} (?:WARNING|ERROR) (Control.*)", output, re.M)
        assert first.startswith("Control is off until all ranks take part: ") and f"rank {1 - rank} never" in first
        assert second.startswith("Control is off for this run: ") and f"rank {1 - rank} never" in second
