"""The script's own commands on real ranks: all at one step, errors of any rank, one that hangs, and Ctrl-C."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forgather_control import CommandFailed, CommandRefused, connect, errors

from ..support.harness import SOON, needs_lightning, needs_torch, needs_transformers, until
from ..support.torchrun import START, Torchrun

pytestmark = [needs_torch, pytest.mark.once]

SCRIPT = """
import os, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from forgather_control import TrainingJob

dist.init_process_group("gloo")
rank, size, folder = dist.get_rank(), dist.get_world_size(), Path(sys.argv[1])

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def begin():
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.01)

def train(model, optimizer, step):
    loss = model(torch.full((2, 4), step % 7 + rank + 1.0)).square().mean() / 100
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

def scale_all(model, factor):
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(factor)

def job(job_id, **options):
    model, optimizer = begin()
    changes, last = [], 0
    with TrainingJob(job_id, **options) as job:

        @job.command
        def scale(context, factor: float, names: list[str] = ()) -> list:
            changes.append((context.step, factor))
            scale_all(model, factor)
            steps = [torch.zeros(1) for _ in range(size)]
            dist.all_gather(steps, torch.tensor([float(context.step)]))
            return [[int(step) for step in steps], names, rank]

        @job.command
        def fail(where: int, how: str = "raise") -> str:
            if rank == where:
                if how == "exit":
                    sys.exit(7)
                if how == "json":
                    return object()
                raise ValueError(f"no, says {rank}")
            return "done"

        @job.command
        def hang(where: int) -> None:
            while rank == where and not (folder / "go").exists():
                time.sleep(0.01)

        @job.command
        def interrupt(where: int) -> None:
            if rank == where:
                raise KeyboardInterrupt

        if rank == 0:
            job.command(name="odd")(lambda: 5)
            job.command(name="only0")(lambda: 5)
        else:
            def odd(n: int = 1): ...
            job.command(odd)
            job.command(name="only1")(lambda: 5)
        for last in range(1, 10**6):
            train(model, optimizer, last)
            time.sleep(0.004 if last % size == rank else 0.001)
            try:
                job.step(last)
            except KeyboardInterrupt:
                say("interrupted", job_id, rank)
            if job.should_stop:
                break
    again, optimizer = begin()
    for step in range(1, last + 1):
        train(again, optimizer, step)
        for at, factor in changes:
            if at == step:
                scale_all(again, factor)
    alike = all(torch.equal(*pair) for pair in zip(model.parameters(), again.parameters()))
    say("over", job_id, rank, last, len(changes), alike)
    dist.barrier()

job("store")
job("polled", poll_steps=3)
say("end", rank)
dist.destroy_process_group()
os._exit(0)  # see tests/support/process_group.py
"""


def client_of(run: Torchrun, job_id: str, command: str, **params: Any) -> Any:
    """A connection to a job whose ranks have compared what they registered, so that a first command is accepted."""

    def found() -> Any:
        try:
            with connect(job_id) as client:
                client.command(command, wait="finished", timeout=SOON, **params)
        except (errors.FindError, errors.MethodNotFound, CommandRefused):
            return False
        return True

    run.until(found)
    return connect(job_id)


def failure(call: Callable[..., Any], *words: Any, **params: Any) -> str:
    """The error of a command, or why it was refused."""
    with pytest.raises((CommandFailed, CommandRefused)) as caught:
        call(*words, wait="finished", timeout=SOON, **params)
    return str(caught.value)


def play(run: Torchrun, job_id: str, folder: Path) -> None:
    """Send every command to two ranks, then stop them; both have then trained alike."""
    with client_of(run, job_id, "user.fail", where=-1) as client:
        record = client.command("user.scale", factor=0.5, names=["a"], wait="finished", timeout=SOON)
        step = record.applied_at_step
        assert record.result == {"value": [[step, step], ["a"], 0]}
        for where in (0, 1):
            prefix = "rank 1: " if where else ""
            for how, why in (
                ("raise", f"ValueError: no, says {where}"),
                ("exit", "user.fail called sys.exit(7); training continues"),
            ):
                said = failure(client.command, "user.fail", where=where, how=how)
                assert said == f"user.fail failed: {prefix}{why}"
        assert "not JSON" in failure(client.command, "user.fail", where=0, how="json")
        # Only rank 0's value counts.
        assert client.command("user.fail", where=1, how="json", wait="finished").result == {"value": "done"}
        for name in ("odd", "only0"):
            assert "rank 1 did not register it as rank 0 did" in failure(client.command, f"user.{name}")
        with pytest.raises(errors.MethodNotFound):
            client.call("user.only1")
        hangs(run, client, 0, folder)
        hangs(run, client, 1, folder)
        if job_id == "store":
            paused = client.command("pause", wait="finished", timeout=SOON).applied_at_step
            record = client.command("user.scale", factor=1.0, wait="finished", timeout=SOON)
            assert record.result["value"][0] == [paused, paused] and client.call("status")["status"] == "paused"
            client.command("resume", wait="finished", timeout=SOON)
        else:
            client.command("user.scale", factor=1.0, wait="finished", timeout=SOON)
        for where in (0, 1) if job_id == "store" else ():
            said = failure(client.command, "user.interrupt", where=where)
            assert said.endswith("interrupted on this rank by KeyboardInterrupt") and ("rank 1: " in said) == where
            run.until(lambda where=where: f"interrupted store {where}" in run.output)
        record = client.command("user.scale", factor=1.5, wait="finished", timeout=SOON)
        assert record.result["value"][2] == 0
        client.call("graceful_stop", wait="applied")
    run.until(lambda: len(re.findall(f"^over {job_id} ", run.output, re.M)) == 2)
    over = sorted(re.findall(rf"^over {job_id} (.*)", run.output, re.M))
    assert [line.split()[0] for line in over] == ["0", "1"] and over[0][2:] == over[1][2:]
    assert over[0].endswith(" 3 True"), over


def hangs(run: Torchrun, client: Any, where: int, folder: Path) -> None:
    """While a rank runs a function that does not return, status names it."""
    (folder / "go").unlink(missing_ok=True)
    record = client.call("user.hang", where=where)
    found = run.until(lambda: client.call("status").get("running"))
    if where == 1:
        found = run.until(lambda: [each for each in client.call("status").get("running", []) if each["ranks"] == [1]])
    assert found[0]["command_id"] == record["command_id"] and found[0]["command"] == "user.hang"
    assert found[0]["ranks"][0] == where and found[0]["seconds"] >= 0
    (folder / "go").touch()
    run.until(lambda: client.call("get_command", command_id=record["command_id"])["state"] == "finished")
    assert "running" not in client.call("status")


@pytest.mark.timeout(300)
def test_own_commands_on_two_ranks(tmp_path):
    """Over the store and polled; the weights of both ranks are those of a training with the same changes built in."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    with Torchrun(str(script), str(tmp_path), ranks=2) as run:
        play(run, "store", tmp_path)
        play(run, "polled", tmp_path)
        assert run.end(START) == 0
        assert "Control is off" not in run.output


def change(client: Any, size: int) -> None:
    """Pause, save, change a rate and change it back, resume, let a rule fire, profile: the weights stay the same."""
    step = client.command("pause", wait="finished", timeout=SOON).applied_at_step
    for factor in ("x2", "x0.5"):  # exact in binary
        changes = {"learning_rate": factor}
        record = client.command("change_settings", changes=changes, wait="finished", timeout=SOON)
        assert record.applied_at_step == step and record.result["learning_rate"]["effective"] in (0.1, 0.2)
    saved = client.command("save_checkpoint", wait="finished", timeout=START).result
    assert saved["step"] == step and Path(saved["path"]).exists()
    until(lambda: client.call("status")["status"] == "paused")
    assert client.call("status")["global_step"] <= step + 1
    client.command("resume", wait="finished", timeout=SOON)
    rule = client.call("add_rule", when="step >= 1", do="user.scale", params={"factor": 1.0})
    until(lambda: client.call("get_command", command_id=rule["command_id"])["state"] == "finished")
    record = client.command("profile", steps=2, wait="finished", timeout=START)
    paths = record.result["paths"]
    assert len(paths) == size and all(f"step{record.applied_at_step}-rank" in path for path in paths)
    assert all(Path(path).exists() for path in paths) and record.result["operations"]


@needs_transformers
@needs_lightning
@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", [1, 2])
def test_trainers_are_changed_on_all_ranks(tmp_path, size):
    """Both trainers' objects are there on each rank; the weights are those of a run with the same changes built in."""
    objects = {
        "hugging_face": {"model", "optimizer", "lr_scheduler", "state", "args", "trainer", "step"},
        "lightning": {"model", "trainer", "step"},
    }
    with Torchrun("-m", "tests.support.ranks_own_commands", str(tmp_path), ranks=size) as run:
        for name, expected in objects.items():
            with client_of(run, name, "user.scale", factor=1.0) as client:
                for factor in (0.5, 1.5):
                    record = client.command("user.scale", factor=factor, wait="finished", timeout=SOON)
                    steps, found = record.result["value"]
                    assert steps == [record.applied_at_step] * size and expected <= set(found)
                change(client, size)
                client.call("graceful_stop", wait="applied")
            run.until(lambda name=name: len(re.findall(f"^over {name} ", run.output, re.M)) == size)
            over = sorted(re.findall(rf"^over {name} (.*)", run.output, re.M))
            assert over[0][2:] == over[-1][2:] and over[0].endswith(" 4 True"), over
        assert run.end(START) == 0
