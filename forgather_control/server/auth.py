"""The gate for strangers: over TCP the first line shows the token, or the connection ends there.

Floor 2: imports errors and jsonrpc. Runs on the server thread only; the clock is its caller's.

What is no ``authenticate`` request, or a notification of it, gets no reply at all: a web page's POST, a TLS
hello or a port scan learns nothing, and nothing of it is ever read as a command. A wrong token is answered,
late: each try takes ``AUTH_FAILURE_DELAY`` seconds and a place of its own, so nobody tries fast; but no address is
locked out, as the owner may come from the same one. Against 256 random bits guessing is hopeless anyway.
"""

from __future__ import annotations

import hmac
import logging
import secrets
from typing import Any, Literal

from ..errors import ControlError, NotAuthenticated
from ..wire import jsonrpc
from . import limits

log = logging.getLogger("forgather_control")


Verdict = Literal["welcome", "wrong", "noise"]


def new_token() -> str:
    """A new secret, for one run of one job."""
    return secrets.token_urlsafe(limits.TOKEN_BYTES)


class TokenAuthenticator:
    """Knows the token, and counts who did not.

    Args:
        token: the secret of this run.
    """

    def __init__(self, token: str) -> None:
        self._token = token.encode("ascii")
        #: Connections that were turned away, for whatever reason.
        self.refused = 0

    def is_noise(self, start: bytes) -> bool:
        """Whether what a stranger has sent so far can never become a first line that opens."""
        hopeless = start.lstrip(b" \t\r")[:1] not in (b"", b"{")
        if hopeless:
            self._count()
        return hopeless

    def judge(self, line: bytes) -> tuple[Verdict, bytes]:
        """Whether the first line of a connection opens it, and what a wrong token is answered."""
        request = _authenticate(line)
        if request is None:
            self._count()
            return "noise", b""
        if hmac.compare_digest(_token(request), self._token):
            return "welcome", b""
        self._count()
        return "wrong", _refusal(request)

    def _count(self) -> None:
        self.refused += 1
        if str(self.refused).strip("0") == "1":  # 1, 10, 100, ...: a scan must not fill the log
            plural = "" if self.refused == 1 else "s"
            log.warning("%d connection%s came over TCP without the token", self.refused, plural)


def _authenticate(line: bytes) -> jsonrpc.Request | None:
    if len(line) > limits.MAX_FIRST_LINE:
        return None
    try:
        message = jsonrpc.parse_message(line)
    except ControlError:
        return None
    item = message.items[0]
    if message.is_batch or not isinstance(item, jsonrpc.Request) or item.method != "authenticate":
        return None
    # A notification: who wants no answer would not learn that it was refused.
    return None if isinstance(item.id, jsonrpc.NoId) else item


def _token(request: jsonrpc.Request) -> bytes:
    """The token it shows; nothing where it shows none."""
    params: Any = request.params
    given = params.get("token") if isinstance(params, dict) else params[0] if len(params) == 1 else None
    return given.encode("utf-8") if isinstance(given, str) else b""


def _refusal(request: jsonrpc.Request) -> bytes:
    assert not isinstance(request.id, jsonrpc.NoId)
    error = NotAuthenticated("this is not the job's token; it stands in its endpoint.json, for its owner to read")
    return jsonrpc.response(request.id, error)
