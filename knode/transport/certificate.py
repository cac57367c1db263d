"""A node's TLS certificate, and the TLS settings of both ends.

No certificate authority stands behind the certificate and nobody checks its name: TLS gives secrecy
alone. Who the peer is, the KLP handshake proves over the channel binding, the SHA-256 of the server's
certificate, which both ends compute for themselves. Someone in between who shows a certificate of their
own makes the two bindings differ, and the handshake fails.
"""

from __future__ import annotations

import hashlib
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

from knode.errors import Code, KnodeError
from knode.world import WallTime

_NAME = "knode"
_CLOCK_SLACK = timedelta(days=1)
# RFC 5280, 4.1.2.5: the date for a certificate with no well-defined end. The link never looks at it.
_NO_END = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)


def make_certificate(now: WallTime) -> bytes:
    """Return a new ECDSA P-256 key and its self-signed certificate, as one PEM text.

    Args:
        now: the certificate is valid from a day before it, without end.
    """
    # cryptography takes 10 MB and 40 ms: only the first start of a node needs it
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, _NAME)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.fromtimestamp(now // 1000, UTC) - _CLOCK_SLACK)
        .not_valid_after(_NO_END)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(_NAME)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private + certificate.public_bytes(serialization.Encoding.PEM)


def server_context(path: Path) -> ssl.SSLContext:
    """Return the settings of the end that is dialled: TLS 1.3 alone, no resumption, no client certificate.

    Args:
        path: the PEM file that `make_certificate` gave.

    Raises:
        OSError: the file is missing or holds no key and certificate (`ssl.SSLError` is an OSError).
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    context.load_cert_chain(path)
    return context


def client_context() -> ssl.SSLContext:
    """Return the settings of the end that dials: TLS 1.3 alone; the KLP handshake checks the peer."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def certificate_of(pem: str) -> bytes:
    """Return the certificate (DER) in the PEM text that `make_certificate` gave."""
    return ssl.PEM_cert_to_DER_cert(pem[pem.index(ssl.PEM_HEADER) :])


def channel_binding(certificate: bytes) -> bytes:
    """Return the 32 bytes that name a channel to the owner of `certificate` (DER)."""
    return hashlib.sha256(certificate).digest()


def binding_of(path: Path) -> bytes:
    """Return the channel binding of the certificate in the file that `make_certificate` gave.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no certificate.
    """
    return channel_binding(certificate_of(path.read_text()))


def damaged(path: Path, error: Exception) -> KnodeError:
    """Return the error for a certificate's file that cannot be used."""
    return KnodeError(
        Code.HOME_DAMAGED,
        f"{path} holds no TLS key and certificate ({error})",
        "remove it: the next start makes a new one",
    )
