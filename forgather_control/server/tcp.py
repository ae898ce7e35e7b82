"""The TCP port that a job may offer beside its socket: what was asked for, checked early, and opened once.

Floor 3, training side: imports endpoint, errors, gate and tls. Runs on the training thread of rank 0, before training.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from ..errors import InvalidParams, PortTaken, TlsUnusable
from ..wire import tls
from ..wire.addresses import is_loopback
from . import auth

if TYPE_CHECKING:
    import ssl

log = logging.getLogger("forgather_control")


class TcpServer(Protocol):
    """The server, as far as it matters here."""

    def listen_tcp(self, host: str, port: int | None, token: str, tls: ssl.SSLContext | None) -> tuple[str, int]: ...


class BoundPort(NamedTuple):
    """An open port, as the job's record tells of it; ``address`` is a number, so that no name leads elsewhere."""

    address: str
    port: int
    token: str
    tls_sha256: str | None


class TcpOptions(NamedTuple):
    """A port that is to be opened.

    Attributes:
        port: its number, 0 for any, ``"auto"`` for the first free one from 8900.
        host: the address to bind.
        certfile: a PEM file with the certificate; ``None`` for a port without TLS.
        keyfile: a PEM file with its key; ``None`` if that is in ``certfile``, too.
    """

    port: int | Literal["auto"]
    host: str
    certfile: str | None = None
    keyfile: str | None = None

    def open(self, server: TcpServer) -> BoundPort:
        """Bind the port, and keep it.

        Raises:
            PortTaken: it cannot be had.
            TlsUnusable: the certificate or its key cannot be used; a port without TLS is no answer to that.
        """
        context, sha256 = self._tls()
        token = auth.new_token()
        try:
            address, port = server.listen_tcp(self.host, None if self.port == "auto" else self.port, token, context)
        except (OSError, ValueError, TypeError) as err:  # no such address, too, and what can be no host name
            wanted = f"{ascii(self.host)[1:-1][:140]} port {self.port}"
            why = getattr(err, "strerror", None) or err
            raise PortTaken(f"{wanted} cannot be had ({why})", port=self.port, host=self.host) from err
        if context is None and not is_loopback(address):
            log.warning(
                "port %d of %s is open to the network without TLS: whoever sees the traffic sees the token, "
                "and can then save, stop and abort this job; give certfile=, or use ssh",
                port,
                address,
            )
        return BoundPort(address, port, token, sha256)

    def _tls(self) -> tuple[ssl.SSLContext | None, str | None]:
        if self.certfile is None:
            return None, None
        try:
            return tls.server_context(self.certfile, self.keyfile), tls.fingerprint(self.certfile)
        except OSError as err:
            raise TlsUnusable(f"{err.filename or self.certfile} cannot be read ({err.strerror or err})") from err
        except ValueError as err:
            raise TlsUnusable(str(err)) from err


def check(port: Any, host: Any, certfile: Any, keyfile: Any) -> TcpOptions | None:
    """What the arguments of an adapter ask for; ``None`` without a port.

    Raises:
        InvalidParams: which of them cannot be what it is.
    """
    for name, path in (("certfile", certfile), ("keyfile", keyfile)):
        if path is not None and (not isinstance(path, str) or not path):
            raise InvalidParams(f"{name} must be the path of a PEM file, not {ascii(path)[:80]}", parameter=name)
    if port is None:
        return None
    if port != "auto" and (type(port) is not int or not 0 <= port < 65536):
        raise InvalidParams(f'port must be None, "auto" or from 0 to 65535, not {ascii(port)[:80]}', parameter="port")
    if not isinstance(host, str) or not host:
        raise InvalidParams(f"host must be an address of this host, not {ascii(host)[:80]}", parameter="host")
    if keyfile is not None and certfile is None:
        raise InvalidParams(
            "keyfile needs a certfile: a key without its certificate shows nothing", parameter="keyfile"
        )
    return TcpOptions(port, host, certfile, keyfile)
