"""The seam between ranks: one process is a world of its own, several are refused rather than split."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from forgather_control import TrainingJob, errors, ranks

from .world import ROOT, SOON, needs_torch


def test_one_process_agrees_with_itself():
    """What the only rank holds, all ranks hold."""
    world = ranks.of_this_job()
    calls = [object(), object()]
    assert (world.rank, world.size) == (0, 1) and world.share(calls) == calls


@pytest.mark.parametrize("size", ["1", "", "many"])
def test_an_environment_without_other_ranks_is_one_process(monkeypatch, size):
    """torchrun with one process, or nonsense in WORLD_SIZE."""
    monkeypatch.setenv("WORLD_SIZE", size)
    assert ranks.of_this_job().size == 1


def test_several_ranks_train_on_uncontrolled(monkeypatch, caplog, jobs_dir):
    """One rank that stops alone leaves the others waiting for ever: so the job says why, and trains."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(errors.Unsupported, match="4 ranks"):
        ranks.of_this_job()
    with caplog.at_level(logging.WARNING), TrainingJob("job") as job:
        job.step(1)
    (warning,) = caplog.records
    assert "4 ranks" in warning.getMessage() and not (jobs_dir / "job").exists()


@needs_torch
def test_two_real_ranks_are_seen(tmp_path):
    """Under torchrun with gloo both ranks refuse, and both finish their training."""
    script = tmp_path / "train.py"
    script.write_text(
        "import torch.distributed as dist\n"
        "from forgather_control import TrainingJob\n"
        "dist.init_process_group('gloo')\n"
        "with TrainingJob('job') as job:\n"
        "    for step in range(1, 4):\n"
        "        dist.barrier(); job.step(step)\n"
        "print('done', job.job_id)\n"
        "dist.destroy_process_group()\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, str(script)], capture_output=True, text=True, timeout=4 * SOON, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 2 and done.stderr.count("not controllable") == 2
