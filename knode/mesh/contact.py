"""Where a node can be reached, in its own signed words. The newest record of a key counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec

from knode.identity import KeyPair, PublicKey
from knode.klp.codec import Decoder, encode
from knode.klp.objects import Domain, open_signed, sign
from knode.mesh.statements import Key, Milliseconds
from knode.mesh.ticket import Address

MAX_ADDRESSES = 16


class Contact(msgspec.Struct, frozen=True, array_like=True):
    """Addresses of one node, as `host:port`, best first."""

    key: Key
    addresses: Annotated[tuple[Address, ...], msgspec.Meta(max_length=MAX_ADDRESSES)]
    version: Annotated[str, msgspec.Meta(max_length=32)]
    issued: Milliseconds


@dataclass(frozen=True, slots=True)
class SignedContact:
    """A contact whose signature was verified, with its bytes."""

    body: Contact
    data: bytes


_decoder: Decoder[Contact] = Decoder(Contact)


def sign_contact(key: KeyPair, body: Contact) -> SignedContact:
    """Sign `body`, which must be about `key`.

    Raises:
        KnodeError: as `open_contact`: what others would refuse is not signed.
    """
    assert body.key == key.public.raw
    return open_contact(sign(key, Domain.NODE, encode(body)))


def open_contact(data: bytes) -> SignedContact:
    """Decode and verify one contact.

    Raises:
        KnodeError: BAD_FRAME, NON_CANONICAL, BAD_SIGNATURE or INVALID_ARGUMENT (a bad key).
    """
    body = _decoder.decode(data[64:])
    open_signed(PublicKey(body.key), Domain.NODE, data)
    return SignedContact(body, data)
