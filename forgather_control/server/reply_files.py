"""The files in ``replies/``: written as soon as the file system lets, and removed when no client has read them.

Runs on the server thread; only ``are_awaited`` is called on the training thread, when training ends.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from ..errors import InvalidRequest
from ..jobs import private_files, spool
from ..wire import jsonrpc
from . import limits
from .dispatcher import Peer, ReplySink


class FileReply(ReplySink):
    """Sink for the one reply to a request file.

    Args:
        name: of the reply file.
        awaited: whether a program may wait for it; a person who touched an empty file reads it at some time, or never.
        owner: the user id of the request file's owner.
        post: writes the reply file.
    """

    def __init__(self, name: str, awaited: bool, owner: int, post: Callable[[FileReply, bytes], None]) -> None:
        super().__init__(Peer("file", owner))
        self.name, self.awaited, self._post = name, awaited, post
        #: What is not written yet; the bytes of the file; and when it was written, in ``time.monotonic()`` seconds.
        self.data, self.size, self.written_at = b"", 0, math.inf

    def send(self, data: bytes) -> None:
        """Write the reply; a notification has none."""
        if data:
            self._post(self, data)


class ReplyFiles:
    """The reply files of one job. Their number, their bytes and their age are bounded.

    Args:
        opened: opens ``replies/``; raises OSError.
        warn: called with an error that delays a reply.
    """

    def __init__(self, opened: Callable[[], AbstractContextManager[int]], warn: Callable[[OSError], None]) -> None:
        self._opened, self._warn = opened, warn
        self._replies: dict[str, FileReply] = {}  # by name, oldest first

    def post(self, reply: FileReply, data: bytes) -> None:
        """Write a reply now, or when it is possible. Never raises."""
        if len(data) > limits.MAX_REPLY_FILE:
            text = f"it was carried out, but the reply is longer than {limits.MAX_REPLY_FILE} bytes; ask for less"
            data = jsonrpc.response(None, InvalidRequest(text, limit=limits.MAX_REPLY_FILE))
        reply.data, reply.size = data, len(data)
        self._replies[reply.name] = reply
        try:
            self.write()
        except OSError as err:  # a full disk, for example: each tick tries again
            self._warn(err)
            if self._are_too_many():
                del self._replies[reply.name]

    def write(self) -> None:
        """Write the replies that could not be written yet; raise OSError at the first that still cannot."""
        if not any(reply.data for reply in self._replies.values()):
            return
        with self._opened() as replies:
            self._make_room(replies)
            for reply in self._replies.values():
                if reply.data:
                    private_files.write(replies, reply.name, reply.data)
                    reply.data, reply.written_at = b"", time.monotonic()

    def _make_room(self, replies: int) -> None:
        if self._are_too_many():
            left = set(os.listdir(replies))  # the clients have removed most of them
            self._replies = {name: reply for name, reply in self._replies.items() if reply.data or name in left}
        while self._are_too_many():
            self._remove(replies, next(iter(self._replies)))

    def _are_too_many(self) -> bool:
        size = sum(reply.size for reply in self._replies.values())
        return len(self._replies) > limits.MAX_REPLY_FILES or size > limits.MAX_REPLY_FILES_BYTES

    def remove(self, name: str) -> None:
        """Remove a reply, written or not; raise OSError if that is not possible."""
        self._replies.pop(name, None)
        with self._opened() as replies:
            spool.remove(replies, name)

    def remove_old(self) -> None:
        """Remove the files that no client has read in time; raise OSError if that is not possible."""
        limit = time.monotonic() - limits.REPLY_FILE_TIMEOUT
        old = [name for name, reply in self._replies.items() if reply.written_at < limit]
        if old:
            with self._opened() as replies:
                for name in old:
                    self._remove(replies, name)

    def _remove(self, replies: int, name: str) -> None:
        spool.remove(replies, name)
        del self._replies[name]

    def are_awaited(self) -> bool:
        """Return whether a program may still be about to read a reply."""
        limit = time.monotonic() - 2.0  # by then a program has read it, or has ended
        young = {reply.name for reply in list(self._replies.values()) if reply.awaited and reply.written_at > limit}
        if not young:
            return False
        try:
            with self._opened() as replies:
                return not young.isdisjoint(os.listdir(replies))
        except OSError:
            return False
