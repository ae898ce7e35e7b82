"""The open connections of a server: what the selector watches for, and which are closed when. Server thread only."""

from __future__ import annotations

import resource
import selectors
import time
from collections.abc import Iterator

from . import limits
from .connection import Connection


class Connections:
    """The open connections of a server: what the selector watches for, and which are closed when."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self._selector = selector
        self._open: set[Connection] = set()
        #: Those that have, or had, a subscription.
        self.subscribed: set[Connection] = set()

    def __iter__(self) -> Iterator[Connection]:
        """Iterate over a copy, so that connections can be closed meanwhile."""
        return iter(list(self._open))

    def add(self, connection: Connection) -> None:
        """Add a connection; beyond a limit, close another one."""
        if not connection.authenticated:
            others = [other for other in self if not other.authenticated]
            if len(others) >= limits.MAX_UNAUTHENTICATED:
                self.close(min(others, key=lambda other: other.accepted_at))
        if len(self._open) >= _most_connections():
            self.close(min(self, key=_eviction_order))
        stale = self._selector.get_map().get(connection.fd)
        if stale is not None:  # other code closed a connection, whose number this one has now
            self.close(stale.data)
        self._open.add(connection)

    def update(self, connection: Connection) -> None:
        """Close a connection that is finished, otherwise watch for what it may do next."""
        finished = connection.at_end and not connection.queued and (connection.is_idle or connection.hung_up())
        if connection.broken or (finished and not connection.linger()):
            self.close(connection)
            return
        events = selectors.EVENT_WRITE if connection.unsent else 0
        takes_lines = not (connection.at_end or connection.unsent > limits.MAX_UNSENT)
        if (takes_lines or connection.lingers_until is not None) and not connection.queued:
            events |= selectors.EVENT_READ
        self._watch(connection, events)

    def _watch(self, connection: Connection, events: int) -> None:
        if events == connection.watched:
            return
        if not events:
            self._selector.unregister(connection.fd)
        elif connection.watched:
            self._selector.modify(connection.fd, events, connection)
        else:
            connection.note_file()
            self._selector.register(connection.fd, events, connection)
        connection.watched = events

    def close(self, connection: Connection) -> None:
        """Close a connection, if it is open."""
        if connection in self._open:
            self._open.remove(connection)
            self._watch(connection, 0)
            connection.close()

    def sweep(self) -> None:
        """Close connections that stopped reading, hung up, did not authenticate in time, or are silent over TCP."""
        now = time.monotonic()
        for connection in self:
            connection.flush()  # a socket may accept bytes long before poll(2) says that it is writable
            still = now - connection.moved_at
            stalled = connection.unsent and still > limits.STALL_TIMEOUT
            late = not connection.authenticated and now - connection.accepted_at > limits.AUTH_TIMEOUT
            waits = connection.open or connection.subscription
            silent = connection.peer.via == "tcp" and still > limits.IDLE_TIMEOUT and not waits
            stalled = stalled or now > (connection.lingers_until or now)
            if stalled or late or silent or not connection.is_open() or (connection.at_end and connection.hung_up()):
                self.close(connection)

    def streams_due(self, woken: bool) -> list[Connection]:
        """Return the subscribed connections that can be sent more; all of them may have more if ``woken``."""
        now = time.monotonic()
        self.subscribed = {connection for connection in self.subscribed if connection.subscription is not None}
        for connection in self.subscribed if woken else ():
            connection.stream_at = now
        return [connection for connection in self.subscribed if connection.stream_time <= now]


def _eviction_order(connection: Connection) -> tuple[bool, bool, float]:
    """Sort unauthenticated connections first, then idle ones, the longest idle first; half a line is not activity."""
    busy = connection.open > 0 or connection.unsent > 0 or connection.subscription is not None
    return connection.authenticated, busy, connection.moved_at


def _most_connections() -> int:
    """Return how many connections leave enough descriptors to training, however low its limit is (getrlimit(2))."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    room = limits.MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else soft - limits.RESERVED_FILES
    return max(8, min(limits.MAX_CONNECTIONS, room))
