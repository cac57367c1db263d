"""A member says whether it can dial another one, and can be used for nothing else."""

from __future__ import annotations

import pytest
import trio
from mesh_cell import Cell, MeshNode, refused, until

from knode.errors import Code
from knode.mesh.reaching import ASKED_AT_ONCE, EVERY_S, MAX_ADDRESSES, TRY_S, Reachability, Reaching


@pytest.fixture
async def asking(cell: Cell) -> tuple[MeshNode, MeshNode, Reaching]:
    a, b = await cell.nodes("a", "b")
    return a, b, await reaching(a, b)


async def reaching(asker: MeshNode, *others: MeshNode) -> Reaching:
    for other in others:
        Reaching(other.world, other.membership, other.peers, other.methods)
    return Reaching(asker.world, asker.membership, asker.peers, asker.methods)


def problems(seen: Reachability) -> dict[str, str]:
    return {tried.address: tried.problem for tried in seen.tried}


async def tell(node: MeshNode, other: MeshNode, *addresses: str) -> None:
    """Let `node` say that it is at these addresses, and `other` have heard it."""
    node.clock.moved_ms += 1000
    await node.tell_contact(*addresses)
    await until(lambda: other.membership.contacts[node.key.public.raw].body.addresses == addresses)


async def test_a_member_dials_where_the_asking_one_has_signed_that_it_is(
    asking: tuple[MeshNode, MeshNode, Reaching],
) -> None:
    a, b, reach = asking
    before = a.conversation(b).established
    assert problems(await reach.ask(a.peer(b))) == {a.address: ""}
    assert a.conversation(b).established == before
    assert len(a.peer(b).conversations) == 1


async def test_being_asked_who_is_there_is_counted_and_fills_no_log(
    asking: tuple[MeshNode, MeshNode, Reaching],
) -> None:
    a, b, reach = asking
    lines = len(a.log.lines)
    await reach.ask(a.peer(b))
    await until(lambda: a.peers.refusals[Code.CANCELLED] == 1)
    assert {level for level, _, _ in a.log.lines[lines:]} <= {"debug"}


async def test_each_address_has_its_own_answer_within_seconds(
    cell: Cell, asking: tuple[MeshNode, MeshNode, Reaching]
) -> None:
    a, b, reach = asking
    other = await cell.node("other", founder=True)
    carrier = cell.network.carrier("silent")
    silent = await carrier.listen("", 0)  # takes links, and says nothing on them
    await tell(a, b, "nobody:1", a.address, other.address, silent.addresses[0])
    begun = trio.current_time()
    assert problems(await reach.ask(a.peer(b))) == {
        "nobody:1": Code.UNAVAILABLE,
        a.address: "",
        other.address: Code.WRONG_NETWORK,
        silent.addresses[0]: Code.TIMEOUT,
    }
    assert trio.current_time() - begun < TRY_S + 1


async def test_no_more_than_eight_addresses_are_dialled(asking: tuple[MeshNode, MeshNode, Reaching]) -> None:
    a, b, reach = asking
    await tell(a, b, *(f"nobody:{port}" for port in range(1, 16)))
    assert len((await reach.ask(a.peer(b))).tried) == MAX_ADDRESSES


async def test_asking_again_at_once_is_refused(asking: tuple[MeshNode, MeshNode, Reaching]) -> None:
    a, b, reach = asking
    await reach.ask(a.peer(b))
    await refused(Code.RATE_LIMITED, reach.ask, a.peer(b))
    await trio.sleep(EVERY_S)
    assert problems(await reach.ask(a.peer(b))) == {a.address: ""}


async def test_few_members_are_served_at_once(cell: Cell) -> None:
    names = [f"n{number}" for number in range(ASKED_AT_ONCE + 1)]
    asked, *askers = await cell.nodes("asked", *names)
    silent = await cell.network.carrier("silent").listen("", 0)
    Reaching(asked.world, asked.membership, asked.peers, asked.methods)
    outcomes: list[Code | None] = []

    async def ask(asker: MeshNode) -> None:
        reach = Reaching(asker.world, asker.membership, asker.peers, asker.methods)
        try:
            await reach.ask(asker.peer(asked))
            outcomes.append(None)
        except Exception as error:
            outcomes.append(getattr(error, "code", None))

    for asker in askers:
        await tell(asker, asked, silent.addresses[0])
    async with trio.open_nursery() as nursery:
        for asker in askers:
            nursery.start_soon(ask, asker)
    assert sorted(map(str, outcomes)) == [*["None"] * ASKED_AT_ONCE, str(Code.RATE_LIMITED)]


async def test_the_members_clock_is_told(asking: tuple[MeshNode, MeshNode, Reaching]) -> None:
    a, b, reach = asking
    b.clock.moved_ms = 90_000
    assert abs((await reach.ask(a.peer(b))).clock_ahead_ms - 90_000) < 50


async def test_a_member_that_is_away_or_older_is_named(cell: Cell) -> None:
    a, b = await cell.nodes("a", "b")
    reach = Reaching(a.world, a.membership, a.peers, a.methods)
    await refused(Code.NOT_FOUND, reach.ask, a.peer(b))
    await cell.crash(b)
    await until(lambda: a.peer(b).conversation is None)
    await trio.sleep(60)
    await refused(Code.UNAVAILABLE, reach.ask, a.peer(b))
