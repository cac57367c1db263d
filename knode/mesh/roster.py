"""The roster: signed statements about a cell's members, and what they mean together.

Theory of operation. A cell is named by the hash of its genesis, which fixes the owner key and the
recovery key. Everything else is a statement signed by one key. Replicas merge by union, so the meaning
(`resolve`) depends on the set alone, never on the order of arrival:

1. ADD and ROLE count when signed by the owner, or by an admin that the owner made. An admin cannot
   make admins.
2. Of several ADD or ROLE statements about one member the latest counts: greatest (issued, id).
3. REVOKE, by the owner or the recovery key, wins for ever, whatever is added later.
4. A key that is admin no longer (by ROLE or REVOKE) keeps only those of its statements that the ending
   statement names; so whoever stole the key cannot backdate one.

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
from knode.identity import KeyPair, NodeId, PublicKey
from knode.klp.codec import Decoder, encode
from knode.klp.objects import Domain, object_id, open_signed, sign

MAX_STATEMENTS = 4096
MAX_KEPT = 1024

Key = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
StatementId = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")]
Milliseconds = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


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
    name: Name
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


Statement = Genesis | Add | SetRole | Revoke
_decoder: Decoder[Statement] = Decoder(Statement)


@dataclass(frozen=True, slots=True)
class SignedStatement:
    """A statement whose signature was verified, with its bytes and id."""

    id: bytes
    body: Statement
    data: bytes


def sign_statement(key: KeyPair, body: Statement) -> SignedStatement:
    """Sign `body`, whose signer must be `key`."""
    assert body.signer == key.public.raw
    data = sign(key, Domain.MEMBER, encode(body))
    return SignedStatement(object_id(data), body, data)


def open_statement(data: bytes) -> SignedStatement:
    """Decode and verify one statement.

    Raises:
        KnodeError: BAD_FRAME, NON_CANONICAL, BAD_SIGNATURE or INVALID_ARGUMENT (a bad key).
    """
    body = _decoder.decode(data[64:])
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
    """Raw key of everyone who was revoked, to its last name."""
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
        return max([now, *(issued + 1 for issued in others)])

    def signed_by(self, raw_key: bytes) -> tuple[bytes, ...]:
        """Return the ids of what a key has signed, for an ending statement to keep."""
        return tuple(sorted(s.id for s in self.statements.values() if s.body.signer == raw_key))

    def free_name(self, wanted: str) -> str:
        """Return `wanted`, or with a number behind it when another member has that name."""
        taken = {member.name for member in self.members.values()}
        candidates = [wanted, *(f"{wanted[:58]}-{n}" for n in range(2, MAX_STATEMENTS + 2))]
        return next(name for name in candidates if name not in taken)


def resolve(cell_id: bytes, statements: Iterable[SignedStatement]) -> Roster:
    """Say what the statements mean. The order given does not matter.

    Statements of other cells, or of keys that never had a right to make them, are left out.

    Raises:
        KnodeError: WRONG_NETWORK when the genesis is not among them.
    """
    by_id = {statement.id: statement for statement in statements}
    genesis = by_id.get(cell_id)
    if genesis is None or not isinstance(genesis.body, Genesis):
        raise KnodeError(Code.WRONG_NETWORK, "the statement that founded the cell is missing")
    owner, recovery = genesis.body.signer, genesis.body.recovery

    ours = [s for _, s in sorted(by_id.items()) if not isinstance(s.body, Genesis) and s.body.cell == cell_id]
    revokes = [s for s in ours if isinstance(s.body, Revoke) and s.body.signer in (owner, recovery)]
    revoked = {s.body.member for s in revokes if isinstance(s.body, Revoke)}
    owners = [s for s in ours if isinstance(s.body, Add | SetRole) and s.body.signer == owner]
    ever_admin = {
        s.body.member for s in owners if isinstance(s.body, Add | SetRole) and s.body.role is Role.ADMIN
    }
    kept = _kept(owners, revokes)
    admins = [
        s
        for s in ours
        if isinstance(s.body, Add | SetRole)
        and s.body.signer in ever_admin
        and s.body.role is not Role.ADMIN
        and (s.body.signer not in kept or s.id in kept[s.body.signer])
    ]
    # A statement by someone who was admin once stays in the set, even when void, so that replicas agree.
    known = {cell_id: genesis} | {
        s.id: s
        for s in ours
        if s in revokes or s in owners or (isinstance(s.body, Add | SetRole) and s.body.signer in ever_admin)
    }

    added: dict[bytes, SignedStatement] = {}
    latest: dict[bytes, SignedStatement] = {}
    for statement in sorted(owners + admins, key=_when):
        body = statement.body
        assert isinstance(body, Add | SetRole)
        if isinstance(body, Add):
            added[body.member] = statement
        latest[body.member] = statement
    # An admin's later ROLE does not take away what the owner gave: admin is the owner's to give and end.
    members: dict[bytes, Member] = {}
    names: dict[bytes, str] = {}
    owners_latest = {_about(s): s for s in sorted(owners, key=_when)}
    for raw_key, statement in added.items():
        add = statement.body
        assert isinstance(add, Add)
        names[raw_key] = add.name
        if raw_key in revoked:
            continue
        deciding = latest[raw_key].body
        by_owner = owners_latest.get(raw_key)
        if (
            by_owner is not None
            and isinstance(by_owner.body, Add | SetRole)
            and by_owner.body.role is Role.ADMIN
        ):
            deciding = by_owner.body
        assert isinstance(deciding, Add | SetRole)
        members[raw_key] = Member(PublicKey(raw_key), add.name, deciding.role, add.issued)
    ordered = dict(sorted(members.items(), key=lambda item: (item[1].name, item[0])))
    return Roster(
        cell_id=cell_id,
        owner=PublicKey(owner),
        recovery=PublicKey(recovery),
        statements=known,
        members=ordered,
        revoked={raw_key: names.get(raw_key, "") for raw_key in sorted(revoked)},
        digest=sha256(b"KLP/1/roster\0" + b"".join(sorted(known))).digest(),
    )


def _when(statement: SignedStatement) -> tuple[int, bytes]:
    return statement.body.issued, statement.id


def _about(statement: SignedStatement) -> bytes:
    assert isinstance(statement.body, Add | SetRole | Revoke)
    return statement.body.member


def _kept(owners: list[SignedStatement], revokes: list[SignedStatement]) -> dict[bytes, frozenset[bytes]]:
    """Return, for each key whose right to sign has ended, which of its statements stay valid."""
    kept: dict[bytes, frozenset[bytes]] = {}
    for raw_key, statement in {_about(s): s for s in sorted(owners, key=_when)}.items():
        if isinstance(statement.body, SetRole) and statement.body.role is not Role.ADMIN:
            kept[raw_key] = frozenset(statement.body.kept)
    for statement in revokes:
        assert isinstance(statement.body, Revoke)
        named = frozenset(statement.body.kept)
        # Several revocations of one key: only what all of them keep stays.
        kept[statement.body.member] = kept.get(statement.body.member, named) & named
    return kept
