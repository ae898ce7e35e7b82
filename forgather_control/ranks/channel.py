"""The line between ranks: messages over a store of torch.distributed, heard without asking.

Floor 0: imports nothing of ours; knows a store by its methods, not torch. Two threads a rank, both
quiet: the *ear* is blocked in the store's ``get``, outside the interpreter's lock, until a message for
this rank comes; the *mouth* is blocked on a queue until this process has something to say. The training
thread, the server thread and signal handlers only put into that queue, so none of them ever waits for
the network.

Each rank has an inbox, the keys ``RANK/1``, ``RANK/2``, ... Whoever sends takes the next number by the
store's atomic ``add``, then writes that key; the receiver takes them in order and deletes them. (A sender
that dies between the two leaves a hole, behind which nothing is heard; but a job that lost a rank has
ended.) A message is one JSON array, its kind first.

An ear is woken for its end by its own mouth, which writes the key that the ear waits for: a thread left
in a call into C++ would be torn out of it when the interpreter ends, and that aborts the process.
"""

from __future__ import annotations

import json
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any, Final

log = logging.getLogger("forgather_control")

#: A wait that no training outlives: poll(2) counts milliseconds in an int, which ends at 24.8 days.
_FOREVER: Final = timedelta(days=20)
#: Seconds that any other call of the store may take before the line counts as broken.
_SOON: Final = timedelta(seconds=30)
#: Seconds that the interpreter's end may wait for a line that nobody closed.
_AT_EXIT: Final = 1.0


class StoreSender:
    """One thread's own connection to the store; a store serves one call at a time, and the ear's waits."""

    def __init__(self, store: Any) -> None:
        self._store = store
        store.set_timeout(_SOON)

    def send(self, ranks: Iterable[int], message: list[Any]) -> None:
        """Put a message into the inboxes of ``ranks``."""
        data = json.dumps(message)
        for rank in ranks:
            self._store.set(f"{rank}/{self._store.add(f'{rank}/count', 1)}", data)

    def decide(self, key: str, value: Any) -> Any:
        """What stands under ``key`` from now on: ``value``, if nothing stood there."""
        return json.loads(self._store.compare_set(key, "", json.dumps(value)))

    def write(self, key: str, data: str) -> None:
        """Write a key, whatever stood there."""
        self._store.set(key, data)


class StoreChannel:
    """One rank's end of the line.

    Args:
        connect: makes a new connection to the store, one for each thread.
        rank: whose inbox to listen to.
        hear: called on the ear's thread with each message, and a voice to answer with.
        pause: called on the mouth's thread: seconds after which to call ``idle``; ``None`` for never.
        idle: called on the mouth's thread when nothing was said for that long.
        cut: called on either thread, once, when the line broke: the store's host has gone, say; with a voice that
            may still be heard.

    Raises:
        RuntimeError: the store cannot be reached (torch's ``DistError`` is one).
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        rank: int,
        hear: Callable[[list[Any], StoreSender], None],
        pause: Callable[[], float | None],
        idle: Callable[[StoreSender], None],
        cut: Callable[[str, StoreSender], None],
    ) -> None:
        self._rank = rank
        self._hear, self._pause, self._idle, self._cut = hear, pause, idle, cut
        self._inbox = connect()
        self._inbox.set_timeout(_FOREVER)
        self._answers, self._voice = StoreSender(connect()), StoreSender(connect())
        self._queue: SimpleQueue[Callable[[StoreSender], None] | None] = SimpleQueue()
        self._at_exit: Any = None
        self._next = 1  # the key that the ear waits for, written by it alone
        self._over = False
        self._lock = threading.Lock()  # guards _over against two threads that find the line broken
        self._threads = [
            threading.Thread(target=self._run, args=(work, voice), name=f"forgather-{name}", daemon=True)
            for name, work, voice in (("ear", self._listen, self._answers), ("mouth", self._talk, self._voice))
        ]

    def start(self) -> None:
        """Begin to hear and to speak."""
        # Whoever forgot to close, or is closed by a finalizer of his own, made later: those run last made first.
        self._at_exit = weakref.finalize(self, self.close, _AT_EXIT)
        for thread in self._threads:
            thread.start()

    def say(self, speak: Callable[[StoreSender], None]) -> None:
        """Have ``speak`` called on the mouth's thread. Reentrant and never blocks: fit for signal handlers."""
        self._queue.put(speak)

    def close(self, seconds: float) -> None:
        """Say what is queued, then end both threads; a dead network costs at most ``seconds``."""
        if self._at_exit is not None:
            self._at_exit.detach()
        self._queue.put(None)
        end = time.monotonic() + seconds
        for thread in self._threads:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(max(0.0, end - time.monotonic()))

    def _run(self, work: Callable[[], None], voice: StoreSender) -> None:
        try:
            work()
        except Exception as err:  # border: whatever a store raises, it must not stop training
            with self._lock:
                was_over, self._over = self._over, True
            if not was_over:
                log.debug("the line between ranks broke", exc_info=True)
                self._cut(f"{type(err).__name__}: {str(err).partition(chr(10))[0]}", voice)
                self._queue.put(None)

    def _listen(self) -> None:
        while not self._over:  # looked at after _next is written, as _talk writes _over before it reads _next
            try:
                data = self._inbox.get(f"{self._rank}/{self._next}")
            except RuntimeError as err:
                if "timeout" in str(err).lower() and not self._over:
                    continue
                raise
            if self._over:
                return
            self._inbox.delete_key(f"{self._rank}/{self._next}")
            self._next += 1
            self._hear(json.loads(data), self._answers)

    def _talk(self) -> None:
        while True:
            try:
                speak = self._queue.get(timeout=self._pause())
            except Empty:
                self._idle(self._voice)
                continue
            if speak is None:
                break
            speak(self._voice)
        with self._lock:
            broken, self._over = self._over, True
        if not broken:
            self._voice.write(f"{self._rank}/{self._next}", "[]")
