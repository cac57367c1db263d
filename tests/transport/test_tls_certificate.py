"""The certificate of a node, and the names of its channel."""

from __future__ import annotations

import hashlib
import ssl
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509

from knode.transport.certificate import certificate_of, channel_binding, make_certificate, server_context
from knode.world import WallTime

NOW = WallTime(1_700_000_000_123)


def test_a_certificate_is_self_signed_and_valid_from_a_day_ago_without_end() -> None:
    certificate = x509.load_der_x509_certificate(certificate_of(make_certificate(NOW).decode()))
    certificate.verify_directly_issued_by(certificate)
    assert certificate.not_valid_before_utc == datetime(2023, 11, 13, 22, 13, 20, tzinfo=UTC)
    assert certificate.not_valid_after_utc.year == 9999


def test_each_certificate_has_a_key_of_its_own() -> None:
    first, second = make_certificate(NOW), make_certificate(NOW)
    assert channel_binding(certificate_of(first.decode())) != channel_binding(certificate_of(second.decode()))


def test_the_binding_is_the_sha_256_of_the_certificate(certificate: Path) -> None:
    pem = certificate.read_text()
    der = ssl.PEM_cert_to_DER_cert(pem[pem.index("-----BEGIN CERTIFICATE") :])
    assert channel_binding(certificate_of(pem)) == hashlib.sha256(der).digest()


def test_a_file_that_is_no_certificate_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tls.pem"
    with pytest.raises(OSError, match="No such file"):
        server_context(path)
    path.write_text("not PEM")
    with pytest.raises(OSError, match="PEM"):
        server_context(path)


def test_a_node_that_has_its_certificate_never_imports_cryptography() -> None:
    program = "import sys, knode.transport.websocket; print('cryptography' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "False"
