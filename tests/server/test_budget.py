"""The processor budget never lets a thread take more than its share."""

from __future__ import annotations

import gc
import threading
import time
from types import SimpleNamespace

import pytest

from forgather_control.server import budget as module
from forgather_control.server.budget import CpuBudget

from ..support.harness import MS, SOON


@pytest.fixture
def now(monkeypatch):
    """A clock in the test's hands: the wall's time and the thread's processor time."""
    hands = SimpleNamespace(wall=1000.0, used=5.0)
    fake = SimpleNamespace(monotonic=lambda: hands.wall, thread_time=lambda: hands.used)
    monkeypatch.setattr(module, "time", fake)
    return hands


def test_budget_starts_full(now):
    """A first burst costs no delay; what goes beyond it is paid back at the share."""
    budget = CpuBudget(share=0.05, burst=0.1)
    now.used += 0.1
    assert budget.throttle_delay() == pytest.approx(0, abs=1e-9)
    now.used += 0.01
    assert budget.throttle_delay() == pytest.approx(0.2)


def test_budget_after_its_delay(now):
    """After the delay the budget is no longer overdrawn."""
    budget = CpuBudget(share=0.05, burst=0.02)
    for used in (0.3, 0.001, 2.0, 0.02):
        now.used += used
        now.wall += budget.throttle_delay() + 1e-9
        assert budget.throttle_delay() == 0.0


def test_budget_asked_twice(now):
    """Asking does not cost: the answer is the same until time passes or is used."""
    budget = CpuBudget(share=0.1, burst=0.0)
    now.used += 0.05
    assert [budget.throttle_delay() for _ in range(5)] == pytest.approx([0.5] * 5)
    now.wall += 0.2
    assert budget.throttle_delay() == pytest.approx(0.3)


def test_budget_does_not_save_up(now):
    """A night of idleness buys one burst, not a night of processor time."""
    budget = CpuBudget(share=0.05, burst=0.05)
    now.wall += 100_000
    assert budget.throttle_delay() == 0.0
    now.used += 0.06
    assert budget.throttle_delay() == pytest.approx(0.01 / 0.05)


@pytest.mark.parametrize("slice_s", [0.0001, 0.005, 0.5])
def test_budget_keeps_the_share(now, slice_s):
    """Under a flood the thread gets its share of a core, however it is cut, and no more."""
    budget, used_before, wall_before = CpuBudget(share=0.05, burst=0.05), now.used, now.wall
    while now.wall - wall_before < 100:
        delay = budget.throttle_delay()
        if delay:
            now.wall += delay + 1e-6  # no clock stands still
        else:
            now.used += slice_s
            now.wall += slice_s
    share = (now.used - used_before - 0.05) / (now.wall - wall_before)
    assert 0.04 < share < 0.056


def test_budget_is_refilled_for_more_than_asking_costs(now):
    """A thread that looks again after each delay, which costs more than a moment earns, still gets its share."""
    budget, worked, start = CpuBudget(share=0.04, burst=0.05, refill=0.005), 0.0, now.wall
    while now.wall - start < 100:
        now.used += 0.0003  # what a look costs
        delay = budget.throttle_delay()
        now.wall += delay
        if delay == 0:
            now.used += 0.005
            worked += 0.005
    assert 0.03 < worked / 100 < 0.041


def test_budget_does_not_charge_full_collections_of_garbage(now):
    """They are work for all threads; the small ones are for what this thread itself makes."""
    budget = CpuBudget(share=0.04, burst=0.05)
    for generation, charged in ((2, False), (0, True)):
        budget.leave_out_collection("start", {"generation": generation})
        now.used += 0.5
        budget.leave_out_collection("stop", {"generation": generation})
        assert (budget.throttle_delay() > 10) == charged


def test_budget_knows_the_thread_of_a_real_collection():
    """One on another thread is not taken off what this one has used."""
    crowd = [[] for _ in range(200_000)]
    budget = CpuBudget(share=1e-3, burst=1 * MS)
    gc.callbacks.append(budget.leave_out_collection)
    try:
        gc.collect()
        assert budget.throttle_delay() < 1.0  # else it would be more than ten
        used = time.thread_time()
        other = threading.Thread(target=gc.collect)
        other.start()
        other.join(SOON)
        assert not other.is_alive()
        while time.thread_time() < used + 20 * MS:
            pass
        assert budget.throttle_delay() > 10.0 and crowd
    finally:
        gc.callbacks.remove(budget.leave_out_collection)


def test_budget_counts_its_own_thread():
    """What another thread burns is not charged; what this one burns is, on the real clock."""

    def burn():
        end = time.thread_time() + 50 * MS
        while time.thread_time() < end:
            pass

    budget = CpuBudget(share=1e-3, burst=25 * MS)
    other = threading.Thread(target=burn)
    other.start()
    other.join(SOON)
    assert not other.is_alive()
    assert budget.throttle_delay() == 0.0
    burn()
    assert budget.throttle_delay() > 1.0
