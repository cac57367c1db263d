"""The roster: signed statements about a cell's members, and what they mean together.

Theory of operation. A cell is named by the hash of its genesis, which fixes the owner key and the
recovery key. Everything else is a statement signed by one key. Replicas merge by union, so the meaning
(`resolve`) depends on the set alone, never on the order of arrival:

1. ADD and ROLE count when signed by the owner, or by an admin that the owner made. An admin cannot
   make admins, and cannot end what the owner gave to one.
2. Of several ADD or ROLE statements about one member the latest counts: greatest (issued, id).
3. REVOKE, by the owner or the recovery key, wins for ever, whatever is added later.
4. A key that is admin no longer (by ROLE or REVOKE) keeps only those of its statements that the ending
   statement names; so whoever stole the key cannot backdate one.
5. Of one admin the earliest 512 statements count, and what a revoked key loses is forgotten; so no
   admin can fill the roster, and the owner has the last word.

Pure: no clock, no disk, no network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from typing import Annotated

import msgspec

from knode.errors import Code, KnodeError
from knode.home.folder import NodeName
from knode.identity import KeyPair, NodeId, PublicKey
from knode.klp.codec import Decoder, encode
from knode.klp.objects import Domain, object_id, open_signed, sign

MAX_STATEMENTS = 4096
MAX_STATEMENTS_OF_AN_ADMIN = 512
MAX_KEPT = 1024
MAX_ISSUED = 2**62

Key = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
StatementId = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Milliseconds = Annotated[int, msgspec.Meta(ge=0, le=MAX_ISSUED)]


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


class Genesis(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """The first statement of a cell; its id is the cell's id."""

    signer: Key
    recovery: Key
    nonce: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    issued: Milliseconds


class Add(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """`member` belongs to the cell."""

    signer: Key
    cell: StatementId
    member: Key
    name: NodeName
    role: Role
    issued: Milliseconds


class SetRole(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """`member` has another role from now on; `kept` are its own statements that stay valid."""

    signer: Key
    cell: StatementId
    member: Key
    role: Role
    kept: Annotated[tuple[StatementId, ...], msgspec.Meta(max_length=MAX_KEPT)]
    issued: Milliseconds


class Revoke(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """`member` belongs to the cell no longer, for ever; `kept` are its own statements that stay valid."""

    signer: Key
    cell: StatementId
    member: Key
    kept: Annotated[tuple[StatementId, ...], msgspec.Meta(max_length=MAX_KEPT)]
    issued: Milliseconds


Grant = Add | SetRole
Statement = Genesis | Add | SetRole | Revoke
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


def open_statement(data: bytes) -> SignedStatement:
    """Decode and verify one statement.

    Raises:
        KnodeError: BAD_FRAME, NON_CANONICAL, BAD_SIGNATURE or INVALID_ARGUMENT (a bad key).
    """
    body = _decoder.decode(data[64:])
    PublicKey(body.recovery if isinstance(body, Genesis) else body.member)
    open_signed(PublicKey(body.signer), Domain.MEMBER, data)
    return SignedStatement(object_id(data), body, data)


@dataclass(frozen=True, slots=True)
class Member:
    """One member, as the roster has it now."""

    key: PublicKey
    name: str
    role: Role
    joined: int
    """Wall time in milliseconds of the statement that added it."""

    @property
    def node_id(self) -> NodeId:
        """Its PeerId."""
        return self.key.node_id


@dataclass(frozen=True, slots=True)
class Roster:
    """What a set of statements means."""

    cell_id: bytes
    owner: PublicKey
    recovery: PublicKey
    statements: Mapping[bytes, SignedStatement]
    members: Mapping[bytes, Member]
    """By raw key, in the order of their names."""
    revoked: Mapping[bytes, str]
    """Raw key of everyone who was revoked, to its last name; empty when nothing kept says it."""
    in_force: frozenset[bytes]
    """Ids of the ADD and ROLE statements that make the members what they are."""
    digest: bytes
    """32 bytes; equal when the sets of statements are equal."""

    def may_sign_members(self, key: PublicKey) -> bool:
        """Tell whether `key` may add members and change roles."""
        member = self.members.get(key.raw)
        return key == self.owner or (member is not None and member.role is Role.ADMIN)

    def admit(self, raw_key: bytes) -> Member:
        """Return the member with this key.

        Raises:
            KnodeError: KEY_REVOKED or UNKNOWN_PEER.
        """
        member = self.members.get(raw_key)
        if member is not None:
            return member
        if raw_key in self.revoked:
            raise KnodeError(Code.KEY_REVOKED, "this node was revoked", "ask the cell's owner")
        raise KnodeError(
            Code.UNKNOWN_PEER, "not a member of this cell", "join it with a ticket from 'knode invite'"
        )

    def find(self, selector: str) -> Member:
        """Return the member with this name, id, or unique start of an id.

        Raises:
            KnodeError: NOT_FOUND, or INVALID_ARGUMENT when several fit.
        """
        exact = [m for m in self.members.values() if selector in (m.name, m.node_id, m.key.did)]
        fitting = exact or [m for m in self.members.values() if selector and m.node_id.startswith(selector)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise KnodeError(
                Code.INVALID_ARGUMENT,
                f"{selector!r} fits {len(fitting)} members",
                "give more of the id: 'knode member list' shows them",
            )
        raise KnodeError(
            Code.NOT_FOUND, f"no member is called {selector[:80]!r}", "'knode member list' shows all"
        )

    def next_issue_time(self, member: bytes, now: int) -> int:
        """Return when to say that a new statement about `member` was issued: later than all others."""
        others = [
            s.body.issued
            for s in self.statements.values()
            if not isinstance(s.body, Genesis) and s.body.member == member
        ]
        return min(MAX_ISSUED, max([now, *(issued + 1 for issued in others)]))

    def in_force_by(self, raw_key: bytes) -> tuple[bytes, ...]:
        """Return the ids of what a key signed and is in force, for an ending statement to keep."""
        return tuple(sorted(i for i in self.in_force if self.statements[i].body.signer == raw_key))

    def free_name(self, wanted: str) -> str:
        """Return `wanted`, or with a number behind it when another member has that name."""
        taken = {member.name for member in self.members.values()}
        candidates = [wanted, *(f"{wanted[:58]}-{n}" for n in range(2, MAX_STATEMENTS + 2))]
        return next(name for name in candidates if name not in taken)


def resolve(cell_id: bytes, statements: Iterable[SignedStatement]) -> Roster:
    """Say what the statements mean. The order given does not matter.

    Statements of other cells, of keys that never had a right to make them, and what can never count
    again are left out.

    Raises:
        KnodeError: WRONG_NETWORK when the genesis is not among them.
    """
    signed = {statement.id: statement for statement in statements}
    bodies = {i: statement.body for i, statement in signed.items()}
    genesis = bodies.get(cell_id)
    if not isinstance(genesis, Genesis):
        raise KnodeError(Code.WRONG_NETWORK, "the statement that founded the cell is missing")
    grants = {i: b for i, b in bodies.items() if isinstance(b, Add | SetRole) and b.cell == cell_id}
    revokes = {i: b for i, b in bodies.items() if isinstance(b, Revoke) and b.cell == cell_id}

    # Rule 3.
    revokes = {i: b for i, b in revokes.items() if b.signer in (genesis.signer, genesis.recovery)}
    kept_of_revoked = _kept_of_revoked(revokes.values())
    # Rules 1 and 5. A grant that a later ROLE made void is remembered: its signer may be admin again.
    by_owner = {i: b for i, b in grants.items() if b.signer == genesis.signer}
    ever_admins = {b.member for b in by_owner.values() if b.role is Role.ADMIN} - {genesis.signer}
    by_admins: dict[bytes, Grant] = {}
    for admin in sorted(ever_admins):
        theirs = {i: b for i, b in grants.items() if b.signer == admin and b.role is not Role.ADMIN}
        if admin in kept_of_revoked:
            theirs = {i: b for i, b in theirs.items() if i in kept_of_revoked[admin]}
        by_admins |= dict(_in_order(theirs)[:MAX_STATEMENTS_OF_AN_ADMIN])
    # Rule 4.
    kept_of_demoted = _kept_of_demoted(by_owner)
    valid = by_owner | {
        i: b
        for i, b in by_admins.items()
        if b.signer not in kept_of_demoted or i in kept_of_demoted[b.signer]
    }

    # Rule 2. What an admin says of another admin counts only once the owner has ended that one's right.
    adds = {i: b for i, b in valid.items() if isinstance(b, Add)}
    adding = _latest(adds)
    admins_now = {key: i for key, i in _latest(by_owner).items() if by_owner[i].role is Role.ADMIN}
    deciding = _latest(valid) | admins_now
    added = {key: adds[i] for key, i in adding.items()}
    members = [
        Member(PublicKey(key), body.name, valid[deciding[key]].role, body.issued)
        for key, body in added.items()
        if key not in kept_of_revoked
    ]
    known = {cell_id, *revokes, *by_owner, *by_admins}
    return Roster(
        cell_id=cell_id,
        owner=PublicKey(genesis.signer),
        recovery=PublicKey(genesis.recovery),
        statements={i: signed[i] for i in sorted(known)},
        members={m.key.raw: m for m in sorted(members, key=lambda m: (m.name, m.key.raw))},
        revoked={key: added[key].name if key in added else "" for key in sorted(kept_of_revoked)},
        in_force=frozenset(adding.values()) | {deciding[key] for key in adding},
        digest=sha256(b"KLP/1/roster\0" + b"".join(sorted(known))).digest(),
    )


def _in_order(grants: Mapping[bytes, Grant]) -> list[tuple[bytes, Grant]]:
    return sorted(grants.items(), key=lambda item: (item[1].issued, item[0]))


def _latest(grants: Mapping[bytes, Grant]) -> dict[bytes, bytes]:
    """Return, for each member that these grants are about, the id of the latest."""
    return {body.member: i for i, body in _in_order(grants)}


def _kept_of_revoked(revokes: Iterable[Revoke]) -> dict[bytes, frozenset[bytes]]:
    """Return, for each revoked key, what stays valid of it: only what all its revocations keep."""
    kept: dict[bytes, frozenset[bytes]] = {}
    for body in revokes:
        kept[body.member] = kept.get(body.member, frozenset(body.kept)) & frozenset(body.kept)
    return kept


def _kept_of_demoted(by_owner: Mapping[bytes, Grant]) -> dict[bytes, frozenset[bytes]]:
    """Return, for each key that the owner made no admin, or admin no longer, what stays valid of it."""
    ending = {key: by_owner[i] for key, i in _latest(by_owner).items()}
    return {
        key: frozenset(body.kept) if isinstance(body, SetRole) else frozenset()
        for key, body in ending.items()
        if body.role is not Role.ADMIN
    }
