"""Fixtures of every test: a jobs directory of its own, and skips that are failures where CI promises the tool."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def jobs_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A jobs directory with a path short enough for sockets; pytest's own would be too long."""
    path = Path(tempfile.mkdtemp(prefix="fg"))
    monkeypatch.setenv("FORGATHER_JOBS_DIR", str(path / "jobs"))
    monkeypatch.delenv("NO_COLOR", raising=False)
    yield path / "jobs"
    shutil.rmtree(path, ignore_errors=True)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # noqa: ANN201
    """Under CI nothing is missing: ``.ci/run`` installs it first, so a skip is a failure."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("CI") == "true" and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped under CI: {report.longrepr}"
