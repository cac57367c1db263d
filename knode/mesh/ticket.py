"""The one-use invitation, as text: who invites, where, into which cell, and a secret.

The secret never travels. Both ends derive a key pair from it; the inviter stores the public key alone,
and the joining node proves the secret by a signature over the handshake's transcript (docs/klp.md).
"""

from __future__ import annotations

from typing import Annotated

import base58
import msgspec

from knode.errors import Code, KnodeError
from knode.identity import KeyPair, PublicKey
from knode.klp.codec import Decoder, encode
from knode.klp.handshake import TICKET_SECRET_BYTES, ticket_key

VERSION = 1
SECRET_BYTES = TICKET_SECRET_BYTES
LIFETIME_MS = 10 * 60 * 1000
MAX_ADDRESSES = 4
PREFIX = "knode-"

Address = Annotated[str, msgspec.Meta(min_length=3, max_length=261)]


class Ticket(msgspec.Struct, frozen=True, array_like=True):
    """What the text of a ticket says."""

    version: Annotated[int, msgspec.Meta(ge=VERSION, le=VERSION)]
    inviter: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    cell: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    secret: Annotated[bytes, msgspec.Meta(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]
    addresses: Annotated[tuple[Address, ...], msgspec.Meta(min_length=1, max_length=MAX_ADDRESSES)]

    @property
    def inviter_key(self) -> PublicKey:
        """The key that the handshake is pinned to."""
        return PublicKey(self.inviter)

    @property
    def key(self) -> KeyPair:
        """The key pair that proves the secret."""
        return ticket_key(self.secret)

    def text(self) -> str:
        """The ticket as people pass it on, with a checksum."""
        return PREFIX + base58.b58encode_check(encode(self)).decode()

    def __repr__(self) -> str:
        return f"Ticket(inviter={self.inviter_key.node_id}, addresses={self.addresses})"


_decoder: Decoder[Ticket] = Decoder(Ticket)


def parse_ticket(text: str) -> Ticket:
    """Read a ticket's text; white space around and inside it (a wrapped line) does not matter.

    Raises:
        KnodeError: INVALID_ARGUMENT when it is none, or damaged; UNSUPPORTED_VERSION.
    """
    compact = "".join(text.split())
    ask = "copy the whole line that 'knode invite' printed, or ask for a new ticket"
    if not compact.startswith(PREFIX) or len(compact) > 2048:
        raise KnodeError(Code.INVALID_ARGUMENT, f"this is no ticket: it does not begin with {PREFIX!r}", ask)
    damaged = KnodeError(Code.INVALID_ARGUMENT, "the ticket is damaged: its checksum does not fit", ask)
    try:
        data = base58.b58decode_check(compact.removeprefix(PREFIX))
    except ValueError as error:
        raise damaged from error
    # Every version is an array that begins with the version, a small number.
    if len(data) > 1 and data[0] >> 4 == 0x9 and VERSION < data[1] < 0x80:
        raise KnodeError(
            Code.UNSUPPORTED_VERSION, "the ticket was made by a newer knode", "upgrade knode on this machine"
        )
    try:
        ticket = _decoder.decode(data)
        PublicKey(ticket.inviter)
    except KnodeError as error:
        raise damaged from error
    return ticket
