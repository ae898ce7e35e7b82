"""The event log of a run: what happened, numbered, for clients that subscribe.

Rare events are published where they happen, on any thread. Progress and metrics are sampled by the server thread,
and only while a client subscribes to them, so that a step costs nothing.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, Final, NamedTuple

from .. import states
from ..wire import jsonrpc
from . import limits

#: The kinds that are sampled.
SAMPLED: Final = frozenset((states.EVENT_PROGRESS, states.EVENT_METRICS))


class Event(NamedTuple):
    """One event; ``ordinal`` counts those of its ring."""

    seq: int
    ordinal: int
    time: float
    kind: str
    facts: dict[str, Any]

    def line(self, lost: int) -> bytes:
        """Return the notification, newline included."""
        params = {"seq": self.seq, "time": self.time, "kind": self.kind, **self.facts}
        if lost:
            params["lost"] = lost
        return jsonrpc.encode({"jsonrpc": "2.0", "method": "event", "params": params})


class _Ring:
    """The latest events of some kinds."""

    def __init__(self, size: int) -> None:
        self.events: deque[Event] = deque(maxlen=size)
        self.count = 0  # of all that were ever added
        self.dropped_seq = 0  # of the last one that fell out

    def add(self, seq: int, kind: str, facts: dict[str, Any]) -> None:
        if len(self.events) == self.events.maxlen:
            self.dropped_seq = self.events[0].seq
        self.events.append(Event(seq, self.count, time.time(), kind, facts))
        self.count += 1

    def position(self, since: int) -> int:
        """Return the ordinal of the first event after number ``since``; of dropped ones, the most it can be."""
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
        self._lock = threading.Lock()
        self._seq = 0
        self._rare, self._samples = _Ring(limits.MAX_EVENTS), _Ring(limits.MAX_SAMPLE_EVENTS)
        self._marks: dict[str, object] = {}  # of the last sample; server thread only
        self._sample_at = 0.0  # monotonic; server thread only

    @property
    def next_seq(self) -> int:
        """The number of the next event."""
        return self._seq + 1

    def publish(self, kind: str, **facts: Any) -> None:
        """Add an event. On any thread; never blocks."""
        with self._lock:
            self._seq += 1
            (self._samples if kind in SAMPLED else self._rare).add(self._seq, kind, facts)
        self._on_event()

    def sample(self) -> None:
        """Add progress and metrics if they have changed and the last sample is old enough. On the server thread."""
        now = time.monotonic()
        if now < self._sample_at:
            return
        self._sample_at = now + limits.EVENT_SAMPLE_PERIOD
        for kind, (mark, facts) in self._sample().items():
            if self._marks.get(kind) != mark:
                self._marks[kind] = mark
                with self._lock:
                    self._seq += 1
                    self._samples.add(self._seq, kind, facts)

    @property
    def sample_at(self) -> float:
        """When the next sample is due, in ``time.monotonic()`` seconds."""
        return self._sample_at

    def subscribe(self, since: int | None, kinds: Iterable[str] | None) -> Subscriber:
        """Return a new subscriber: after event ``since``, or from now on."""
        with self._lock:
            start = self._seq if since is None else since
            return Subscriber(self, frozenset(kinds or states.EVENT_KINDS), start)

    # For subscribers...

    def positions(self, since: int) -> list[int]:
        """Return where a subscriber starts in each ring. With the lock held."""
        return [ring.position(since) for ring in (self._rare, self._samples)]

    def after(self, positions: list[int]) -> tuple[list[Event], list[int]]:
        """Return the events from these positions on, in order, and how many of each ring were dropped before them."""
        with self._lock:
            found: list[Event] = []
            lost = []
            for ring, position in zip((self._rare, self._samples), positions):
                first = ring.count - len(ring.events)
                lost.append(max(0, first - position))
                skip = max(0, position - first)
                found += islice(ring.events, skip, None)
        return sorted(found), lost


class Subscriber:
    """One client's position in the log. On the server thread only.

    A client that reads slowly falls behind, and loses the events that leave the rings meanwhile.
    """

    def __init__(self, log: EventLog, kinds: frozenset[str], since: int) -> None:
        self._log, self._kinds = log, kinds
        self._positions = log.positions(since)
        self._lost = 0  # not told yet

    @property
    def _samples(self) -> bool:
        return bool(self._kinds & SAMPLED)

    def pull(self, size: int) -> bytes:
        """Return the next events as lines: at most about ``size`` bytes, nothing where there is none."""
        if self._samples:
            self._log.sample()
        events, lost = self._log.after(self._positions)
        self._count_lost(lost)
        text = b""
        for event in events:
            if len(text) >= size:
                break
            self._positions[event.kind in SAMPLED] = event.ordinal + 1
            if event.kind in self._kinds:
                text += event.line(self._lost)
                self._lost = 0
        return text

    def _count_lost(self, lost: list[int]) -> None:
        rare, sampled = lost
        self._lost += rare * bool(self._kinds - SAMPLED) + sampled * self._samples
        self._positions = [position + more for position, more in zip(self._positions, lost)]

    def next_at(self) -> float | None:
        """Return when there may be more though no event was published; ``None`` where only events count."""
        return self._log.sample_at if self._samples else None
