"""What waits to be taken in, and how much of it one sender may have there."""

from __future__ import annotations

from knode.consensus.inbox import OTHERS, Inbox, share_of
from knode.consensus.messages import Configuration

A, B, C, D = b"a", b"b", b"c", b"d"


def test_items_come_out_as_they_came_in_whoever_sent_them() -> None:
    inbox = Inbox[int](3, 100)
    for place, sender in enumerate((A, B, A, C, B)):
        assert inbox.put(sender, place, 1)
    assert [inbox.take() for _ in range(len(inbox))] == [0, 1, 2, 3, 4]
    assert not len(inbox)


def test_one_sender_fills_its_share_alone() -> None:
    inbox = Inbox[int](3, 100)
    assert [inbox.put(A, n, 1) for n in range(5)] == [True, True, True, False, False]
    assert inbox.put(B, 9, 100)
    assert not inbox.put(B, 9, 1)
    assert inbox.put(C, 9, 99)
    assert not inbox.put(C, 9, 2)
    assert inbox.put(C, 9, 1)


def test_a_share_is_free_again_when_its_items_are_taken() -> None:
    inbox = Inbox[int](2, 100)
    assert inbox.put(A, 1, 60)
    assert not inbox.put(A, 2, 60)
    assert inbox.put(B, 3, 60)
    assert inbox.take() == 1
    assert inbox.put(A, 4, 100)
    inbox.clear()
    assert not len(inbox)
    assert inbox.put(B, 5, 100)
    assert inbox._shares == {B: (1, 100)}
    inbox.take()
    assert inbox._shares == {}


def test_whoever_is_not_named_shares_with_all_others() -> None:
    configuration = Configuration(voters=(A,), outgoing=(B,), learners=(C,))
    assert [share_of(configuration, replica) for replica in (A, B, C, D, b"e")] == [A, B, C, OTHERS, OTHERS]
