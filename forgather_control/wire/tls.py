"""TLS for the TCP port: what a job shows, and how a client makes sure that it is the job.

Floor 0: imports nothing of ours. Runs on whatever thread calls it. ``ssl`` and what hashes are imported when TLS
is used, as they cost a client more than all the rest.

A job's certificate is mostly its own work, so a client knows it by its SHA-256, which stands in
``endpoint.json``; or by a certificate authority, as https does.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import ssl


def server_context(certfile: str, keyfile: str | None) -> ssl.SSLContext:
    """What the job's port speaks.

    Args:
        certfile: a PEM file with the certificate, and those that certify it.
        keyfile: a PEM file with its private key, without a password; ``None`` if that is in ``certfile``, too.

    Raises:
        OSError: a file cannot be read.
        ValueError: they are no certificate and its key.
    """
    import ssl

    for path in filter(None, (certfile, keyfile)):
        with open(path, "rb"):
            pass  # ssl says that there is no such file, but not which
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # it costs the other side little, and us a signature each
    try:
        context.load_cert_chain(certfile, keyfile, password=_no_password)
    except ssl.SSLError as err:
        raise ValueError(f"{certfile} and {keyfile or 'itself'} are no certificate and its key ({err})") from err
    return context


def _no_password() -> str:
    raise ValueError("the key wants a password, and nobody is there to type it")


def fingerprint(certfile: str) -> str:
    """The SHA-256 of the first certificate of a PEM file, in hexadecimal, as ``openssl x509 -fingerprint`` has it.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds none.
    """
    import hashlib
    import ssl

    with open(certfile, encoding="ascii", errors="replace") as file:
        text = file.read()
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    body = text.partition(begin)[2].partition(end)[0]
    if not body:  # one that OpenSSL reads all the same: TRUSTED CERTIFICATE, as openssl x509 -trustout writes it
        raise ValueError(f"{certfile} holds no {begin}")
    pem = begin + body + end
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()


def wrap_client(sock: socket.socket, host: str, sha256: str | None, cafile: str | None) -> ssl.SSLSocket:
    """Shake hands with a job, and make sure that it is the one.

    Args:
        sha256: of its certificate, in hexadecimal; ``None`` has authorities vouch for ``host``.
        cafile: a PEM file with those authorities; ``None`` for the system's.

    Raises:
        PermissionError: it is another.
        OSError: it does not speak TLS, or not in time.
    """
    import hashlib
    import hmac
    import ssl

    try:
        context = ssl.create_default_context(cafile=cafile)
        context.check_hostname = sha256 is None
        context.verify_mode = ssl.CERT_REQUIRED if sha256 is None else ssl.CERT_NONE
        wrapped = context.wrap_socket(sock, server_hostname=host)
    except ssl.SSLCertVerificationError as err:
        raise PermissionError(f"the certificate of {host} is not to be trusted: {err.verify_message}") from err
    found = hashlib.sha256(wrapped.getpeercert(binary_form=True) or b"").hexdigest()
    if sha256 is not None and not hmac.compare_digest(found.encode(), _plain(sha256)):
        wrapped.close()
        raise PermissionError(f"{host} shows another certificate than the job's: its SHA-256 is {found}")
    return wrapped


def _plain(sha256: str) -> bytes:
    """A fingerprint without the colons that openssl puts in."""
    return sha256.replace(":", "").strip().lower().encode("ascii", "replace")
