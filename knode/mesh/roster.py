"""The roster: what the signed statements about a cell's members mean together.

Theory of operation. A cell is named by the hash of its genesis, which fixes the first owner key and the
recovery key. Replicas merge by union, so the meaning (`resolve`) depends on the set alone, never on the
order of arrival:

1. The genesis is the first era. Each RECOVER of the recovery key is another, with an owner key, members and
   revoked keys of its own; the greatest (issued, id) is in force. ADD, ROLE and the owner's REVOKE count only
   in the era that they name, so whoever has an earlier owner's key can add and revoke nobody.
2. ADD and ROLE count when signed by the era's owner, or by an admin that the owner made. An admin cannot
   make admins, and cannot end what the owner gave to one.
3. Of several ADD or ROLE statements about one member the latest counts: greatest (issued, id).
4. REVOKE wins, whatever is added later: the owner's for its era, the recovery key's for ever.
5. A member's id is its first key. ROTATE, signed by the old key and the new, gives it another, in every era.
   When two lead away from one key, or two to one key, nobody can say which is the member's: none is.
6. A key that is admin no longer (by ROLE, REVOKE or ROTATE) keeps only those of its statements that the
   ending statement names; so whoever stole the key cannot backdate one. What the owner names outranks what
   the key does.
7. Of one admin the earliest 512 statements count, of one member 16 rotations, and what can never count
   again is forgotten; so nobody can fill the roster, and the owner has the last word.
8. INCARNATION begins the cell's ledger anew, KEEP decides between two: `knode.mesh.incarnations`.

Pure: no clock, no disk, no network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256

from knode.errors import Code, KnodeError
from knode.identity import NodeId, PublicKey
from knode.mesh.eras import Era, eras_of
from knode.mesh.incarnations import Incarnations, incarnations_of
from knode.mesh.rotations import Path, known_paths, paths_of
from knode.mesh.statements import (
    MAX_ISSUED,
    Add,
    BeginIncarnation,
    Genesis,
    Grant,
    KeepIncarnation,
    Known,
    OfTheCell,
    Recover,
    Revoke,
    Role,
    SetRole,
    SignedStatement,
    Statement,
)

MAX_STATEMENTS = 4096
MAX_STATEMENTS_OF_AN_ADMIN = 512


@dataclass(frozen=True, slots=True)
class Member:
    """One member, as the roster has it now."""

    keys: tuple[PublicKey, ...]
    """Every key that it has had, the present one last."""
    name: str
    role: Role
    joined: int
    """Wall time in milliseconds of the statement that added it."""

    @property
    def key(self) -> PublicKey:
        """The key with which it speaks now."""
        return self.keys[-1]

    @property
    def id(self) -> PublicKey:
        """Its first key: who it is in statements, whatever key it has."""
        return self.keys[0]

    @property
    def node_id(self) -> NodeId:
        """Its first key, as a PeerId: how people and programs call it."""
        return self.id.node_id


@dataclass(frozen=True, slots=True)
class Roster:
    """What a set of statements means."""

    cell_id: bytes
    era: bytes
    """Id of the statement that began the era in force."""
    owner: PublicKey
    recovery: PublicKey
    statements: Mapping[bytes, SignedStatement]
    members: Mapping[bytes, Member]
    """By the raw key that each has now, in the order of their names."""
    contested: Mapping[bytes, Member]
    """By raw id, members whose key is contested: they are out until they are revoked."""
    holders: Mapping[bytes, Member]
    """Every raw key that a member has or had, to the member."""
    revoked: Mapping[bytes, str]
    """Raw key of everyone who was revoked, to its last name; empty when nothing kept says it."""
    replaced: frozenset[bytes]
    """Raw keys that a ROTATE ended, or that are contested."""
    in_force: frozenset[bytes]
    """Ids of the ADD and ROLE statements that make the members what they are."""
    incarnations: Incarnations
    """Which ledger counts."""
    digest: bytes
    """32 bytes; equal when the sets of statements are equal."""

    def is_founder(self, member: Member) -> bool:
        """Tell whether the cell was founded with this member."""
        genesis = self.statements[self.cell_id].body
        return member.joined == genesis.issued

    def may_sign_members(self, key: PublicKey) -> bool:
        """Tell whether `key` may add members and change roles."""
        member = self.members.get(key.raw)
        return key == self.owner or (member is not None and member.role is Role.ADMIN)

    def admit(self, raw_key: bytes) -> Member:
        """Return the member that has this key now.

        Raises:
            KnodeError: KEY_REVOKED or UNKNOWN_PEER.
        """
        member = self.members.get(raw_key)
        if member is not None:
            return member
        if raw_key in self.revoked:
            raise KnodeError(Code.KEY_REVOKED, "this node was revoked", "ask the cell's owner")
        if raw_key in self.replaced:
            raise KnodeError(
                Code.KEY_REVOKED,
                "another key has taken the place of this one",
                "if nobody ran 'knode member rotate' there, the key was stolen: have the owner revoke it",
            )
        raise KnodeError(
            Code.UNKNOWN_PEER, "not a member of this cell", "join it with a ticket from 'knode invite'"
        )

    def find(self, selector: str) -> Member:
        """Return the member with this name, id, or unique start of an id; a contested one too.

        Raises:
            KnodeError: NOT_FOUND, or INVALID_ARGUMENT when several fit.
        """
        everyone = [*self.members.values(), *self.contested.values()]
        exact = [m for m in everyone if selector in (m.name, m.node_id, m.id.did)]
        fitting = exact or [m for m in everyone if selector and m.node_id.startswith(selector)]
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
        """Return when to say that a new statement about a member's raw id was issued: after all others."""
        bodies = [s.body for s in self.statements.values()]
        return _after([b.issued for b in bodies if not isinstance(b, OfTheCell) and b.member == member], now)

    def next_incarnation_time(self, now: int) -> int:
        """Return when to say that an incarnation was begun or kept: after all others."""
        bodies = [s.body for s in self.statements.values()]
        return _after([b.issued for b in bodies if isinstance(b, BeginIncarnation | KeepIncarnation)], now)

    def next_era_time(self, now: int) -> int:
        """Return when to say that a new era was begun: after all others."""
        bodies = [s.body for s in self.statements.values()]
        return _after([b.issued for b in bodies if isinstance(b, Recover)], now)

    def in_force_by(self, member: Member) -> tuple[bytes, ...]:
        """Return the ids of what a member signed and is in force, for an ending statement to keep."""
        keys = {key.raw for key in member.keys}
        return tuple(sorted(i for i in self.in_force if self.statements[i].body.signer in keys))

    def free_name(self, wanted: str) -> str:
        """Return `wanted`, or with a number behind it when another member has that name."""
        taken = {m.name for m in (*self.members.values(), *self.contested.values())}
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
    eras = eras_of(cell_id, genesis, bodies)
    era = eras[-1]
    revokes = _revokes(bodies, eras, genesis.recovery)
    kept_of_revoked = _kept_of_revoked(revokes.values())
    paths = paths_of(bodies, eras)
    grants = _grants(bodies, era, paths, kept_of_revoked)

    # Whoever is not known here can leave no rotations here.
    paths = known_paths(paths, grants.known_members(era))
    rotates = {i: rotate for path in paths.values() for i, rotate in path.followed}
    claims = Counter(rotate.key for rotate in rotates.values())
    known = _members(era, grants, paths)
    revoked_ids = set(kept_of_revoked) | era.revoked
    revoked = {
        key: known[i].name if i in known else ""
        for i in sorted(revoked_ids)
        for key in (paths[i].every_key if i in paths else (i,))
    }
    # Nobody lends its place to a key that was revoked.
    contested = {i for i, p in paths.items() if p.is_contested(claims) or not p.every_key.isdisjoint(revoked)}
    members = [m for i, m in known.items() if i not in revoked_ids | contested]
    led_away = {key for path in paths.values() if path.followed for key in path.every_key}
    incarnations = incarnations_of(cell_id, bodies, eras, genesis.recovery)
    kept = {cell_id, *(e.id for e in eras), *revokes, *grants.by_owner, *grants.by_admins, *rotates}
    kept |= incarnations.kept
    return Roster(
        cell_id=cell_id,
        era=era.id,
        owner=PublicKey(era.owner),
        recovery=PublicKey(genesis.recovery),
        statements={i: signed[i] for i in sorted(kept)},
        members={m.key.raw: m for m in sorted(members, key=lambda m: (m.name, m.id.raw))},
        contested={i: m for i, m in known.items() if i in contested - revoked_ids},
        holders={key.raw: m for m in members for key in m.keys},
        revoked=revoked,
        replaced=frozenset(led_away - {m.key.raw for m in members} - set(revoked)),
        in_force=grants.in_force,
        incarnations=incarnations,
        digest=sha256(b"KLP/1/roster\0" + b"".join(sorted(kept))).digest(),
    )


@dataclass(frozen=True, slots=True)
class _Grants:
    """The ADD and ROLE statements of an era that have or may again have a right to be there, by id."""

    by_owner: Mapping[bytes, Grant]
    by_admins: Mapping[bytes, Grant]
    valid: Mapping[bytes, Grant]
    """Those that count now."""

    @property
    def adding(self) -> Mapping[bytes, bytes]:
        """For each member that was added in this era, the id of the ADD that counts."""
        return _latest({i: b for i, b in self.valid.items() if isinstance(b, Add)})

    @property
    def deciding(self) -> Mapping[bytes, bytes]:
        """For each member, the id of the statement that gave it its role.

        What an admin says of another admin counts only once the owner has ended that one's right.
        """
        by_owner = _latest(self.by_owner)
        return _latest(self.valid) | {
            m: i for m, i in by_owner.items() if self.by_owner[i].role is Role.ADMIN
        }

    @property
    def in_force(self) -> frozenset[bytes]:
        """Ids of those that make the members what they are."""
        return frozenset((*self.adding.values(), *self.deciding.values()))

    def known_members(self, era: Era) -> set[bytes]:
        """Return the ids of whom the owner, or an admin that added it, has ever spoken in this era."""
        by_admins = {b.member for b in self.by_admins.values() if isinstance(b, Add)}
        return {*era.members, *by_admins, *(b.member for b in self.by_owner.values())}


def _grants(
    bodies: Mapping[bytes, Statement],
    era: Era,
    paths: Mapping[bytes, Path],
    kept_of_revoked: Mapping[bytes, frozenset[bytes]],
) -> _Grants:
    grants = {i: b for i, b in bodies.items() if isinstance(b, Add | SetRole) and b.era == era.id}
    by_owner = {i: b for i, b in grants.items() if b.signer == era.owner}
    kept_of_demoted = _kept_of_demoted(by_owner)
    # A grant that a later ROLE made void is remembered: its signer may be admin again.
    by_admins: dict[bytes, Grant] = {}
    valid: dict[bytes, Grant] = dict(by_owner)
    made_admin = [m for m in (*by_owner.values(), *era.members.values()) if m.role is Role.ADMIN]
    for admin, path in known_paths(paths, {m.member for m in made_admin}).items():
        of_owner = kept_of_revoked.get(admin)
        theirs = {
            i: b
            for i, b in grants.items()
            if b.signer in path.every_key
            and b.signer != era.owner
            and b.role is not Role.ADMIN
            and (of_owner is None or i in of_owner)
        }
        earliest = dict(_in_order(theirs)[:MAX_STATEMENTS_OF_AN_ADMIN])
        by_admins |= earliest
        # What the owner lists outranks what the keys themselves say: a thief has those.
        of_owner = of_owner if of_owner is not None else kept_of_demoted.get(admin)
        valid |= {
            i: b
            for i, b in earliest.items()
            if (i in of_owner if of_owner is not None else path.keeps(i, b.signer))
        }
    return _Grants(by_owner, by_admins, valid)


def _members(era: Era, grants: _Grants, paths: Mapping[bytes, Path]) -> dict[bytes, Member]:
    """Return everybody who was added, by raw id, revoked or not."""
    adding, deciding = grants.adding, grants.deciding
    owner_spoke_of = {b.member for b in grants.by_owner.values()}
    members: dict[bytes, Member] = {}
    for member in sorted({*era.members, *adding}):
        known = era.members.get(member)
        if member in adding:
            add = grants.valid[adding[member]]
            assert isinstance(add, Add)
            known = Known(member, add.name, add.role, add.issued)
        assert known is not None
        began_as_admin = member in era.members and era.members[member].role is Role.ADMIN
        if began_as_admin and member not in owner_spoke_of:
            role = Role.ADMIN
        else:
            role = grants.valid[deciding[member]].role if member in deciding else known.role
        keys = tuple(PublicKey(key) for key in paths[member].keys)
        members[member] = Member(keys, known.name, role, known.joined)
    return members


def _in_order(grants: Mapping[bytes, Grant]) -> list[tuple[bytes, Grant]]:
    return sorted(grants.items(), key=lambda item: (item[1].issued, item[0]))


def _latest(grants: Mapping[bytes, Grant]) -> dict[bytes, bytes]:
    """Return, for each member that these grants are about, the id of the latest."""
    return {body.member: i for i, body in _in_order(grants)}


def _after(others: list[int], now: int) -> int:
    return min(MAX_ISSUED, max([now, *(issued + 1 for issued in others)]))


def _revokes(bodies: Mapping[bytes, Statement], eras: list[Era], recovery: bytes) -> dict[bytes, Revoke]:
    """Return the revocations that count: the owner's of this era, the recovery key's of every era."""
    known, era = {e.id for e in eras}, eras[-1]
    return {
        i: b
        for i, b in bodies.items()
        if isinstance(b, Revoke)
        and ((b.signer == recovery and b.era in known) or (b.signer == era.owner and b.era == era.id))
    }


def _kept_of_revoked(revokes: Iterable[Revoke]) -> dict[bytes, frozenset[bytes]]:
    """Return, for each revoked member, what stays valid of it: only what all its revocations keep."""
    kept: dict[bytes, frozenset[bytes]] = {}
    for body in revokes:
        kept[body.member] = kept.get(body.member, frozenset(body.kept)) & frozenset(body.kept)
    return kept


def _kept_of_demoted(by_owner: Mapping[bytes, Grant]) -> dict[bytes, frozenset[bytes]]:
    """Return, for each member that the owner made no admin, or admin no longer, what stays valid of it."""
    ending = {member: by_owner[i] for member, i in _latest(by_owner).items()}
    return {
        member: frozenset(body.kept) if isinstance(body, SetRole) else frozenset()
        for member, body in ending.items()
        if body.role is not Role.ADMIN
    }
