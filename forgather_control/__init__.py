"""Find, watch, save, stop and abort a PyTorch training job from outside the process.

This module holds names only. Each one is loaded when it is first used (PEP 562), so that a client never imports the
training side, and a training script never imports the client.
"""
# ruff: noqa: F403, F405 (tests/system/test_exports.py checks what the star stands for)

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import jobs as _jobs_package
from .version import VERSION as __version__

if TYPE_CHECKING:
    from .client.api import (  # isort: skip
        abort, cancel_command, cleanup, connect, get_command, get_job_status, graceful_stop, list_jobs, save_and_stop,
        save_checkpoint,
    )  # fmt: skip
    from .client.connection import Client
    from .client.many import Jobs, jobs
    from .errors import *
    from .integrations.huggingface import TrainerControlCallback
    from .integrations.lightning import LightningControlCallback
    from .integrations.loop import TrainingJob
    from .jobs.registry import Job
    from .wire.job_status import JobStatus
    from .wire.records import CommandRecord

__all__ = [
    "AmbiguousJob", "BadJobId", "Client", "CommandError", "CommandExpired", "CommandFailed", "CommandNotFound",
    "CommandRecord", "CommandRefused", "ControlError", "DeadlinePassed", "FindError", "InternalError",
    "InvalidParams", "InvalidRequest", "Job", "JobDead", "JobEnding", "JobIdTaken", "JobNotAnswering", "JobStatus",
    "Jobs", "JobsDirUnusable", "LightningControlCallback", "MethodNotFound", "NoSuchJob", "NotAuthenticated",
    "NotCancellable", "ParseError", "PortTaken", "StartError", "TlsUnusable", "TooManyCommands",
    "TrainerControlCallback", "TrainingJob", "Unsupported", "WireError", "__version__", "abort", "cancel_command",
    "cleanup", "connect", "get_command", "get_job_status", "graceful_stop", "jobs", "list_jobs", "save_and_stop",
    "save_checkpoint",
]  # fmt: skip

#: The module of each public class that is no error; other functions, in lower case, are those of ``client.api``.
_MODULES = {
    "Client": "client.connection",
    "CommandRecord": "wire.records",
    "Job": "jobs.registry",
    "JobStatus": "wire.job_status",
    "Jobs": "client.many",
    "LightningControlCallback": "integrations.lightning",
    "TrainerControlCallback": "integrations.huggingface",
    "TrainingJob": "integrations.loop",
    "jobs": "client.many",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # at its start the command line needs no lazy name

    module = _MODULES.get(name) or ("client.api" if name.islower() else "errors")
    value = globals()[name] = getattr(import_module(f".{module}", __name__), name)
    return value


class _CallablePackage(ModuleType):
    """The package ``jobs``, which is also the public function of this name: ``jobs("run*").save()``.

    Importing a subpackage sets its name here, so the function cannot have this name. Instead, the package is called.
    """

    def __call__(self, *words: str | int, **options: Any) -> Jobs:
        from .client.many import jobs

        return jobs(*words, **options)


_jobs_package.__class__ = _CallablePackage


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
