"""The TCP port beside the Unix socket: options checked early, and the port bound before training starts.

Runs on the training thread of rank 0.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..errors import InvalidParams, PortTaken, TlsUnusable
from ..wire.addresses import is_loopback
from .auth import new_token

if TYPE_CHECKING:
    import ssl

    from .server import Server

log = logging.getLogger("forgather_control")


class BoundPort(NamedTuple):
    """An open port, as the job's record describes it; ``address`` is numeric, as a name may lead elsewhere."""

    address: str
    port: int
    token: str
    tls_sha256: str | None


class TcpOptions(NamedTuple):
    """A port to open; see ``training.options`` for the meaning of each."""

    port: int | Literal["auto"]
    host: str
    certfile: str | None = None
    keyfile: str | None = None

    def open(self, server: Server) -> BoundPort:
        """Bind the port. A port whose certificate or key is unusable is not opened without TLS instead.

        Raises:
            PortTaken, TlsUnusable: it cannot be bound; the certificate or its key cannot be used.
        """
        (context, sha256), token = self._tls(), new_token()
        try:
            address, port = server.listen_tcp(self.host, None if self.port == "auto" else self.port, token, context)
        except (OSError, ValueError, TypeError) as err:  # also no such address, or not a host name at all
            wanted = f"{ascii(self.host)[1:-1][:140]} port {self.port}"
            why = getattr(err, "strerror", None) or err
            raise PortTaken(f"{wanted} cannot be bound ({why})", port=self.port, host=self.host) from err
        if context is None and not is_loopback(address):
            log.warning(
                "Port %d of %s is open to the network without TLS: anyone who can read the traffic can read the token "
                "and then save, stop and abort this job. Give certfile=, or use ssh.",
                port,
                address,
            )
        return BoundPort(address, port, token, sha256)

    def _tls(self) -> tuple[ssl.SSLContext | None, str | None]:
        if self.certfile is None:
            return None, None
        from ..wire import tls

        try:
            return tls.server_context(self.certfile, self.keyfile), tls.fingerprint(self.certfile)
        except OSError as err:
            raise TlsUnusable(f"{err.filename or self.certfile} cannot be read ({err.strerror or err})") from err
        except ValueError as err:
            raise TlsUnusable(str(err)) from err


def demand(fits: bool, name: str, expected: str, value: Any) -> None:
    """Raise InvalidParams if the value of an option does not fit."""
    if not fits:
        raise InvalidParams(f"{name} must be {expected}, not {ascii(value)[:80]}", parameter=name)


def check(port: Any, host: Any, certfile: Any, keyfile: Any) -> TcpOptions | None:
    """Return the port that an integration's arguments ask for; raise InvalidParams at an impossible value."""
    for name, path in (("certfile", certfile), ("keyfile", keyfile)):
        demand(path is None or (isinstance(path, str) and path != ""), name, "the path of a PEM file", path)
    if port is None:
        return None
    is_port = port == "auto" or (type(port) is int and 0 <= port < 65536)
    demand(is_port, "port", 'None, "auto" or a number from 0 to 65535', port)
    demand(isinstance(host, str) and host != "", "host", "an address of this host", host)
    if keyfile is not None and certfile is None:
        raise InvalidParams("keyfile needs a certfile as well", parameter="keyfile")
    return TcpOptions(port, host, certfile, keyfile)
