"""Fixtures of the tests of the jobs directory."""

from __future__ import annotations

import subprocess

import psutil
import pytest

from forgather_control.processes import liveness


@pytest.fixture(scope="module")
def dead():
    """The identity of a real process that is gone."""
    child = subprocess.Popen(["sleep", "1000"])
    started_at = psutil.Process(child.pid).create_time()
    child.kill()
    child.wait()
    return liveness.current_process()._replace(pid=child.pid, started_at=started_at)
