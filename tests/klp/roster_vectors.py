"""The vectors of the roster: sets of statements, and what each means."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import msgspec

from knode.errors import Code
from knode.identity import KeyPair
from knode.klp import Domain, encode, sign
from knode.mesh.roster import resolve
from knode.mesh.statements import (
    Add,
    BeginIncarnation,
    Genesis,
    KeepIncarnation,
    Known,
    Recover,
    Revoke,
    Role,
    Rotate,
    SetRole,
    SignedStatement,
    sign_rotation,
    sign_statement,
)


def _key(name: str) -> KeyPair:
    return KeyPair(hashlib.sha256(b"roster " + name.encode()).digest())


OWNER, RECOVERY, SECOND = map(_key, ("owner", "recovery", "second owner"))
ADMIN, OTHER, WORKER, FRIEND = map(_key, ("admin", "other", "worker", "friend"))
NEW, NEWER, THIEF = map(_key, ("new", "newer", "thief"))
GENESIS = sign_statement(OWNER, Genesis(OWNER.public.raw, RECOVERY.public.raw, bytes(16), 1))
CELL = GENESIS.id


def add(
    signer: KeyPair,
    who: KeyPair,
    name: str,
    role: Role = Role.WORKER,
    issued: int = 10,
    era: bytes = CELL,
) -> SignedStatement:
    return sign_statement(signer, Add(signer.public.raw, era, who.public.raw, name, role, issued))


def role(
    signer: KeyPair,
    who: KeyPair,
    given: Role,
    issued: int,
    *kept: SignedStatement,
    era: bytes = CELL,
) -> SignedStatement:
    body = SetRole(signer.public.raw, era, who.public.raw, given, ids(kept), issued)
    return sign_statement(signer, body)


def revoke(
    signer: KeyPair, who: KeyPair, issued: int, *kept: SignedStatement, era: bytes = CELL
) -> SignedStatement:
    body = Revoke(signer.public.raw, era, who.public.raw, ids(kept), issued)
    return sign_statement(signer, body)


def rotate(who: KeyPair, old: KeyPair, to: KeyPair, *kept: SignedStatement) -> SignedStatement:
    return sign_rotation(old, to, era=CELL, member=who.public.raw, kept=ids(kept), issued=30)


def recover(issued: int, to: KeyPair, *known: Known, revoked: tuple[KeyPair, ...] = ()) -> SignedStatement:
    out = tuple(key.public.raw for key in revoked)
    body = Recover(RECOVERY.public.raw, CELL, to.public.raw, known, out, issued)
    return sign_statement(RECOVERY, body)


def begin(
    signer: KeyPair,
    on: SignedStatement | None = None,
    *,
    survivor: KeyPair = ADMIN,
    index: int = 7,
    issued: int = 40,
    era: bytes = CELL,
) -> SignedStatement:
    """Begin an incarnation on that of `on`, or on the first."""
    number, predecessor = 1, CELL
    if on is not None:
        assert isinstance(on.body, BeginIncarnation)
        number, predecessor = on.body.number + 1, on.id
    replica = survivor.public.raw + bytes(8)
    body = BeginIncarnation(signer.public.raw, era, number, predecessor, replica, index, 3, issued)
    return sign_statement(signer, body)


def keep(
    signer: KeyPair, incarnation: SignedStatement, *, issued: int = 60, era: bytes = CELL
) -> SignedStatement:
    return sign_statement(signer, KeepIncarnation(signer.public.raw, era, incarnation.id, issued))


def ids(kept: tuple[SignedStatement, ...]) -> tuple[bytes, ...]:
    return tuple(statement.id for statement in kept)


def roster() -> dict[str, object]:
    """Sets of statements, in no order, and what each means; then bytes that are no statement."""
    is_admin = add(OWNER, ADMIN, "admin", Role.ADMIN)
    has_other = add(OWNER, OTHER, "other", Role.ADMIN, 11)
    by_admin = add(ADMIN, WORKER, "worker")
    backdated = add(ADMIN, FRIEND, "friend", issued=2)
    rotated = rotate(ADMIN, ADMIN, NEW, by_admin)
    era = recover(
        50,
        SECOND,
        Known(ADMIN.public.raw, "admin", Role.ADMIN, 10),
        Known(WORKER.public.raw, "worker", Role.WORKER, 10),
        revoked=(FRIEND,),
    )
    cases: dict[str, list[SignedStatement]] = {
        "a cell of nobody": [],
        "an admin adds a member and changes its role": [
            is_admin,
            by_admin,
            role(ADMIN, WORKER, Role.VOTER, 20),
        ],
        "an admin makes no admin and ends none": [
            is_admin,
            has_other,
            role(ADMIN, OTHER, Role.OBSERVER, 99),
            add(ADMIN, WORKER, "worker", Role.ADMIN),
        ],
        "the latest statement counts, by id when issued at once": [
            is_admin,
            by_admin,
            role(OWNER, WORKER, Role.VOTER, 20),
            role(OWNER, WORKER, Role.OBSERVER, 20),
        ],
        "a revoked admin keeps what is named": [
            is_admin,
            by_admin,
            backdated,
            revoke(OWNER, ADMIN, 40, by_admin),
        ],
        "of two revocations what both name": [
            is_admin,
            by_admin,
            backdated,
            revoke(OWNER, ADMIN, 40, by_admin, backdated),
            revoke(RECOVERY, ADMIN, 41, by_admin),
        ],
        "a demoted admin keeps what is named": [
            is_admin,
            by_admin,
            backdated,
            role(OWNER, ADMIN, Role.WORKER, 40, by_admin),
        ],
        "nobody else revokes": [is_admin, by_admin, revoke(ADMIN, WORKER, 40), revoke(WORKER, ADMIN, 40)],
        "strangers": [
            is_admin,
            add(THIEF, FRIEND, "friend"),
            rotate(THIEF, THIEF, NEW),
            revoke(THIEF, ADMIN, 9),
        ],
        "a member has another key": [
            is_admin,
            by_admin,
            rotate(WORKER, WORKER, NEW),
            rotate(WORKER, NEW, NEWER),
        ],
        "an admin's old key adds nobody, its new one does": [
            is_admin,
            by_admin,
            backdated,
            rotated,
            add(NEW, NEWER, "newer"),
        ],
        "a key that was rotated twice": [
            is_admin,
            by_admin,
            rotate(WORKER, WORKER, NEW),
            rotate(WORKER, WORKER, THIEF),
            rotate(WORKER, NEW, NEWER),
        ],
        "a contested member is revoked": [
            is_admin,
            by_admin,
            rotate(WORKER, WORKER, NEW),
            rotate(WORKER, WORKER, THIEF),
            revoke(OWNER, WORKER, 40),
        ],
        "two members rotate to one key": [
            is_admin,
            has_other,
            rotate(ADMIN, ADMIN, NEW),
            rotate(OTHER, OTHER, NEW),
        ],
        "a member rotates in a ring": [is_admin, rotate(ADMIN, ADMIN, NEW), rotate(ADMIN, NEW, ADMIN)],
        "a key that was rotated to is no first key": [
            is_admin,
            has_other,
            rotate(ADMIN, ADMIN, NEW),
            add(OTHER, NEW, "new"),
        ],
        "a member rotates to a revoked key": [
            is_admin,
            has_other,
            revoke(OWNER, OTHER, 40),
            rotate(ADMIN, ADMIN, OTHER),
        ],
        "the owner's list outranks the admin's own": [
            is_admin,
            by_admin,
            backdated,
            rotate(ADMIN, ADMIN, THIEF, backdated),
            add(THIEF, NEWER, "newer"),
            revoke(OWNER, ADMIN, 40, by_admin),
        ],
        "a new era": [
            is_admin,
            has_other,
            by_admin,
            era,
            add(OWNER, NEWER, "newer", issued=99),
            add(OWNER, NEWER, "newer", issued=99, era=era.id),
            revoke(OWNER, WORKER, 99),
            add(ADMIN, NEW, "new", era=era.id),
            role(SECOND, WORKER, Role.OBSERVER, 60, era=era.id),
        ],
        "in a new era the owner ends an admin": [
            era,
            add(ADMIN, NEW, "new", era=era.id),
            role(SECOND, ADMIN, Role.WORKER, 70, era=era.id),
        ],
        "a rotation outlives its era with its member": [
            is_admin,
            rotated,
            has_other,
            rotate(OTHER, OTHER, NEWER),
            era,
        ],
        "of two eras the later counts": [
            is_admin,
            era,
            recover(51, NEWER, Known(OTHER.public.raw, "other", Role.OBSERVER, 3)),
            revoke(RECOVERY, OTHER, 60, era=era.id),
        ],
        "only the recovery key begins an era": [
            is_admin,
            sign_statement(OWNER, Recover(OWNER.public.raw, CELL, THIEF.public.raw, (), (), 60)),
        ],
    }
    first, rival = begin(OWNER), begin(RECOVERY, survivor=OTHER)
    second = begin(OWNER, first)
    cases |= {
        "the owner begins an incarnation, and another on that": [is_admin, first, second],
        "two incarnations on one predecessor stop both": [is_admin, has_other, first, second, rival],
        "the owner names the incarnation to keep": [is_admin, first, rival, second, keep(OWNER, rival)],
        "what was begun on the one to keep counts": [is_admin, first, second, rival, keep(OWNER, first)],
        "of two that were named the later counts": [
            is_admin,
            first,
            rival,
            keep(OWNER, first, issued=61),
            keep(RECOVERY, rival, issued=62),
        ],
        "an admin begins and keeps none": [is_admin, begin(ADMIN), first, rival, keep(ADMIN, first)],
        "a number that is not the next": [
            is_admin,
            first,
            sign_statement(OWNER, BeginIncarnation(OWNER.public.raw, CELL, 3, first.id, bytes(40), 1, 1, 50)),
        ],
        "of an earlier owner none counts, the recovery key's does": [is_admin, first, era, rival],
        "an earlier owner's counts when it is named": [is_admin, first, era, keep(RECOVERY, first)],
        "what an earlier owner names does not count": [is_admin, first, rival, era, keep(OWNER, first)],
        "of an earlier owner so many are kept and no more": [
            is_admin,
            era,
            *(begin(OWNER, issued=n, index=n) for n in range(20)),
        ],
        "one that nobody has heard of is not kept": [is_admin, first, keep(OWNER, second)],
    }
    long_path = [is_admin]
    keys_in_turn = [ADMIN, *(KeyPair(hashlib.sha256(b"turn %d" % n).digest()) for n in range(18))]
    for old, to in pairwise(keys_in_turn):
        long_path.append(rotate(ADMIN, old, to))
    cases["sixteen rotations and no more"] = long_path
    unsigned = rotated.body
    assert isinstance(unsigned, Rotate)
    no_proof = encode(msgspec.structs.replace(unsigned, proof=bytes(64)))
    return {
        "cell": CELL.hex(),
        "rosters": [
            {
                "name": name,
                "statements": [s.data.hex() for s in (*case, GENESIS)],
                **meaning([*case, GENESIS]),
            }
            for name, case in cases.items()
        ],
        "refused": [
            {"why": why, "code": code.value, "statement": data.hex()}
            for why, code, data in (
                ("the new key did not sign", Code.BAD_SIGNATURE, sign(ADMIN, Domain.MEMBER, no_proof)),
                ("another key signed", Code.BAD_SIGNATURE, sign(THIEF, Domain.MEMBER, is_admin.data[64:])),
                (
                    "signed for another domain",
                    Code.BAD_SIGNATURE,
                    sign(OWNER, Domain.NODE, is_admin.data[64:]),
                ),
                (
                    "a field too many",
                    Code.BAD_FRAME,
                    sign(OWNER, Domain.MEMBER, b"\x98" + is_admin.data[65:] + b"\x01"),
                ),
                ("a role that is none", Code.BAD_FRAME, _with_role(OWNER, is_admin, "guest")),
                (
                    "a survivor that is no replica",
                    Code.BAD_FRAME,
                    sign(OWNER, Domain.MEMBER, encode((7, OWNER.public.raw, CELL, 1, CELL, CELL, 1, 1, 1))),
                ),
                (
                    "an unknown statement",
                    Code.BAD_FRAME,
                    sign(OWNER, Domain.MEMBER, encode((9, OWNER.public.raw))),
                ),
            )
        ],
    }


def _with_role(key: KeyPair, statement: SignedStatement, role: str) -> bytes:
    fields = msgspec.msgpack.decode(statement.data[64:])
    return sign(key, Domain.MEMBER, encode((*fields[:5], role, *fields[6:])))


def meaning(statements: list[SignedStatement]) -> dict[str, object]:
    found = resolve(CELL, statements)
    return {
        "era": found.era.hex(),
        "owner": found.owner.raw.hex(),
        "kept": [i.hex() for i in found.statements],
        "digest": found.digest.hex(),
        "members": [
            {
                "id": m.id.raw.hex(),
                "key": m.key.raw.hex(),
                "name": m.name,
                "role": m.role.value,
                "joined": m.joined,
            }
            for m in sorted(found.members.values(), key=lambda m: m.id.raw)
        ],
        "contested": [i.hex() for i in sorted(found.contested)],
        "revoked": [key.hex() for key in sorted(found.revoked)],
        "incarnation": [found.incarnations.present.number, found.incarnations.present.hash.hex()],
        "rivals": [rival.hash.hex() for rival in found.incarnations.rivals],
    }
