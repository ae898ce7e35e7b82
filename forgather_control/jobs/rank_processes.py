"""The processes of a job's ranks, in ``ranks.json`` beside its ``endpoint.json``: for when the job no longer answers.

Rank 0 writes the file when all ranks have joined; clients read it, on any thread, and do not trust it.
"""

from __future__ import annotations

import json
import os
from typing import Final, NamedTuple

from ..processes.liveness import Identity
from ..schema import INTEGER, NULL, Field, load, parse_json
from . import limits, private_files
from .record import FIELDS, check_job_id

RANKS_FILE: Final = "ranks.json"


class RankRecord(NamedTuple):
    """The process of one rank, as in :class:`liveness.Identity`, and where it writes its stacks."""

    rank: int
    host: str
    pid: int
    started_at: float | None = None
    booted_at: float | None = None
    boot_id: str | None = None
    machine: str | None = None
    pid_namespace: int | None = None
    stack_fd: int | None = None  #: The ``fd`` of its :class:`stack_dump.StackDumper`; ``None`` if it has none.

    @classmethod
    def of(cls, rank: int, identity: Identity, stack_fd: int | None) -> RankRecord:
        """Return the record of a process."""
        return cls(rank, *identity, stack_fd)

    @property
    def identity(self) -> Identity:
        """The process."""
        return Identity(*self[1:-1])


_FIELDS: Final = {
    **{name: FIELDS[name] for name in ("host", "pid", "booted_at", "boot_id", "machine", "pid_namespace")},
    "started_at": FIELDS["process_started_at"],
    "rank": Field(INTEGER, 0, (1 << 31) - 1),
    "stack_fd": Field(INTEGER + NULL, 0, (1 << 31) - 1),
}


def write(path: str, ranks: list[RankRecord]) -> None:
    """Write the file into the job's directory at ``path``, as :func:`private_files.write` does."""
    data = json.dumps([rank._asdict() for rank in ranks]).encode("ascii")
    with private_files.opened(path) as directory:
        private_files.write(directory, RANKS_FILE, data)


def read(root: str, job_id: str) -> list[RankRecord] | None:
    """Return the ranks of a job, in order; ``None`` if there is no such file. Errors as in :func:`read_record`."""
    data = private_files.read_trusted(os.path.join(root, check_job_id(job_id)), RANKS_FILE, limits.MAX_RANKS_FILE)
    return None if data is None else parse_ranks(data)


def parse_ranks(data: bytes) -> list[RankRecord]:
    """Return the ranks in ``data``; raise ValueError naming the member of a rank that is not as expected."""
    value = parse_json(data)
    if not isinstance(value, list):
        raise ValueError(f"{RANKS_FILE} holds no JSON array")
    ranks = [load(RankRecord, _FIELDS, item, "a rank") for item in value]
    numbers = [rank.rank for rank in ranks]
    if numbers != sorted(set(numbers)):
        raise ValueError("its ranks are not in order, each once")
    return ranks
