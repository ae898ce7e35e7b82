"""TLS for the TCP port: the job's certificate, and how a client verifies it.

Import this module where TLS is used: ``ssl`` and ``hashlib`` take a client longer to load than everything else. A job's
certificate is usually self-signed, so a client verifies it by its SHA-256 in ``endpoint.json``; or by a certificate
authority, as https does.
"""

import hashlib
import socket
import ssl


def server_context(certfile: str, keyfile: str | None) -> ssl.SSLContext:
    """Return the TLS settings of the job's port.

    Both are PEM files: the certificate with those that certify it, and its private key without a password; ``None`` if
    the first contains it. Raises OSError if one cannot be read, ValueError if they are not a certificate and its key.
    """
    for path in filter(None, (certfile, keyfile)):
        with open(path, "rb"):
            pass  # the error of ssl does not name the file
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # it costs the client little, and the job a signature each time
    try:
        context.load_cert_chain(certfile, keyfile, password=_no_password)
    except ssl.SSLError as err:
        raise ValueError(f"{certfile} and {keyfile or 'itself'} are not a certificate and its key ({err})") from err
    return context


def _no_password() -> str:
    raise ValueError("the private key has a password; give a keyfile without one (openssl pkey -in OLD -out NEW)")


def fingerprint(certfile: str) -> str:
    """Return the SHA-256 of the first certificate of a PEM file, in hexadecimal, like ``openssl x509 -fingerprint``.

    Raises OSError if the file cannot be read, ValueError if it contains no certificate.
    """
    with open(certfile, encoding="ascii", errors="replace") as file:
        text = file.read()
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    body = text.partition(begin)[2].partition(end)[0]
    if not body:  # one that OpenSSL can read all the same: TRUSTED CERTIFICATE, as openssl x509 -trustout writes it
        raise ValueError(f"{certfile} contains no {begin}")
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(begin + body + end)).hexdigest()


def wrap_client(sock: socket.socket, host: str, sha256: str | None, cafile: str | None) -> ssl.SSLSocket:
    """Do the handshake with a job and verify its certificate.

    Args:
        sha256: of its certificate, in hexadecimal; ``None`` has certificate authorities vouch for ``host``.
        cafile: a PEM file with those authorities; ``None`` for the system's.

    Raises:
        OSError: it is another one (PermissionError), or the other side does not speak TLS, or not in time.
    """
    try:
        context = ssl.create_default_context(cafile=cafile)
        context.check_hostname = sha256 is None
        context.verify_mode = ssl.CERT_REQUIRED if sha256 is None else ssl.CERT_NONE
        wrapped = context.wrap_socket(sock, server_hostname=host)
    except ssl.SSLCertVerificationError as err:
        raise PermissionError(f"The certificate of {host} is not trusted: {err.verify_message}") from err
    found = hashlib.sha256(wrapped.getpeercert(binary_form=True) or b"").hexdigest()
    # Without the colons that openssl prints.
    if sha256 is not None and sha256.replace(":", "").strip().lower() != found:
        wrapped.close()
        raise PermissionError(f"The certificate of {host} is not the job's: its SHA-256 is {found}")
    return wrapped
