"""The answer of ``status``, written as JSON once for each change, not once for each request.

Runs on the server thread only. Reading the process figures takes longer than the rest of an answer, and a processor
share over less than a second means little, so the figures are kept longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ..wire import jsonrpc
from . import limits


class StatusCache:
    """The latest answer, as text.

    Args:
        build: returns the answer without the process figures.
        version: returns a value that differs when the answer has changed; cheap, and compared by ``==``.
        process_stats: returns the process figures; unknown ones are ``None`` and left out.
    """

    def __init__(
        self,
        build: Callable[[], dict[str, Any]],
        version: Callable[[], Any],
        process_stats: Callable[[], dict[str, Any]],
    ) -> None:
        self._build, self._version, self._process_stats = build, version, process_stats
        self._text = jsonrpc.Encoded()
        self._built: object = None  # the version of the text
        self._built_at = self._stats_at = float("-inf")  # monotonic
        self._stats: dict[str, Any] = {}

    def text(self) -> jsonrpc.Encoded:
        """Return what ``status`` answers now."""
        now, version = time.monotonic(), self._version()
        if version != self._built or now - self._built_at >= limits.STATUS_AGE:
            if now - self._stats_at >= limits.PROCESS_STATS_AGE:
                self._stats = {name: value for name, value in self._process_stats().items() if value is not None}
                self._stats_at = now
            # A change after the version was read changes the next version.
            self._text = jsonrpc.encoded({**self._build(), **self._stats})
            self._built, self._built_at = version, now
        return self._text
