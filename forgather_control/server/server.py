"""A line server in one thread: lines from many connections to one handler, and replies back.

All but ``listen``, ``start``, ``call``, ``wake``, ``close`` and ``abandon`` runs on the server thread. Connections go
to a selector instead of a thread each, and a request that has to wait is an object to be polled, not a blocked thread.
So 1,000 connections cost no thread, and closing them all at once makes one thread runnable, not a thousand that compete
with training for the interpreter.

One round::

    select ─▶ accept, read ─▶ one line and one piece of a stream for each connection in turn ─▶ poll deferred ─▶ tick
                                  └─ until the processor budget is used up: then wait, only ``wake`` is noticed
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import selectors
import signal
import socket
import threading
import time
import weakref
from _thread import get_ident  # the system's, also once gevent or eventlet has replaced that of threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from ..descriptors import Kept
from ..wire.limits import MAX_LINE
from . import limits
from .auth import TokenAuthenticator, new_token
from .budget import CpuBudget
from .connection import Connection, TlsConnection
from .connections import Connections
from .dispatcher import Dispatcher, Handler, Peer
from .listener import Listener, Listeners, UnixListener, open_port
from .waker import Waker

if TYPE_CHECKING:
    import ssl

log = logging.getLogger("forgather_control")


class Server:
    """Serves a handler over a Unix socket and, if asked, over TCP, in one daemon thread.

    Args:
        handler: called on the server thread for each request; see ``dispatcher.Handler``.
        tick: called on the server thread every ``TICK_PERIOD`` seconds; more rarely while it raises.
        last: called on the server thread once, before the waiting requests are answered that the job is ending.
        check: called on the server thread whenever it has waited; returns why it can serve no longer, or ``None``.

    The order of calls: ``listen``, ``start``, (``listen`` again), ``close``.
    """

    def __init__(
        self,
        handler: Handler,
        tick: Callable[[], None],
        last: Callable[[], None] = lambda: None,
        check: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._dispatcher, self._tick, self._last, self._check = Dispatcher(handler), tick, last, check
        self._selector, self._waker = selectors.DefaultSelector(), Waker()
        fd = getattr(self._selector, "fileno", lambda: None)()  # poll(2) has none
        self._selector_file = None if fd is None else Kept.of(fd)
        self._selector.register(self._waker, selectors.EVENT_READ)
        self._listeners, self._connections = Listeners(self._selector), Connections(self._selector)
        self._authenticator = TokenAuthenticator(new_token())  # without a port, no client has this token
        self._queue: deque[Connection] = deque()  # connections that may have a line or a stream, each once
        self._thread: threading.Thread | None = None
        self._calls: deque[Callable[[], None]] = deque()  # from other threads
        self._closing = self._woken = False
        #: Why the thread ends by itself, after a last ``tick``; no connection is used from then on.
        self.fault: str | None = None
        self._tick_at = time.monotonic() + limits.TICK_PERIOD
        self._failed_ticks = self._skipped_ticks = 0
        #: On the server thread: answer a line that did not come over a connection; check for room to defer an answer.
        self.dispatch, self.check_room = self._dispatcher.dispatch, self._dispatcher.check_room
        #: On any thread: have deferred requests and subscriptions polled soon. Never blocks.
        self.wake = self._waker.wake
        _servers.add(self)

    def listen(self, path: str) -> None:
        """Listen at ``path`` instead of the path before, or raise OSError; open connections stay. On any thread."""
        if self._closing:
            raise OSError(errno.ESHUTDOWN, "the server is closed")
        add = partial(self._listeners.add, UnixListener(path, self._adopt))
        if self._thread is None or self.is_this_thread:
            add()
        else:
            self.call(add)

    def listen_tcp(self, host: str, port: int | None, token: str, tls: ssl.SSLContext | None) -> tuple[str, int]:
        """Listen on a port, too, for clients with the token; return its address and port. Before ``start``.

        See ``listener.open_port`` for the port and what is raised; with ``tls``, the port speaks TLS.
        """
        self._authenticator = TokenAuthenticator(token)
        listener = open_port(host, port, lambda sock, peer: self._adopt(sock, peer, tls))
        self._listeners.add(listener)
        return str(listener.server_address[0]), listener.server_address[1]

    def start(self) -> None:
        """Start the server thread."""
        thread = threading.Thread(target=self._run, name="forgather-control", daemon=True)
        thread.start()
        self._thread = thread  # only a thread that was started can be joined

    def call(self, call: Callable[[], None]) -> None:
        """Have a call run on the server thread soon. On any thread; never blocks."""
        self._calls.append(call)
        self.wake()

    @property
    def is_this_thread(self) -> bool:
        """Whether the caller runs on the server thread."""
        return self._thread is not None and self._thread.ident == get_ident()

    def close(self, timeout: float) -> None:
        """Answer what can be answered, then close everything.

        Clients that have connected, also those in the backlog, are read once more; waiting requests are answered that
        the job is ending; clients have ``CLOSE_GRACE`` seconds to read. After ``timeout`` seconds the thread finishes
        on its own, as it does when ``tick`` calls this.
        """
        self._closing = True
        if self._thread is None:
            self._release()
        elif not self.is_this_thread:
            self._waker.wake()
            self._thread.join(timeout)

    def abandon(self) -> None:
        """Close all descriptors in a forked child. Nothing is unregistered: the selector's set is the parent's, too."""
        for connection in self._connections:
            connection.close_socket()
        self._listeners.abandon()
        self._close_selector()
        self._waker.abandon()

    # The server thread...

    def _run(self) -> None:
        # OpenSSL cannot be told MSG_NOSIGNAL; see ``connection``.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
        budget = CpuBudget(limits.CPU_SHARE, limits.CPU_BURST, limits.CPU_SLICE)
        gc.callbacks.append(budget.leave_out_collection)
        try:
            self._serve_all(budget)
        finally:
            gc.callbacks.remove(budget.leave_out_collection)
        _survives(self._last_round if self.fault is None else self._tick)
        self._release()

    def _serve_all(self, budget: CpuBudget) -> None:
        faults = 0
        while not self._closing and self.fault is None:
            faults = 0 if _survives(self._round, budget) else faults + 1
            if faults:
                time.sleep(min(limits.TICK_PERIOD, 0.01 * 2 ** min(faults, 10)))  # it may occur in each round

    def _round(self, budget: CpuBudget) -> None:
        delay = budget.throttle_delay()
        if delay > 0:
            self._woken |= self._waker.wait(min(delay, limits.TICK_PERIOD))
        if delay > 0 or not self._select() or time.monotonic() >= self._tick_at:
            self.fault = self.fault or self._find_fault()  # before anything is sent that no client has just asked for
            if self.fault is not None:
                return
        if delay <= 0:
            self._serve_queue()
        self._run_calls()
        woken, self._woken = self._woken, False
        for sink in self._dispatcher.poll(woken):
            if isinstance(sink, Connection):
                self._connections.update(sink)
        for connection in self._connections.streams_due(woken):
            self._enqueue(connection)
        if time.monotonic() >= self._tick_at:
            self._tick_at = time.monotonic() + limits.TICK_PERIOD
            self._listeners.resume()
            self._connections.sweep()
            self._try_tick()

    def _run_calls(self) -> None:
        while self._calls:
            _survives(self._calls.popleft())

    def _try_tick(self) -> None:
        """Call ``tick``. After n failures in a row, skip the next 2 ** n - 1 (at most 31) calls."""
        if self._skipped_ticks > 0:
            self._skipped_ticks -= 1
        elif _survives(self._tick):
            self._failed_ticks = 0
        else:
            self._failed_ticks += 1
            self._skipped_ticks = 2 ** min(self._failed_ticks, 5) - 1

    def _find_fault(self) -> str | None:
        whole = self._waker.is_whole() and self._listeners.are_open()
        if whole and (self._selector_file is None or self._selector_file.is_open()):
            return None
        return "other code in this process closed its file descriptors"

    def _select(self) -> bool:
        """Serve what is ready; return whether there was anything."""
        streams = (connection.stream_time for connection in self._connections.subscribed)
        due = 0.0 if self._queue else min([self._tick_at, *self._dispatcher.deadlines(), *streams])
        try:
            ready = self._selector.select(due - time.monotonic())
        except (OSError, ValueError):
            if self._find_fault() is None:
                raise
            return False
        self.fault = self._check()
        for key, events in ready if self.fault is None else ():
            if isinstance(key.fileobj, Listener):
                # One is the rule, and looking for another costs as much as a round. But while others are being
                # answered, a new client must soon be among them: the backlog knows no turns.
                self._listeners.accept(key.fileobj, 64 if self._queue else 1)
            elif key.fileobj is self._waker:
                self._woken |= self._waker.wait(0.0)
            else:
                self._serve(key.data, events)
        return bool(ready) and self.fault is None

    def _adopt(self, sock: socket.socket, peer: Peer, tls: ssl.SSLContext | None = None) -> None:
        max_line = MAX_LINE if peer.via == "socket" else limits.MAX_FIRST_LINE
        connection = TlsConnection(sock, max_line, tls) if tls else Connection(sock, max_line, peer)
        self._connections.add(connection)
        self._serve(connection, selectors.EVENT_READ)  # usually the request is there; watched once that is answered

    def _serve(self, connection: Connection, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            connection.flush()
        if connection.queued:
            self._connections.update(connection)
            return
        if events & selectors.EVENT_READ:
            connection.read()
        if connection.broken:  # at once: its descriptor may be closed, and reused by the next connection
            self._connections.close(connection)
        else:
            self._enqueue(connection)  # after a flush, too: lines or a stream may have waited for room

    def _enqueue(self, connection: Connection) -> None:
        if not connection.queued:
            connection.queued = True
            self._queue.append(connection)

    def _serve_queue(self) -> None:
        """Serve connections in turn, for at most a slice of processor time."""
        until = time.thread_time() + limits.CPU_SLICE
        while self._queue:
            connection = self._queue.popleft()
            connection.queued = False
            if connection.broken:
                self._connections.close(connection)
            elif self._serve_one(connection):
                self._enqueue(connection)
                if time.thread_time() >= until:
                    return

    def _serve_one(self, connection: Connection) -> bool:
        """Answer one line and send one piece of a stream; return whether there may be more."""
        line = connection.take_line() if connection.unsent <= limits.MAX_UNSENT else None
        if line is not None:
            self._answer(connection, line)
        elif not connection.authenticated:
            self._authenticator.check_start(connection)
        if connection.stream() or line is not None:
            return True
        self._connections.update(connection)
        return False

    def _answer(self, connection: Connection, line: bytes) -> None:
        is_blank = len(line) <= connection.max_line and not line.strip(b" \t\r")
        if not is_blank and (connection.authenticated or self._authenticator.admit(connection, line)):
            self._dispatcher.dispatch(connection, line)
        if connection.subscription is not None:
            self._connections.subscribed.add(connection)

    def _last_round(self) -> None:
        self._listeners.close()
        for connection in self._connections:
            connection.read()
            while not connection.broken and (line := connection.take_line()) is not None:
                self._answer(connection, line)
            connection.stop_reading()
            self._enqueue(connection)
        self._last()
        self._run_calls()
        self._dispatcher.give_up()
        self._connections.streams_due(woken=True)
        self._tick_at = time.monotonic() + limits.CLOSE_GRACE
        while time.monotonic() < self._tick_at and (self._queue or any(each.unsent for each in self._connections)):
            self._select()
            self._serve_queue()

    def _release(self) -> None:
        if self.fault is None:
            self._listeners.close()
        self._listeners.abandon()
        for connection in self._connections:
            self._connections.close(connection)
        self._close_selector()
        self._waker.close()

    def _close_selector(self) -> None:
        if self.fault is None and (self._selector_file is None or self._selector_file.is_open()):
            self._selector.close()
        else:
            _left_open.append(self._selector)


def _survives(call: Callable[..., None], *args: Any) -> bool:
    """Return whether a call raised nothing: a fault here ends neither the server thread nor training."""
    try:
        call(*args)
        return True
    except Exception as err:  # boundary
        log.exception("Internal error in the control server (recovered): %s", err)
        return False


#: Selectors whose descriptors other code closed: theirs may be another's by now, and the garbage collector closes it.
_left_open: list[selectors.BaseSelector] = []

# A forked child (a DataLoader worker, for example) would keep the socket open after the parent's death: clients could
# connect, and would never be answered. One handler for all servers, as a fork handler cannot be unregistered.
_servers: weakref.WeakSet[Server] = weakref.WeakSet()


def _after_fork() -> None:
    for server in list(_servers):
        server.abandon()


os.register_at_fork(after_in_child=_after_fork)
