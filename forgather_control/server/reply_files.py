"""The files in ``replies/``: written as soon as the file system lets, and removed when no client has read them.

Runs on the server thread; only ``are_awaited`` is called on the training thread, when training ends.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

from ..errors import InvalidRequest
from ..jobs import private_files, spool
from ..wire import jsonrpc
from . import limits
from .dispatcher import Peer, Subscription


class FileReply:
    """Sink for the one reply to a request file.

    Args:
        name: of the reply file.
        awaited: whether a program may wait for it; a person who touched an empty file reads it at some time, or never.
        owner: the user id of the request file's owner.
        post: writes the reply file.
    """

    broken = False

    def __init__(self, name: str, awaited: bool, owner: int, post: Callable[[FileReply, bytes], None]) -> None:
        self.name, self.awaited, self.peer, self._post = name, awaited, Peer("file", owner), post
        self.open = 0

    def send(self, data: bytes) -> None:
        """Write the reply; a notification has none."""
        if data:
            self._post(self, data)

    def stop_reading(self) -> None:
        """Do nothing: a request file is one line."""

    def start_subscription(self, subscription: Subscription) -> None:
        """Raise InvalidRequest: a file takes one reply."""
        raise InvalidRequest("A request file cannot subscribe to events. Connect to the job's socket instead.")

    def end_subscription(self) -> bool:
        """Return ``False``: there is no subscription."""
        return False


class _Written(NamedTuple):
    """A reply file: when it was written (monotonic), its bytes, whether a program may wait for it."""

    at: float
    size: int
    awaited: bool


class ReplyFiles:
    """The reply files of one job. Their number, their bytes and their age are bounded.

    Args:
        opened: opens ``replies/``; raises OSError.
        warn: called with an error that delays a reply.
    """

    def __init__(self, opened: Callable[[], AbstractContextManager[int]], warn: Callable[[OSError], None]) -> None:
        self._opened, self._warn = opened, warn
        self._unwritten: dict[FileReply, bytes] = {}  # oldest first
        self._written: dict[str, _Written] = {}  # by name, oldest first

    def forget(self) -> None:
        """Forget the files that were written: their directory is gone."""
        self._written.clear()

    def post(self, reply: FileReply, data: bytes) -> None:
        """Write a reply now, or when it is possible. Never raises."""
        if len(data) > limits.MAX_REPLY_FILE:
            text = f"it was carried out, but the reply is longer than {limits.MAX_REPLY_FILE} bytes; ask for less"
            data = jsonrpc.response(None, InvalidRequest(text, limit=limits.MAX_REPLY_FILE))
        self._unwritten[reply] = data
        try:
            self.write()
        except OSError as err:  # a full disk, for example: each tick tries again
            self._warn(err)
            while _is_too_much(len(self._unwritten), sum(map(len, self._unwritten.values()))):
                del self._unwritten[next(iter(self._unwritten))]

    def write(self) -> None:
        """Write the replies that could not be written yet; raise OSError at the first that still cannot."""
        if not self._unwritten:
            return
        with self._opened() as replies:
            for reply, data in list(self._unwritten.items()):
                self._make_room(replies, len(data))
                private_files.write(replies, reply.name, data)
                del self._unwritten[reply]
                self._written[reply.name] = _Written(time.monotonic(), len(data), reply.awaited)

    def _make_room(self, replies: int, size: int) -> None:
        if self._is_full(size):
            left = set(os.listdir(replies))  # the clients have removed most of them
            self._written = {name: written for name, written in self._written.items() if name in left}
        while self._written and self._is_full(size):
            self._remove(replies, next(iter(self._written)))

    def _is_full(self, size: int) -> bool:
        return _is_too_much(len(self._written) + 1, sum(written.size for written in self._written.values()) + size)

    def remove(self, name: str) -> None:
        """Remove a reply, written or not; raise OSError if that is not possible."""
        self._unwritten = {reply: data for reply, data in self._unwritten.items() if reply.name != name}
        with self._opened() as replies:
            self._remove(replies, name)

    def remove_old(self) -> None:
        """Remove the files that no client has read in time; raise OSError if that is not possible."""
        limit = time.monotonic() - limits.REPLY_FILE_TIMEOUT
        for name in [name for name, written in self._written.items() if written.at < limit]:
            self.remove(name)

    def _remove(self, replies: int, name: str) -> None:
        self._written.pop(name, None)
        spool.remove(replies, name)

    def are_awaited(self) -> bool:
        """Return whether a program may still be about to read a reply."""
        limit = time.monotonic() - limits.YOUNG_REPLY
        young = {name for name, written in list(self._written.items()) if written.awaited and written.at > limit}
        if not young:
            return False
        try:
            with self._opened() as replies:
                return not young.isdisjoint(os.listdir(replies))
        except OSError:
            return False


def _is_too_much(count: int, size: int) -> bool:
    return count > limits.MAX_REPLY_FILES or size > limits.MAX_REPLY_FILES_BYTES
