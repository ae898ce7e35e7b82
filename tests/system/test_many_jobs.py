"""A hundred live jobs: one save of all, and the status of one meanwhile."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

import forgather_control
from forgather_control import CommandRecord, jobs

from ..support.harness import MS, ROOT, SOON, Process, until

#: Several jobs as threads of one program: python -c SOURCE FOLDER ID...; prints "ready", ends when its input does.
SOURCE = """
import os, sys, threading, time
from pathlib import Path
from forgather_control import TrainingJob

folder, names = Path(sys.argv[1]), sys.argv[2:]
ready, stop = threading.Barrier(len(names) + 1), threading.Event()

def save(path):
    path.mkdir(parents=True)
    for part in range(4):
        with open(path / f"part-{part}", "wb") as file:
            file.write(os.urandom(16384))
            file.flush()
            os.fsync(file.fileno())
    (path / "complete").touch()

def train(name):
    with TrainingJob(job_id=name) as job:
        ready.wait()
        step = 0
        while not (stop.is_set() or job.should_stop):
            time.sleep(0.05)
            step += 1
            job.log(loss=1 / step)
            job.step(step)
            if job.should_save:
                path = folder / name / f"checkpoint-{step}"
                save(path)
                job.saved(path)

threads = [threading.Thread(target=train, args=(name,)) for name in names]
for thread in threads:
    thread.start()
ready.wait()
print("ready", flush=True)
sys.stdin.read()
stop.set()
"""
COUNT, PROCESSES = 100, 4
NAMES = [f"run{number:03}" for number in range(COUNT)]


@pytest.fixture
def hundred(tmp_path):
    """A hundred jobs in a few processes; yields the folder of their checkpoints."""
    with ExitStack() as stack:
        for number in range(PROCESSES):
            process = stack.enter_context(Process(SOURCE, str(tmp_path), *NAMES[number::PROCESSES]))
            stack.callback(process.popen.stdin.close)
            assert process.line() == "ready", "".join(process.errors)
        yield tmp_path


def complete(folder: Path) -> set[str]:
    """The checkpoints that are whole."""
    return {str(path.parent) for path in folder.glob("*/*/complete")}


@pytest.mark.once
def test_a_hundred_jobs_are_saved(hundred):
    """``save --all --wait`` returns when all checkpoints are on disk; a status takes less than a second meanwhile."""
    words = [sys.executable, "-m", "forgather_control", "save", "--all", "--wait"]
    took = []
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as saving:
        while saving.poll() is None:
            begin = time.monotonic()
            assert forgather_control.get_job_status("run042")["job_id"] == "run042"
            took.append(time.monotonic() - begin)
        on_disk = complete(hundred)
        out, err = saving.communicate(timeout=SOON)
    assert (saving.returncode, err) == (0, "")
    *lines, summary = out.splitlines()
    assert summary == "save of 100 jobs: 100 finished"
    assert sorted(line.partition(":")[0] for line in lines) == NAMES
    assert {re.search(r": (/\S+)$", line)[1] for line in lines} == on_disk and len(on_disk) == COUNT
    assert len(took) > 1 and max(took) < 1000 * MS, f"{len(took)} calls, at most {max(took):.2f} s"


@pytest.mark.once
def test_a_hundred_jobs_from_python(hundred):
    """One record for each, and every checkpoint on disk; ten end, and the others train on."""
    records = jobs(all=True).save(wait="finished", timeout=SOON * 3)
    assert list(records) == NAMES
    assert all(isinstance(record, CommandRecord) for record in records.values())
    assert {record.result["path"] for record in records.values()} == complete(hundred)
    ended = jobs("run00*", parallel=50).stop(wait="finished", timeout=SOON)
    assert len(ended) == 10 and {record.state for record in ended.values()} == {"finished"}
    root = Path(os.environ["FORGATHER_JOBS_DIR"])
    until(lambda: not list(root.glob("run00*")) and len(list(root.glob("run*"))) == COUNT - len(ended))
