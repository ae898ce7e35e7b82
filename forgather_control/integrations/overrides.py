"""Attributes of other libraries' objects, set for a while and then restored."""

from __future__ import annotations

import contextlib
from typing import Any, Final

_ABSENT: Final = object()


class AttributeOverrides:
    """The attributes that were set here, with what they were before."""

    def __init__(self) -> None:
        self._previous: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute; leave an object that does not allow it as it is."""
        with contextlib.suppress(AttributeError, TypeError):
            previous = vars(owner).get(name, _ABSENT)
            setattr(owner, name, value)
            self._previous.append((owner, name, previous))

    def restore(self, keep: str = "") -> None:
        """Restore all attributes, the last one first, except those named ``keep``."""
        kept = [entry for entry in self._previous if entry[1] == keep]
        for owner, name, previous in reversed(self._previous):
            if name == keep:
                continue
            if previous is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, previous)
        self._previous = kept


def do_nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing, in place of a disabled method."""
