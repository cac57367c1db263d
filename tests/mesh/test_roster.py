from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mesh_cell import RECOVERY, key_of

from knode.errors import Code, KnodeError
from knode.klp.codec import encode
from knode.klp.objects import Domain, sign
from knode.mesh.roster import (
    MAX_KEPT,
    MAX_STATEMENTS_OF_AN_ADMIN,
    Add,
    Genesis,
    Revoke,
    Role,
    Roster,
    SetRole,
    SignedStatement,
    open_statement,
    resolve,
    sign_statement,
)

OWNER = key_of("owner")
ADMIN, OTHER_ADMIN, WORKER, FRIEND, STRANGER = map(key_of, ("admin", "other", "worker", "friend", "stranger"))
PEOPLE = (ADMIN, OTHER_ADMIN, WORKER, FRIEND)
GENESIS = sign_statement(OWNER, Genesis(OWNER.public.raw, RECOVERY.public.raw, bytes(16), 1))
CELL = GENESIS.id


def add(signer, member, *, role=Role.WORKER, name="n", issued=10, cell=CELL) -> SignedStatement:
    return sign_statement(signer, Add(signer.public.raw, cell, member.public.raw, name, role, issued))


def set_role(signer, member, role, *, kept=(), issued=20) -> SignedStatement:
    ids = tuple(s.id for s in kept)
    return sign_statement(signer, SetRole(signer.public.raw, CELL, member.public.raw, role, ids, issued))


def revoke(signer, member, *, kept=(), issued=30) -> SignedStatement:
    ids = tuple(s.id for s in kept)
    return sign_statement(signer, Revoke(signer.public.raw, CELL, member.public.raw, ids, issued))


def roster(*statements: SignedStatement) -> Roster:
    return resolve(CELL, [GENESIS, *statements])


def roles(found: Roster) -> dict[bytes, Role]:
    return {raw_key: member.role for raw_key, member in found.members.items()}


ADMINS = (add(OWNER, ADMIN, role=Role.ADMIN, name="admin"), add(OWNER, OTHER_ADMIN, role=Role.ADMIN))

# Every statement that anybody could make about anybody, with few times, so that they meet.
signers = st.sampled_from([OWNER, RECOVERY, *PEOPLE, STRANGER])
members = st.sampled_from(PEOPLE)
times = st.integers(1, 4)
added = st.builds(
    lambda s, m, r, t: add(s, m, role=r, issued=t), signers, members, st.sampled_from(Role), times
)
pools = st.lists(added, max_size=12).flatmap(
    lambda pool: st.tuples(
        st.just(pool),
        st.lists(
            st.one_of(
                st.builds(
                    lambda s, m, r, k, t: set_role(s, m, r, kept=k, issued=t),
                    signers,
                    members,
                    st.sampled_from(Role),
                    st.lists(st.sampled_from(pool), max_size=4, unique_by=lambda s: s.id)
                    if pool
                    else st.just([]),
                    times,
                ),
                st.builds(
                    lambda s, m, k, t: revoke(s, m, kept=k, issued=t),
                    signers,
                    members,
                    st.lists(st.sampled_from(pool), max_size=4, unique_by=lambda s: s.id)
                    if pool
                    else st.just([]),
                    times,
                ),
            ),
            max_size=8,
        ),
    )
)
sets = pools.map(lambda both: [*both[0], *both[1]])


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
@given(sets, members, st.sampled_from([OWNER, RECOVERY]))
def test_a_revocation_wins_for_ever(statements, member, signer) -> None:
    found = roster(*ADMINS, revoke(signer, member), *statements, add(OWNER, member, issued=99))
    assert member.public.raw not in found.members
    assert member.public.raw in found.revoked
    with pytest.raises(KnodeError) as caught:
        found.admit(member.public.raw)
    assert caught.value.code is Code.KEY_REVOKED


@settings(deadline=None, max_examples=50)
@given(sets)
def test_only_the_owner_makes_admins_and_strangers_never_count(statements) -> None:
    found = roster(*statements)
    for raw_key, member in found.members.items():
        if member.role is Role.ADMIN:
            assert any(
                isinstance(s.body, Add | SetRole)
                and (s.body.signer, s.body.member, s.body.role) == (OWNER.public.raw, raw_key, Role.ADMIN)
                for s in statements
            )
    assert all(s.body.signer != STRANGER.public.raw for s in found.statements.values())
    without = [s for s in statements if s.body.signer != STRANGER.public.raw]
    assert roster(*without) == found


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
    ending = Revoke(OWNER.public.raw, CELL, ADMIN.public.raw, before.in_force_by(ADMIN.public.raw), 30)
    after = resolve(CELL, [*before.statements.values(), sign_statement(OWNER, ending)])
    assert roles(after)[WORKER.public.raw] is Role.VOTER
    assert ADMIN.public.raw not in after.members


def test_what_a_revoked_admin_signed_in_a_flood_is_dropped() -> None:
    flood = [set_role(ADMIN, WORKER, Role.VOTER, issued=n) for n in range(100, 100 + 50)]
    before = roster(*ADMINS, add(OWNER, WORKER), *flood)
    ending = Revoke(OWNER.public.raw, CELL, ADMIN.public.raw, before.in_force_by(ADMIN.public.raw), 30)
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
    assert len(found.in_force_by(ADMIN.public.raw)) <= MAX_KEPT
    assert resolve(CELL, reversed([GENESIS, *ADMINS, *flood, *found.statements.values()])) == found


def test_a_statement_of_another_cell_is_left_out() -> None:
    elsewhere = sign_statement(OWNER, Genesis(OWNER.public.raw, RECOVERY.public.raw, bytes(15) + b"2", 1))
    found = roster(elsewhere, add(OWNER, WORKER, cell=elsewhere.id))
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
