"""The screen of ``watch`` with colours, drawn by rich; imported only where that is installed (the extra ``watch``)."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: The colour of what a line contains, the first that fits.
_STYLES = (
    (r"^(ended|dead|silent)|failed", "red"),
    (r"^\[", "green"),
    (r"[▁▂▃▄▅▆▇█]{8}|┤", "cyan"),
    (r"^\d\d:\d\d:\d\d  ", "dim"),
    (r"^JOB +STATE", "bold"),
)


@contextmanager
def live() -> Iterator[Callable[[list[str]], None]]:
    """Take over the terminal; yield a function that shows lines. The screen of before is back at the end."""
    from rich.console import ConsoleDimensions
    from rich.live import Live
    from rich.text import Text

    # What stands for stdout while rich redirects it has no encoding, so that nobody could tell what can be printed.
    screen = Live(screen=True, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False)
    with screen:

        def show(lines: list[str]) -> None:
            width, height = size = os.get_terminal_size()
            screen.console.size = ConsoleDimensions(*size)  # else COLUMNS and LINES of the environment would count
            text = Text("\n", no_wrap=True).join(
                Text(line[:width], style=_style(line, number)) for number, line in enumerate(lines[:height])
            )
            screen.update(text, refresh=True)

        yield show


def _style(line: str, number: int) -> str:
    if number == 0 and not line.startswith("JOB "):
        return "bold"
    return next((style for pattern, style in _STYLES if re.search(pattern, line)), "")
