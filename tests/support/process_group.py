"""How a rank that trained over Gloo ends its process."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn

import torch.distributed as dist


def leave() -> NoReturn:
    """Leave the process group, do what is registered for the exit, and end the process with 0, at once.

    A thread of Gloo frees what a collective of a backward pass held, for which it needs the interpreter's lock. Where
    it does so late, the end of the interpreter aborts the process, and the destructor of a DDP model, which waits for
    that thread with the lock, hangs. Both are torch's (pytorch issues 190489 and 56297), and come without control, too.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
