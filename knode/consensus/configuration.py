"""Changing who votes, by joint consensus (dissertation, section 4.3).

From `old` to `target`: the leader appends the joint configuration (voters `target`, outgoing `old`), in which
every decision needs a majority of both; when that is committed it appends `target` alone. A voter that is
to become a learner is in `outgoing` and in `learners` during the joint part: it has its vote until the end.
"""

from __future__ import annotations

from itertools import pairwise

from knode.consensus.messages import Configuration, Entry, HardState, Kind, ReplicaId, Snapshot
from knode.consensus.ready import Recovered
from knode.errors import KnodeError
from knode.klp.codec import Decoder, encode

_decoder: Decoder[Configuration] = Decoder(Configuration)


def check(configuration: Configuration) -> None:
    """Refuse what is no configuration.

    Raises:
        ValueError: a tuple is unsorted or has a repetition, there are no voters, or somebody is both voter
            and learner.
    """
    for replicas in (configuration.voters, configuration.outgoing, configuration.learners):
        if any(one >= other for one, other in pairwise(replicas)):
            raise ValueError("replicas must be sorted, each once")
    if not configuration.voters:
        raise ValueError("a configuration needs a voter")
    if set(configuration.voters) & set(configuration.learners):
        raise ValueError("nobody is voter and learner")


def is_sound(configuration: Configuration) -> bool:
    """Whether `check` has nothing against it."""
    try:
        check(configuration)
    except ValueError:
        return False
    return True


def decoded(data: bytes) -> Configuration | None:
    """Return the configuration that an entry holds; None when it holds none."""
    try:
        configuration = _decoder.decode(data)
    except KnodeError:
        return None
    return configuration if is_sound(configuration) else None


def encoded(configuration: Configuration) -> bytes:
    """Return the data of an entry with this configuration."""
    return encode(configuration)


def steps_toward(present: Configuration, target: Configuration) -> Configuration:
    """Return what to append first: the joint configuration, or `target` itself when no vote changes.

    Raises:
        ValueError: `target` is no configuration, or is joint.
    """
    check(target)
    if target.outgoing:
        raise ValueError("the configuration that is wanted cannot be joint")
    assert not present.outgoing, "one change at a time"
    if present.voters == target.voters:
        return target
    return Configuration(target.voters, present.voters, target.learners)


def left(joint: Configuration) -> Configuration:
    """Return the configuration that ends a joint one."""
    return Configuration(joint.voters, (), joint.learners)


def may_vote(configuration: Configuration, replica: ReplicaId) -> bool:
    """Whether its vote counts."""
    return replica in configuration.voters or replica in configuration.outgoing


def gets_log(configuration: Configuration, replica: ReplicaId) -> bool:
    """Whether it is one of `everyone`."""
    return may_vote(configuration, replica) or replica in configuration.learners


def everyone(configuration: Configuration) -> list[ReplicaId]:
    """Return all that get the log, each once, sorted."""
    return sorted({*configuration.voters, *configuration.outgoing, *configuration.learners})


def founded(configuration: Configuration, command: bytes = b"") -> Recovered:
    """Return the log with which a cell begins: its configuration as the first entry, then `command`, if any,
    in term 1, committed.

    Every replica that founds the cell must begin with the same; who comes later begins with an empty log.
    """
    check(configuration)
    entries = [Entry(1, 1, Kind.CONFIGURATION, encoded(configuration))]
    if command:
        entries.append(Entry(1, 2, Kind.COMMAND, command))
    return Recovered(HardState(term=1, commit=len(entries)), Snapshot(), tuple(entries))
