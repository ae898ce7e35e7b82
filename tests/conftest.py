"""Fixtures of every test, such as a private jobs directory; under CI, skips and runs without torch fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import pytest

from forgather_control.training.job_queries import JobQueries

from .support import answers

CI = os.environ.get("CI") == "true"
#: Whether this is the torch-free half, on a Python without torch: only there may tests that need torch be skipped.
LIGHT = os.environ.get("FORGATHER_TEST_LIGHT") == "1"

#: The file in tox's directory that names the Python on which the full half has run: the light half skips that Python.
_FULL = Path(os.environ.get("TOX_WORK_DIR", os.devnull)) / "full-half-ran-on"
_PYTHON = "{}.{}".format(*sys.version_info)

# How long an example takes depends on the machine: speed is for tests/benchmarks.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")

_torch_tests_passed = 0


def pytest_configure(config: pytest.Config) -> None:
    """End the light half at once on the Python on which the full one has passed."""
    if os.environ.get("TOX_ENV_NAME") == "full":
        _FULL.unlink(missing_ok=True)
    elif LIGHT and config.args_source.name != "ARGS" and _FULL.is_file() and _FULL.read_text() == _PYTHON:
        pytest.exit(f"the full half has passed on Python {_PYTHON}", returncode=0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out of the light half what is slow and independent of Python's version."""
    if LIGHT:
        slow = [item for item in items if item.get_closest_marker("once")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(autouse=True)
def jobs_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A jobs directory with a path short enough for sockets; pytest's own would be too long."""
    path = Path(tempfile.mkdtemp(prefix="fg"))
    monkeypatch.setenv("FORGATHER_JOBS_DIR", str(path / "jobs"))
    monkeypatch.delenv("NO_COLOR", raising=False)
    yield path / "jobs"
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(autouse=True)
def answers_fit(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Check the answers of this process's jobs against the schemas of ``rpc.discover``."""
    kept = answers.Kept()
    monkeypatch.setattr(JobQueries, "answer", kept.wrap(JobQueries.answer))
    yield
    kept.check()


class Certificates(NamedTuple):
    """PEM files that openssl made; ``sha256`` is of ``cert``, for localhost and 127.0.0.1."""

    cert: str
    key: str
    both: str  # in one file
    locked: str  # the key, with a password
    other_cert: str
    other_key: str
    sha256: str


@pytest.fixture(scope="session")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Two certificates with their keys; tests that use them are marked ``needs("openssl")``."""
    folder = tmp_path_factory.mktemp("pem")

    def openssl(*words: str) -> str:
        return subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True, text=True).stdout

    for name in ("", "other-"):
        openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"),
            *("-subj", f"/CN={name}job", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            *("-keyout", f"{name}key.pem", "-out", f"{name}cert.pem"),
        )
    openssl("ec", "-in", "key.pem", "-aes256", "-passout", "pass:secret", "-out", "locked.pem")
    (folder / "both.pem").write_text((folder / "key.pem").read_text() + (folder / "cert.pem").read_text())
    shown = openssl("x509", "-in", "cert.pem", "-noout", "-fingerprint", "-sha256").strip().partition("=")[2]
    names = ("cert", "key", "both", "locked", "other-cert", "other-key")
    return Certificates(*(str(folder / f"{name}.pem") for name in names), sha256=shown)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Under CI a skip is a failure, because ``.ci/run`` installs everything first."""
    outcome = yield
    report = outcome.get_result()
    report.wants_torch = any("torch" in str(mark.kwargs.get("reason")) for mark in item.iter_markers("skipif"))
    if CI and report.skipped and not (LIGHT and report.wants_torch):
        report.outcome = "failed"
        report.longrepr = f"skipped under CI: {report.longrepr}"


def pytest_runtest_logreport(report: Any) -> None:
    """Count the tests of torch that have passed, in the process that collects the reports of all."""
    global _torch_tests_passed
    _torch_tests_passed += report.when == "call" and report.passed and getattr(report, "wants_torch", False)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Under CI a full run fails in which no torch test has run."""
    if hasattr(session.config, "workerinput"):  # one of the processes of pytest-xdist: the first of them decides
        return
    if os.environ.get("TOX_ENV_NAME") == "full" and exitstatus == pytest.ExitCode.OK:
        _FULL.write_text(_PYTHON)
    if CI and not LIGHT and exitstatus == pytest.ExitCode.OK and not _torch_tests_passed:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
