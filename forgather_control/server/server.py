"""A line server in one thread: lines from many connections to one handler, and replies back.

All but ``listen``, ``start``, ``wake``, ``close`` and ``abandon`` runs on the server thread. Connections go to a
selector instead of a thread each, and a request that has to wait is an object to be polled, not a blocked thread. So
1,000 connections cost no thread, and closing them all at once makes one thread runnable, not a thousand that compete
with training for the interpreter.

One round::

    select ─▶ accept, read ─▶ one line and one piece of a stream for each connection in turn ─▶ poll deferred ─▶ tick
                                  └─ until the processor budget is used up: then wait, only ``wake`` is noticed
"""

from __future__ import annotations

import logging
import os
import selectors
import signal
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from ..deadline import Deadline
from ..errors import NotAuthenticated
from ..wire import jsonrpc
from ..wire.limits import MAX_LINE
from . import limits
from .auth import TokenAuthenticator, new_token
from .budget import CpuBudget
from .connection import Connection, TlsConnection
from .connections import Connections
from .dispatcher import Dispatcher, Handler, Peer, ReplySink
from .listener import Listener, Listeners, open_port, open_socket
from .waker import Waker

if TYPE_CHECKING:
    import ssl

log = logging.getLogger("forgather_control")

_NO_TLS: Final = jsonrpc.response(None, NotAuthenticated("This port speaks TLS. Connect to tls:// instead."))


class Server:
    """Serves a handler over a Unix socket and, if asked, over TCP, in one daemon thread.

    Args:
        handler: called on the server thread for each request; see ``dispatcher.Handler``.
        tick: called on the server thread every ``TICK_PERIOD`` seconds; more rarely while it raises.
        last: called on the server thread once, before the waiting requests are answered that the job is ending.

    The order of calls: ``listen``, ``start``, (``listen`` again from ``tick``), ``close``.
    """

    def __init__(self, handler: Handler, tick: Callable[[], None], last: Callable[[], None] = lambda: None) -> None:
        self._dispatcher, self._tick, self._last = Dispatcher(handler), tick, last
        self._selector = selectors.DefaultSelector()
        self._listeners = Listeners(self._selector)
        self._connections = Connections(self._selector)
        self._authenticator = TokenAuthenticator(new_token())  # without a port, no client has this token
        self._queue: deque[Connection] = deque()  # connections that may have a line or a stream, each once
        self._thread: threading.Thread | None = None
        self._closing = self._closed_from_tick = self._woken = False
        self._tick_at = time.monotonic() + limits.TICK_PERIOD
        self._failed_ticks = self._skipped_ticks = 0
        self._waker = Waker()
        self._selector.register(self._waker, selectors.EVENT_READ)
        _servers.add(self)

    # For other threads...

    def listen(self, path: str) -> None:
        """Listen at ``path`` instead of the path before; open connections stay.

        On any thread before ``start``, later on the server thread only.

        Raises:
            OSError: the path cannot be bound.
        """
        self._listeners.add(open_socket(path, self._adopt))

    def listen_tcp(self, host: str, port: int | None, token: str, tls: ssl.SSLContext | None) -> tuple[str, int]:
        """Listen on a port, too, for clients with the token; return its address and port. Before ``start``.

        Args:
            port: a number, 0 for any, ``None`` for the first free one from ``DEFAULT_PORT``.
            tls: for a port that speaks TLS.

        Raises:
            OSError, ValueError, TypeError: it cannot be bound.
        """
        self._authenticator = TokenAuthenticator(token)
        listener = open_port(host, port, lambda sock, peer: self._adopt(sock, peer, tls))
        self._listeners.add(listener)
        host, port = listener.socket.getsockname()[:2]
        return host, port

    def start(self) -> None:
        """Start the server thread."""
        thread = threading.Thread(target=self._run, name="forgather-control", daemon=True)
        thread.start()
        self._thread = thread  # only a thread that was started can be joined

    def wake(self) -> None:
        """Have deferred requests and subscriptions polled soon. Never blocks; callable from any thread."""
        self._waker.wake()

    def close(self, timeout: float) -> None:
        """Answer what can be answered, then close everything.

        Clients that have connected, also those in the backlog, are read once more; waiting requests are answered that
        the job is ending; clients have ``CLOSE_GRACE`` seconds to read.

        Args:
            timeout: seconds to wait for the thread; after that it finishes on its own.
        """
        self._closing = True
        if self._thread is None:
            self._release()
        elif self._thread is threading.current_thread():
            self._closed_from_tick = True  # then the thread ends with it
            return
        else:
            self._waker.wake()
            self._thread.join(timeout)
            if self._thread.is_alive():
                return  # it still uses its descriptors
        self._close_waker()

    def abandon(self) -> None:
        """Close all descriptors in a forked child, and send nothing to the parent's clients.

        Nothing is unregistered, because the selector's set is the parent's, too.
        """
        for connection in self._connections:
            connection.sock.close()
        self._listeners.abandon()
        self._selector.close()
        self._waker.abandon()
        _servers.discard(self)

    def _close_waker(self) -> None:
        _servers.discard(self)
        self._waker.close()

    # For the handler and the tick, on the server thread...

    def dispatch(self, sink: ReplySink, line: bytes) -> None:
        """Answer a line that did not come over a connection."""
        self._dispatcher.dispatch(sink, line)

    def check_room(self) -> None:
        """Raise TooManyCommands if no more answers can be deferred."""
        self._dispatcher.check_room()

    @property
    def is_this_thread(self) -> bool:
        """Whether the caller runs on the server thread."""
        return self._thread is threading.current_thread()

    # The server thread...

    def _run(self) -> None:
        # OpenSSL cannot be told MSG_NOSIGNAL; see ``connection``.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
        budget, faults = CpuBudget(limits.CPU_SHARE, limits.CPU_BURST), 0
        while not self._closing:
            try:
                self._round(budget)
                faults = 0
            except Exception as err:  # boundary: a fault here ends neither this thread nor training
                log.exception("Internal error in the control server (recovered): %s", err)
                faults += 1
                time.sleep(min(limits.TICK_PERIOD, 0.01 * 2 ** min(faults, 10)))  # it may occur in each round
        try:
            self._last_round()
        except Exception as err:  # boundary: as above
            log.exception("Internal error in the control server while it closed: %s", err)
        self._release()
        if self._closed_from_tick:
            self._close_waker()

    def _round(self, budget: CpuBudget) -> None:
        delay = budget.throttle_delay()
        if delay > 0:
            self._woken |= self._waker.wait(min(delay, limits.TICK_PERIOD))
        else:
            self._select(0.0 if self._queue else self._timeout())
            self._serve_queue()
        woken, self._woken = self._woken, False
        for sink in (*self._authenticator.send_rejections(), *self._dispatcher.poll(woken)):
            if isinstance(sink, Connection):
                self._connections.update(sink)
        for connection in self._connections.streams_due(woken):
            self._enqueue(connection)
        if time.monotonic() >= self._tick_at:
            self._tick_at = time.monotonic() + limits.TICK_PERIOD
            self._connections.sweep()
            self._try_tick()

    def _try_tick(self) -> None:
        """Call ``tick``. After n failures in a row, skip the next 2 ** n - 1 (at most 31) calls."""
        if self._skipped_ticks > 0:
            self._skipped_ticks -= 1
            return
        try:
            self._tick()
            self._failed_ticks = 0
        except Exception as err:  # boundary: requests are answered all the same
            log.exception("Internal error in the control server (recovered): %s", err)
            self._failed_ticks += 1
            self._skipped_ticks = 2 ** min(self._failed_ticks, 5) - 1

    def _timeout(self) -> float:
        """Return the seconds until something is due."""
        moments = [self._tick_at, *self._dispatcher.deadlines(), *self._connections.stream_times()]
        moments += self._authenticator.rejection_times()
        if self._listeners.retry_at is not None:
            moments.append(self._listeners.retry_at)
        return max(0.0, min(moments) - time.monotonic())

    def _select(self, timeout: float) -> None:
        self._listeners.resume()
        for key, events in self._selector.select(timeout):
            if isinstance(key.fileobj, Listener):
                # One is the rule, and looking for another costs as much as a round. But while others are being
                # answered, a new client must soon be among them: the backlog knows no turns.
                self._listeners.accept(key.fileobj, limits.ACCEPTS_PER_ROUND if self._queue else 1)
            elif key.fileobj is self._waker:
                self._waker.drain()
                self._woken = True
            elif (connection := self._connections.get(key.fd)) is not None:  # else closed by an earlier event
                self._serve(connection, events)

    # ... connections

    def _adopt(self, sock: socket.socket, peer: Peer, tls: ssl.SSLContext | None = None) -> None:
        max_line = MAX_LINE if peer.via == "socket" else limits.MAX_FIRST_LINE
        connection = TlsConnection(sock, max_line, tls, _NO_TLS) if tls else Connection(sock, max_line, peer)
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
        if is_blank or not (connection.authenticated or self._authenticator.admit(connection, line)):
            return
        self._dispatcher.dispatch(connection, line)
        self._connections.note_subscription(connection)

    # ... the end

    def _last_round(self) -> None:
        self._listeners.accept_backlogs()
        for connection in self._connections:
            connection.read()
            while not connection.broken and (line := connection.take_line()) is not None:
                self._answer(connection, line)
        self._last()
        self._dispatcher.give_up()
        self._connections.flush(Deadline(limits.CLOSE_GRACE))

    def _release(self) -> None:
        for connection in self._connections:
            self._connections.close(connection)
        self._listeners.close()
        self._selector.close()


# A forked child (a DataLoader worker, for example) would keep the socket open after the parent's death: clients could
# connect, and would never be answered. One handler for all servers, as a fork handler cannot be unregistered.
_servers: weakref.WeakSet[Server] = weakref.WeakSet()


def _after_fork() -> None:
    for server in list(_servers):
        server.abandon()


os.register_at_fork(after_in_child=_after_fork)
