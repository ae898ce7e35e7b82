"""The command line as a process: ``python -m forgather_control VERB ...``, and the two words that pip installs.

Once all is printed, the process ends at once: taking a whole interpreter down in good order takes longer
than most verbs' work, and a client has nothing that wants it.
"""

import gc
import os
import sys
from types import ModuleType
from typing import NoReturn


def control() -> NoReturn:
    """``forgather-control VERB ...``."""
    _end(_cli().main())


def forgather() -> NoReturn:
    """``forgather control VERB ...``; what the real Forgather does, ends as it wants."""
    code = _cli().forgather()
    if sys.argv[1:2] == ["control"]:
        _end(code)
    sys.exit(code)


def _cli() -> ModuleType:
    """Loaded without looking for garbage meanwhile: there is none, and to look takes a thirtieth of a start."""
    gc.disable()
    from .cli import main as cli

    gc.enable()
    return cli


def _end(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            pass  # nobody reads it
    os._exit(code)


if __name__ == "__main__":
    control()
