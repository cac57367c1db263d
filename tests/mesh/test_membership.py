from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import pairwise
from pathlib import Path

import apsw
import pytest
import trio
from mesh_cell import RECOVERY, MeshNode, key_of, refused

from knode.errors import Code, KnodeError
from knode.identity import KeyPair
from knode.mesh import membership as membership_module
from knode.mesh.contact import Contact, SignedContact, sign_contact
from knode.mesh.invitations import MAX_OPEN_TICKETS
from knode.mesh.membership import MIGRATIONS, Membership
from knode.mesh.rotations import MAX_ROTATIONS
from knode.mesh.statements import Add, Revoke, Role, SetRole, SignedStatement, sign_statement
from knode.mesh.ticket import LIFETIME_MS
from knode.mesh.words import four_words
from knode.storage import Database

WORDS = four_words(bytes(32))
FRIEND, OTHER = key_of("friend"), key_of("other")
ADDRESSES = ("home:4747",)


@pytest.fixture
async def reopen(
    tmp_path: Path, autojump_clock: object
) -> AsyncIterator[Callable[[], Awaitable[Membership]]]:
    """Opens the founder's membership, anew each time."""
    node = MeshNode("home", tmp_path, {})
    await node.found()

    async def open_again() -> Membership:
        await node.database.aclose()
        await node.open()
        return node.membership

    open_again.node = node  # type: ignore[attr-defined]
    yield open_again
    await node.database.aclose()


@pytest.fixture
async def home(reopen) -> Membership:
    return await reopen()


@pytest.fixture
def node(reopen) -> MeshNode:
    return reopen.node


async def joined(home: Membership, key: KeyPair, role: Role = Role.WORKER, name: str = "friend") -> bytes:
    ticket, _ = await home.issue_ticket(role, ADDRESSES)
    await home.redeem(ticket.key.public.raw, key.public, name, WORDS)
    return ticket.key.public.raw


async def member(tmp_path: Path, home: Membership, key: KeyPair, name: str) -> Membership:
    """The membership of another node, which knows what `home` knows."""
    other = MeshNode(name, tmp_path, {}, key=key)
    await other.open()
    await other.membership.adopt(home.roster.cell_id, list(home.roster.statements.values()))
    return other.membership


async def test_everything_is_there_when_the_database_is_opened_again(reopen) -> None:
    home = await reopen()
    used = await joined(home, FRIEND)
    open_ticket, expires = await home.issue_ticket(Role.OBSERVER, ADDRESSES)
    await home.add_contacts([sign_contact(FRIEND, Contact(FRIEND.public.raw, ("shed:1",), "0.1.0", 7))])
    before = home.roster, home.contacts, home.invitations.words()
    again = await reopen()
    assert again is not home
    assert (again.roster, again.contacts, again.invitations.words()) == before
    assert again.invitations.find(used).used_by == FRIEND.public.raw
    assert again.invitations.find(open_ticket.key.public.raw).expires == expires
    assert again.invitations.words()[FRIEND.public.raw] == WORDS
    assert again.own.role is Role.ADMIN


async def test_a_cell_is_founded_once(home: Membership) -> None:
    await refused(Code.HOME_EXISTS, home.found, recovery=RECOVERY.public, name="again")


async def test_a_node_belongs_to_one_cell_even_when_it_joins_twice_at_once(
    tmp_path: Path, home: Membership
) -> None:
    await joined(home, FRIEND)
    other = MeshNode("friend", tmp_path, {})
    await other.open()
    results: list[object] = []

    async def adopt() -> None:
        try:
            await other.membership.adopt(home.roster.cell_id, list(home.roster.statements.values()))
            results.append("adopted")
        except KnodeError as error:
            results.append(error.code)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(adopt)
        nursery.start_soon(adopt)
    assert sorted(map(str, results)) == ["HOME_EXISTS", "adopted"]
    await other.database.aclose()
    await other.open()
    assert other.membership.roster == home.roster
    await other.database.aclose()


async def test_a_node_adopts_no_cell_that_does_not_name_it(tmp_path: Path, home: Membership) -> None:
    other = MeshNode("friend", tmp_path, {})
    await other.open()
    statements = list(home.roster.statements.values())
    await refused(Code.UNKNOWN_PEER, other.membership.adopt, home.roster.cell_id, statements)
    assert not other.membership.in_cell
    await other.database.aclose()


async def test_a_ticket_is_used_once_however_many_show_it_at_once(home: Membership) -> None:
    ticket, _ = await home.issue_ticket(Role.WORKER, ADDRESSES)
    keys = [key_of(f"joiner {n}") for n in range(8)]
    outcomes: list[object] = []

    async def join(key: KeyPair) -> None:
        try:
            outcomes.append(await home.redeem(ticket.key.public.raw, key.public, "friend", WORDS))
        except KnodeError as error:
            outcomes.append(error.code)

    async with trio.open_nursery() as nursery:
        for key in keys:
            nursery.start_soon(join, key)
    assert outcomes.count(Code.TICKET_USED) == 7
    assert len(home.roster.members) == 2


async def test_a_join_that_was_cut_off_is_repeated_by_the_same_key(home: Membership) -> None:
    ticket, _ = await home.issue_ticket(Role.WORKER, ADDRESSES)
    first = await home.redeem(ticket.key.public.raw, FRIEND.public, "friend", WORDS)
    again = await home.redeem(ticket.key.public.raw, FRIEND.public, "friend", WORDS)
    assert first == again
    assert len(home.roster.statements) == 3
    await refused(Code.TICKET_USED, home.redeem, ticket.key.public.raw, OTHER.public, "other", WORDS)


async def test_a_second_ticket_that_a_member_shows_is_used_up_too(home: Membership) -> None:
    await joined(home, FRIEND)
    second = await joined(home, FRIEND)
    await refused(Code.TICKET_USED, home.redeem, second, OTHER.public, "other", WORDS)


async def test_an_expired_ticket_is_refused(home: Membership, node: MeshNode) -> None:
    ticket, expires = await home.issue_ticket(Role.WORKER, ADDRESSES)
    assert expires == node.clock.wall() + LIFETIME_MS
    node.clock.moved_ms += LIFETIME_MS - 1
    assert home.invitations.check(ticket.key.public.raw, FRIEND.public.raw).role is Role.WORKER
    node.clock.moved_ms += 3 * 60_000 + 1
    error = await refused(Code.TICKET_EXPIRED, home.redeem, ticket.key.public.raw, FRIEND.public, "f", WORDS)
    assert "3 minutes ago" in error.message
    assert "knode invite" in error.next_step
    assert len(home.roster.members) == 1


async def test_an_unknown_ticket_is_refused(home: Membership) -> None:
    await refused(Code.TICKET_INVALID, home.redeem, bytes(32), FRIEND.public, "friend", WORDS)


async def test_a_ticket_is_worth_no_more_than_its_inviter(tmp_path: Path, home: Membership) -> None:
    await joined(home, FRIEND, Role.ADMIN)
    friend = await member(tmp_path, home, FRIEND, "friend")
    ticket, _ = await friend.issue_ticket(Role.WORKER, ADDRESSES)
    await home.set_role(home.roster.members[FRIEND.public.raw], Role.WORKER)
    await friend.add(home.roster.statements.values())
    await refused(Code.NOT_ALLOWED, friend.redeem, ticket.key.public.raw, OTHER.public, "other", WORDS)
    await refused(Code.NOT_ALLOWED, friend.issue_ticket, Role.WORKER, ADDRESSES)


async def test_a_revoked_node_comes_back_with_no_ticket(home: Membership) -> None:
    await joined(home, FRIEND)
    await home.revoke(home.roster.members[FRIEND.public.raw])
    ticket, _ = await home.issue_ticket(Role.WORKER, ADDRESSES)
    await refused(Code.KEY_REVOKED, home.redeem, ticket.key.public.raw, FRIEND.public, "friend", WORDS)
    assert home.invitations.find(ticket.key.public.raw).used_by is None


async def test_the_secret_of_a_ticket_is_not_on_the_disk(home: Membership, node: MeshNode) -> None:
    ticket, _ = await home.issue_ticket(Role.WORKER, ADDRESSES)
    await home.redeem(ticket.key.public.raw, FRIEND.public, "friend", WORDS)
    await node.database.aclose()
    on_disk = b"".join(file.read_bytes() for file in node.file.parent.iterdir() if file.is_file())
    assert ticket.key.public.raw in on_disk  # what is searched is the right place
    assert ticket.secret not in on_disk
    assert ticket.key.seed not in on_disk


async def test_open_tickets_are_limited_and_old_ones_forgotten(
    home: Membership, node: MeshNode, reopen
) -> None:
    for _ in range(MAX_OPEN_TICKETS):
        ticket, _ = await home.issue_ticket(Role.WORKER, ADDRESSES)
    await refused(Code.RATE_LIMITED, home.issue_ticket, Role.WORKER, ADDRESSES)
    node.clock.moved_ms += LIFETIME_MS
    used = await joined(home, FRIEND)
    await refused(Code.TICKET_EXPIRED, home.redeem, ticket.key.public.raw, OTHER.public, "o", WORDS)
    node.clock.moved_ms += 2 * 24 * 3600 * 1000
    last, _ = await home.issue_ticket(Role.WORKER, ADDRESSES)
    for membership in (home, await reopen()):
        with pytest.raises(KnodeError) as caught:
            membership.invitations.find(ticket.key.public.raw)
        assert caught.value.code is Code.TICKET_INVALID
        assert membership.invitations.find(used).used_by == FRIEND.public.raw
        assert membership.invitations.find(last.key.public.raw).used_by is None
        assert len(membership.invitations._known) == 2


async def test_a_ticket_needs_an_address(home: Membership) -> None:
    await refused(Code.UNAVAILABLE, home.issue_ticket, Role.WORKER, ())


async def test_who_may_invite_and_whom(tmp_path: Path, home: Membership) -> None:
    await joined(home, FRIEND, Role.ADMIN)
    await joined(home, OTHER, Role.WORKER, "other")
    admin = await member(tmp_path, home, FRIEND, "friend")
    worker = await member(tmp_path, home, OTHER, "other")
    await admin.issue_ticket(Role.WORKER, ADDRESSES)
    await refused(Code.NOT_ALLOWED, admin.issue_ticket, Role.ADMIN, ADDRESSES)
    error = await refused(Code.NOT_ALLOWED, worker.issue_ticket, Role.WORKER, ADDRESSES)
    assert "friend" in error.next_step
    assert "home" in error.next_step


async def test_who_may_change_roles_and_revoke(tmp_path: Path, home: Membership) -> None:
    await joined(home, FRIEND, Role.ADMIN)
    await joined(home, OTHER, Role.WORKER, "other")
    admin = await member(tmp_path, home, FRIEND, "friend")
    friend, other = (home.roster.members[key.public.raw] for key in (FRIEND, OTHER))
    assert (await admin.set_role(other, Role.OBSERVER)).role is Role.OBSERVER
    await refused(Code.NOT_ALLOWED, admin.set_role, other, Role.ADMIN)
    await refused(Code.NOT_ALLOWED, admin.set_role, home.own, Role.WORKER)
    await refused(Code.NOT_ALLOWED, admin.revoke, other)
    await refused(Code.NOT_ALLOWED, home.revoke, home.own)
    assert (await home.set_role(friend, Role.WORKER)).role is Role.WORKER
    await home.revoke(friend)
    assert FRIEND.public.raw in home.roster.revoked


async def test_what_an_admin_did_outlives_its_revocation(tmp_path: Path, home: Membership) -> None:
    await joined(home, FRIEND, Role.ADMIN)
    admin = await member(tmp_path, home, FRIEND, "friend")
    await joined(admin, OTHER, name="other")
    await home.add(admin.roster.statements.values())
    await home.revoke(home.roster.members[FRIEND.public.raw])
    assert OTHER.public.raw in home.roster.members
    backdated = Add(FRIEND.public.raw, home.roster.cell_id, key_of("spy").public.raw, "spy", Role.WORKER, 1)
    assert await home.add([sign_statement(FRIEND, backdated)]) == []


async def test_a_rogue_admin_cannot_keep_the_owner_from_revoking_it(home: Membership, reopen) -> None:
    await joined(home, FRIEND, Role.ADMIN)
    await joined(home, OTHER, Role.WORKER, "other")
    cell, friend, other = home.roster.cell_id, FRIEND.public.raw, OTHER.public.raw
    flood = [SetRole(friend, cell, other, Role.VOTER, (), 2**62 - n) for n in range(1500)]
    await home.add([sign_statement(FRIEND, body) for body in flood])
    assert (await home.set_role(home.roster.members[other], Role.OBSERVER)).role in Role
    await home.revoke(home.roster.members[friend])
    assert len(home.roster.statements) < 10
    again = await reopen()
    assert again.roster == home.roster
    assert friend in again.roster.revoked


async def test_contacts_of_strangers_are_not_kept_and_those_of_members_are_the_newest(
    home: Membership, reopen
) -> None:
    def contact(key: KeyPair, issued: int):  # type: ignore[no-untyped-def]
        return sign_contact(key, Contact(key.public.raw, (f"host:{issued}",), "0.1.0", issued))

    assert await home.add_contacts([contact(FRIEND, 1)]) == []
    await joined(home, FRIEND)
    assert await home.add_contacts([contact(FRIEND, 3), contact(FRIEND, 9), contact(FRIEND, 2)]) == [
        contact(FRIEND, 9)
    ]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(home.add_contacts, [contact(FRIEND, 12)])
        nursery.start_soon(home.add_contacts, [contact(FRIEND, 11)])
    assert home.contacts[FRIEND.public.raw].body.issued == 12
    assert (await reopen()).contacts[FRIEND.public.raw].body.issued == 12


async def test_the_contact_of_a_revoked_member_is_forgotten(home: Membership, reopen) -> None:
    await joined(home, FRIEND)
    await home.add_contacts([sign_contact(FRIEND, Contact(FRIEND.public.raw, ("shed:1",), "0.1.0", 7))])
    await home.revoke(home.roster.members[FRIEND.public.raw])
    assert home.contacts == {}
    assert (await reopen()).contacts == {}


async def test_a_cancelled_change_is_whole_or_not_begun(home: Membership, reopen) -> None:
    ticket, _ = await home.issue_ticket(Role.WORKER, ADDRESSES)
    for steps in range(6):
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(home.redeem, ticket.key.public.raw, FRIEND.public, "friend", WORDS)
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                scope.cancel()
        in_memory = FRIEND.public.raw in home.roster.members
        again = await reopen()
        assert (FRIEND.public.raw in again.roster.members) == in_memory
        assert (again.invitations.find(ticket.key.public.raw).used_by is not None) == in_memory
        home = again


async def test_a_change_is_told_once_it_is_durable(home: Membership) -> None:
    told: list[int] = []
    home.changed.append(lambda new: told.append(len(new)))
    changed = home.next_change()
    await joined(home, FRIEND)
    assert changed.is_set()
    assert not home.next_change().is_set()
    assert told == [1]
    assert await home.add(home.roster.statements.values()) == []
    assert told == [1]


def contact_of(key: KeyPair, issued: int) -> SignedContact:
    return sign_contact(key, Contact(key.public.raw, (f"host:{issued}",), "0.1.0", issued))


# Another key.


async def test_a_rotated_member_keeps_its_id_and_is_reached_where_it_told_with_its_old_key(
    tmp_path: Path, home: Membership, reopen
) -> None:
    await joined(home, FRIEND, Role.ADMIN)
    await home.add_contacts([contact_of(FRIEND, 100)])
    friend = await member(tmp_path, home, FRIEND, "friend")
    await joined(friend, OTHER, name="other")
    new = key_of("friend's new key")
    await friend.rotate(new)
    await home.add(friend.roster.statements.values())
    again = await reopen()
    for membership in (home, again):
        rotated = membership.roster.find("friend")
        assert (rotated.id, rotated.key, rotated.role) == (FRIEND.public, new.public, Role.ADMIN)
        assert membership.roster.find("other").key == OTHER.public
        assert membership.contacts[new.public.raw] == contact_of(FRIEND, 100)
    # Whatever an old key says later, the new one's word counts.
    assert await again.add_contacts([contact_of(new, 1)]) == [contact_of(new, 1)]
    assert await again.add_contacts([contact_of(FRIEND, 999)]) == []
    assert (await reopen()).contacts[new.public.raw] == contact_of(new, 1)
    await refused(Code.KEY_REVOKED, friend.rotate, key_of("yet another"))


async def test_a_member_rotates_only_so_often(tmp_path: Path, home: Membership) -> None:
    await joined(home, FRIEND)
    keys = [FRIEND, *(key_of(f"turn {n}") for n in range(MAX_ROTATIONS + 1))]
    for old, new in pairwise(keys[:-1]):
        membership = await member(tmp_path, home, old, f"with-{old.node_id[-8:].lower()}")
        await membership.rotate(new)
        await home.add(membership.roster.statements.values())
    last = await member(tmp_path, home, keys[-2], "last")
    error = await refused(Code.RATE_LIMITED, last.rotate, keys[-1])
    assert "revoke" in error.next_step


async def test_a_contested_member_is_revoked_by_its_name(tmp_path: Path, home: Membership) -> None:
    await joined(home, FRIEND)
    friend, thief = [await member(tmp_path, home, FRIEND, name) for name in ("friend", "thief")]
    await friend.rotate(key_of("new"))
    await thief.rotate(key_of("stolen"))
    await home.add([*friend.roster.statements.values(), *thief.roster.statements.values()])
    assert [m.name for m in home.roster.members.values()] == ["home"]
    await home.revoke(home.roster.find("friend"))
    assert key_of("stolen").public.raw in home.roster.revoked
    assert home.roster.contested == {}


# Another owner.

NEW_OWNER = key_of("new owner")


async def test_the_recovery_key_makes_another_node_the_owner_s(tmp_path: Path, home: Membership) -> None:
    await joined(home, FRIEND)
    await joined(home, OTHER, Role.ADMIN, "other")
    friend = await member(tmp_path, home, FRIEND, "friend")
    await refused(Code.NOT_ALLOWED, friend.issue_ticket, Role.WORKER, ADDRESSES)
    lost = friend.roster.find("home")
    await friend.recover(RECOVERY, NEW_OWNER, lost=[lost])
    assert {m.name: m.role for m in friend.roster.members.values()} == {
        "friend": Role.WORKER,
        "other": Role.ADMIN,
    }
    assert friend.roster.owner == NEW_OWNER.public
    await joined(friend, key_of("third"), Role.ADMIN, "third")
    await friend.revoke(friend.roster.find("other"))
    # On the lost machine, and wherever its statements come, its owner key does nothing any more.
    await home.set_role(home.roster.find("friend"), Role.ADMIN)
    await joined(home, key_of("late"), name="late")
    await home.revoke(home.roster.find("other"))
    assert await friend.add(home.roster.statements.values()) == []
    await home.add(friend.roster.statements.values())
    assert home.roster == friend.roster
    await refused(Code.KEY_REVOKED, lambda: _own(home))
    error = await refused(Code.NOT_ALLOWED, home.revoke, friend.roster.find("third"))
    assert "knode member recover" in error.next_step
    await refused(Code.NOT_ALLOWED, home.issue_ticket, Role.WORKER, ADDRESSES)


async def _own(membership: Membership) -> object:
    return membership.own


async def test_another_key_recovers_nothing(tmp_path: Path, home: Membership) -> None:
    await joined(home, FRIEND)
    friend = await member(tmp_path, home, FRIEND, "friend")
    before = friend.roster
    await refused(Code.NOT_ALLOWED, friend.recover, key_of("not it"), NEW_OWNER)
    await refused(Code.NOT_ALLOWED, friend.recover, RECOVERY, NEW_OWNER, lost=[friend.own])
    assert friend.roster == before


async def test_what_a_thief_did_with_the_owner_s_key_is_undone_in_one_step(
    tmp_path: Path, home: Membership, node: MeshNode
) -> None:
    await joined(home, FRIEND)
    await joined(home, OTHER, Role.ADMIN, "other")
    await joined(home, key_of("gone"), name="gone")
    await home.revoke(home.roster.find("gone"))
    node.clock.moved_ms += 60_000
    theft = node.clock.wall()
    node.clock.moved_ms += 60_000
    spy = key_of("spy")
    await joined(home, spy, Role.ADMIN, "spy")
    await home.set_role(home.roster.find("friend"), Role.OBSERVER)
    await home.revoke(home.roster.find("other"))
    spied = await member(tmp_path, home, spy, "spy")
    await joined(spied, key_of("second spy"), name="second-spy")
    await home.add(spied.roster.statements.values())
    assert "second-spy" in {m.name for m in home.roster.members.values()}

    await home.recover(RECOVERY, NEW_OWNER, undo_since=theft)
    assert {m.name: m.role for m in home.roster.members.values()} == {
        "friend": Role.WORKER,
        "home": Role.ADMIN,
        "other": Role.ADMIN,
    }
    assert set(home.roster.revoked) == {key_of("gone").public.raw}
    assert await home.add(spied.roster.statements.values()) == []
    await refused(Code.INVALID_ARGUMENT, home.recover, RECOVERY, key_of("third owner"), undo_since=5)


async def test_what_a_thief_did_with_an_admin_s_key_is_undone_by_its_revocation(
    tmp_path: Path, home: Membership, node: MeshNode
) -> None:
    await joined(home, FRIEND, Role.ADMIN)
    admin = await member(tmp_path, home, FRIEND, "friend")
    await joined(admin, OTHER, name="other")
    await home.add(admin.roster.statements.values())
    node.clock.moved_ms += 60_000
    theft = node.clock.wall()
    cell = home.roster.cell_id
    spy = Add(FRIEND.public.raw, cell, key_of("spy").public.raw, "spy", Role.WORKER, 1)
    demoted = SetRole(FRIEND.public.raw, cell, OTHER.public.raw, Role.OBSERVER, (), 2**60)
    await home.add([sign_statement(FRIEND, body) for body in (spy, demoted)])
    assert home.roster.find("other").role is Role.OBSERVER
    await home.revoke(home.roster.find("friend"), undo_since=theft)
    assert {m.name: m.role for m in home.roster.members.values()} == {
        "home": Role.ADMIN,
        "other": Role.WORKER,
    }


async def test_when_a_node_heard_of_a_statement_outlives_its_start(home: Membership, node, reopen) -> None:
    await joined(home, FRIEND, Role.ADMIN)
    node.clock.moved_ms += 60_000
    between = node.clock.wall()
    node.clock.moved_ms += 60_000
    await joined(home, OTHER, name="other")
    again = await reopen()
    await again.recover(RECOVERY, NEW_OWNER, undo_since=between)
    assert {m.name for m in again.roster.members.values()} == {"home", "friend"}


async def test_a_roster_of_the_first_schema_is_read(tmp_path: Path, home: Membership, node: MeshNode) -> None:
    await joined(home, FRIEND)
    before = home.roster
    await node.database.aclose()
    path = tmp_path / "old.db"
    old = await Database.open(node.world, path, MIGRATIONS[:1])

    def write(connection: apsw.Connection) -> None:
        connection.execute("INSERT INTO cell VALUES (?)", (before.cell_id,))
        connection.executemany(
            "INSERT INTO statement VALUES (?, ?)", [(s.id, s.data) for s in before.statements.values()]
        )

    await old.write(write)
    await old.aclose()
    database = await Database.open(node.world, path, MIGRATIONS)
    membership = Membership(node.world, database, node.key, node.owner_key)
    await membership.load()
    assert membership.roster == before
    await membership.recover(RECOVERY, NEW_OWNER, undo_since=1)  # all of it was there for ever
    assert len(membership.roster.members) == 2
    await database.aclose()


async def test_the_owner_and_the_recovery_key_have_room_for_the_last_word(
    home: Membership, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(membership_module, "MAX_STATEMENTS_OF_OTHERS", 20)
    await joined(home, FRIEND, Role.ADMIN)
    await joined(home, OTHER, Role.WORKER, "other")
    cell, friend, other = home.roster.cell_id, FRIEND.public.raw, OTHER.public.raw

    def flood(first: int, count: int) -> list[SignedStatement]:
        bodies = [SetRole(friend, cell, other, Role.VOTER, (), n) for n in range(first, first + count)]
        return [sign_statement(FRIEND, body) for body in bodies]

    await home.add(flood(1, 20))
    error = await refused(Code.RATE_LIMITED, home.add, flood(100, 1))
    assert "revoke" in error.next_step
    owner = home._owner_key
    assert owner is not None
    last = sign_statement(owner, Revoke(owner.public.raw, cell, other, (), 5))
    # Told together with what has no room, it counts all the same.
    await refused(Code.RATE_LIMITED, home.add, [*flood(200, 3), last])
    assert other in home.roster.revoked
    await home.revoke(home.roster.find("friend"))
    assert len(home.roster.statements) < 10
