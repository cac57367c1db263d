"""Three messages in which two nodes prove to each other who they are.

    initiator                          responder
        HELLO    what I am                 →
                 ←    WELCOME   what I am, the version, my signature
        PROOF    my signature              →

Both sign one transcript: the HELLO and the body of the WELCOME, hence both keys, nonces, boots, lists
of versions and roster digests, the cell and what each sees as channel binding. The role is in the
signature's domain. The link's TLS gives secrecy; this gives identity, freshness and binding to the link.

A joining node is in no roster yet: its HELLO names a ticket's public key, and its PROOF carries a second
signature by the ticket's key. The inviter keeps only that public key; the ticket's secret never travels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, NoReturn

from msgspec import Meta, Struct

from knode.errors import Code, KnodeError
from knode.identity import KeyPair, PublicKey
from knode.klp import limits
from knode.klp.codec import Decoder, encode
from knode.klp.frames import Kind, kind_of, refused
from knode.klp.messages import Boot, Hash
from knode.klp.objects import SIGNATURE_BYTES, Domain, open_signed, signature

_TRANSCRIPT_PREFIX = b"KLP/1/transcript\0"
_TICKET_KEY_PREFIX = b"KLP/1/ticket-key\0"
TICKET_SECRET_BYTES = 16
_TICKET_FIELD_BYTES = (0, 32)

Version = Annotated[int, Meta(ge=1, le=0xFFFF)]


class Hello(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True):
    """What one end says of itself.

    Args:
        versions: of KLP that it speaks, ascending.
        channel_binding: of the link, as this end sees it.
        ticket: public key of the ticket that a joining node holds; empty for a member.
    """

    versions: Annotated[tuple[Version, ...], Meta(min_length=1, max_length=limits.MAX_VERSIONS)]
    cell_id: Hash
    key: Hash
    nonce: Hash
    boot: Boot
    roster_digest: Hash
    channel_binding: Hash
    ticket: bytes

    def __post_init__(self) -> None:
        if any(low >= high for low, high in zip(self.versions, self.versions[1:], strict=False)):
            raise ValueError("versions are in ascending order, each once")
        if len(self.ticket) not in _TICKET_FIELD_BYTES:
            raise ValueError("a ticket's public key has 32 bytes")


class WelcomeBody(Struct, array_like=True, frozen=True, gc=False, forbid_unknown_fields=True):
    """The responder's hello and the version that it chose."""

    hello: Hello
    version: Version


_HELLO = Decoder[Hello](Hello)
_WELCOME = Decoder[WelcomeBody](WelcomeBody)


@dataclass(frozen=True, slots=True)
class Introduction:
    """What a node says in every handshake: its cell (32 bytes), boot (16), roster digest (32)."""

    cell_id: bytes
    boot: bytes
    roster_digest: bytes
    versions: tuple[int, ...] = (1,)


@dataclass(frozen=True, slots=True)
class Established:
    """What both ends know when the handshake is done. `ticket` is empty for a member's session."""

    version: int
    session_id: bytes
    peer: PublicKey
    peer_boot: bytes
    peer_roster_digest: bytes
    ticket: bytes
    initiator: bool


Admit = Callable[[Hello], None]
"""Raises UNKNOWN_PEER, KEY_REVOKED or TICKET_… for who may not connect; called before any signature."""


class State(Enum):
    """How far one end of a handshake is."""

    START = "start"
    WAITING = "waiting"
    ESTABLISHED = "established"
    CLOSED = "closed"


# What is not here does not happen: it is BAD_FRAME, and the handshake is closed.
INITIATOR: dict[tuple[State, Kind], State] = {
    (State.START, Kind.HELLO): State.WAITING,  # sent
    (State.WAITING, Kind.WELCOME): State.ESTABLISHED,
    (State.WAITING, Kind.REFUSE): State.CLOSED,
}
RESPONDER: dict[tuple[State, Kind], State] = {
    (State.START, Kind.HELLO): State.WAITING,
    (State.WAITING, Kind.PROOF): State.ESTABLISHED,
    (State.WAITING, Kind.REFUSE): State.CLOSED,
}


def ticket_key(secret: bytes) -> KeyPair:
    """Return the key pair of a ticket's secret of 16 bytes."""
    if len(secret) != TICKET_SECRET_BYTES:
        raise KnodeError(Code.TICKET_INVALID, "a ticket's secret has 16 bytes")
    return KeyPair(hashlib.sha256(_TICKET_KEY_PREFIX + secret).digest())


def transcript_of(hello: bytes, welcome: bytes) -> bytes:
    """Return what both ends sign: payload of the HELLO and body of the WELCOME, each with its length."""
    return b"".join(
        (_TRANSCRIPT_PREFIX, len(hello).to_bytes(4, "big"), hello, len(welcome).to_bytes(4, "big"), welcome)
    )


class _Progress:
    """One end's state, moved along its table."""

    def __init__(self, table: dict[tuple[State, Kind], State]) -> None:
        self._table = table
        self._state = State.START

    def step(self, kind: Kind) -> None:
        """Go where the table says; BAD_FRAME when it says nothing."""
        state = self._table.get((self._state, kind))
        if state is None:
            self.close(KnodeError(Code.BAD_FRAME, f"a {kind.name} frame is not due here"))
        self._state = state

    def receive(self, frame: bytes) -> bytes:
        """Take the one frame that is due and return its payload; a REFUSE raises what it tells."""
        kind = kind_of(frame)
        self.step(kind)
        if kind is Kind.REFUSE:
            self.close(refused(frame))
        if len(frame) > limits.MAX_HANDSHAKE_BYTES:
            self.close(KnodeError(Code.TOO_LARGE, f"a {kind.name} frame over its size limit"))
        return frame[1:]

    def close(self, error: KnodeError) -> NoReturn:
        """End the handshake with `error`."""
        self._state = State.CLOSED
        raise error


def _introduce(
    key: KeyPair, introduction: Introduction, channel_binding: bytes, nonce: bytes, ticket: bytes
) -> Hello:
    hello = Hello(
        versions=introduction.versions,
        cell_id=introduction.cell_id,
        key=key.public.raw,
        nonce=nonce,
        boot=introduction.boot,
        roster_digest=introduction.roster_digest,
        channel_binding=channel_binding,
        ticket=ticket,
    )
    return _HELLO.decode(encode(hello))  # what the other end would refuse is refused here


def _check_channel(ours: Hello, theirs: Hello) -> None:
    if theirs.channel_binding != ours.channel_binding:
        raise KnodeError(
            Code.CHANNEL_MISMATCH,
            "the two ends see different channels: something between them opens the connection",
            "connect without a proxy that ends TLS",
        )


def _highest_common(ours: Hello, theirs: Hello) -> int:
    common = set(ours.versions) & set(theirs.versions)
    if not common:
        raise KnodeError(
            Code.UNSUPPORTED_VERSION,
            f"we speak KLP {ours.versions}, the other node {theirs.versions}",
            "update the older of the two nodes",
        )
    return max(common)


def _check_cell(ours: Hello, theirs: Hello) -> None:
    if theirs.cell_id != ours.cell_id:
        raise KnodeError(Code.WRONG_NETWORK, "the other node belongs to another cell")


def _key_of(raw: bytes) -> PublicKey:
    try:
        return PublicKey(raw)
    except KnodeError as error:
        raise KnodeError(Code.BAD_SIGNATURE, "a key under which no signature counts") from error


class Initiator:
    """The end that dialled.

    Args:
        expected_peer: the node that was dialled; any other is NOT_RECIPIENT.
        channel_binding: of the link, 32 bytes.
        nonce: 32 random bytes, for this handshake alone.
        ticket: the ticket's key pair, when the node joins.
    """

    def __init__(
        self,
        key: KeyPair,
        introduction: Introduction,
        *,
        expected_peer: PublicKey,
        channel_binding: bytes,
        nonce: bytes,
        ticket: KeyPair | None = None,
    ) -> None:
        self._key = key
        self._expected_peer = expected_peer
        self._ticket = ticket
        ticket_raw = ticket.public.raw if ticket else b""
        self._hello = _introduce(key, introduction, channel_binding, nonce, ticket_raw)
        self._progress = _Progress(INITIATOR)

    def hello(self) -> bytes:
        """Return the HELLO frame to send first."""
        self._progress.step(Kind.HELLO)
        return bytes([Kind.HELLO]) + encode(self._hello)

    def receive(self, frame: bytes) -> tuple[bytes, Established]:
        """Take the responder's WELCOME; return the PROOF frame to send and what is now established.

        Checked in order: frame, key, channel binding, version, cell, signature.

        Raises:
            KnodeError: what is wrong, or what a REFUSE frame tells; the handshake is then closed.
        """
        payload = self._progress.receive(frame)
        try:
            return self._check(payload)
        except KnodeError as error:
            self._progress.close(error)

    def _check(self, payload: bytes) -> tuple[bytes, Established]:
        body = payload[SIGNATURE_BYTES:]
        welcome = _WELCOME.decode(body)
        theirs = welcome.hello
        if theirs.key != self._expected_peer.raw:
            raise KnodeError(Code.NOT_RECIPIENT, "another node answers at this address")
        if theirs.ticket:
            raise KnodeError(Code.BAD_FRAME, "a responder has no ticket")
        _check_channel(self._hello, theirs)
        if welcome.version != _highest_common(self._hello, theirs):
            raise KnodeError(
                Code.DOWNGRADE, f"version {welcome.version} was chosen, though both ends speak a higher one"
            )
        _check_cell(self._hello, theirs)
        transcript = transcript_of(encode(self._hello), body)
        open_signed(self._expected_peer, Domain.HELLO_RESPONDER, payload[:SIGNATURE_BYTES] + transcript)
        proof = bytes([Kind.PROOF]) + signature(self._key, Domain.HELLO_INITIATOR, transcript)
        if self._ticket:
            proof += signature(self._ticket, Domain.TICKET, transcript)
        return proof, Established(
            version=welcome.version,
            session_id=hashlib.sha256(transcript).digest(),
            peer=self._expected_peer,
            peer_boot=theirs.boot,
            peer_roster_digest=theirs.roster_digest,
            ticket=self._hello.ticket,
            initiator=True,
        )


class Responder:
    """The end that was dialled.

    Args:
        admit: decides by roster or ticket who may connect; raises the error that refuses.
        channel_binding: of the link, 32 bytes.
        nonce: 32 random bytes, for this handshake alone.
    """

    def __init__(
        self,
        key: KeyPair,
        introduction: Introduction,
        *,
        admit: Admit,
        channel_binding: bytes,
        nonce: bytes,
    ) -> None:
        self._key = key
        self._admit = admit
        self._hello = _introduce(key, introduction, channel_binding, nonce, b"")
        self._progress = _Progress(RESPONDER)
        self._theirs: Hello | None = None
        self._version = 0
        self._transcript = b""

    def receive_hello(self, frame: bytes) -> bytes:
        """Take the initiator's HELLO; return the WELCOME frame to send.

        Checked in order: frame, channel binding, version, cell, `admit`; only then is anything signed.

        Raises:
            KnodeError: what is wrong; the handshake is then closed.
        """
        payload = self._progress.receive(frame)
        try:
            theirs = _HELLO.decode(payload)
            _check_channel(self._hello, theirs)
            self._version = _highest_common(self._hello, theirs)
            _check_cell(self._hello, theirs)
            if theirs.key == self._key.public.raw:
                raise KnodeError(Code.NOT_RECIPIENT, "a node does not connect to itself")
            self._admit(theirs)
        except KnodeError as error:
            self._progress.close(error)
        self._theirs = theirs
        body = encode(WelcomeBody(self._hello, self._version))
        self._transcript = transcript_of(payload, body)
        return bytes([Kind.WELCOME]) + signature(self._key, Domain.HELLO_RESPONDER, self._transcript) + body

    def receive_auth(self, frame: bytes) -> Established:
        """Take the initiator's PROOF; return what is now established.

        Raises:
            KnodeError: BAD_SIGNATURE, or what a REFUSE frame tells; the handshake is then closed.
        """
        payload = self._progress.receive(frame)
        theirs = self._theirs
        assert theirs is not None, "the table lets no PROOF come before a HELLO"
        try:
            if len(payload) != SIGNATURE_BYTES * (2 if theirs.ticket else 1):
                raise KnodeError(Code.BAD_FRAME, "a PROOF of the wrong length")
            peer = _key_of(theirs.key)
            open_signed(peer, Domain.HELLO_INITIATOR, payload[:SIGNATURE_BYTES] + self._transcript)
            if theirs.ticket:
                ticket = _key_of(theirs.ticket)
                open_signed(ticket, Domain.TICKET, payload[SIGNATURE_BYTES:] + self._transcript)
        except KnodeError as error:
            self._progress.close(error)
        return Established(
            version=self._version,
            session_id=hashlib.sha256(self._transcript).digest(),
            peer=peer,
            peer_boot=theirs.boot,
            peer_roster_digest=theirs.roster_digest,
            ticket=theirs.ticket,
            initiator=False,
        )
