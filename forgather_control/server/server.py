"""A line server in one thread: bytes from many connections to one handler, and back.

Floor 3: imports clock, errors, jsonrpc, connection, exchange, gate and listener; knows nothing of training,
and must not import torch. All but ``start``, ``wake``, ``close`` and ``abandon`` runs on the server thread.

``socketserver``, in ``listener``, gives bind, accept, the check of the peer and closing; a connection goes
to a selector in the same thread instead of a thread of its own, and a request that has
to wait is an object to ask again, not a blocked thread. So 1,000 connections cost no thread, and
closing them all at once makes one thread runnable, not a thousand that fight for the interpreter.
Who comes over TCP is a stranger until it has passed the ``gate``.

One round::

    select ─▶ accept, read ─▶ one line of each connection in turn ─▶ ask the waiting again ─▶ tick
                                     └─ until the budget is spent: then nap, deaf to all but wake()
"""

from __future__ import annotations

import errno
import logging
import os
import resource
import select
import selectors
import signal
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from ..errors import NotAuthenticated
from ..wire import addresses, jsonrpc
from ..wire.limits import MAX_LINE
from . import auth, limits
from .budget import CpuBudget
from .connection import Connection, TlsConnection
from .dispatcher import Dispatcher, Handler, Peer, ReplySink
from .listener import Listener, TcpListener, UnixListener, open_port

if TYPE_CHECKING:
    import ssl

log = logging.getLogger("forgather_control")


_NO_TLS: Final = jsonrpc.response(None, NotAuthenticated("this port speaks TLS: connect to tls://"))


class Server:
    """Serves ``handler`` over a Unix socket, and over TCP if that is asked for, in one daemon thread.

    Args:
        handler: called on the server thread for each request; see ``dispatcher.Handler``.
        tick: called on the server thread every ``TICK_PERIOD`` seconds.
        last: called on the server thread once, before who still waits is told that the job is ending.

    The order of life: ``listen``, ``start``, (``listen`` again from ``tick``), ``close``.
    """

    def __init__(self, handler: Handler, tick: Callable[[], None], last: Callable[[], None] = lambda: None) -> None:
        self._dispatcher, self._tick, self._last = Dispatcher(handler), tick, last
        self._selector = selectors.DefaultSelector()
        self._listeners: list[Listener] = []
        self._gate: auth.TokenAuthenticator | None = None
        self._accept_after: float | None = None  # monotonic; set while the process is out of files
        self._connections: dict[int, Connection] = {}
        self._punished: list[tuple[float, Connection, bytes]] = []  # when to answer whom, and what
        self._queue: deque[Connection] = deque()  # those with something to take, each once
        self._thread: threading.Thread | None = None
        self._closing = self._closed_from_tick = False
        self._woken = False
        self._wake_out, self._wake_in = os.pipe()
        os.set_blocking(self._wake_in, False)
        os.set_blocking(self._wake_out, False)
        self._selector.register(self._wake_out, selectors.EVENT_READ)
        _servers.add(self)

    # For other threads...

    def listen(self, path: str) -> None:
        """Listen at ``path``, and no longer where it listened before; open connections stay.

        Before ``start`` on any thread, later on the server thread only.

        Raises:
            OSError: the path cannot be bound.
        """
        listener = UnixListener(path, self._adopt)
        for old in [old for old in self._listeners if isinstance(old, UnixListener)]:
            self._take_backlog(old)  # who has connected there has sent a request, too
            self._drop_listener(old)
        self._add_listener(listener)

    def listen_tcp(self, host: str, port: int | None, token: str, tls: ssl.SSLContext | None) -> tuple[str, int]:
        """Listen at a port, too, for who shows the token; the address and port it has. Before ``start``, on any thread.

        Args:
            port: a number, 0 for any, ``None`` for the first free one from ``limits.DEFAULT_PORT``.
            tls: what it speaks, if it speaks TLS.

        Raises:
            OSError, ValueError, TypeError: it cannot be bound.
        """
        self._gate = auth.TokenAuthenticator(token)
        listener: TcpListener = open_port(host, port, lambda sock: self._adopt_stranger(sock, tls))
        self._add_listener(listener)
        return listener.bound

    def _add_listener(self, listener: Listener) -> None:
        self._listeners.append(listener)
        if self._accept_after is None:
            self._selector.register(listener, selectors.EVENT_READ)

    def start(self) -> None:
        """Begin to answer."""
        thread = threading.Thread(target=self._run, name="forgather-control", daemon=True)
        thread.start()
        self._thread = thread  # only a thread that runs can be joined

    def wake(self) -> None:
        """Have the waiting requests asked again soon. Never blocks; callable from any thread."""
        try:
            os.write(self._wake_in, b"\0")
        except OSError:
            pass  # the pipe is full, so the thread is about to wake; or it is closed, and nobody waits

    def close(self, timeout: float) -> None:
        """Answer what can be answered, then close everything.

        Who is connected, or stands in the backlog, is read once more; who still waits is told that
        the job is ending; ``CLOSE_GRACE`` are left for reading the replies.

        Args:
            timeout: seconds after which the thread is left to itself.
        """
        self._closing = True
        if self._thread is None:
            self._release()
        elif self._thread is threading.current_thread():
            self._closed_from_tick = True  # then the thread ends with it
            return
        else:
            self.wake()
            self._thread.join(timeout)
            if self._thread.is_alive():
                return  # its descriptors are its own until it ends
        self._close_pipe()

    def abandon(self) -> None:
        """In a forked child: let go of all descriptors without a word to the parent's clients.

        Nothing is unregistered, because the selector's set is the parent's, too.
        """
        for connection in self._connections.values():
            connection.sock.close()
        for listener in self._listeners:
            listener.socket.close()
        self._selector.close()
        self._close_pipe()

    def _close_pipe(self) -> None:
        _servers.discard(self)
        ends, self._wake_in, self._wake_out = (self._wake_in, self._wake_out), -1, -1
        for end in ends:
            if end >= 0:
                os.close(end)

    # For who is called on the server thread...

    def dispatch(self, sink: ReplySink, line: bytes) -> None:
        """Have a line answered that came in another way."""
        self._dispatcher.dispatch(sink, line)

    def check_room(self) -> None:
        """Raise TooManyCommands where an answer that has to wait could not."""
        self._dispatcher.check_room()

    @property
    def is_this_thread(self) -> bool:
        """Whether this is the server thread."""
        return self._thread is threading.current_thread()

    # The server thread, round by round...

    def _run(self) -> None:
        # OpenSSL cannot be told MSG_NOSIGNAL; see ``connection``.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})
        budget = CpuBudget(limits.CPU_SHARE, limits.CPU_BURST)
        tick_at = time.monotonic() + limits.TICK_PERIOD
        while not self._closing:
            try:
                self._round(tick_at, budget)
                if time.monotonic() >= tick_at:
                    tick_at = time.monotonic() + limits.TICK_PERIOD
                    self._sweep(time.monotonic())
                    self._tick()
            except Exception:  # border: a fault of ours ends neither this thread nor the training
                log.exception("the control server stumbled, and goes on")
                time.sleep(limits.TICK_PERIOD)  # should it stumble each time: seldom
        try:
            self._last_round()
        except Exception:  # border: as above
            log.exception("the control server stumbled while it closed")
        self._release()
        if self._closed_from_tick:
            self._close_pipe()

    def _round(self, tick_at: float, budget: CpuBudget) -> None:
        nap = budget.throttle_delay()
        if nap > 0:
            self._nap(min(nap, limits.TICK_PERIOD))
        else:
            self._select(0.0 if self._queue else self._seconds_until(tick_at))
            self._answer_some()
        if self._punished:
            self._answer_punished(time.monotonic())
        woken, self._woken = self._woken, False
        for asker in self._dispatcher.poll(woken):
            if isinstance(asker, Connection):
                self._settle(asker)

    def _nap(self, seconds: float) -> None:
        poller = select.poll()
        poller.register(self._wake_out, select.POLLIN)
        if poller.poll(seconds * 1000):
            self._drain_wake()

    def _seconds_until(self, tick_at: float) -> float:
        moments = [tick_at, *self._dispatcher.deadlines(), *(moment for moment, _, _ in self._punished)]
        if self._accept_after is not None:
            moments.append(self._accept_after)
        return max(0.0, min(moments) - time.monotonic())

    def _select(self, timeout: float) -> None:
        if self._accept_after is not None and time.monotonic() >= self._accept_after:
            self._accept_after = None
            for listener in self._listeners:
                self._selector.register(listener, selectors.EVENT_READ)
        for key, events in self._selector.select(timeout):
            if isinstance(key.fileobj, Listener):
                self._accept(key.fileobj)
            elif key.fd == self._wake_out:
                self._drain_wake()
            elif key.fd in self._connections:  # an earlier event of this round may have closed it
                self._serve(self._connections[key.fd], events)

    def _drain_wake(self) -> None:
        self._woken = True
        try:
            os.read(self._wake_out, 4096)
        except BlockingIOError:
            pass

    # ... connections come, send, and go

    def _accept(self, listener: Listener) -> None:
        try:
            # Most come alone, and to look in vain for another costs as much as a round. But where others are being
            # answered, who comes must soon stand among them: the listen queue knows no turns.
            for _ in range(limits.ACCEPTS_PER_ROUND if self._queue else 1):
                if not listener.accept():
                    return
        except OSError as err:
            if err.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                return
            # Out of files: a backlog that cannot be taken would wake us for ever. Look again later.
            if self._accept_after is None:
                self._accept_after = time.monotonic() + limits.TICK_PERIOD
                for each in self._listeners:
                    self._selector.unregister(each)

    def _adopt(self, sock: socket.socket) -> None:
        self._admit(Connection(sock, MAX_LINE, Peer("socket", *addresses.peer_ids(sock))))

    def _adopt_stranger(self, sock: socket.socket, tls: ssl.SSLContext | None) -> None:
        strangers = [connection for connection in self._connections.values() if connection.is_stranger]
        if len(strangers) >= limits.MAX_UNAUTHENTICATED:
            self._drop(min(strangers, key=lambda connection: connection.came_at))
        if tls is None:
            connection = Connection(sock, limits.MAX_FIRST_LINE, Peer("tcp"))
        else:
            connection = TlsConnection(sock, limits.MAX_FIRST_LINE, tls, _NO_TLS)
        connection.is_stranger = True
        self._admit(connection)

    def _admit(self, connection: Connection) -> None:
        if len(self._connections) >= _most_connections():
            self._close_idlest()
        self._connections[connection.fd] = connection
        self._serve(connection, selectors.EVENT_READ)  # mostly its request is there; watched when that is answered

    def _serve(self, connection: Connection, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            connection.flush()
        if connection.queued:
            self._settle(connection)
            return
        if events & selectors.EVENT_READ:
            connection.read()
        if connection.broken:  # at once: its descriptor may be free, and the next one's
            self._drop(connection)
            return
        connection.queued = True  # after a flush, too: lines that came in earlier may have waited for room
        self._queue.append(connection)

    def _settle(self, connection: Connection) -> None:
        """Close a connection that is over, else watch for what it may do next."""
        if connection.broken or (connection.at_end and connection.is_idle):
            self._drop(connection)
            return
        listens = not (connection.at_end or connection.queued or connection.unsent > limits.MAX_UNSENT)
        self._watch(
            connection,
            (selectors.EVENT_READ if listens else 0) | (selectors.EVENT_WRITE if connection.unsent else 0),
        )

    def _watch(self, connection: Connection, events: int) -> None:
        key = self._selector.get_map().get(connection.fd)
        if key is None:
            if events:
                self._selector.register(connection.fd, events)
        elif not events:
            self._selector.unregister(connection.fd)
        elif key.events != events:
            self._selector.modify(connection.fd, events)

    def _drop(self, connection: Connection) -> None:
        if self._connections.get(connection.fd) is connection:
            del self._connections[connection.fd]
            self._watch(connection, 0)
            connection.close()

    def _close_idlest(self) -> None:
        """A stranger; else who is silent longest; only then who waits for a reply or reads one.

        Half a line is no claim to a place.
        """
        everybody = self._connections.values()
        least = min(everybody, key=lambda c: (not c.is_stranger, c.open > 0 or c.unsent > 0, c.moved_at), default=None)
        if least is not None:
            self._drop(least)

    def _sweep(self, now: float) -> None:
        """Drop who stopped reading, who hung up while a request of theirs waits, who shows no token, who is silent."""
        for connection in list(self._connections.values()):
            stalled = connection.unsent and now - connection.moved_at > limits.STALL_TIMEOUT
            hides = connection.is_stranger and now - connection.came_at > limits.AUTH_TIMEOUT
            silent = connection.sock.family != socket.AF_UNIX and now - connection.moved_at > limits.IDLE_TIMEOUT
            if stalled or hides or (silent and not connection.open) or (connection.at_end and connection.hung_up()):
                self._drop(connection)

    def _answer_some(self) -> None:
        """One line of each connection in turn, for at most a slice of processor time."""
        until = time.thread_time() + limits.CPU_SLICE
        while self._queue:
            connection = self._queue.popleft()
            connection.queued = False
            has_room = not connection.broken and connection.unsent <= limits.MAX_UNSENT
            if has_room and (line := connection.take_line()) is not None:
                if connection.is_stranger and not self._passes(connection, line):
                    continue
                self._dispatcher.dispatch(connection, line)
                connection.queued = True
                self._queue.append(connection)
                if time.thread_time() >= until:
                    return
            elif connection.is_stranger and self._is_noise(connection):
                self._drop(connection)
            else:
                self._settle(connection)

    # Strangers...

    def _is_noise(self, connection: Connection) -> bool:
        assert self._gate is not None
        return self._gate.is_noise(connection.half_line)

    def _passes(self, connection: Connection, line: bytes) -> bool:
        """Whether a stranger's first line lets it in; if not, it is punished, or gone."""
        assert self._gate is not None
        verdict, reply = self._gate.judge(line)
        if verdict == "welcome":
            connection.is_stranger = False
            connection.max_line = MAX_LINE
            return True
        if verdict == "wrong":
            connection.stop_reading()
            self._watch(connection, 0)
            self._punished.append((time.monotonic() + limits.AUTH_FAILURE_DELAY, connection, reply))
        else:
            self._drop(connection)
        return False

    def _answer_punished(self, now: float) -> None:
        due = [item for item in self._punished if item[0] <= now]
        self._punished = [item for item in self._punished if item[0] > now]
        for _, connection, reply in due:
            if not connection.broken:
                connection.send(reply)
                self._drop(connection)

    # The end...

    def _last_round(self) -> None:
        for listener in self._listeners:
            self._take_backlog(listener)
        for connection in list(self._connections.values()):
            connection.read()
            while not connection.broken and (line := connection.take_line()) is not None:
                if not connection.is_stranger or self._passes(connection, line):
                    self._dispatcher.dispatch(connection, line)
        self._last()
        self._dispatcher.give_up()
        self._flush_all(time.monotonic() + limits.CLOSE_GRACE)

    def _take_backlog(self, listener: Listener) -> None:
        try:
            while listener.accept():
                pass
        except OSError:
            pass  # out of files: who is not in cannot be told

    def _flush_all(self, until: float) -> None:
        while late := [c for c in self._connections.values() if c.unsent and not c.broken]:
            left = until - time.monotonic()
            if left <= 0:
                return
            poller = select.poll()
            for connection in late:
                poller.register(connection.sock, select.POLLOUT)
            poller.poll(left * 1000)
            for connection in late:
                connection.flush()

    def _release(self) -> None:
        for connection in list(self._connections.values()):
            self._drop(connection)
        for listener in list(self._listeners):
            self._drop_listener(listener)
        self._selector.close()

    def _drop_listener(self, listener: Listener) -> None:
        if self._accept_after is None:
            self._selector.unregister(listener)
        self._listeners.remove(listener)
        listener.server_close()


def _most_connections() -> int:
    """So many that the process keeps files for its training, however low its limit is (getrlimit(2))."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return limits.MAX_CONNECTIONS
    return max(8, min(limits.MAX_CONNECTIONS, soft - limits.RESERVED_FILES))


# A forked child (a DataLoader worker, say) would keep the socket open after the parent's death:
# connect succeeds, and nobody ever answers. One handler for all servers: it cannot be taken back.
_servers: weakref.WeakSet[Server] = weakref.WeakSet()


def _after_fork() -> None:
    for server in list(_servers):
        server.abandon()


os.register_at_fork(after_in_child=_after_fork)
