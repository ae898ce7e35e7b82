"""Which group a job uses, as far as that can be seen without other ranks."""

from __future__ import annotations

import logging
import os
from collections import Counter
from typing import Any

import pytest

from forgather_control import TrainingJob, errors
from forgather_control.ranks import keys, select
from forgather_control.ranks.polling_group import SingleProcess

from ..support.harness import needs_torch, until
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


@pytest.fixture
def without_clone(monkeypatch):
    """Stores as those of torch 2.7 and older."""
    import torch.distributed as dist

    monkeypatch.delattr(dist.Store, "clone", raising=False)


@needs_torch
def test_a_second_client_of_a_store_that_cannot_be_cloned(without_clone):
    """It keeps apart what torch's and the user's prefixes do, and leaves no descriptor and one key."""
    import torch.distributed as dist

    base = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    other = dist.TCPStore("127.0.0.1", base.port, None, False)
    connectors = [
        select._connector(dist, dist.PrefixStore("pg", dist.PrefixStore(prefix, store)))
        for prefix, store in (("a", base), ("a", other), ("b", other))
    ]
    assert [kind for _, kind in connectors] == ["TCPStore"] * 3
    one, same, another = (connect() for connect, _ in connectors)
    one.set("key", "value")
    assert same.get("key") == b"value" and not another.check(["key"])
    files, stored = len(os.listdir("/proc/self/fd")), base.num_keys()
    for _ in range(60):
        connectors[0][0]().set("key", "value")
    until(lambda: len(os.listdir("/proc/self/fd")) <= files)  # the store's thread closes its ends
    assert base.num_keys() == stored


@needs_torch
def test_a_store_in_this_process_that_cannot_be_cloned(without_clone):
    """Only a TCPStore has other clients."""
    import torch.distributed as dist

    assert select._connector(dist, dist.HashStore()) == (None, "a HashStore of this torch cannot be cloned")


def test_restarted_workers_have_keys_of_their_own(monkeypatch):
    """torchrun may give them the store of those before them; each run of a process has its own, too."""
    monkeypatch.setattr(select, "_opened", Counter())
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert [select._prefix("job") for _ in range(2)] == [keys.prefix("job", "2", 1), keys.prefix("job", "2", 2)]
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    assert select._prefix("job") == keys.prefix("job", "0", 3)
