"""What a running node finds about itself, in memory and in virtual time."""

from __future__ import annotations

import pytest
from memory_cell import Cell, Host
from trio.testing import MockClock

from knode.mesh.reaching import EVERY_S
from knode.node.health import Finding, Grade, examine


async def found(host: Host, check: str) -> list[Finding]:
    return [finding for finding in await examine(host.node) if finding.check == check]


async def test_a_node_that_others_reach_has_nothing_to_mend(autojump_clock: MockClock, cell: Cell) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    findings = await examine(desk.node)
    grades = {finding.check: finding.grade for finding in findings}
    assert grades == {
        "cell": Grade.PASS,
        "sandbox": Grade.PASS,
        "mdns": Grade.SKIP,
        "clock of others": Grade.PASS,
        "reachability": Grade.PASS,
    }
    [reached] = [finding for finding in findings if finding.check == "reachability"]
    assert desk.node.addresses[0] in reached.found
    assert attic.name in reached.found
    assert all(finding.fix for finding in findings if finding.grade in (Grade.WARN, Grade.FAIL))


async def test_a_node_alone_says_what_cannot_be_checked(autojump_clock: MockClock, cell: Cell) -> None:
    desk = await cell.add("desk")
    for check in ("clock of others", "reachability"):
        [finding] = await found(desk, check)
        assert finding.grade is Grade.SKIP
    [whole] = await found(desk, "cell")
    assert whole.grade is Grade.PASS


async def test_addresses_at_which_nobody_answers_are_named_with_the_mend(
    autojump_clock: MockClock, cell: Cell
) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic", node_advertise="nowhere:4747")
    [finding] = await found(attic, "reachability")
    assert finding.grade is Grade.WARN
    assert "desk cannot dial this node: memory nowhere:4747 (UNAVAILABLE)" in finding.found
    assert "node.advertise" in finding.fix
    [other] = await found(desk, "reachability")
    assert other.grade is Grade.PASS


@pytest.mark.parametrize(
    ("skew_s", "grade"), [(0.0, Grade.PASS), (-60.0, Grade.WARN), (60.0, Grade.WARN), (3600.0, Grade.FAIL)]
)
async def test_a_clock_that_differs_from_the_others_is_found(
    autojump_clock: MockClock, cell: Cell, skew_s: float, grade: Grade
) -> None:
    desk, _, _ = await cell.add("desk"), await cell.add("attic"), await cell.add("cellar")
    desk.clock.skew_s += skew_s
    [finding] = await found(desk, "clock of others")
    assert finding.grade is grade
    if grade is not Grade.PASS:
        assert f"{abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'}" in finding.found


async def test_one_wrong_clock_among_the_others_is_outvoted(autojump_clock: MockClock, cell: Cell) -> None:
    desk = await cell.add("desk")
    others = [await cell.add(name) for name in ("attic", "cellar", "garage")]
    others[0].clock.skew_s += 7200
    [finding] = await found(desk, "clock of others")
    assert finding.grade is Grade.PASS


async def test_members_that_were_asked_a_moment_ago_are_named(autojump_clock: MockClock, cell: Cell) -> None:
    desk, _ = await cell.add("desk"), await cell.add("attic")
    await examine(desk.node)
    [finding] = await found(desk, "reachability")
    assert finding.grade is Grade.SKIP
    assert f"{EVERY_S:.0f} seconds" in finding.fix


@pytest.mark.parametrize("is_away", [False, True], ids=["here", "away"])
async def test_a_revoked_node_is_told(autojump_clock: MockClock, cell: Cell, is_away: bool) -> None:
    desk, attic = await cell.add("desk"), await cell.add("attic")
    own = attic.node.key.public.raw
    if is_away:
        await cell.stop(attic)
    await desk.node.membership.revoke(desk.node.membership.roster.find("attic"))
    if is_away:
        await cell.start(attic)
        await cell.until(lambda: attic.node.peers.peer(desk.node.key.public).refusal is not None)
    else:
        await cell.until(lambda: own not in attic.node.membership.roster.members)
    [finding] = await found(attic, "cell")
    assert finding.grade is Grade.FAIL
    assert "revoked" in finding.found
    assert finding.fix
