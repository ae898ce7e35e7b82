"""Which group a job uses, as far as that can be seen without other ranks."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from forgather_control import TrainingJob, errors
from forgather_control.ranks import select
from forgather_control.ranks.group import SingleProcess

from ..support.harness import needs_torch
from ..support.ranks_delegate import Delegate


def choose(name: str = "", **options: Any) -> Any:
    return select.select_group(Delegate(), name, 0, options.get("poll_steps"))


@pytest.mark.parametrize("size", ["1", "", "many"])
def test_an_environment_without_other_ranks_is_one_process(monkeypatch, size):
    """torchrun with one process, or nonsense in WORLD_SIZE."""
    monkeypatch.setenv("WORLD_SIZE", size)
    group = choose()
    assert isinstance(group, SingleProcess) and (group.rank, group.size) == (0, 1)


def test_several_ranks_without_a_group_train_on_uncontrolled(monkeypatch, caplog, jobs_dir):
    """One rank that stops alone leaves the others waiting for ever, so the job logs why and trains without control."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(errors.Unsupported, match="4 ranks"):
        choose()
    with caplog.at_level(logging.WARNING), TrainingJob("job") as job:
        job.step(1)
    (warning,) = caplog.records
    assert "4 ranks" in warning.getMessage() and not (jobs_dir / "job").exists()


@needs_torch
def test_a_group_of_one_is_one_process(tmp_path):
    """Whatever its store."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert isinstance(choose(), SingleProcess)
    finally:
        dist.destroy_process_group()
