"""Names of users and programs, for records of commands."""

from __future__ import annotations

import os
import pwd

from forgather_control.processes import callers

from ..support.harness import Process


def test_the_user_has_its_name():
    """The name of the system's user database, or none."""
    assert callers.user_name(os.getuid()) == pwd.getpwuid(os.getuid()).pw_name
    assert (
        callers.user_name(None) is None and callers.user_name(4_000_000_000) is None and callers.user_name(-5) is None
    )


def test_the_program_of_a_process(monkeypatch):
    """The name of what it runs; none for a process that has gone, or that cannot be."""
    with Process("import sys; print('ready', flush=True); sys.stdin.readline()") as process:
        process.line()
        assert callers.program_name(process.pid).startswith("python")
    for gone in (process.pid, None, -1, 2**40):
        assert callers.program_name(gone) is None
    monkeypatch.setattr("forgather_control.processes.proc.psutil", lambda: None)
    assert callers.program_name(os.getpid()) is None
