"""Signed things: `signature (64) || body`, each kind signed under its own domain.

The domain is part of what is signed, not of what is sent: a signature of one kind can never stand for
another. A bundle is signed the same way as an object that travels and stays.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum

from knode.errors import Code, KnodeError
from knode.identity import KeyPair, PublicKey

SIGNATURE_BYTES = 64


class Domain(StrEnum):
    """What a signature is for."""

    BUNDLE = "bundle"
    HELLO_INITIATOR = "hs-i"
    HELLO_RESPONDER = "hs-r"
    TICKET = "ticket"
    MEMBER = "member"
    NODE = "node"
    MANIFEST = "manifest"
    ROTATE = "rotate"
    REPLICA = "replica"


_PREFIXES = {domain: b"KLP/1/" + domain.encode() + b"\0" for domain in Domain}


def sign(key: KeyPair, domain: Domain, body: bytes) -> bytes:
    """Return the signed object: signature, then body."""
    return signature(key, domain, body) + body


def signature(key: KeyPair, domain: Domain, body: bytes) -> bytes:
    """Return the 64-byte signature over `body`, for a body that the other end knows."""
    return key.sign(_PREFIXES[domain] + body)


def open_signed(key: PublicKey, domain: Domain, data: bytes) -> bytes:
    """Return the body of a signed object.

    Raises:
        KnodeError: BAD_SIGNATURE when `key` did not sign this body for this domain.
    """
    body = data[SIGNATURE_BYTES:]
    if not key.verifies(data[:SIGNATURE_BYTES], _PREFIXES[domain] + body):
        raise KnodeError(Code.BAD_SIGNATURE, f"a {domain.value} signature does not verify")
    return body


def object_id(data: bytes) -> bytes:
    """Return the id of a signed object, 32 bytes: SHA-256 of its body, without the signature."""
    return hashlib.sha256(data[SIGNATURE_BYTES:]).digest()
