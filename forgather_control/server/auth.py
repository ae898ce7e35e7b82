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
from typing import Any

from ..errors import ControlError, NotAuthenticated
from ..wire import jsonrpc
from ..wire.limits import MAX_LINE
from . import limits
from .connection import Connection
from .dispatcher import Subscription

log = logging.getLogger("forgather_control")


def new_token() -> str:
    """Return a new secret, for one run of one job."""
    return secrets.token_urlsafe(32)  # bytes


class TokenAuthenticator:
    """Checks first lines against the token of this run."""

    def __init__(self, token: str) -> None:
        self._token = token.encode("ascii")
        #: Number of connections that were turned away.
        self.refused = 0

    def check_start(self, connection: Connection) -> None:
        """Have a connection closed whose first line cannot authenticate it, however it ends."""
        if connection.partial_line.lstrip(b" \t\r")[:1] not in (b"", b"{", b"["):
            self._refuse(connection)

    def admit(self, connection: Connection, line: bytes) -> bool:
        """Return whether the first line authenticates a connection; otherwise have it closed, soon or at once."""
        found = _parse(line)
        if found is None:
            self._refuse(connection)
        elif hmac.compare_digest(found[1], self._token):
            connection.authenticated, connection.max_line = True, MAX_LINE
        else:
            self._refuse(connection, found[0])
        return connection.authenticated

    def _refuse(self, connection: Connection, message: jsonrpc.Message | None = None) -> None:
        self.refused += 1
        if str(self.refused).strip("0") == "1":  # 1, 10, 100, ...: a scan must not fill the log
            log.warning("Rejected a TCP connection that did not send the job's token (%d so far)", self.refused)
        if message is None:
            connection.broken = True
        else:
            connection.stop_reading()
            connection.start_subscription(_rejection(connection, message))


def _parse(line: bytes) -> tuple[jsonrpc.Message, bytes] | None:
    """Return a line that begins with a request ``authenticate``, and the token in it; nothing if there is none."""
    if len(line) > limits.MAX_FIRST_LINE:
        return None
    try:
        message = jsonrpc.parse_message(line)
    except ControlError:
        return None
    request = message.items[0]
    if not isinstance(request, jsonrpc.Request) or request.method != "authenticate":
        return None
    if isinstance(request.id, jsonrpc.NoId):  # its sender would not learn that it was refused
        return None
    params: Any = request.params
    token = params.get("token") if isinstance(params, dict) else params[0] if len(params) == 1 else None
    return message, token.encode("utf-8") if isinstance(token, str) else b""


def _rejection(connection: Connection, message: jsonrpc.Message) -> Subscription:
    """Return a stream of one reply, which is due after a delay: an error for each request of a line."""
    due = time.monotonic() + limits.AUTH_FAILURE_DELAY
    error = NotAuthenticated(
        "This is not the job's token. The token is in the job's endpoint.json, which only its owner can read."
    )
    ids = [item.id for item in message.items]
    responses = [jsonrpc.response(id_, error) for id_ in ids if not isinstance(id_, jsonrpc.NoId)]

    def pull(_size: int) -> bytes:
        if time.monotonic() < due:
            return b""
        connection.end_subscription()
        return jsonrpc.replies(responses, message.is_batch)

    return Subscription(None, pull, lambda: due)
