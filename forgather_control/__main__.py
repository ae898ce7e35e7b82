"""The command line as a process: ``python -m forgather_control VERB ...`` and the two console scripts."""

import gc
import os
import sys
from contextlib import suppress
from types import ModuleType
from typing import NoReturn


def control() -> NoReturn:
    """``forgather-control VERB ...``."""
    _end(_cli().main())


def forgather() -> NoReturn:
    """``forgather control VERB ...``; any other first word is left to Forgather, which exits in its own way."""
    code = _cli().forgather()
    if sys.argv[1:2] == ["control"]:
        _end(code)
    sys.exit(code)


def _cli() -> ModuleType:
    """Import the command line with garbage collection off, and never look for garbage in it: that costs 3 % each."""
    gc.disable()
    from .cli import main as cli

    gc.freeze()
    gc.enable()
    return cli


def _end(code: int) -> NoReturn:
    """Exit once all is printed: an orderly shutdown of the interpreter takes longer than most verbs do."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, AttributeError):  # its reader has gone; the process has no such stream
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    control()
