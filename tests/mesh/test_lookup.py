"""Members that are away are looked for, and what is claimed for them is tried."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
from mesh_cell import Cell, MeshNode, SeededRandomness, until

from knode.mesh.lookup import AT_ONCE, EVERY_S, FIRST_AFTER_S, Lookup
from knode.transport.memory import MemoryCarrier, MemoryNetwork


class Hearsay:
    """Somebody who is asked where nodes are."""

    def __init__(self) -> None:
        self.claims: dict[str, Sequence[str]] = {}
        self.asked: Counter[str] = Counter()
        self.at_once = 0
        self.most_at_once = 0

    async def find(self, node_id: str) -> Sequence[str]:
        self.asked[node_id] += 1
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        await trio.sleep(1)
        self.at_once -= 1
        return self.claims.get(node_id, ())


class DialsNobody:
    """A carrier that others can dial alone."""

    def __init__(self, carrier: MemoryCarrier) -> None:
        self.listen = carrier.listen
        self.dial = carrier.dial

    def dials(self, address: str) -> bool:
        return False


async def test_a_member_that_moved_is_found_by_hearsay(
    autojump_clock: object, tmp_path: Path, nursery: trio.Nursery
) -> None:
    network = MemoryNetwork(SeededRandomness("network"))
    a, b = (MeshNode(name, tmp_path, {"memory": network.carrier(name)}) for name in ("a", "b"))
    await a.found()
    await a.start(nursery)
    await b.start(nursery)
    await b.join(await a.invite())
    await a.connected(b)
    hearsay = Hearsay()
    nursery.start_soon(Lookup(a.world, a.peers, hearsay, a.log).run)
    await trio.sleep(3 * EVERY_S)
    assert not hearsay.asked, "nobody is away"
    await b.stop()
    moved = MeshNode("b", tmp_path, {"memory": DialsNobody(network.carrier("elsewhere"))})
    await moved.start(nursery)
    await trio.sleep(3 * EVERY_S)
    assert hearsay.asked[b.key.node_id] >= 2
    assert a.peer(moved).conversation is None
    hearsay.claims[moved.key.node_id] = ["nowhere:1", moved.address]
    await until(lambda: a.peer(moved).conversation is not None, within_s=3 * EVERY_S)
    assert await a.ask(moved, "test.echo", "found") == "found"


@pytest.mark.usefixtures("autojump_clock")
async def test_who_stays_away_is_looked_for_about_once_a_minute_and_few_at_once(cell: Cell) -> None:
    a, *others = await cell.nodes("a", *(f"n{number}" for number in range(2 * AT_ONCE)))
    for other in others:
        await other.stop()
    hearsay = Hearsay()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Lookup(a.world, a.peers, hearsay, a.log).run)
        await trio.sleep(FIRST_AFTER_S - 1)
        assert not hearsay.asked
        await trio.sleep(10 * EVERY_S)
        nursery.cancel_scope.cancel()
    assert hearsay.most_at_once == AT_ONCE
    assert set(hearsay.asked) == {other.key.node_id for other in others}
    assert all(8 <= times <= 13 for times in hearsay.asked.values())
