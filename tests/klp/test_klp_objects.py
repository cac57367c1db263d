"""Signed objects: one kind never stands for another, and odd keys and signatures count for nothing.

The edge cases are the classes of Chalkias, Garillot and Nikolaenko, "Taming the many EdDSAs" (2020),
made here from their definitions: small-order and mixed-order keys, small-order and non-canonical R,
and S that is not reduced.
"""

from __future__ import annotations

import hashlib
import itertools

import pytest
from klp_pair import ALICE, BOB, initiator, responder
from nacl.bindings import crypto_core_ed25519_add

from knode.errors import Code, KnodeError
from knode.identity import PublicKey
from knode.klp import Domain, Hello, object_id, open_signed, sign
from knode.klp.codec import Decoder, encode

GROUP_ORDER = 2**252 + 27742317777372353535851937790883648493
IDENTITY = bytes([1]) + bytes(31)
ORDER_8 = bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a")
SMALL_ORDER = [
    IDENTITY,
    bytes.fromhex("ec" + "ff" * 30 + "7f"),  # order 2
    bytes(32),  # order 4
    bytes(31) + b"\x80",
    bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"),  # order 8
    bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc85"),
    ORDER_8,
    bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac03fa"),
]
NON_CANONICAL = [
    bytes.fromhex("ed" + "ff" * 30 + "7f"),  # y = p, that is 0
    bytes.fromhex("ed" + "ff" * 30 + "ff"),
    bytes.fromhex("ee" + "ff" * 30 + "7f"),  # y = p + 1, that is 1
    bytes.fromhex("ee" + "ff" * 30 + "ff"),
    IDENTITY[:31] + b"\x80",  # minus zero
    bytes.fromhex("ec" + "ff" * 31),
]
PREFIX = b"KLP/1/member\0"


def test_a_signed_object_opens_under_its_key_and_domain() -> None:
    signed = sign(ALICE, Domain.MEMBER, b"body")
    assert open_signed(ALICE.public, Domain.MEMBER, signed) == b"body"
    assert signed[64:] == b"body"
    with pytest.raises(KnodeError) as caught:
        open_signed(BOB.public, Domain.MEMBER, signed)
    assert caught.value.code is Code.BAD_SIGNATURE


@pytest.mark.parametrize(("made_for", "read_as"), list(itertools.permutations(Domain, 2)))
def test_a_signature_of_one_domain_is_refused_in_every_other(made_for: Domain, read_as: Domain) -> None:
    with pytest.raises(KnodeError) as caught:
        open_signed(ALICE.public, read_as, sign(ALICE, made_for, b"body"))
    assert caught.value.code is Code.BAD_SIGNATURE


def test_an_id_is_of_the_body_whoever_signed_it() -> None:
    one, other = sign(ALICE, Domain.MEMBER, b"body"), sign(BOB, Domain.NODE, b"body")
    assert object_id(one) == object_id(other) == hashlib.sha256(b"body").digest()


def test_an_object_shorter_than_a_signature_is_refused() -> None:
    for length in (0, 1, 63, 64):
        with pytest.raises(KnodeError) as caught:
            open_signed(ALICE.public, Domain.NODE, bytes(length))
        assert caught.value.code is Code.BAD_SIGNATURE


# -- published edge cases -----------------------------------------------------------------------


@pytest.mark.parametrize("raw", SMALL_ORDER + NON_CANONICAL, ids=bytes.hex)
def test_a_small_order_or_non_canonical_key_is_no_key(raw: bytes) -> None:
    with pytest.raises(KnodeError):
        PublicKey(raw)


def test_a_mixed_order_key_is_no_key() -> None:
    with pytest.raises(KnodeError):
        PublicKey(crypto_core_ed25519_add(ALICE.public.raw, ORDER_8))


@pytest.mark.parametrize("r", SMALL_ORDER + NON_CANONICAL, ids=bytes.hex)
def test_a_signature_whose_r_is_small_or_not_canonical_is_refused(r: bytes) -> None:
    """S = h·a satisfies the equation up to the small R: only the check of R itself refuses it."""
    secret = bytearray(hashlib.sha512(ALICE.seed).digest()[:32])
    secret[0] &= 248
    secret[31] = secret[31] & 127 | 64
    challenge = hashlib.sha512(r + ALICE.public.raw + PREFIX + b"body").digest()
    scalar = int.from_bytes(challenge, "little") * int.from_bytes(secret, "little") % GROUP_ORDER
    with pytest.raises(KnodeError) as caught:
        open_signed(ALICE.public, Domain.MEMBER, r + scalar.to_bytes(32, "little") + b"body")
    assert caught.value.code is Code.BAD_SIGNATURE


def test_a_signature_whose_s_is_not_reduced_is_refused() -> None:
    signed = sign(ALICE, Domain.MEMBER, b"body")
    scalar = int.from_bytes(signed[32:64], "little")
    for multiple in range(1, 8):
        malleated = (scalar + multiple * GROUP_ORDER).to_bytes(32, "little")
        with pytest.raises(KnodeError) as caught:
            open_signed(ALICE.public, Domain.MEMBER, signed[:32] + malleated + b"body")
        assert caught.value.code is Code.BAD_SIGNATURE


@pytest.mark.parametrize("raw", SMALL_ORDER + NON_CANONICAL, ids=bytes.hex)
@pytest.mark.parametrize("field", ["key", "ticket"])
def test_a_small_order_key_in_a_hello_never_becomes_a_session(field: str, raw: bytes) -> None:
    """With such a key R = the key, S = 0 verifies any message in a lax implementation."""
    hello = Decoder[Hello](Hello).decode(initiator().hello()[1:])
    fields = {name: getattr(hello, name) for name in Hello.__struct_fields__} | {field: raw}
    lax = IDENTITY + bytes(32)
    inviting = responder()
    inviting.receive_hello(b"\x01" + encode(Hello(**fields)))
    with pytest.raises(KnodeError) as caught:
        inviting.receive_auth(b"\x03" + lax + (lax if field == "ticket" else b""))
    assert caught.value.code is Code.BAD_SIGNATURE
