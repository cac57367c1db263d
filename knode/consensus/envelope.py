"""How what replicas say travels between nodes: typed and bounded.

A message goes as an event, TOPIC, in an `Envelope`. A snapshot is offered by a request whose stream is the
state (`Offer`). Both show which incarnation of the cell they belong to, and of which start of its node.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from knode.consensus.messages import Message, ReplicaId
from knode.klp.codec import Decoder

TOPIC = "consensus.message"
REFUSED_TOPIC = "consensus.refused"

Hash = Annotated[bytes, Meta(min_length=32, max_length=32)]
Start = Annotated[int, Meta(ge=0, le=2**53)]
Boot = Annotated[bytes, Meta(min_length=16, max_length=16)]


class Envelope(Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """One message, and under which conditions it counts."""

    incarnation: Hash
    start: Start
    """How often its sender's home was opened."""
    boot: Boot
    """Of its sender's process."""
    message: Message


class Offer(Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """A state that comes on the request's stream."""

    envelope: Envelope
    """Its message is an `InstallSnapshot`."""
    size: Annotated[int, Meta(ge=0, le=2**53)]
    """Bytes."""
    hash: Hash
    """SHA-256 of the bytes."""


class Refused(Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Its sender takes nothing from `replica` any more: it has been shown (`start`, `boot`)."""

    replica: ReplicaId
    start: Start
    boot: Boot


class Asked(Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """The body of `consensus.read` and `consensus.leader`."""

    incarnation: Hash


class Readable(Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """A state in which `index` is applied shows all that was committed when it was asked."""

    index: Annotated[int, Meta(ge=0)]


class Leading(Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """Who leads, as far as is known."""

    leader: Annotated[bytes, Meta(max_length=32)]
    """Raw id of the member; empty: nobody."""


envelopes: Decoder[Envelope] = Decoder(Envelope)
refusals: Decoder[Refused] = Decoder(Refused)
readables: Decoder[Readable] = Decoder(Readable)
leadings: Decoder[Leading] = Decoder(Leading)
