"""``LightningControlCallback``, created when it is first used: only then must Lightning be loaded."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any, Final

from .lightning_hooks import LightningHooks

#: The packages with a Trainer: different packages with the same content.
_PACKAGES: Final = ("lightning.pytorch", "pytorch_lightning")

if TYPE_CHECKING:
    LightningControlCallback = LightningHooks


def __getattr__(name: str) -> Any:
    if name != "LightningControlCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    cls = globals()[name] = _callback_class(name)
    return cls


def _callback_class(name: str) -> type:
    """Return the hooks as a ``Callback`` of each Lightning that is loaded, else of each that is installed.

    The trainer and LightningCLI check for their own package's class. Without Lightning the class can be named, as
    in ``from forgather_control import *``, but not instantiated.
    """
    members: dict[str, Any] = {"__module__": __name__, "__qualname__": name, "__doc__": LightningHooks.__doc__}
    packages = [package for package in _PACKAGES if package in sys.modules] or _PACKAGES
    bases, problems = [], []
    for package in packages:
        try:
            bases.append(importlib.import_module(f"{package}.callbacks.callback").Callback)
        except ImportError as err:
            problems.append(str(err))
    if not bases:

        def not_installed(cls: type, *args: Any, **kwargs: Any) -> Any:
            raise ImportError(
                f"{name} needs Lightning ({'; '.join(problems)}). Install lightning or pytorch-lightning."
            )

        members["__new__"] = not_installed
    return type(name, (LightningHooks, *bases), members)
