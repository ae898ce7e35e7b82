"""Runs that end or go on in unusual ways, for the chaos test: each is started for one fault, and checked by it."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forgather_control import ControlError, connect
from forgather_control.errors import CommandExpired

from .harness import ROOT, SOON, Process, Wire, until

#: A run, as ``python -c PROGRAM NAME WAY FOLDER``; it changes its way when the file FOLDER/NAME appears.
PROGRAM = """
import ctypes, os, socket, sys, time
from concurrent.futures import Future
from forgather_control import TrainingJob

name, way, folder = sys.argv[1:]
if way.startswith("host-"):
    assert ctypes.CDLL(None).unshare(0x04000000) == 0  # CLONE_NEWUTS
    socket.sethostname(way)

def save(job, step):
    path = os.path.join(folder, "disk" if way == "full" else "", f"{name}-{step}")
    if way == "future":
        job.saved(path, step=step, future=Future())  # which never ends
        return
    try:
        with open(path + ".part", "wb", buffering=0) as file:
            file.write(bytes(1 << 16))
            file.write(bytes(1 << 16))
        os.rename(path + ".part", path)
    except OSError as err:
        print("not saved", err.strerror, flush=True)
    job.saved(path)

def train(job):
    step = 0
    while not job.should_stop:
        step += 1
        time.sleep(0.005)
        job.step(step)
        if job.should_save:
            save(job, step)
        if way in ("exec", "cell") and os.path.exists(os.path.join(folder, name)):
            return False
    return True

job = TrainingJob(name, save_on_stop=False).__enter__()
print("ready", flush=True)
if train(job):
    job.__exit__(None, None, None)
    sys.exit()
if way == "exec":
    os.execv(sys.executable, [*sys.orig_argv[:-2], "plain", folder])
way = "plain"
with TrainingJob(name, save_on_stop=False) as job:  # the cell is run again; the first run has not ended
    train(job)
"""


class Runs:
    """The faults; each is a method that starts a run of its own, and has ended it when it returns.

    Args:
        jobs: the jobs directory, which may be full while ``disk`` is held.
        folder: an empty one, for checkpoints.
    """

    #: Those that need root.
    PRIVILEGED = ("changes_its_host", "fills_a_trainers_disk")
    FAULTS = ("executes_itself", "runs_a_cell_again", "reads_too_late", "cuts_off_a_save", *PRIVILEGED)

    def __init__(self, jobs: Path, folder: Path, disk: threading.Lock) -> None:
        self._jobs, self._folder, self._disk, self._numbers = jobs, folder, disk, itertools.count()
        (folder / "disk").mkdir(parents=True)

    @contextlib.contextmanager
    def _run(self, way: str, name: str | None = None) -> Iterator[tuple[str, Process]]:
        name = name or f"run-{next(self._numbers)}"
        # Without the clock that jumps: a time at which a command expires is one of the job's clock.
        with Process(PROGRAM, name, way, str(self._folder), env={"PYTHONPATH": str(ROOT)}) as process:
            assert process.line() == "ready", process.errors
            until(lambda: self._commands(name) == [])
            yield name, process

    @staticmethod
    def _commands(name: str) -> list[dict[str, Any]] | None:
        try:
            with connect(name, SOON) as client:
                return client.call("list_commands")
        except ControlError:  # it cannot be found yet, or ends
            return None

    @staticmethod
    def _stop(name: str, process: Process) -> None:
        with connect(name, SOON) as client:
            assert client.call("graceful_stop", wait="finished", timeout=SOON)["state"] == "finished"
        assert process.end() == 0 and "Traceback" not in "".join(process.errors), process.errors

    def _changes_way(self, way: str) -> None:
        with self._disk, self._run(way) as (name, process):
            with connect(name, SOON) as client:
                saved = client.call("save_checkpoint", wait="finished", timeout=SOON)
                assert saved["state"] == "finished" and Path(saved["result"]["path"]).exists()
            (self._folder / name).touch()
            until(lambda: self._commands(name) == [])  # those of the new run
            self._stop(name, process)

    def executes_itself(self) -> None:
        """Have a run execute its program anew: it is controlled under its id."""
        self._changes_way("exec")

    def runs_a_cell_again(self) -> None:
        """Have a run begin again in its process without an end, as an interrupted cell of a notebook does."""
        self._changes_way("cell")

    def changes_its_host(self) -> None:
        """Kill a run, and start it under another host name, as a container that is made anew."""
        with self._disk, self._run("host-one") as (name, first):
            first.kill()
            with self._run("host-two", name) as (_, second):
                self._stop(name, second)

    def reads_too_late(self) -> None:
        """Suspend a run while a command expires: it is not carried out later."""
        with self._disk, self._run("plain") as (name, process), Wire(self._jobs / name / "control.sock") as wire:
            os.kill(process.pid, signal.SIGSTOP)
            try:
                until(lambda: all(_is_stopped(task) for task in Path(f"/proc/{process.pid}/task").iterdir()))
                params = {"expires_at": time.time() + 0.1}
                request = {"jsonrpc": "2.0", "id": 1, "method": "save_checkpoint", "params": params}
                wire.send(json.dumps(request).encode() + b"\n")
                until(lambda: time.time() > params["expires_at"])
            finally:
                os.kill(process.pid, signal.SIGCONT)
            assert wire.reply()["error"]["code"] == CommandExpired.code
            self._stop(name, process)
            assert not [*self._folder.glob(f"{name}-*")]

    def cuts_off_a_save(self) -> None:
        """Kill a run while it saves in the background: no client hears that it was saved, and the id can be used."""
        with self._disk, self._run("future") as (name, first):
            with Wire(self._jobs / name / "control.sock") as wire:
                wire.send(b'{"jsonrpc":"2.0","id":1,"method":"save_checkpoint","params":{"wait":"finished"}}\n')
                until(lambda: [record["state"] for record in self._commands(name) or ()] == ["applied"])
                first.kill()
                assert wire.is_closed()
            with self._run("plain", name) as (_, second):
                self._stop(name, second)

    def fills_a_trainers_disk(self) -> None:
        """Leave no space for checkpoints: the save fails, and training continues."""
        disk = self._folder / "disk"
        with self._disk:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=True)
            try:
                with self._run("full") as (name, process), connect(name, SOON) as client:
                    failed = client.call("save_checkpoint", wait="finished", timeout=SOON)
                    assert failed["state"] == "failed" and "there is none" in failed["error"]["message"], failed
                    step = client.call("status")["global_step"]
                    until(lambda: client.call("status")["global_step"] > step)
                    self._stop(name, process)
            finally:
                subprocess.run(["umount", "-l", str(disk)], check=True)


def _is_stopped(task: Path) -> bool:
    return (task / "stat").read_text().rpartition(")")[2].split()[0] == "T"
