"""One rank of a real process group, for test_poll and test_store_group.

The arguments are ``RANK SIZE PORT POLL_STEPS CLONES``.

It trains until it applied a ``save_and_stop``, and prints what it saw as one line of JSON. ``user.sample`` has an
outcome on each rank but 0; every rank reports on ``save_checkpoint`` at once, where rank 2 fails, on ``profile``
``RANK`` steps later, and on ``save_and_stop`` as it ends. Rank 2 asks for the ``profile``, as a signal handler would.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from forgather_control.ranks import select
from forgather_control.ranks.channel import Connect

from .harness import ROOT, SOON
from .ranks_delegate import REPORTED, Delegate
from .torchrun import ENVIRONMENT


@contextmanager
def one_of_two(kind: str = "HashStore", *args: Any) -> Iterator[Any]:
    """Make this process rank 0 of a process group whose rank 1 does not exist; a backend of torch's own tests."""
    import torch.distributed as dist
    from torch.testing._internal.distributed import fake_pg  # noqa: F401 - registers it

    store = getattr(dist, kind)(*args)
    dist.init_process_group("fake", store=store, rank=0, world_size=2)
    try:
        yield store
    finally:
        dist.destroy_process_group()


def connector(store: Any) -> Connect:
    """Return what connects to a store as ranks do; skip the test where this torch cannot."""
    import torch.distributed as dist

    connect, why = select._connector(dist, store)
    return connect or pytest.skip(why)


def run_ranks(size: int, poll_steps: int = 0, *, clones: bool = True) -> list[Any]:
    """Run so many ranks to their end, with stores that can be cloned or not; return what each of them saw."""
    import os

    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    words = [str(size), str(store.port), str(poll_steps), str(int(clones))]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", __name__, str(rank), *words],
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        seen = [rank.communicate(timeout=3 * SOON)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0] * size
    return [json.loads(line) for line in seen]


class Rank:
    """A rank that trains in step with the others."""

    def __init__(self, rank: int, size: int, port: int, poll_steps: int, clones: int) -> None:
        import torch.distributed as dist

        from forgather_control.ranks.select import select_group

        if not clones and hasattr(dist.Store, "clone"):
            del dist.Store.clone
        store = dist.TCPStore("127.0.0.1", port, None, False)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        self.dist, self.rank, self.store = dist, rank, store
        dist.barrier()
        self.keys = [store.num_keys()]
        dist.barrier()
        self.delegate = Delegate(rank)
        self.group = self.delegate.group = select_group(self.delegate, "job", 0, poll_steps or None)
        self.applied: list[Any] = []
        self.late: list[tuple[int, str]] = []  # reports at a later step
        self.reported: dict[str, Any] = {}
        self.reported_at: dict[str, int] = {}

    def train(self) -> None:
        self.group.start()
        self.group.describe({"methods": f"of rank {self.rank}"})
        self.step = step = 0
        while "save_and_stop" not in [command[1] for _, commands in self.applied for command in commands]:
            self.step = step = step + 1
            self.dist.barrier()
            self.act(step)
            for due, command_id in self.late:
                if due == step:
                    self.group.report(command_id, {"value": f"trace of rank {self.rank}"})
            if self.group.due(step):
                self.apply(step)
        self.group.report(self.applied[-1][1][-1].command_id, {"value": f"shard of rank {self.rank}"})
        self.group.close(SOON)

    def act(self, step: int) -> None:
        """What comes from outside before this step ends."""
        if step == 2 and self.rank == 0:
            self.delegate.order("user.sample", n=2)
            self.delegate.order("save_checkpoint", evaluate=False)
        if step == 4 and self.rank == 2:
            self.group.request("profile")
        joined = self.delegate.notes("joined")
        told = bool(joined) and all("methods" in known for known in joined[-1].values())
        if self.rank == 0 and len(self.reported) == 2 and told:
            self.delegate.order("save_and_stop")

    def apply(self, step: int) -> None:
        commands = self.group.receive(step)
        if not commands:
            return
        outcomes = {
            command.command_id: {"value": command.params["n"] * self.rank}
            for command in commands
            if command.name == "user.sample" and self.rank
        }
        self.group.applied(commands, step, outcomes)
        self.applied.append((step, commands))
        for command in commands:
            self.follow(step, *command[:2])

    def follow(self, step: int, command_id: str, name: str) -> None:
        if name == "save_checkpoint":
            failed = {"error": {"code": -32000, "message": "full"}}
            self.group.report(command_id, failed if self.rank == 2 else {})
        elif name == "profile":
            self.late.append((step + 1 + self.rank, command_id))
        if self.rank == 0 and name in REPORTED:
            self.group.when_reported(command_id, lambda *result: self.note_reported(name, result))

    def note_reported(self, name: str, result: Any) -> None:
        self.reported[name], self.reported_at[name] = result, self.step

    def seen(self) -> dict[str, Any]:
        """All that it saw."""
        told = {"applied": self.applied, "told": self.delegate.told, "keys": self.keys}
        return {**told, "reported": self.reported, "reported_at": self.reported_at}


def main(*words: str) -> None:
    rank = Rank(*map(int, words))
    rank.train()
    rank.dist.barrier()
    rank.keys.append(rank.store.num_keys())
    print(json.dumps(rank.seen()), flush=True)
    rank.dist.barrier()
    rank.dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
