"""The processes of a job's ranks, in ``ranks.json`` beside its ``endpoint.json``: for when the job no longer answers.

Rank 0 writes the file when all ranks have joined; clients read it, on any thread. As with a record, nothing that is
read here is trusted.
"""

from __future__ import annotations

import json
import os
from typing import Final, NamedTuple

from ..processes.liveness import Identity
from ..schema import INTEGER, NULL, PID, TEXT, TIME, Field, load, nullable, parse_json
from . import limits, private_files
from .record import check_job_id

RANKS_FILE: Final = "ranks.json"


class RankRecord(NamedTuple):
    """The process of one rank, as in :class:`liveness.Identity`, and where it writes its stacks.

    Attributes:
        stack_fd: the ``fd`` of its :class:`stack_dump.StackDumper`; ``None`` if it has none.
    """

    rank: int
    host: str
    pid: int
    started_at: float | None = None
    booted_at: float | None = None
    boot_id: str | None = None
    machine: str | None = None
    pid_namespace: int | None = None
    stack_fd: int | None = None

    @classmethod
    def of(cls, rank: int, identity: Identity, stack_fd: int | None) -> RankRecord:
        """Return the record of a process."""
        return cls(rank, *identity, stack_fd)

    @property
    def identity(self) -> Identity:
        """The process."""
        return Identity(*self[1:-1])


_FIELDS: Final = {
    "rank": Field(INTEGER, 0, (1 << 31) - 1),
    "host": Field(TEXT),
    "pid": PID,
    **dict.fromkeys(("started_at", "booted_at"), nullable(TIME)),
    **dict.fromkeys(("boot_id", "machine"), Field(TEXT + NULL)),
    "pid_namespace": Field(INTEGER + NULL),
    "stack_fd": Field(INTEGER + NULL, 0, (1 << 31) - 1),
}


def write(path: str, ranks: list[RankRecord]) -> None:
    """Write the file, readable by its owner only; others see it whole or not at all.

    Args:
        path: of the job's directory.

    Raises:
        OSError: it cannot be written; an older file stays.
    """
    data = json.dumps([rank._asdict() for rank in ranks]).encode("ascii")
    with private_files.opened(path) as directory:
        private_files.write(directory, RANKS_FILE, data)


def read(root: str, job_id: str) -> list[RankRecord] | None:
    """Return the ranks of a job, in order; ``None`` if there is no such file.

    Raises:
        ValueError: the file is not as expected, and why.
        OSError: this process has no descriptors left.
    """
    data = private_files.read_trusted(os.path.join(root, check_job_id(job_id)), RANKS_FILE, limits.MAX_RANKS_FILE)
    return None if data is None else parse_ranks(data)


def parse_ranks(data: bytes) -> list[RankRecord]:
    """Return the ranks in ``data``.

    Raises:
        ValueError: which member of a rank is not as expected.
    """
    value = parse_json(data)
    if not isinstance(value, list):
        raise ValueError(f"{RANKS_FILE} holds no JSON array")
    ranks = [load(RankRecord, _FIELDS, item, "a rank") for item in value]
    numbers = [rank.rank for rank in ranks]
    if numbers != sorted(set(numbers)):
        raise ValueError("its ranks are not in order, each once")
    return ranks
