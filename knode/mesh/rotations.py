"""How a member comes to another key: the path of ROTATE statements that leads away from its first.

Whoever holds a key can rotate it, a thief as well as the member. So nothing that the two could write
differently (a time, an order) decides between them: two statements that replace one key leave the member
without a key, and only a revocation, or a new era, ends that.

Pure: no clock, no disk, no network.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from knode.mesh.eras import Era
from knode.mesh.statements import Rotate, Statement

MAX_ROTATIONS = 16


@dataclass(frozen=True, slots=True)
class Path:
    """The keys of one member, from its first on, as far as the statements agree."""

    keys: tuple[bytes, ...]
    followed: tuple[tuple[bytes, Rotate], ...] = ()
    """The statements that count, with their ids: one a step, and two where they part."""
    parted: bool = False
    """Whether it ends where two statements part, or where it meets itself."""

    @property
    def every_key(self) -> frozenset[bytes]:
        """The member's keys, and those to which parting statements lead."""
        return frozenset((*self.keys, *(rotate.key for _, rotate in self.followed)))

    def is_contested(self, claims: Mapping[bytes, int]) -> bool:
        """Tell whether nobody can say which key is the member's.

        Args:
            claims: how many statements, of whichever member, lead to each key. None may lead to a first
                key, and one to each later.
        """
        return self.parted or any(claims.get(key, 0) != min(n, 1) for n, key in enumerate(self.keys))

    def keeps(self, statement: bytes, signer: bytes) -> bool:
        """Tell whether a statement is of one of the member's keys and, when that has ended, outlived it."""
        ends = (rotate for _, rotate in self.followed if rotate.signer == signer)
        return signer in self.keys and all(statement in rotate.kept for rotate in ends)


def paths_of(bodies: Mapping[bytes, Statement], eras: Sequence[Era]) -> dict[bytes, Path]:
    """Return the path of each member that has rotated, by its id.

    A statement of an earlier era counts when every later one began with its member.
    """
    later = {era.id: eras[n + 1 :] for n, era in enumerate(eras)}
    leaving: dict[bytes, dict[bytes, list[tuple[bytes, Rotate]]]] = defaultdict(lambda: defaultdict(list))
    for i, body in sorted(bodies.items()):
        if not isinstance(body, Rotate) or body.era not in later:
            continue
        if all(body.member in era.members for era in later[body.era]):
            leaving[body.member][body.signer].append((i, body))
    return {member: _follow(member, steps) for member, steps in leaving.items()}


def _follow(member: bytes, leaving: Mapping[bytes, Sequence[tuple[bytes, Rotate]]]) -> Path:
    keys, followed = [member], list[tuple[bytes, Rotate]]()
    while len(keys) <= MAX_ROTATIONS and (steps := leaving.get(keys[-1], ())):
        followed += steps[:2]
        key = steps[0][1].key
        if len(steps) > 1 or key in keys:
            return Path(tuple(keys), tuple(followed), parted=True)
        keys.append(key)
    return Path(tuple(keys), tuple(followed))


def known_paths(paths: Mapping[bytes, Path], members: Iterable[bytes]) -> dict[bytes, Path]:
    """Return a path for each of `members`; one that never rotated has its first key alone."""
    return {member: paths.get(member, Path((member,))) for member in sorted(members)}
