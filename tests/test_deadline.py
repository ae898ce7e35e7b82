"""Deadlines: what is left never falls below zero, and no deadline never passes."""

from __future__ import annotations

import fcntl
import threading
import time
from types import SimpleNamespace

import pytest

from forgather_control import deadline as module
from forgather_control.deadline import Deadline, lock_file

from .support.harness import MS, SOON


@pytest.fixture
def now(monkeypatch):
    """A clock in the test's hands: the wall's time."""
    hands = SimpleNamespace(wall=1000.0)
    fake = SimpleNamespace(monotonic=lambda: hands.wall)
    monkeypatch.setattr(module, "time", fake)
    return hands


@pytest.mark.parametrize("seconds", [0, 0.5, 3, 1e9])
def test_deadline_counts_down(now, seconds):
    """What is left falls to zero, at which the deadline has passed, and stays there."""
    deadline = Deadline(seconds)
    assert (deadline.at, deadline.left(), deadline.passed()) == (1000.0 + seconds, seconds, seconds == 0)
    now.wall += seconds
    assert (deadline.left(), deadline.passed()) == (0.0, True)
    now.wall += 7
    assert (deadline.left(), deadline.passed()) == (0.0, True)


def test_deadline_in_the_past(now):
    """A negative number of seconds is a deadline that has passed, not a negative wait."""
    assert (Deadline(-5).left(), Deadline(-5).passed()) == (0.0, True)


def test_no_deadline(now):
    """``None`` is never: not zero, not a large number."""
    deadline = Deadline(None)
    now.wall += 1e12
    assert (deadline.at, deadline.left(), deadline.passed()) == (None, None, False)


def test_deadline_fits_a_wait():
    """What is left can be handed to ``wait`` as it is, on the real clock."""
    deadline, event = Deadline(20 * MS), threading.Event()
    assert not event.wait(deadline.left())
    assert deadline.at - time.monotonic() < 20 * MS
    event.set()
    assert event.wait(Deadline(None).left())


def test_a_lock_is_waited_for_until_the_deadline(tmp_path):
    """It is taken when it is free before the deadline, and not after it."""
    with open(tmp_path / "lock", "w") as one, open(tmp_path / "lock", "w") as two:
        assert lock_file(one.fileno(), Deadline(0.0))
        begin = time.monotonic()
        assert not lock_file(two.fileno(), Deadline(0.05)) and time.monotonic() - begin >= 0.05
        taken = []
        waiter = threading.Thread(target=lambda: taken.append(lock_file(two.fileno(), Deadline(SOON))))
        waiter.start()
        fcntl.flock(one.fileno(), fcntl.LOCK_UN)
        waiter.join(SOON)
        assert taken == [True]
