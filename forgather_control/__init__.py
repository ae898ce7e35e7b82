"""Find, watch, save, stop and abort a PyTorch training job from outside.

This door holds names only. Each is loaded when it is first used (PEP 562), so that a client never
pays for the training side, nor a training script for the client's.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import VERSION as __version__

if TYPE_CHECKING:
    from .client.api import (
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
    from .client.connection import Client
    from .errors import ControlError
    from .integrations.huggingface import TrainerControlCallback
    from .integrations.lightning import LightningControlCallback
    from .integrations.loop import TrainingJob
    from .jobs.registry import Job
    from .wire.records import CommandRecord

_HOME = {
    "LightningControlCallback": "integrations.lightning",
    "TrainerControlCallback": "integrations.huggingface",
    "TrainingJob": "integrations.loop",
    "Client": "client.connection",
    "abort": "client.api",
    "cancel_command": "client.api",
    "cleanup": "client.api",
    "connect": "client.api",
    "get_command": "client.api",
    "get_job_status": "client.api",
    "graceful_stop": "client.api",
    "list_jobs": "client.api",
    "save_and_stop": "client.api",
    "save_checkpoint": "client.api",
    "CommandRecord": "wire.records",
    "ControlError": "errors",
    "Job": "jobs.registry",
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
