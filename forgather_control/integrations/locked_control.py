"""The control object for the rest of an aborted run: a copy of the trainer's own whose flags stay as they are.

A Hugging Face trainer uses the control object that a callback returns instead of the one that it passed, so an abort
needs to change nothing in the trainer's own object but its flags.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast


class LockedControl:
    """The part of a locked control object that ignores changes. Copies of it are ordinary control objects."""

    __slots__ = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Create an ordinary control object: that is what ``dataclasses.replace`` calls."""
        return cls.__bases__[1](*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """Ignore a change: callbacks and trainers set flags at any time, and expect no error."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Let ``copy`` and ``pickle`` copy an ordinary control object with the same flags."""
        return dataclasses.replace, (dataclasses.replace(cast(Any, self)),)


def locked(control: Any) -> Any:
    """Return a copy of a control object, a dataclass, that ignores changes."""
    kind = type(control)
    # The name stays: transformers saves a control object's state under the name of its class.
    members = {"__slots__": (), "__module__": kind.__module__}
    copied: Any = object.__new__(type(kind.__name__, (LockedControl, kind), members))
    for field in dataclasses.fields(control):
        object.__setattr__(copied, field.name, getattr(control, field.name))
    return copied
