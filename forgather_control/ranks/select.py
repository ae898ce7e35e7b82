"""Which group this job uses: one process, ranks with a shared store, or ranks that poll."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections import Counter
from datetime import timedelta
from typing import Any, Final

from ..errors import Unsupported
from . import keys, limits, poll
from .channel import Connect
from .coordinator_group import CoordinatorGroup
from .group import RankGroup, RankGroupDelegate
from .polling_group import PollingGroup, SingleProcess
from .store_group import StoreGroup

log = logging.getLogger("forgather_control")

#: How many groups this process has opened under each name: each training run has keys of its own.
_opened: Counter[str] = Counter()

_TOO_LATE: Final = "torch.distributed.init_process_group was not called before the job was opened; call it first"


def select_group(
    delegate: RankGroupDelegate, name: str, step: int, poll_steps: int | None, log_steps: int | None = None
) -> RankGroup:
    """Return the group that this process trains in: the same kind on all ranks, without a collective.

    Args:
        name: the job id that was asked for, or nothing; the same on all ranks.
        step: where training begins.
        poll_steps: poll every so many steps, rather than never.
        log_steps: how often to poll where ranks must and nothing is chosen.

    Raises:
        Unsupported: there is no way to agree with the other ranks, and a command to one rank alone would leave them
            waiting in a collective for ever.
    """
    dist = _distributed()
    if dist is None:
        return SingleProcess(delegate)
    rank, size = int(dist.get_rank()), int(dist.get_world_size())
    default, prefix = _default_store(dist), _prefix(name)
    connect, why = (None, f"poll_steps={poll_steps} was given") if poll_steps else _connector(dist, default)
    if connect is None:
        steps = poll_steps or log_steps or limits.POLL_STEPS
        if rank == 0:
            log.info("ranks poll one another for commands every %d steps: %s", steps, why)
        roll = None if default is None else dist.PrefixStore(prefix, default)
        return PollingGroup(delegate, rank, size, steps, poll.CollectivePoll(rank, size, roll).exchange, roll)
    kind = StoreGroup
    if rank == 0:
        kind, idle = CoordinatorGroup, "they do not communicate while no command is pending"
        log.info("ranks agree on commands over torch.distributed's %s; %s", why, idle)
    return kind(delegate, rank, size, lambda: dist.PrefixStore(prefix, connect()), step)


def check_alone(group: RankGroup) -> None:
    """Check that a process whose group was selected as one process is not one of several ranks by now.

    Raises:
        Unsupported: it is; a command to this rank alone would leave the others waiting in a collective for ever.
    """
    if group.size == 1 and (dist := _distributed()) is not None:
        size = int(dist.get_world_size())
        raise Unsupported(f"this process is one of {size} ranks, but {_TOO_LATE}", world_size=size)


def _distributed() -> Any:
    """Return torch.distributed if this process is one of several ranks, ``None`` if it is alone."""
    # A process that trains with several ranks has imported torch; any other must not pay for it here.
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed if torch.distributed.get_world_size() > 1 else None
    try:
        size = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's
    except ValueError:
        size = 1
    if size > 1:
        raise Unsupported(f"this process is one of {size} ranks, but {_TOO_LATE}", world_size=size)
    return None


def _prefix(name: str) -> str:
    """Return what the keys of the next run begin with, the same on all ranks."""
    _opened[name] += 1
    return keys.prefix(name, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), _opened[name])


def _default_store(dist: Any) -> Any:
    """Return the default group's store, or ``None`` if it has none (MPI) or this torch does not give it."""
    get_store = getattr(dist.distributed_c10d, "_get_default_store", None)
    return get_store() if get_store is not None else None


def _connector(dist: Any, store: Any) -> tuple[Connect | None, str]:
    """Return what connects to a store that can carry the channel and its kind, or ``None`` and why it cannot."""
    base = store
    while (under := getattr(base, "underlying_store", None)) is not None:
        base = under
    kind = type(base).__name__
    if kind not in ("TCPStore", "HashStore"):  # a FileStore is read again and again to wait for a key
        return None, f"a {kind} cannot wake a waiting rank"
    if hasattr(store, "clone"):
        return store.clone, kind
    if kind == "HashStore":
        return None, "a HashStore of this torch cannot be cloned"
    return lambda: _second_client(dist, store, base), kind


def _second_client(dist: Any, store: Any, base: Any) -> Any:
    """Connect to a TCPStore that cannot be cloned (torch 2.7 and older), under a prefix of the same ranks.

    Those that torch and the user gave ``store`` cannot be read, but another job may have others in the same server.
    """
    scope = store.compare_set(keys.SCOPE, "", uuid.uuid4().hex).decode()
    timeout = timedelta(seconds=limits.STORE_TIMEOUT)
    client = dist.TCPStore(
        base.host, base.port, None, False, timeout, wait_for_workers=False, use_libuv=base.libuvBackend
    )
    return dist.PrefixStore(scope, client)
