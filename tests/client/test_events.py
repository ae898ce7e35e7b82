"""The queue of received events: bounded, and honest about what it dropped."""

from __future__ import annotations

import pytest

from forgather_control.client import limits
from forgather_control.client.events import EventQueue
from forgather_control.errors import InternalError
from forgather_control.wire.jsonrpc import Notification


def event(seq, **facts):
    return Notification("event", {"seq": seq, "kind": "progress", **facts})


def test_first_in_first_out():
    """Events come out in their order; an empty queue has none; other notifications are ignored."""
    queue = EventQueue()
    queue.put(event(1))
    queue.put(Notification("news", {"kind": 7}))
    queue.put(event(2))
    assert [queue.take()["seq"], queue.take()["seq"], queue.take()] == [1, 2, None]


def test_the_oldest_are_dropped_and_counted(monkeypatch):
    """The next event says how many were lost before it, those that the job lost included."""
    monkeypatch.setattr(limits, "MAX_EVENTS", 3)
    queue = EventQueue()
    for seq in range(1, 7):
        queue.put(event(seq, **({"lost": 10} if seq == 2 else {})))
    queue.put(event(7, lost=5))
    found = [queue.take() for _ in range(3)]
    assert [(one["seq"], one.get("lost")) for one in found] == [(5, 14), (6, None), (7, 5)]


@pytest.mark.parametrize(
    "params", [None, [], 7, {}, {"kind": 1}, {"kind": "a", "lost": "x"}, {"kind": "a", "lost": True}]
)
def test_an_event_that_is_none(params):
    """Whatever a hostile job sends is one error, not a traceback later."""
    with pytest.raises(InternalError):
        EventQueue().put(Notification("event", params))
