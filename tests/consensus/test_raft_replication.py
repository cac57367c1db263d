"""Proposals: how entries get to the others and are committed."""

from __future__ import annotations

from core_cell import A, B, C, Cell, voters


def test_a_command_is_applied_everywhere_in_order() -> None:
    cell = Cell(voters(A, B, C))
    leader = cell.elect(A)
    for number in range(100):
        leader.propose(b"%d" % number)
    cell.settle()
    assert [node.commands for node in cell.nodes.values()] == [[b"%d" % n for n in range(100)]] * 3


def test_a_single_voter_commits_at_once() -> None:
    cell = Cell(voters(A))
    cell.tick(1)
    cell[A].propose(b"x")
    cell.settle()
    assert cell.nodes[A].commands == [b"x"]
