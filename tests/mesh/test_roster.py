from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mesh_cell import RECOVERY, key_of
from msgspec.structs import replace as replace_field

from knode.errors import Code, KnodeError
from knode.identity import KeyPair
from knode.klp.codec import encode
from knode.klp.objects import Domain, sign
from knode.mesh.roster import MAX_STATEMENTS_OF_AN_ADMIN, Roster, resolve
from knode.mesh.rotations import MAX_ROTATIONS
from knode.mesh.statements import (
    MAX_KEPT,
    MAX_RECOVERED_MEMBERS,
    MAX_RECOVERED_REVOKED,
    Add,
    Genesis,
    Known,
    Recover,
    Revoke,
    Role,
    Rotate,
    SetRole,
    SignedStatement,
    open_statement,
    sign_rotation,
    sign_statement,
)

OWNER = key_of("owner")
ADMIN, OTHER_ADMIN, WORKER, FRIEND, STRANGER = map(key_of, ("admin", "other", "worker", "friend", "stranger"))
PEOPLE = (ADMIN, OTHER_ADMIN, WORKER, FRIEND)
GENESIS = sign_statement(OWNER, Genesis(OWNER.public.raw, RECOVERY.public.raw, bytes(16), 1))
CELL = GENESIS.id


def add(signer, member, *, role=Role.WORKER, name="n", issued=10, era=CELL) -> SignedStatement:
    return sign_statement(signer, Add(signer.public.raw, era, member.public.raw, name, role, issued))


def set_role(signer, member, role, *, kept=(), issued=20, era=CELL) -> SignedStatement:
    ids = tuple(s.id for s in kept)
    return sign_statement(signer, SetRole(signer.public.raw, era, member.public.raw, role, ids, issued))


def revoke(signer, member, *, kept=(), issued=30, era=CELL) -> SignedStatement:
    ids = tuple(s.id for s in kept)
    return sign_statement(signer, Revoke(signer.public.raw, era, member.public.raw, ids, issued))


def roster(*statements: SignedStatement) -> Roster:
    return resolve(CELL, [GENESIS, *statements])


def roles(found: Roster) -> dict[bytes, Role]:
    return {raw_key: member.role for raw_key, member in found.members.items()}


ADMINS = (add(OWNER, ADMIN, role=Role.ADMIN, name="admin"), add(OWNER, OTHER_ADMIN, role=Role.ADMIN))


def rotate(member, old, new, *, kept=(), era=CELL, issued=40) -> SignedStatement:
    ids = tuple(s.id for s in kept)
    return sign_rotation(old, new, era=era, member=member.public.raw, kept=ids, issued=issued)


def recover(owner, members, *, signer=RECOVERY, revoked=(), issued=50, cell=CELL) -> SignedStatement:
    """A new era; `members` are (key, role) or keys of workers."""
    known = [(m, Role.WORKER) if isinstance(m, KeyPair) else m for m in members]
    return sign_statement(
        signer,
        Recover(
            signer.public.raw,
            cell,
            owner.public.raw,
            tuple(Known(m.public.raw, f"n{n}", role, 5) for n, (m, role) in enumerate(known)),
            tuple(key.public.raw for key in revoked),
            issued,
        ),
    )


# Every statement that anybody could make about anybody, with few times, so that they meet: in the first era
# and in two later ones, with the keys that people begin with and those to which they rotate.
NEW_OWNERS = key_of("second owner"), key_of("third owner")
SPARE = tuple(key_of(f"spare {n}") for n in range(4))
ERAS = (
    GENESIS,
    recover(NEW_OWNERS[0], [(ADMIN, Role.ADMIN), WORKER], revoked=[FRIEND], issued=50),
    recover(NEW_OWNERS[1], [ADMIN, (OTHER_ADMIN, Role.ADMIN), FRIEND], issued=51),
)
keys = st.sampled_from([OWNER, RECOVERY, *NEW_OWNERS, *PEOPLE, *SPARE, STRANGER])
members = st.sampled_from(PEOPLE)
times = st.integers(1, 4)
eras = st.sampled_from([CELL, CELL, CELL, ERAS[1].id, ERAS[2].id, bytes(32)])
added = st.builds(
    lambda s, m, r, t, e: add(s, m, role=r, issued=t, era=e),
    keys,
    st.sampled_from([*PEOPLE, SPARE[0]]),
    st.sampled_from(Role),
    times,
    eras,
)


def _after(pool: list[SignedStatement]) -> st.SearchStrategy[list[SignedStatement]]:
    """Statements that name some of the others as those that stay valid."""
    kept = st.lists(st.sampled_from(pool), max_size=4, unique_by=lambda s: s.id) if pool else st.just([])
    changed = st.builds(
        lambda s, m, r, k, t, e: set_role(s, m, r, kept=k, issued=t, era=e),
        keys,
        members,
        st.sampled_from(Role),
        kept,
        times,
        eras,
    )
    revoked = st.builds(
        lambda s, m, k, t, e: revoke(s, m, kept=k, issued=t, era=e), keys, members, kept, times, eras
    )
    rotated = st.builds(
        lambda m, o, n, k, e: rotate(m, o or m, n, kept=k, era=e),
        members,
        st.sampled_from([None, None, *SPARE]),
        st.sampled_from([*SPARE, *PEOPLE[:1]]),
        kept,
        eras,
    )
    return st.lists(st.one_of(changed, revoked, rotated, rotated), max_size=12)


pools = st.lists(added, max_size=12).flatmap(lambda pool: st.tuples(st.just(pool), _after(pool)))
sets = st.tuples(pools, st.sets(st.sampled_from(ERAS[1:]))).map(
    lambda drawn: [*drawn[0][0], *drawn[0][1], *drawn[1]]
)


def merged(one: Roster, other: Roster) -> Roster:
    return resolve(CELL, [*one.statements.values(), *other.statements.values()])


@settings(deadline=None, max_examples=50)
@given(sets, sets, sets)
def test_merging_is_commutative_associative_and_idempotent(a, b, c) -> None:
    one, two, three = roster(*a), roster(*b), roster(*c)
    assert merged(one, two) == merged(two, one)
    assert merged(merged(one, two), three) == merged(one, merged(two, three))
    assert merged(one, one) == one


@settings(deadline=None, max_examples=50)
@given(sets, st.randoms())
def test_neither_order_nor_the_way_of_arrival_matters(statements, random) -> None:
    at_once = roster(*statements)
    shuffled = list(statements)
    random.shuffle(shuffled)
    assert roster(*shuffled) == at_once
    # Whoever was told of the admins first misses nothing that depends on them.
    one_by_one = roster(*ADMINS)
    for statement in shuffled:
        one_by_one = resolve(CELL, [*one_by_one.statements.values(), statement])
    one_by_one = resolve(CELL, [*one_by_one.statements.values(), *shuffled])
    assert one_by_one == roster(*ADMINS, *statements)


@settings(deadline=None, max_examples=50)
@given(sets, sets)
def test_digests_are_equal_exactly_when_the_sets_are(a, b) -> None:
    one, two = roster(*a), roster(*b)
    assert (one.digest == two.digest) == (set(one.statements) == set(two.statements))
    if one.digest == two.digest:
        assert one == two


@settings(deadline=None, max_examples=50)
@given(sets, members)
def test_what_the_recovery_key_revokes_is_out_for_ever(statements, member) -> None:
    found = roster(*ADMINS, revoke(RECOVERY, member), *statements, add(OWNER, member, issued=99))
    assert_out(found, member, Code.KEY_REVOKED)
    assert member.public.raw in found.revoked


@settings(deadline=None, max_examples=50)
@given(sets, members)
def test_what_the_owner_revokes_is_out_for_as_long_as_its_key_owns_the_cell(statements, member) -> None:
    of_one_era = [s for s in statements if not isinstance(s.body, Recover)]
    found = roster(*ADMINS, revoke(OWNER, member), *of_one_era, add(OWNER, member, issued=99))
    assert_out(found, member, Code.KEY_REVOKED)


@settings(deadline=None, max_examples=50)
@given(sets)
def test_nobody_gets_in_who_was_not_added_by_a_chain_that_begins_with_the_owner(statements) -> None:
    found = roster(*statements)
    bodies = [s.body for s in statements]
    began = next((b for b in bodies if isinstance(b, Recover) and found.owner.raw == b.owner), None)
    began_with = {known.member: known.role for known in began.members} if began else {}
    grants = [b for b in bodies if isinstance(b, Add | SetRole) and b.era == found.era]
    admins = {b.member for b in grants if b.signer == found.owner.raw and b.role is Role.ADMIN}
    admins |= {member for member, role in began_with.items() if role is Role.ADMIN}

    def keys_of(member: bytes) -> set[bytes]:
        reached, size = {member}, 0
        while size != len(reached):
            size = len(reached)
            reached |= {
                b.key for b in bodies if isinstance(b, Rotate) and b.member == member and b.signer in reached
            }
        return reached

    may_add = {found.owner.raw, *(key for admin in admins for key in keys_of(admin))}
    for raw_key, member in found.members.items():
        member_id = member.id.raw
        assert member_id in began_with or any(
            isinstance(b, Add) and b.member == member_id and b.signer in may_add for b in grants
        )
        assert raw_key in keys_of(member_id)
        assert member.role is not Role.ADMIN or member_id in admins


@settings(deadline=None, max_examples=50)
@given(sets)
def test_strangers_never_count(statements) -> None:
    found = roster(*statements)
    assert all(s.body.signer != STRANGER.public.raw for s in found.statements.values())
    without = [s for s in statements if s.body.signer != STRANGER.public.raw]
    assert roster(*without) == found


@settings(deadline=None, max_examples=50)
@given(sets, pools, st.sampled_from(ERAS[1:]))
def test_nothing_that_an_earlier_owner_s_key_signs_counts_in_a_new_era(statements, pool, era) -> None:
    found = roster(*ADMINS, *statements, era)
    earlier = {OWNER, *NEW_OWNERS} - {next(key for key in NEW_OWNERS if key.public == found.owner)}
    thief = [s for s in (*pool[0], *pool[1]) if s.body.signer in {key.public.raw for key in earlier}]
    after = resolve(CELL, [*found.statements.values(), *thief])
    assert (after.members, after.revoked, after.owner) == (found.members, found.revoked, found.owner)


@settings(deadline=None, max_examples=50)
@given(sets, st.data())
def test_a_rotation_changes_a_member_s_key_and_nothing_else_of_it(statements, data) -> None:
    before = roster(*ADMINS, *statements)
    secret = {key.public.raw: key for key in (*PEOPLE, *SPARE)}
    if not before.members:
        return
    member = data.draw(st.sampled_from(list(before.members.values())))
    fresh = key_of("fresh")
    rotation = sign_rotation(
        secret[member.key.raw],
        fresh,
        era=before.era,
        member=member.id.raw,
        kept=before.in_force_by(member),
        issued=99,
    )
    after = resolve(CELL, [*before.statements.values(), rotation])
    rotated = after.admit(fresh.public.raw)
    assert rotated == replace(member, keys=(*member.keys, fresh.public))
    assert_out(after, secret[member.key.raw], Code.KEY_REVOKED)
    others = [m for m in before.members.values() if m != member]
    assert [m for m in after.members.values() if m != rotated] == others
    assert resolve(CELL, reversed(after.statements.values())) == after
    # A thief who has the old key and rotates it too gets nobody in, and nobody else out.
    theft = sign_rotation(
        secret[member.key.raw], key_of("thief"), era=before.era, member=member.id.raw, kept=(), issued=1
    )
    both = resolve(CELL, [*after.statements.values(), theft])
    for key in (fresh, key_of("thief"), secret[member.key.raw]):
        assert_out(both, key, Code.KEY_REVOKED)
    assert member.id.raw in both.contested


def assert_out(found: Roster, key: KeyPair, code: Code) -> None:
    with pytest.raises(KnodeError) as caught:
        found.admit(key.public.raw)
    assert caught.value.code is code
    assert key.public.raw not in found.members


def test_an_admin_adds_members_and_changes_their_roles() -> None:
    found = roster(*ADMINS, add(ADMIN, WORKER), set_role(OTHER_ADMIN, WORKER, Role.OBSERVER))
    assert roles(found)[WORKER.public.raw] is Role.OBSERVER
    assert found.may_sign_members(ADMIN.public)
    assert not found.may_sign_members(WORKER.public)


def test_the_latest_statement_about_a_member_counts() -> None:
    first, second = (
        set_role(ADMIN, WORKER, Role.VOTER, issued=21),
        set_role(ADMIN, WORKER, Role.OBSERVER, issued=22),
    )
    found = roster(*ADMINS, add(ADMIN, WORKER), second, first)
    assert roles(found)[WORKER.public.raw] is Role.OBSERVER


def test_an_admin_cannot_end_what_the_owner_gave() -> None:
    found = roster(*ADMINS, set_role(ADMIN, OTHER_ADMIN, Role.OBSERVER, issued=99))
    assert roles(found)[OTHER_ADMIN.public.raw] is Role.ADMIN


def test_a_backdated_statement_of_a_revoked_admin_is_void_unless_it_was_kept() -> None:
    honest, backdated = add(ADMIN, WORKER, issued=11), add(ADMIN, FRIEND, issued=1)
    found = roster(*ADMINS, honest, revoke(OWNER, ADMIN, kept=[honest]), backdated)
    assert WORKER.public.raw in found.members
    assert FRIEND.public.raw not in found.members


def test_of_two_revocations_only_what_both_keep_stays() -> None:
    honest, stolen = add(ADMIN, WORKER, issued=11), add(ADMIN, FRIEND, issued=12)
    both = revoke(OWNER, ADMIN, kept=[honest, stolen])
    found = roster(*ADMINS, honest, stolen, both, revoke(RECOVERY, ADMIN, kept=[honest]))
    assert set(found.members) == {WORKER.public.raw, OTHER_ADMIN.public.raw}


def test_a_backdated_statement_of_a_demoted_admin_is_void_unless_it_was_kept() -> None:
    honest, backdated = add(ADMIN, WORKER, issued=11), add(ADMIN, FRIEND, issued=1)
    found = roster(*ADMINS, honest, set_role(OWNER, ADMIN, Role.WORKER, kept=[honest]), backdated)
    assert WORKER.public.raw in found.members
    assert FRIEND.public.raw not in found.members
    assert roles(found)[ADMIN.public.raw] is Role.WORKER


def test_an_admin_whom_the_owner_adds_again_as_a_worker_signs_no_more() -> None:
    found = roster(*ADMINS, add(OWNER, ADMIN, issued=15), add(ADMIN, WORKER, issued=16))
    assert WORKER.public.raw not in found.members


def test_an_admin_who_was_demoted_and_made_admin_again_signs_again() -> None:
    demoted = set_role(OWNER, ADMIN, Role.WORKER, issued=20)
    found = roster(
        *ADMINS, demoted, set_role(OWNER, ADMIN, Role.ADMIN, issued=21), add(ADMIN, WORKER, issued=22)
    )
    assert WORKER.public.raw in found.members


def test_an_ending_statement_keeps_what_makes_members_of_others() -> None:
    honest = add(ADMIN, WORKER, issued=11)
    before = roster(*ADMINS, honest, set_role(ADMIN, WORKER, Role.VOTER, issued=12))
    ending = Revoke(
        OWNER.public.raw, CELL, ADMIN.public.raw, before.in_force_by(before.members[ADMIN.public.raw]), 30
    )
    after = resolve(CELL, [*before.statements.values(), sign_statement(OWNER, ending)])
    assert roles(after)[WORKER.public.raw] is Role.VOTER
    assert ADMIN.public.raw not in after.members


def test_what_a_revoked_admin_signed_in_a_flood_is_dropped() -> None:
    flood = [set_role(ADMIN, WORKER, Role.VOTER, issued=n) for n in range(100, 100 + 50)]
    before = roster(*ADMINS, add(OWNER, WORKER), *flood)
    ending = Revoke(
        OWNER.public.raw, CELL, ADMIN.public.raw, before.in_force_by(before.members[ADMIN.public.raw]), 30
    )
    after = resolve(CELL, [*before.statements.values(), sign_statement(OWNER, ending)])
    assert len(before.statements) == 54
    assert len(after.statements) == 6  # genesis, three ADD, the one ROLE in force, REVOKE
    assert roles(after)[WORKER.public.raw] is Role.VOTER


def test_one_admin_can_fill_only_its_own_share() -> None:
    flood = [set_role(ADMIN, WORKER, Role.VOTER, issued=n) for n in range(MAX_STATEMENTS_OF_AN_ADMIN + 20)]
    found = roster(*ADMINS, *flood, add(OTHER_ADMIN, WORKER), revoke(OWNER, FRIEND))
    assert len(found.statements) == MAX_STATEMENTS_OF_AN_ADMIN + 5
    assert WORKER.public.raw in found.members
    assert FRIEND.public.raw in found.revoked
    assert len(found.in_force_by(found.members[ADMIN.public.raw])) <= MAX_KEPT
    assert resolve(CELL, reversed([GENESIS, *ADMINS, *flood, *found.statements.values()])) == found


def test_a_statement_of_another_cell_is_left_out() -> None:
    elsewhere = sign_statement(OWNER, Genesis(OWNER.public.raw, RECOVERY.public.raw, bytes(15) + b"2", 1))
    found = roster(elsewhere, add(OWNER, WORKER, era=elsewhere.id))
    assert set(found.statements) == {CELL}


def test_without_its_genesis_a_roster_means_nothing() -> None:
    with pytest.raises(KnodeError) as caught:
        resolve(CELL, ADMINS)
    assert caught.value.code is Code.WRONG_NETWORK
    with pytest.raises(KnodeError):
        resolve(ADMINS[0].id, ADMINS)


def test_a_statement_goes_through_its_bytes_unchanged() -> None:
    for statement in (
        GENESIS,
        *ADMINS,
        set_role(OWNER, ADMIN, Role.WORKER, kept=ADMINS),
        revoke(OWNER, ADMIN),
        rotate(WORKER, WORKER, SPARE[0], kept=ADMINS),
        *ERAS,
    ):
        assert open_statement(statement.data) == statement


def test_a_damaged_statement_is_refused() -> None:
    data = ADMINS[0].data
    for position in range(len(data)):
        with pytest.raises(KnodeError):
            open_statement(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])


def test_a_statement_that_others_would_refuse_is_not_signed() -> None:
    with pytest.raises(KnodeError) as caught:
        add(OWNER, WORKER, issued=2**62 + 1)
    assert caught.value.code is Code.BAD_FRAME
    with pytest.raises(KnodeError):
        add(OWNER, WORKER, name="No Name")


def test_a_member_whose_key_is_none_is_refused_before_it_is_kept() -> None:
    small_order = bytes(32)
    for body in (
        Add(OWNER.public.raw, CELL, small_order, "n", Role.WORKER, 1),
        SetRole(OWNER.public.raw, CELL, small_order, Role.WORKER, (), 1),
        Revoke(OWNER.public.raw, CELL, small_order, (), 1),
        Genesis(OWNER.public.raw, small_order, bytes(16), 1),
        Rotate(OWNER.public.raw, CELL, small_order, NEW.public.raw, bytes(64), (), 1),
        Rotate(OWNER.public.raw, CELL, WORKER.public.raw, small_order, bytes(64), (), 1),
        Recover(OWNER.public.raw, CELL, small_order, (), (), 1),
        Recover(OWNER.public.raw, CELL, NEW.public.raw, (Known(small_order, "n", Role.WORKER, 1),), (), 1),
    ):
        with pytest.raises(KnodeError) as caught:
            open_statement(sign(OWNER, Domain.MEMBER, encode(body)))
        assert caught.value.code is Code.INVALID_ARGUMENT


def test_the_next_statement_is_later_than_all_before_it_and_can_still_be_said() -> None:
    found = roster(*ADMINS, set_role(ADMIN, WORKER, Role.VOTER, issued=500))
    assert found.next_issue_time(WORKER.public.raw, now=100) == 501
    assert found.next_issue_time(WORKER.public.raw, now=900) == 900
    far = roster(*ADMINS, set_role(ADMIN, WORKER, Role.VOTER, issued=2**62))
    assert far.next_issue_time(WORKER.public.raw, now=100) == 2**62


def test_members_are_found_by_name_id_did_and_start_of_an_id() -> None:
    found = roster(add(OWNER, WORKER, name="shed"), add(OWNER, FRIEND, name="attic"))
    shed = found.members[WORKER.public.raw]
    assert [found.find(by) for by in ("shed", shed.node_id, shed.key.did)] == [shed] * 3
    assert (
        found.find(
            next(shed.node_id[:n] for n in range(60) if not FRIEND.node_id.startswith(shed.node_id[:n]))
        )
        == shed
    )
    for selector, code in (("12D3", Code.INVALID_ARGUMENT), ("cellar", Code.NOT_FOUND), ("", Code.NOT_FOUND)):
        with pytest.raises(KnodeError) as caught:
            found.find(selector)
        assert caught.value.code is code


def test_a_taken_name_gets_a_number_and_stays_a_name() -> None:
    long = "a" * 63
    found = roster(add(OWNER, WORKER, name=long), add(OWNER, FRIEND, name="shed"))
    assert found.free_name("attic") == "attic"
    assert found.free_name("shed") == "shed-2"
    assert add(OWNER, ADMIN, name=found.free_name(long))


def test_members_come_in_the_order_of_their_names() -> None:
    found = roster(add(OWNER, WORKER, name="shed"), add(OWNER, FRIEND, name="attic"))
    assert [m.name for m in found.members.values()] == ["attic", "shed"]


def test_a_name_that_two_admins_gave_is_found_only_by_id() -> None:
    found = roster(*ADMINS, add(ADMIN, WORKER, name="shed"), add(OTHER_ADMIN, FRIEND, name="shed"))
    with pytest.raises(KnodeError) as caught:
        found.find("shed")
    assert caught.value.code is Code.INVALID_ARGUMENT


def test_an_id_is_of_the_body_alone() -> None:
    assert GENESIS.id == hashlib.sha256(GENESIS.data[64:]).digest()
    assert replace(GENESIS).id == CELL


# Rotation.

NEW, NEWER, THIEF = SPARE[0], SPARE[1], key_of("thief")


def test_a_member_goes_from_key_to_key_and_keeps_its_id() -> None:
    found = roster(add(OWNER, WORKER, name="shed"), rotate(WORKER, WORKER, NEW), rotate(WORKER, NEW, NEWER))
    shed = found.admit(NEWER.public.raw)
    assert (shed.id, shed.key, shed.name) == (WORKER.public, NEWER.public, "shed")
    assert found.find(WORKER.node_id) == found.find("shed") == shed
    assert found.holders[NEW.public.raw] == shed
    for key in (WORKER, NEW):
        assert_out(found, key, Code.KEY_REVOKED)


def test_a_new_key_must_sign_too() -> None:
    good = rotate(WORKER, WORKER, NEW).body
    for body in (
        replace_field(good, key=NEWER.public.raw),
        replace_field(good, member=ADMIN.public.raw),
        replace_field(good, era=bytes(32)),
        replace_field(good, proof=bytes(64)),
    ):
        with pytest.raises(KnodeError) as caught:
            sign_statement(WORKER, body)
        assert caught.value.code is Code.BAD_SIGNATURE


def test_nobody_rotates_the_key_of_another() -> None:
    found = roster(*ADMINS, add(OWNER, WORKER), rotate(WORKER, OWNER, THIEF), rotate(WORKER, ADMIN, THIEF))
    assert WORKER.public.raw in found.members
    assert_out(found, THIEF, Code.UNKNOWN_PEER)


def test_of_a_key_that_was_rotated_twice_neither_new_key_gets_in_until_the_member_is_revoked() -> None:
    honest, theft = rotate(WORKER, WORKER, NEW, issued=40), rotate(WORKER, WORKER, THIEF, issued=1)
    found = roster(add(OWNER, WORKER, name="shed"), honest, theft, rotate(WORKER, NEW, NEWER))
    for key in (WORKER, NEW, THIEF):
        assert_out(found, key, Code.KEY_REVOKED)
    assert found.members == {}
    assert found.find("shed").id == WORKER.public
    assert found.free_name("shed") == "shed-2"
    after = resolve(CELL, [*found.statements.values(), revoke(OWNER, WORKER)])
    assert after.contested == {}
    assert {after.revoked[key.public.raw] for key in (WORKER, NEW, THIEF)} == {"shed"}


def test_a_key_to_which_two_members_rotate_is_neither_s() -> None:
    both = add(OWNER, WORKER), add(OWNER, FRIEND, name="f")
    found = roster(*both, rotate(WORKER, WORKER, NEW), rotate(FRIEND, FRIEND, NEW))
    assert set(found.contested) == {WORKER.public.raw, FRIEND.public.raw}
    assert_out(found, NEW, Code.KEY_REVOKED)


def test_a_key_to_which_a_member_rotated_is_nobody_s_first_key() -> None:
    found = roster(*ADMINS, add(OWNER, WORKER), rotate(WORKER, WORKER, NEW), add(ADMIN, NEW, name="new"))
    assert found.admit(NEW.public.raw).id == WORKER.public


def test_a_member_that_rotates_back_is_out() -> None:
    found = roster(add(OWNER, WORKER), rotate(WORKER, WORKER, NEW), rotate(WORKER, NEW, WORKER))
    assert set(found.contested) == {WORKER.public.raw}


def test_a_member_lends_its_place_to_no_revoked_key() -> None:
    found = roster(
        add(OWNER, WORKER), add(OWNER, FRIEND), revoke(OWNER, FRIEND), rotate(WORKER, WORKER, FRIEND)
    )
    assert_out(found, FRIEND, Code.KEY_REVOKED)
    assert set(found.contested) == {WORKER.public.raw}


def test_a_revoked_member_is_out_with_every_key_it_had_or_makes() -> None:
    found = roster(
        add(OWNER, WORKER), rotate(WORKER, WORKER, NEW), revoke(OWNER, WORKER), rotate(WORKER, NEW, NEWER)
    )
    for key in (WORKER, NEW, NEWER):
        assert_out(found, key, Code.KEY_REVOKED)
    assert set(found.revoked) == {key.public.raw for key in (WORKER, NEW, NEWER)}


def test_an_admin_signs_with_its_new_key_and_its_old_one_adds_nobody_any_more() -> None:
    kept, later = add(ADMIN, WORKER, name="kept"), add(ADMIN, FRIEND, issued=1)
    found = roster(*ADMINS, kept, rotate(ADMIN, ADMIN, NEW, kept=[kept]), later, add(NEW, NEWER, name="new"))
    assert {m.name for m in found.members.values()} == {"admin", "n", "kept", "new"}
    assert FRIEND.public.raw not in found.members
    assert found.may_sign_members(NEW.public)
    assert not found.may_sign_members(ADMIN.public)
    ending = found.in_force_by(found.members[NEW.public.raw])
    assert ending == tuple(sorted(s.id for s in (kept, add(NEW, NEWER, name="new"))))


def test_the_owner_s_list_outranks_that_of_whoever_rotated_a_stolen_admin_key() -> None:
    honest, spy = add(ADMIN, WORKER), add(ADMIN, FRIEND)
    theft = rotate(ADMIN, ADMIN, THIEF, kept=[spy])
    stolen = roster(*ADMINS, honest, spy, theft, add(THIEF, NEW))
    assert WORKER.public.raw not in stolen.members
    assert FRIEND.public.raw in stolen.members
    for ending in (revoke(OWNER, ADMIN, kept=[honest]), set_role(OWNER, ADMIN, Role.WORKER, kept=[honest])):
        found = resolve(CELL, [*stolen.statements.values(), ending])
        assert WORKER.public.raw in found.members
        for key in (FRIEND, NEW):
            assert key.public.raw not in found.members


def test_what_a_member_rotated_while_an_admin_was_revoked_stays() -> None:
    honest = add(ADMIN, WORKER)
    found = roster(*ADMINS, honest, rotate(WORKER, WORKER, NEW), revoke(OWNER, ADMIN, kept=[honest]))
    assert found.admit(NEW.public.raw).id == WORKER.public


def test_a_member_rotates_so_often_and_no_more() -> None:
    keys = [WORKER, *(key_of(f"key {n}") for n in range(MAX_ROTATIONS + 2))]
    steps = [rotate(WORKER, old, new) for old, new in pairwise(keys)]
    found = roster(add(OWNER, WORKER), *reversed(steps))
    assert found.admit(keys[MAX_ROTATIONS].public.raw).id == WORKER.public
    assert len(found.statements) == 2 + MAX_ROTATIONS
    forks = [rotate(WORKER, keys[MAX_ROTATIONS - 1], key_of(f"fork {n}")) for n in range(20)]
    found = roster(add(OWNER, WORKER), *steps, *forks)
    assert len(found.statements) == 2 + MAX_ROTATIONS + 1
    assert resolve(CELL, [*found.statements.values(), *forks, *steps]) == found


def test_rotations_of_whom_nobody_added_are_not_kept() -> None:
    found = roster(*ADMINS, rotate(STRANGER, STRANGER, NEW), set_role(ADMIN, STRANGER, Role.WORKER))
    assert not any(isinstance(s.body, Rotate) for s in found.statements.values())


# Recovery.


def test_the_recovery_key_gives_the_cell_another_owner_and_the_first_one_s_word_counts_no_more() -> None:
    era = recover(NEW, [(ADMIN, Role.ADMIN), WORKER], revoked=[FRIEND])
    found = roster(
        *ADMINS, add(OWNER, WORKER), era, add(OWNER, NEWER, issued=99), add(OWNER, NEWER, era=era.id)
    )
    assert (found.owner, found.era) == (NEW.public, era.id)
    assert roles(found) == {ADMIN.public.raw: Role.ADMIN, WORKER.public.raw: Role.WORKER}
    assert_out(found, FRIEND, Code.KEY_REVOKED)
    assert set(found.statements) == {CELL, era.id}
    assert found.members[ADMIN.public.raw].joined == 5
    assert not found.may_sign_members(OWNER.public)
    for statement in (
        revoke(OWNER, WORKER),
        revoke(OWNER, WORKER, era=era.id),
        set_role(OWNER, WORKER, Role.ADMIN, issued=99, era=era.id),
        add(ADMIN, NEWER, era=CELL),
    ):
        assert resolve(CELL, [*found.statements.values(), statement]) == found


def test_in_a_new_era_owner_and_admins_go_on() -> None:
    era = recover(NEW, [(ADMIN, Role.ADMIN), (OTHER_ADMIN, Role.ADMIN), WORKER])
    found = roster(
        era,
        add(ADMIN, FRIEND, era=era.id),
        set_role(ADMIN, WORKER, Role.OBSERVER, era=era.id),
        set_role(ADMIN, OTHER_ADMIN, Role.WORKER, era=era.id),
        set_role(ADMIN, FRIEND, Role.ADMIN, era=era.id, issued=90),
        add(NEW, NEWER, era=era.id, role=Role.ADMIN),
    )
    assert roles(found) == {
        ADMIN.public.raw: Role.ADMIN,
        OTHER_ADMIN.public.raw: Role.ADMIN,
        WORKER.public.raw: Role.OBSERVER,
        FRIEND.public.raw: Role.WORKER,
        NEWER.public.raw: Role.ADMIN,
    }
    demoted = set_role(NEW, ADMIN, Role.WORKER, era=era.id, kept=[add(ADMIN, FRIEND, era=era.id)])
    after = resolve(CELL, [*found.statements.values(), demoted])
    assert roles(after)[ADMIN.public.raw] is Role.WORKER
    assert roles(after)[WORKER.public.raw] is Role.WORKER
    assert FRIEND.public.raw in after.members
    gone = resolve(CELL, [*after.statements.values(), revoke(NEW, WORKER, era=era.id)])
    assert gone.revoked[WORKER.public.raw] == "n2"


def test_of_two_eras_the_later_counts_alone_but_what_the_recovery_key_revoked_stays_out() -> None:
    one = recover(NEW, [WORKER], issued=50)
    other = recover(NEWER, [WORKER, FRIEND], issued=51)
    found = roster(other, one, add(NEW, ADMIN, era=one.id), revoke(RECOVERY, FRIEND, era=one.id))
    assert found.owner == NEWER.public
    assert set(found.members) == {WORKER.public.raw}
    assert_out(found, FRIEND, Code.KEY_REVOKED)
    assert_out(found, ADMIN, Code.UNKNOWN_PEER)


def test_nobody_but_the_recovery_key_begins_an_era() -> None:
    for signer in (OWNER, ADMIN, STRANGER):
        assert roster(*ADMINS, recover(THIEF, [], signer=signer)) == roster(*ADMINS)
    elsewhere = sign_statement(OWNER, Genesis(OWNER.public.raw, RECOVERY.public.raw, bytes(15) + b"2", 1))
    assert roster(*ADMINS, recover(THIEF, [], cell=elsewhere.id)) == roster(*ADMINS)


def test_a_rotation_that_the_recovery_did_not_know_of_still_counts() -> None:
    era = recover(NEWER, [WORKER])
    rotated = rotate(WORKER, WORKER, NEW)
    found = roster(add(OWNER, WORKER), rotated, era)
    assert found.admit(NEW.public.raw).id == WORKER.public
    # One of a member that the recovery left out is forgotten, and does not come back with the member.
    again = roster(add(OWNER, FRIEND), rotate(FRIEND, FRIEND, NEW), era, add(NEWER, FRIEND, era=era.id))
    assert again.admit(FRIEND.public.raw).id == FRIEND.public
    assert_out(again, NEW, Code.UNKNOWN_PEER)


def test_a_stolen_owner_key_fills_no_roster_for_longer_than_until_the_recovery() -> None:
    flood = [set_role(OWNER, WORKER, Role.VOTER, issued=n) for n in range(600)]
    found = roster(add(OWNER, WORKER), *flood, recover(NEW, [WORKER]))
    assert len(found.statements) == 2


def test_the_largest_statements_fit_into_what_is_told_at_once() -> None:
    known = [(key_of(f"m{n}"), Role.OBSERVER) for n in range(MAX_RECOVERED_MEMBERS)]
    era = Recover(
        RECOVERY.public.raw,
        CELL,
        NEW.public.raw,
        tuple(Known(m.public.raw, "n" * 63, role, 2**62) for m, role in known),
        tuple(key_of(f"r{n}").public.raw for n in range(MAX_RECOVERED_REVOKED)),
        2**62,
    )
    assert MAX_KEPT * 35 < len(sign_statement(RECOVERY, era).data) <= 64 * 1024
    with pytest.raises(KnodeError) as caught:
        sign_statement(RECOVERY, replace_field(era, revoked=(*era.revoked, OWNER.public.raw)))
    assert caught.value.code is Code.BAD_FRAME


def test_the_next_era_is_later_than_all_before_it() -> None:
    assert roster(*ADMINS).next_era_time(100) == 100
    assert roster(recover(NEW, [], issued=500)).next_era_time(100) == 501
