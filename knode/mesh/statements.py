"""What can be said of a cell's members, each statement in signed bytes.

A statement holds for one era. The first era is the genesis itself; each `Recover` begins another. The
field `era` is the id of the one under which its signer spoke. What they mean together: `knode.mesh.roster`.

Pure: no clock, no disk, no network.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

import msgspec

from knode.home.folder import NodeName
from knode.identity import KeyPair, PublicKey
from knode.klp.codec import Decoder, encode
from knode.klp.objects import SIGNATURE_BYTES, Domain, object_id, open_signed, sign, signature

MAX_KEPT = 1024
MAX_ISSUED = 2**62
MAX_RECOVERED_MEMBERS = 256
MAX_RECOVERED_REVOKED = 768
MAX_INCARNATIONS = 2**31

Key = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
StatementId = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Milliseconds = Annotated[int, msgspec.Meta(ge=0, le=MAX_ISSUED)]
Position = Annotated[int, msgspec.Meta(ge=0, le=MAX_ISSUED)]
Kept = Annotated[tuple[StatementId, ...], msgspec.Meta(max_length=MAX_KEPT)]


class Role(StrEnum):
    """What a member is for."""

    ADMIN = "admin"
    """Everything that a worker does, and may invite and change roles."""
    WORKER = "worker"
    """Submits and runs tasks."""
    VOTER = "voter"
    """A small machine that only votes: submits tasks, runs none."""
    OBSERVER = "observer"
    """Looks and submits; runs nothing and never votes."""


class Genesis(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=1):
    """The first statement of a cell; its id is the cell's id and that of its first era."""

    signer: Key
    recovery: Key
    nonce: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    issued: Milliseconds


class Add(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=2):
    """`member` belongs to the cell; this key is its id for ever, whatever key it has later."""

    signer: Key
    era: StatementId
    member: Key
    name: NodeName
    role: Role
    issued: Milliseconds


class SetRole(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=3):
    """`member` has another role from now on; `kept` are its own statements that stay valid."""

    signer: Key
    era: StatementId
    member: Key
    role: Role
    kept: Kept
    issued: Milliseconds


class Revoke(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=4):
    """`member` belongs to the cell no longer, for ever; `kept` are its own statements that stay valid."""

    signer: Key
    era: StatementId
    member: Key
    kept: Kept
    issued: Milliseconds


class Rotate(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=5):
    """`member` has the key `key` from now on, and no more that of the signer.

    `proof` is the new key's own signature (`rotation_body`, domain `rotate`); `kept` are the statements
    of the old key that stay valid.
    """

    signer: Key
    era: StatementId
    member: Key
    key: Key
    proof: Annotated[bytes, msgspec.Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]
    kept: Kept
    issued: Milliseconds


class Known(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A member with which an era begins: its id, name, role, and when it joined."""

    member: Key
    name: NodeName
    role: Role
    joined: Milliseconds


class Recover(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=6):
    """The recovery key begins an era: with another owner key, these members, and these revoked keys."""

    signer: Key
    cell: StatementId
    owner: Key
    members: Annotated[tuple[Known, ...], msgspec.Meta(max_length=MAX_RECOVERED_MEMBERS)]
    revoked: Annotated[tuple[Key, ...], msgspec.Meta(max_length=MAX_RECOVERED_REVOKED)]
    issued: Milliseconds


class BeginIncarnation(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=7):
    """The cell's ledger begins anew, with what `replica` has up to `index`; it lost its majority for good.

    What other replicas had beyond that is void.
    """

    signer: Key
    era: StatementId
    number: Annotated[int, msgspec.Meta(ge=1, le=MAX_INCARNATIONS)]
    predecessor: StatementId
    """The incarnation that ends; the cell's id for the first."""
    replica: Annotated[bytes, msgspec.Meta(min_length=40, max_length=40)]
    """The survivor: a member's id and 8 bytes."""
    index: Position
    """Of its last entry; 0 for none."""
    term: Position
    """Of that entry."""
    issued: Milliseconds


class KeepIncarnation(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=8):
    """Of several incarnations this one counts, whoever began it."""

    signer: Key
    era: StatementId
    incarnation: StatementId
    issued: Milliseconds


Statement = Genesis | Add | SetRole | Revoke | Rotate | Recover | BeginIncarnation | KeepIncarnation
OfTheCell = Genesis | Recover | BeginIncarnation | KeepIncarnation
"""Statements about no one member."""
Grant = Add | SetRole
_decoder: Decoder[Statement] = Decoder(Statement)


@dataclass(frozen=True, slots=True)
class SignedStatement:
    """A statement whose signature was verified, with its bytes and id."""

    id: bytes
    body: Statement
    data: bytes


def sign_statement(key: KeyPair, body: Statement) -> SignedStatement:
    """Sign `body`, whose signer must be `key`.

    Raises:
        KnodeError: as `open_statement`: what others would refuse is not signed.
    """
    assert body.signer == key.public.raw
    return open_statement(sign(key, Domain.MEMBER, encode(body)))


def sign_rotation(
    old: KeyPair, new: KeyPair, *, era: bytes, member: bytes, kept: tuple[bytes, ...], issued: int
) -> SignedStatement:
    """Say, with both keys, that `member` changes from `old` to `new`. Raises as `sign_statement`."""
    proof = signature(new, Domain.ROTATE, rotation_body(era, member, old.public.raw, new.public.raw))
    body = Rotate(old.public.raw, era, member, new.public.raw, proof, kept, issued)
    return sign_statement(old, body)


def open_statement(data: bytes) -> SignedStatement:
    """Decode and verify one statement.

    Raises:
        KnodeError: BAD_FRAME, NON_CANONICAL, BAD_SIGNATURE or INVALID_ARGUMENT (a bad key).
    """
    body = _decoder.decode(data[SIGNATURE_BYTES:])
    match body:
        case Genesis(recovery=recovery):
            PublicKey(recovery)
        case Recover(owner=owner, members=members):
            for key in (owner, *(known.member for known in members)):
                PublicKey(key)
        case Rotate(signer=old, era=era, member=member, key=new, proof=proof):
            PublicKey(member)
            open_signed(PublicKey(new), Domain.ROTATE, proof + rotation_body(era, member, old, new))
        case Add() | SetRole() | Revoke():
            PublicKey(body.member)
        case BeginIncarnation() | KeepIncarnation():
            pass
    open_signed(PublicKey(body.signer), Domain.MEMBER, data)
    return SignedStatement(object_id(data), body, data)


def rotation_body(era: bytes, member: bytes, old: bytes, new: bytes) -> bytes:
    """Return what a member's new key signs: that it takes the old one's place."""
    return era + member + old + new
