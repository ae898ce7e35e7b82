"""A child process that prints its identity."""

from __future__ import annotations

import json

import pytest

from forgather_control.processes.liveness import Identity

from ..support.harness import Process

#: Prints its identity, and runs until its standard input ends.
WHO = """
import json, sys
from forgather_control.processes.liveness import current_process
print(json.dumps(current_process()._asdict()), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def child():
    """A process and its identity as it gave it itself."""
    with Process(WHO) as other:
        yield other, Identity(**json.loads(other.line()))
