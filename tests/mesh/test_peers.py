from __future__ import annotations

from mesh_cell import Cell


async def test_members_find_each_other_and_answer_requests(cell: Cell) -> None:
    a, b, c = await cell.nodes("a", "b", "c")
    assert await a.ask(b, "test.echo", "hello") == "hello"
    assert await b.ask(c, "test.echo", "hello") == "hello"
    assert [m.name for m in c.membership.roster.members.values()] == ["a", "b", "c"]
