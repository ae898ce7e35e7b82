"""What ``status`` answers, written as JSON once a change, not once a request.

Floor 2, training side: imports jsonrpc only. Runs on the server thread only.

Asking the operating system for the process figures takes longer than all the rest of an answer, and a processor
share over less than a second says little; so these are kept longer than the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from ..wire import jsonrpc

#: Seconds for which an answer stands while nothing changes but the time: how old ``seconds_since_step`` may be.
FRESH: Final = 0.1
#: Seconds for which the process figures stand.
FIGURES_FRESH: Final = 1.0


class Snapshot:
    """The latest answer, as text.

    Args:
        tell: what there is to tell.
        mark: differs when that has changed; cheap, and compared by ``==``.
        figures: of the process; those that are unknown are ``None``, and left out.
    """

    def __init__(
        self, tell: Callable[[], dict[str, Any]], mark: Callable[[], object], figures: Callable[[], dict[str, Any]]
    ) -> None:
        self._tell, self._mark, self._ask_figures = tell, mark, figures
        self._text = jsonrpc.Encoded()
        self._told: object = None
        self._told_at = self._figures_at = float("-inf")  # monotonic
        self._figures: dict[str, Any] = {}

    def text(self) -> jsonrpc.Encoded:
        """What ``status`` answers now."""
        now, mark = time.monotonic(), self._mark()
        if mark != self._told or now - self._told_at >= FRESH:
            if now - self._figures_at >= FIGURES_FRESH:
                self._figures = {name: value for name, value in self._ask_figures().items() if value is not None}
                self._figures_at = now
            # What changes after the mark was read, changes the next mark.
            self._text = jsonrpc.encoded({**self._tell(), **self._figures})
            self._told, self._told_at = mark, now
        return self._text
