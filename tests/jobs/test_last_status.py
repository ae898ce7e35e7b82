"""The last status of a job that does not answer: read without trust."""

from __future__ import annotations

import os
import time

import pytest

from forgather_control.jobs import last_status, limits


@pytest.fixture
def place(jobs_dir):
    path = jobs_dir / "job"
    path.mkdir(parents=True, mode=0o700)
    (path / "status.json").write_text('{"job_id": "job", "global_step": 3}')
    (path / "status.json").chmod(0o600)
    return path


def read(place):
    return last_status.read(str(place.parent), "job")


def test_it_has_an_age(place):
    """By the time of the file; never below zero, as clocks differ."""
    os.utime(place / "status.json", (time.time() - 60, time.time() - 60))
    assert read(place).status["global_step"] == 3 and 59 < read(place).age < 120
    os.utime(place / "status.json", (time.time() + 60, time.time() + 60))
    assert read(place).age == 0


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"[" * 100_000, b"\xff", b'{"job_id": "other"}', b"{}"])
def test_what_is_no_status_of_the_job(place, content):
    """Other JSON, damage, and the status of another job."""
    (place / "status.json").write_bytes(content)
    assert read(place) is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.unlink(),
        lambda path: path.chmod(0o666),
        lambda path: path.parent.chmod(0o777),
        lambda path: path.write_bytes(path.read_bytes() + b" " * limits.MAX_STATUS),
        lambda path: (path.unlink(), path.symlink_to("/etc/passwd")),
        lambda path: (path.unlink(), os.mkfifo(path)),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=range(7),
)
def test_what_cannot_be_believed(place, spoil):
    """No file, one that others may write, one that is too long, and what is no file."""
    spoil(place / "status.json")
    assert read(place) is None
