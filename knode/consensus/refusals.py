"""Why the core does not do what its shell asks."""

from __future__ import annotations


class Refusal(Exception):
    """Nothing was done, and the core is as it was."""


class NotLeader(Refusal):
    """Only the leader can do it; `Raft.leader` says who that is, as far as is known."""


class QueueFull(Refusal):
    """Too much waits for a quorum already: `max_uncommitted_bytes` or `max_reads`."""


class Transferring(Refusal):
    """The leader hands its office to another replica, and appends nothing meanwhile."""


class ChangeInProgress(Refusal):
    """A change of the configuration is not finished, or the leader has committed nothing of its own term."""


class NotVoter(Refusal):
    """Only another voter of the configuration can be given the leadership."""
