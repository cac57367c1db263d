"""How what replicas say travels between nodes: typed and bounded.

A message goes as an event, TOPIC, in an `Envelope`. A snapshot is offered by a request whose stream is the
state (`Offer`). Both show which incarnation of the cell they belong to, and of which start of its node.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from knode.consensus.messages import Index, Message, ReplicaId
from knode.identity import KeyPair, PublicKey
from knode.klp.codec import Decoder, encode
from knode.klp.objects import SIGNATURE_BYTES, Domain, open_signed, signature

TOPIC = "consensus.message"
REFUSED_TOPIC = "consensus.refused"

Hash = Annotated[bytes, Meta(min_length=32, max_length=32)]
Start = Annotated[int, Meta(ge=0, le=2**53)]
Boot = Annotated[bytes, Meta(min_length=16, max_length=16)]
Proof = Annotated[bytes, Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]
"""The signature of a replica's member over a `Started`: nobody else can say that there was this start."""


class Started(Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """That a replica speaks from this start of its node."""

    replica: ReplicaId
    start: Start
    boot: Boot

    def prove(self, key: KeyPair) -> bytes:
        """Return the proof of it, for the member that has this key."""
        return signature(key, Domain.REPLICA, encode(self))

    def check(self, key: PublicKey, proof: bytes) -> None:
        """Check a proof of it.

        Raises:
            KnodeError: BAD_SIGNATURE when this key has not signed it.
        """
        open_signed(key, Domain.REPLICA, proof + encode(self))


class Envelope(Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """One message, and under which conditions it counts."""

    incarnation: Hash
    start: Start
    """How often its sender's home was opened."""
    boot: Boot
    """Of its sender's process."""
    proof: Proof
    """Of both, kept by whoever first takes a message with them."""
    message: Message

    @property
    def started(self) -> Started:
        """What it shows, and `proof` proves."""
        return Started(self.message.source, self.start, self.boot)


class Offer(Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """A state that comes on the request's stream."""

    envelope: Envelope
    """Its message is an `InstallSnapshot`."""
    size: Annotated[int, Meta(ge=0, le=2**53)]
    """Bytes."""
    hash: Hash
    """SHA-256 of the bytes."""


class Refused(Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Its sender takes nothing from `replica` any more: it has been shown (`start`, `boot`).

    It is taken on proof, not on trust: else one member could stop every replica of its cell.
    """

    replica: ReplicaId
    start: Start
    boot: Boot
    proof: Proof
    """With which the replica itself showed it."""

    @property
    def started(self) -> Started:
        """What was shown, and `proof` proves."""
        return Started(self.replica, self.start, self.boot)


class Asked(Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """The body of `consensus.read` and `consensus.leader`."""

    incarnation: Hash


class Readable(Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """A state in which `index` is applied shows all that was committed when it was asked."""

    index: Index


class Leading(Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Who leads, as far as is known."""

    leader: Annotated[bytes, Meta(max_length=32)]
    """Raw id of the member; empty: nobody."""


envelopes: Decoder[Envelope] = Decoder(Envelope)
refusals: Decoder[Refused] = Decoder(Refused)
readables: Decoder[Readable] = Decoder(Readable)
leadings: Decoder[Leading] = Decoder(Leading)
