"""Authentication over TCP: the first line must contain the token, otherwise the connection ends.

A first line that is not an ``authenticate`` request, or a batch that begins with one, gets no reply: a web page's POST,
a TLS hello or a port scan learns nothing, and nothing after it is read as a request. A wrong token is answered after a
delay and costs one connection, so tokens cannot be tried fast; but no address is locked out, as the owner may use the
same one. Against 256 random bits guessing is hopeless anyway. Runs on the server thread only.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, Literal

from ..errors import ControlError, NotAuthenticated
from ..wire import jsonrpc
from ..wire.limits import MAX_LINE
from . import limits
from .connection import Connection

log = logging.getLogger("forgather_control")

Verdict = Literal["accepted", "wrong token", "not authenticate"]


def new_token() -> str:
    """Return a new secret, for one run of one job."""
    return secrets.token_urlsafe(limits.TOKEN_BYTES)


class TokenAuthenticator:
    """Checks first lines against the token, and counts the connections that it turned away.

    Args:
        token: the secret of this run.
    """

    def __init__(self, token: str) -> None:
        self._token = token.encode("ascii")
        #: Number of connections that were turned away.
        self.refused = 0
        self._rejections: deque[tuple[float, Connection, bytes]] = deque()  # when to send which reply

    def admit(self, connection: Connection, line: bytes) -> bool:
        """Return whether the first line authenticates a connection; otherwise have it closed, soon or at once."""
        verdict, reply = self.check(line)
        if verdict == "accepted":
            connection.authenticated = True
            connection.max_line = MAX_LINE
        elif verdict == "wrong token":
            connection.stop_reading()
            connection.open += 1  # until the reply is sent
            self._rejections.append((time.monotonic() + limits.AUTH_FAILURE_DELAY, connection, reply))
        else:
            connection.broken = True
        return connection.authenticated

    def check_start(self, connection: Connection) -> None:
        """Have a connection closed whose first line cannot authenticate it, however it ends."""
        if self.is_hopeless(connection.partial_line):
            connection.broken = True

    def rejection_times(self) -> Iterator[float]:
        """Return when replies to wrong tokens are due, in ``time.monotonic()`` seconds."""
        return (at for at, _, _ in self._rejections)

    def send_rejections(self) -> Iterator[Connection]:
        """Answer wrong tokens whose delay is over; return their connections."""
        while self._rejections and self._rejections[0][0] <= time.monotonic():
            _, connection, reply = self._rejections.popleft()
            connection.open -= 1
            connection.send(reply)
            yield connection

    def is_hopeless(self, start: bytes) -> bool:
        """Return whether a line with this start cannot authenticate."""
        hopeless = start.lstrip(b" \t\r")[:1] not in (b"", b"{", b"[")
        if hopeless:
            self._count()
        return hopeless

    def check(self, line: bytes) -> tuple[Verdict, bytes]:
        """Return whether the first line of a connection authenticates it, and the reply to a wrong token."""
        found = _authenticate(line)
        if found is None:
            self._count()
            return "not authenticate", b""
        message, request = found
        if hmac.compare_digest(_token(request), self._token):
            return "accepted", b""
        self._count()
        return "wrong token", _refusal(message)

    def _count(self) -> None:
        self.refused += 1
        if str(self.refused).strip("0") == "1":  # 1, 10, 100, ...: a scan must not fill the log
            log.warning("Rejected a TCP connection that did not send the job's token (%d so far)", self.refused)


def _authenticate(line: bytes) -> tuple[jsonrpc.Message, jsonrpc.Request] | None:
    """Parse a line whose first request is ``authenticate``."""
    if len(line) > limits.MAX_FIRST_LINE:
        return None
    try:
        message = jsonrpc.parse_message(line)
    except ControlError:
        return None
    request = message.items[0]
    if not isinstance(request, jsonrpc.Request) or request.method != "authenticate":
        return None
    # Not a notification: its sender would not learn that it was refused.
    return None if isinstance(request.id, jsonrpc.NoId) else (message, request)


def _token(request: jsonrpc.Request) -> bytes:
    """Return the token in a request; nothing if there is none."""
    params: Any = request.params
    given = params.get("token") if isinstance(params, dict) else params[0] if len(params) == 1 else None
    return given.encode("utf-8") if isinstance(given, str) else b""


def _refusal(message: jsonrpc.Message) -> bytes:
    """Return the reply to a line with a wrong token: an error for each of its requests."""
    error = NotAuthenticated(
        "This is not the job's token. The token is in the job's endpoint.json, which only its owner can read."
    )
    ids = [item.id for item in message.items]
    responses = [jsonrpc.response(id_, error) for id_ in ids if not isinstance(id_, jsonrpc.NoId)]
    return jsonrpc.replies(responses, message.is_batch)
