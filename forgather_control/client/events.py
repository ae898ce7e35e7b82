"""Events that a client received and that its iterator has not taken yet."""

from collections import deque
from typing import Any

from ..errors import InternalError
from ..wire import jsonrpc
from . import limits


class EventQueue:
    """Bounded queue of events; when it is full, the oldest is dropped and counted in ``lost`` of the next one."""

    def __init__(self) -> None:
        self._events: deque[dict[str, Any]] = deque()
        self._dropped = 0

    def put(self, message: jsonrpc.Notification) -> None:
        """Add an event; other notifications, of a newer job, are ignored. InternalError: it has no valid ``kind``."""
        if message.method != "event":
            return
        event = message.params
        is_event = isinstance(event, dict) and isinstance(event.get("kind"), str)
        if not is_event or type(event.get("lost", 0)) is not int:
            raise InternalError("the other side sent an event without a kind")
        if len(self._events) >= limits.MAX_EVENTS:
            self._dropped += 1 + self._events.popleft().get("lost", 0)
        self._events.append(event)

    def take(self) -> dict[str, Any] | None:
        """Remove and return the oldest event; ``None`` if there is none."""
        if not self._events:
            return None
        event = self._events.popleft()
        dropped, self._dropped = self._dropped, 0
        return {**event, "lost": event.get("lost", 0) + dropped} if dropped else event
