"""The first promise, with real training: whatever happens on the control side, the weights come out the same.

Each test trains a model in a process of its own, under some attack, and compares the digest of its
final weights with that of an undisturbed, uncontrolled run.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import forgather_control

from ..support.harness import SOON, Process, Wire, needs_torch, remove_folder, until
from .test_fuzz import attack

pytestmark = needs_torch

TRAIN = """
import hashlib, os, sys
import torch
from forgather_control import TrainingJob
from forgather_control.server import limits, server

limits.CPU_SHARE = float(os.environ.get("SHARE", limits.CPU_SHARE))
torch.manual_seed(0)
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
optimizer = torch.optim.Adam(model.parameters())
if "BECOME" in os.environ:  # after the imports: another user may not be able to read this Python
    from forgather_control.jobs import directory
    from forgather_control.processes import liveness as process
    process.current_process(), directory._user()
    os.setgid(int(os.environ["BECOME"]))
    os.setuid(int(os.environ["BECOME"]))
with TrainingJob("victim", max_steps=400, enabled=sys.argv[1] == "controlled") as job:
    print("ready", job._controller is not None, flush=True)
    for step in range(1, 401):
        if step == 200:
            sys.stdin.readline()  # hold still here, so that the attack falls into the middle of training
        features = torch.randn(32, 16)
        loss = (model(features).squeeze() - features.sum(dim=1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        job.log(loss=loss)
        job.step(step)
        if job.should_save:
            torch.save(model.state_dict(), os.environ["CHECKPOINT"])
            job.saved(os.environ["CHECKPOINT"])
digest = hashlib.sha256()
for weights in model.parameters():
    digest.update(weights.detach().numpy().tobytes())
print(digest.hexdigest(), flush=True)
"""


@functools.cache
def undisturbed() -> str:
    """The weights of a run that nobody could control."""
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, "off"], input="\n", capture_output=True, text=True, timeout=4 * SOON, check=True
    )
    return done.stdout.split()[-1]


@contextmanager
def victim(tmp_path: Path, controlled: bool = True, **options) -> Iterator[Process]:
    """A training process in the middle of its run; when the attack is over its weights are compared."""
    env = {**options.pop("env", {}), "CHECKPOINT": str(tmp_path / "checkpoint.pt")}
    with Process(TRAIN, "controlled", env=env, **options) as process:
        assert process.line() == f"ready {controlled}", process.errors
        if controlled:
            until(lambda: forgather_control.get_job_status("victim")["global_step"] == 199)
        yield process
        process.say("")
        assert process.line() == undisturbed()
        assert process.end() == 0
        # A traceback with a line of ours in it; torch logs some of its own where files cannot be read.
        assert not re.search(r'File ".*forgather_control/[\w/]+\.py"', "".join(process.errors))


def test_saving_on_demand_changes_nothing(tmp_path):
    """Saves at random moments, and the same weights."""
    with victim(tmp_path):
        for number in range(20):
            forgather_control.save_checkpoint("victim", command_id=f"save-{number}")
        with forgather_control.connect("victim") as job:
            assert [record["state"] for record in job.call("list_commands")] == ["accepted"] * 20
    assert (tmp_path / "checkpoint.pt").exists()


def test_random_lines_half_lines_and_idle_clients(tmp_path, jobs_dir):
    """200 connections that say nothing, one that says half a line and sleeps, and 100,000 random lines."""
    path = jobs_dir / "victim" / "control.sock"
    with victim(tmp_path, env={"SHARE": "1"}):  # within its budget it would take them for minutes
        idle = [Wire(path) for _ in range(200)]
        idle[0].send(b'{"jsonrpc":"2.0","id":1,"met')
        assert attack(path, seed=1, lines=100_000) == 100_000
        assert forgather_control.get_job_status("victim")["global_step"] == 199
        idle[1].send(b'{"jsonrpc":"2.0","id":1,"method":"save_checkpoint","params":{"wait":"finished"}}\n')
    assert idle[1].reply()["result"]["state"] == "finished"
    for wire in idle:
        wire.close()


def test_a_directory_deleted_under_it(tmp_path, jobs_dir):
    """Everything gone, then a file in its place: one warning at most of each kind, and training."""
    with victim(tmp_path):
        remove_folder(jobs_dir)
        jobs_dir.touch()


def test_clients_killed_while_they_wait(tmp_path):
    """kill -9 of the other side, ten times, in the middle of a wait."""
    wait = "import forgather_control; print(forgather_control.abort.__name__, flush=True);"
    wait += "forgather_control.save_checkpoint('victim', wait='finished')"
    with victim(tmp_path):
        clients = [Process(wait) for _ in range(10)]
        for client in clients:
            assert client.line() == "abort"
        until(lambda: forgather_control.get_job_status("victim")["commands"])
        for client in clients:
            client.kill()
            client.__exit__()
        assert forgather_control.get_job_status("victim")["global_step"] == 199


@pytest.mark.parametrize("place", ["/dev/null/jobs", "/proc/jobs"])
def test_a_home_that_cannot_be_written(tmp_path, place):
    """No jobs directory to be had: one warning, and the same weights."""
    with victim(tmp_path, controlled=False, env={"FORGATHER_JOBS_DIR": place}) as process:
        until(lambda: any("Control is off" in line for line in process.errors))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_read_only_home_of_an_ordinary_user():
    """$HOME without write permission, for a process that is not root."""
    home = Path(tempfile.mkdtemp(prefix="fghome"))
    home.chmod(0o555)
    env = {"HOME": str(home), "FORGATHER_JOBS_DIR": "", "XDG_CONFIG_HOME": "", "BECOME": "65534"}
    try:
        with victim(home, controlled=False, env=env) as process:
            until(lambda: any("Control is off" in line for line in process.errors))
        assert list(home.iterdir()) == []
    finally:
        home.rmdir()


@contextmanager
def mounted(place: Path, *options: str) -> Iterator[None]:
    """A small file system of the test's own."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting needs root")
    place.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(place)], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"tmpfs cannot be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_full_at_the_start(tmp_path, jobs_dir):
    """Not one more byte: one warning, nothing half written left behind, the same weights."""
    with mounted(jobs_dir, "-o", "size=64k,mode=0700"):
        with open(jobs_dir / "ballast", "wb", buffering=0) as ballast, pytest.raises(OSError):
            while True:
                ballast.write(b"\0" * 4096)
        with victim(tmp_path, controlled=False) as process:
            until(lambda: any("Control is off" in line for line in process.errors))
            assert not (jobs_dir / "victim").exists()


def test_a_disk_that_fills_up_under_it(tmp_path, jobs_dir):
    """The record is deleted when there is no room for a new one: a warning, not an end."""
    with mounted(jobs_dir, "-o", "size=64k,mode=0700"), victim(tmp_path) as process:
        with open(jobs_dir / "ballast", "wb", buffering=0) as ballast, pytest.raises(OSError):
            while True:
                ballast.write(b"\0" * 4096)
        (jobs_dir / "victim" / "endpoint.json").unlink()
        with open(jobs_dir / "ballast", "ab", buffering=0) as ballast, pytest.raises(OSError):
            while True:
                ballast.write(b"\0" * 4096)
        until(lambda: any("cannot find this job" in line for line in process.errors))


def test_a_read_only_jobs_directory(tmp_path, jobs_dir):
    """Mounted read-only, so that even root cannot write: one warning, and the same weights."""
    with mounted(jobs_dir, "-o", "ro,size=64k"):
        with victim(tmp_path, controlled=False) as process:
            until(lambda: any("Control is off" in line for line in process.errors))


def test_killed_it_leaves_no_riddle(tmp_path, jobs_dir):
    """kill -9 in the middle: listed as dead at once, cleaned up, and the next run of that name trains to its end."""
    with Process(TRAIN, "controlled", env={"CHECKPOINT": str(tmp_path / "c.pt")}) as process:
        process.line()
        process.kill()
    assert [job.state for job in forgather_control.list_jobs()] == ["dead"]
    with victim(tmp_path):  # takes the dead one's directory over
        assert [job.state for job in forgather_control.list_jobs()] == ["live"]
        assert forgather_control.cleanup() == []
