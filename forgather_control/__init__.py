"""Find, watch, save, stop and abort a PyTorch training job from outside.

This door holds names only. Each is loaded when it is first used (PEP 562), so that a client never
pays for the training side, nor a training script for the client's.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import VERSION as __version__

if TYPE_CHECKING:
    from .caller import Client
    from .client import (
        abort,
        cancel_command,
        cleanup,
        connect,
        get_command,
        get_job_status,
        graceful_stop,
        list_jobs,
        save_and_stop,
        save_checkpoint,
    )
    from .commands import CommandRecord
    from .errors import ControlError
    from .hf import TrainerControlCallback
    from .jobs import Job
    from .lightning import LightningControlCallback
    from .plain import TrainingJob

_HOME = {
    "LightningControlCallback": "lightning",
    "TrainerControlCallback": "hf",
    "TrainingJob": "plain",
    "Client": "caller",
    "abort": "client",
    "cancel_command": "client",
    "cleanup": "client",
    "connect": "client",
    "get_command": "client",
    "get_job_status": "client",
    "graceful_stop": "client",
    "list_jobs": "client",
    "save_and_stop": "client",
    "save_checkpoint": "client",
    "CommandRecord": "commands",
    "ControlError": "errors",
    "Job": "jobs",
}

__all__ = [
    "Client",
    "CommandRecord",
    "ControlError",
    "Job",
    "LightningControlCallback",
    "TrainerControlCallback",
    "TrainingJob",
    "__version__",
    "abort",
    "cancel_command",
    "cleanup",
    "connect",
    "get_command",
    "get_job_status",
    "graceful_stop",
    "list_jobs",
    "save_and_stop",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
