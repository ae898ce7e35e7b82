"""The event log of a run: what happened, numbered, for clients that subscribe.

Rare events are published where they happen, on any thread. Progress and metrics are sampled by the server thread,
and only while a client subscribes to them, so that a step costs nothing.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Final, NamedTuple

from .. import states
from ..wire import jsonrpc
from . import limits

#: The kinds that are sampled. They have a ring of their own, so that they do not push rare events out.
SAMPLED: Final = frozenset((states.EVENT_PROGRESS, states.EVENT_METRICS))


class Event(NamedTuple):
    """One event."""

    seq: int
    time: float
    kind: str
    facts: dict[str, Any]


class _Ring:
    """The latest events of some kinds."""

    def __init__(self, size: int) -> None:
        self.events: deque[Event] = deque(maxlen=size)
        self.count = 0  # of all that were ever added
        self.dropped_seq = 0  # of the last one that fell out

    def add(self, event: Event) -> None:
        if len(self.events) == self.events.maxlen:
            self.dropped_seq = self.events[0].seq
        self.events.append(event)
        self.count += 1

    def position(self, since: int) -> int:
        """Return how many were added before the first event after number ``since``; of dropped ones, the least."""
        kept = sum(event.seq > since for event in self.events)
        return max(0, self.count - kept - max(0, self.dropped_seq - since))


class EventLog:
    """The events of one run. ``_lock`` guards the rings and the counter, and is held for microseconds.

    Args:
        on_event: called after each published event, on its thread; must not block (the server's ``wake``).
        sample: returns the present values of the sampled kinds, a mark for each that differs when they have changed.
    """

    def __init__(
        self,
        on_event: Callable[[], None] = lambda: None,
        sample: Callable[[], dict[str, tuple[object, dict[str, Any]]]] = dict,
    ) -> None:
        self._on_event, self._sample = on_event, sample
        #: Called after that; must not block. Set by what writes the events to a file.
        self.on_publish: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        #: The number of the next event.
        self.next_seq = 1
        self._rings = _Ring(limits.MAX_EVENTS), _Ring(limits.MAX_SAMPLE_EVENTS)  # by whether the kind is sampled
        self._marks: dict[str, object] = {}  # of the last sample; server thread only
        #: When the next sample is due, in ``time.monotonic()`` seconds. Server thread only.
        self.sample_at = 0.0

    def publish(self, kind: str, **facts: Any) -> None:
        """Add an event. On any thread; never blocks."""
        self._add(kind, facts)
        self._on_event()
        self.on_publish()

    def _add(self, kind: str, facts: dict[str, Any]) -> None:
        with self._lock:
            self._rings[kind in SAMPLED].add(Event(self.next_seq, time.time(), kind, facts))
            self.next_seq += 1

    def sample(self) -> None:
        """Add progress and metrics if they have changed and the last sample is old enough. On the server thread."""
        now = time.monotonic()
        if now < self.sample_at:
            return
        self.sample_at = now + limits.EVENT_SAMPLE_PERIOD
        for kind, (mark, facts) in self._sample().items():
            if self._marks.get(kind) != mark:
                self._marks[kind] = mark
                self._add(kind, facts)

    def subscribe(self, since: int | None, kinds: Iterable[str] | None) -> Subscriber:
        """Return a new subscriber: after event ``since``, or from now on."""
        with self._lock:
            start = self.next_seq - 1 if since is None else since
            positions = [ring.position(start) for ring in self._rings]
        return Subscriber(self, frozenset(kinds or states.EVENT_KINDS), positions)

    def after(self, positions: list[int]) -> tuple[list[Event], list[int]]:
        """Return the events from a position in each ring on, in order, and how many had been dropped before them."""
        found: list[Event] = []
        lost = []
        with self._lock:
            for ring, position in zip(self._rings, positions):
                missing = ring.count - len(ring.events) - position  # negative: that many kept ones were sent before
                lost.append(max(0, missing))
                found += islice(ring.events, max(0, -missing), None)
        return sorted(found), lost


class Subscriber:
    """One client's position in the log. On one thread only: that of the server where it wants sampled kinds.

    A client that reads slowly falls behind, and loses the events that leave the rings meanwhile.
    """

    def __init__(self, log: EventLog, kinds: frozenset[str], positions: list[int]) -> None:
        self._log, self._kinds, self._positions = log, kinds, positions
        self._wanted = bool(kinds - SAMPLED), bool(kinds & SAMPLED)  # of each ring: whether it counts what was lost
        self._lost = 0  # not reported yet

    def pull(self, size: int) -> bytes:
        """Return the next events as lines: at most about ``size`` bytes, nothing where there is none."""
        text = b""
        for params in self.take():
            text += jsonrpc.encode({"jsonrpc": "2.0", "method": "event", "params": params})
            if len(text) >= size:
                break
        return text

    def take(self) -> Iterator[dict[str, Any]]:
        """Yield the next events; those that are not taken come the next time."""
        if self._wanted[True]:
            self._log.sample()
        events, lost = self._log.after(self._positions)
        for index, count in enumerate(lost):
            self._positions[index] += count
            self._lost += count * self._wanted[index]
        for event in events:
            self._positions[event.kind in SAMPLED] += 1
            if event.kind in self._kinds:
                params = {"seq": event.seq, "time": event.time, "kind": event.kind, **event.facts}
                if self._lost:
                    params["lost"], self._lost = self._lost, 0
                yield params

    def next_at(self) -> float | None:
        """Return when there may be more though no event was published; ``None`` where only events count."""
        return self._log.sample_at if self._wanted[True] else None
