"""Messages between ranks over a store of torch.distributed, received without polling.

Each rank has two threads, both blocked while there is nothing to do: the *receiver* in the store's ``get``, outside
the interpreter's lock, until there is a message for this rank; the *sender* on a queue, until this process has
something to send. The training thread, the server thread and signal handlers only put into that queue, so none of them
ever waits for the network.

Each rank has an inbox of numbered keys. A sender takes the next number by the store's atomic ``add``, then writes that
key; the receiver takes the keys in order and deletes them. (A process that dies between the two leaves a gap, and
nothing behind it is received; but a job that lost a rank has ended.) A message is one JSON array.

The last rank to leave deletes the keys of the run, which no rank reads or writes any more. They stay where a rank was
lost or never joined, because it does not leave.

A receiver is ended by a message that its own process writes: a thread that is still inside a C++ call when the
interpreter ends would be unwound out of it, and that aborts the process.
"""

from __future__ import annotations

import atexit
import json
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any

from . import keys, limits

log = logging.getLogger("forgather_control")

#: Makes a new connection to a store.
Connect = Callable[[], Any]


class StoreSender:
    """One thread's own connection to the store: a store serves one call at a time, and the receiver's call waits."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._store: Any = None

    def connect(self) -> None:
        """Make the connection, which waits for a store that is frozen; every call before that fails."""
        self._store = self._connect()
        self._store.set_timeout(timedelta(seconds=limits.STORE_TIMEOUT))

    def send(self, ranks: Iterable[int], message: list[Any]) -> None:
        """Put a message into the inboxes of ``ranks``."""
        data = json.dumps(message)
        for rank in ranks:
            self._store.set(keys.message(rank, self._store.add(keys.count(rank), 1)), data)

    def decide(self, key: str, value: Any) -> Any:
        """Write ``value`` under ``key`` unless there is one; return the value that stands there from now on."""
        return json.loads(self._store.compare_set(key, "", json.dumps(value)))

    def write(self, key: str, data: str) -> None:
        """Write a key, whatever stood there."""
        self._store.set(key, data)

    def add(self, key: str, number: int) -> int:
        """Add to the number under ``key``; return the sum."""
        return int(self._store.add(key, number))

    def has(self, key: str) -> bool:
        """Return whether there is such a key."""
        return bool(self._store.check([key]))

    def sweep(self, size: int) -> None:
        """Delete all keys of a run that every rank has left, so that many runs of one process group leave none."""
        add, delete = self._store.add, self._store.delete_key
        for rank in range(size):  # one key more: what wakes a receiver is not counted, and may find it awake
            for number in range(add(keys.received(rank), 0) + 1, add(keys.count(rank), 0) + 2):
                delete(keys.message(rank, number))
            delete(keys.received(rank))
            delete(keys.count(rank))
        for number in range(1, add(keys.ROUNDS, 0) + 1):
            delete(keys.decision(number))
            delete(keys.verdict(number))
        for key in (keys.ROUNDS, keys.JOINED, keys.LEFT):
            delete(key)

    def disconnect(self) -> None:
        """Close the connection now, not when the garbage is collected; every later call fails."""
        self._store = None


class StoreChannel:
    """One rank's end of the channel.

    Args:
        rank: whose inbox to read.
        on_message: called on the receiver thread with each message, and a sender for replies.
        on_idle: called on the sender thread at the start, after each task, and again after the seconds that it
            returned last; ``None`` for never.
        on_lost: called once, on the thread whose call failed, when the channel broke (the store's host ended, say),
            with the reason and a sender that may still work.
        on_end: called once, on the sender thread, when the channel was closed and nothing more is received, with the
            number of messages that were, and a sender. Not after ``on_lost``.

    Each thread makes its own connections, so that no store delays training. One out of reach breaks the channel.
    """

    def __init__(
        self,
        connect: Connect,
        rank: int,
        on_message: Callable[[list[Any], StoreSender], None],
        on_idle: Callable[[StoreSender], float | None],
        on_lost: Callable[[str, StoreSender], None],
        on_end: Callable[[int, StoreSender], None],
    ) -> None:
        self._connect, self._rank = connect, rank
        self._on_message, self._on_idle, self._on_lost, self._on_end = on_message, on_idle, on_lost, on_end
        self._inbox: Any = None
        self._replies, self._sender = StoreSender(connect), StoreSender(connect)
        self._queue: SimpleQueue[Callable[[StoreSender], None] | None] = SimpleQueue()
        self._at_exit: Any = None
        self._next = 1  # the number of the message that the receiver waits for; written by it alone
        self._ended = threading.Lock()  # acquired for good by the first thread that finds, or makes, the channel ended
        self._threads = [
            threading.Thread(target=self._run, args=(work, sender), name=f"forgather-{name}", daemon=True)
            for name, work, sender in (("receiver", self._receive, self._replies), ("sender", self._send, self._sender))
        ]

    def start(self) -> None:
        """Begin to receive and to send."""
        # For owners that do not close. A finalizer that does close is made later, and those run last made first.
        self._at_exit = weakref.finalize(self, self.close, limits.EXIT_TIMEOUT)
        for thread in self._threads:
            thread.start()

    def post(self, task: Callable[[StoreSender], None]) -> None:
        """Have ``task`` called on the sender thread. Reentrant and never blocks, so signal handlers may call it."""
        self._queue.put(task)

    def close(self, seconds: float) -> None:
        """Send what is queued, then end both threads; with a dead network, return after ``seconds``."""
        if self._at_exit is not None:
            self._at_exit.detach()
        self._queue.put(None)
        own = [thread for thread in self._threads if thread.ident is not None]
        threads = [thread for thread in own if thread is not threading.current_thread()]
        _join(threads, seconds)
        if any(thread.is_alive() for thread in threads):
            # Training does not wait any longer, but the interpreter's exit would abort the process: see above.
            atexit.register(_join, threads, limits.LAST_TIMEOUT)

    def _run(self, work: Callable[[], None], sender: StoreSender) -> None:
        try:
            sender.connect()
            work()
        except Exception as err:  # boundary: whatever a store raises, it must not stop training
            if self._ended.acquire(blocking=False):
                log.debug("the channel between ranks broke", exc_info=True)
                try:
                    self._on_lost(f"{type(err).__name__}: {str(err).partition(chr(10))[0]}", sender)
                finally:
                    self._queue.put(None)
                    if sender is self._sender:
                        self._wake_receiver()
        finally:
            sender.disconnect()
            if sender is self._replies:
                self._inbox = None

    def _wake_receiver(self) -> None:
        # Over any connection that still works; where none does, the receiver's own call fails, too.
        for sender in (self._sender, self._replies):
            with suppress(Exception):
                sender.write(keys.message(self._rank, self._next), "[]")
                return

    def _receive(self) -> None:
        self._inbox = self._connect()
        self._inbox.set_timeout(timedelta(seconds=limits.INBOX_TIMEOUT))
        while not self._ended.locked():  # read after _next is written; those that end it do so before they read _next
            try:
                data = self._inbox.get(keys.message(self._rank, self._next))
            except RuntimeError as err:
                if "timeout" in str(err).lower() and not self._ended.locked():
                    continue
                raise
            self._inbox.delete_key(keys.message(self._rank, self._next))
            if self._ended.locked():
                return
            self._next += 1
            self._on_message(json.loads(data), self._replies)

    def _send(self) -> None:
        while True:
            delay = self._on_idle(self._sender)
            with suppress(Empty):
                task = self._queue.get(timeout=delay)
                if task is None:
                    break
                task(self._sender)
        if self._ended.acquire(blocking=False):
            self._wake_receiver()
            receiver, _ = self._threads
            receiver.join(limits.STORE_TIMEOUT)
            if not receiver.is_alive():
                self._on_end(self._next - 1, self._sender)


def _join(threads: list[threading.Thread], seconds: float) -> None:
    end = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
