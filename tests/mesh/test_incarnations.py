"""Which ledger of the cell counts, and who may say so."""

from __future__ import annotations

from typing import Any

import pytest
from mesh_cell import RECOVERY, Cell, MeshNode, key_of, refused, until

from knode.errors import Code
from knode.mesh.incarnations import Incarnation
from knode.mesh.statements import BeginIncarnation

REPLICA = bytes(40)


def present(node: MeshNode) -> Incarnation:
    return node.membership.roster.incarnations.present


async def begin(node: MeshNode, **more: Any) -> Incarnation:
    return await node.membership.begin_incarnation(REPLICA, 7, 3, **more)


async def test_a_cell_begins_with_the_incarnation_of_its_founding(cell: Cell) -> None:
    [a] = await cell.nodes("a")
    assert present(a) == Incarnation(0, a.membership.roster.cell_id)
    assert a.membership.roster.incarnations.begun is None


async def test_what_the_owner_begins_is_told_to_all_and_outlives_a_restart(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    begun = await begin(a)
    assert begun.number == 1
    await until(lambda: present(b) == begun)
    body = b.membership.roster.incarnations.begun
    assert isinstance(body, BeginIncarnation)
    assert (body.replica, body.index, body.term) == (REPLICA, 7, 3)
    await b.stop()
    await b.start(cell.nursery)
    assert present(b) == begun


async def test_only_the_owner_and_the_recovery_key_begin_one(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    await refused(Code.NOT_ALLOWED, begin, b)
    await refused(Code.NOT_ALLOWED, begin, b, recovery=key_of("another"))
    begun = await begin(b, recovery=RECOVERY)
    await until(lambda: present(a) == begun)


async def test_members_may_be_revoked_in_the_same_step(cell: Cell) -> None:
    a, b, c = await cell.nodes("a", "b", "c")
    await refused(Code.NOT_ALLOWED, begin, a, lost=[a.membership.own])
    await begin(a, lost=[a.member(b)])
    await until(lambda: b.key.public.raw in c.membership.roster.revoked)


async def test_two_that_were_begun_apart_stop_both_until_the_owner_names_one(cell: Cell) -> None:
    a, b, c = await cell.nodes("a", "b", "c")
    first = present(a)
    for node in (a, b, c):
        await node.stop()
    await a.start(cell.nursery)
    of_a = await begin(a)
    await a.stop()
    await b.start(cell.nursery)
    of_b = await begin(b, recovery=RECOVERY)
    for node in (a, c):
        await node.start(cell.nursery)
    nodes = (a, b, c)
    await until(lambda: all(len(n.membership.roster.incarnations.rivals) == 2 for n in nodes))
    assert {present(n) for n in nodes} == {first}
    assert set(c.membership.roster.incarnations.rivals) == {of_a, of_b}
    await refused(Code.UNAVAILABLE, begin, a)

    await refused(Code.NOT_ALLOWED, c.membership.keep_incarnation, of_b.hash)
    await refused(Code.NOT_FOUND, a.membership.keep_incarnation, bytes(32))
    await a.membership.keep_incarnation(of_b.hash)
    await until(lambda: all(present(n) == of_b for n in nodes))
    assert (await begin(a)).number == 2


async def test_a_new_era_keeps_the_incarnation_that_the_earlier_owner_began(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    begun = await begin(a)
    await until(lambda: present(b) == begun)
    await b.membership.recover(RECOVERY, key_of("second owner"))
    await until(lambda: a.membership.roster.owner == key_of("second owner").public)
    assert present(a) == present(b) == begun
    await refused(Code.NOT_ALLOWED, begin, a)
    await begin(b)


@pytest.mark.parametrize("rotations", [0, 2])
async def test_the_founder_is_known_by_its_first_key(cell: Cell, rotations: int) -> None:
    a, _ = await cell.nodes("a", "b")
    for n in range(rotations):
        await a.membership.rotate(key_of(f"next {n}"))
        await a.stop()
        a.key = key_of(f"next {n}")
        await a.start(cell.nursery)
    roster = a.membership.roster
    assert [m.name for m in roster.members.values() if roster.is_founder(m)] == ["a"]
