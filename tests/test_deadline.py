"""The two clocks: a deadline never goes below zero, a budget never lets a thread take more than its share."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from forgather_control import deadline as module
from forgather_control.deadline import Budget, Deadline

from .support.harness import MS, SOON


@pytest.fixture
def now(monkeypatch):
    """A clock in the test's hands: the wall's time and the thread's processor time."""
    hands = SimpleNamespace(wall=1000.0, used=5.0)
    fake = SimpleNamespace(monotonic=lambda: hands.wall, thread_time=lambda: hands.used)
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


def test_budget_starts_full(now):
    """A first burst costs no nap; what goes beyond it is paid back at the share."""
    budget = Budget(share=0.05, burst=0.1)
    now.used += 0.1
    assert budget.nap() == pytest.approx(0, abs=1e-9)
    now.used += 0.01
    assert budget.nap() == pytest.approx(0.2)


def test_budget_after_its_nap(now):
    """Whoever naps for as long as he is told owes nothing."""
    budget = Budget(share=0.05, burst=0.02)
    for used in (0.3, 0.001, 2.0, 0.02):
        now.used += used
        now.wall += budget.nap() + 1e-9
        assert budget.nap() == 0.0


def test_budget_asked_twice(now):
    """Asking does not cost: the answer is the same until time passes or is used."""
    budget = Budget(share=0.1, burst=0.0)
    now.used += 0.05
    assert [budget.nap() for _ in range(5)] == pytest.approx([0.5] * 5)
    now.wall += 0.2
    assert budget.nap() == pytest.approx(0.3)


def test_budget_does_not_save_up(now):
    """A night of idleness buys one burst, not a night of processor time."""
    budget = Budget(share=0.05, burst=0.05)
    now.wall += 100_000
    assert budget.nap() == 0.0
    now.used += 0.06
    assert budget.nap() == pytest.approx(0.01 / 0.05)


@pytest.mark.parametrize("slice_s", [0.0001, 0.005, 0.5])
def test_budget_keeps_the_share(now, slice_s):
    """Under a flood the thread gets its share of a core, however it is cut, and no more."""
    budget, used_before, wall_before = Budget(share=0.05, burst=0.05), now.used, now.wall
    while now.wall - wall_before < 100:
        nap = budget.nap()
        if nap:
            now.wall += nap + 1e-6  # no clock stands still
        else:
            now.used += slice_s
            now.wall += slice_s
    share = (now.used - used_before - 0.05) / (now.wall - wall_before)
    assert 0.04 < share < 0.056


def test_budget_counts_its_own_thread():
    """What another thread burns is not charged; what this one burns is, on the real clock."""

    def burn():
        end = time.thread_time() + 50 * MS
        while time.thread_time() < end:
            pass

    budget = Budget(share=1e-3, burst=25 * MS)
    other = threading.Thread(target=burn)
    other.start()
    other.join(SOON)
    assert not other.is_alive()
    assert budget.nap() == 0.0
    burn()
    assert budget.nap() > 1.0
