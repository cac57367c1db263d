"""The typed parameters of the socket's methods, with their bounds; another field is refused."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from knode.home.configuration import NodeId
from knode.mesh.statements import Role

LOG_LINES_READ = 1000
"""The most that one call may ask for."""
AbsolutePath = Annotated[str, Meta(pattern=r"^/[^\x00]*\Z")]
"""The daemon's own working folder is nobody's."""


class Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """No parameters."""


class OfRole(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A role; worker unless given."""

    role: Role = Role.WORKER


class OfTicket(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A ticket's text, and how the joining node wants to be called."""

    ticket: str
    name: str | None = None


class OfNode(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A member's name, id or start of an id."""

    node: str


class OfPings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A member, and how often it is pinged."""

    node: str
    count: Annotated[int, Meta(ge=1, le=100)] = 4


class OfRevocation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A member, and since when what it did as an admin is undone (ISO 8601)."""

    node: str
    undo_since: str | None = None


class OfRotation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether the key is changed although a member is away."""

    force: bool = False


class OfRecovery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The recovery key as text, who is revoked, and since when all that was done is undone (ISO 8601)."""

    recovery_key: Annotated[str, Meta(max_length=1024)]
    revoke: Annotated[tuple[str, ...], Meta(max_length=64)] = ()
    undo_since: str | None = None


class OfSurvey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who is to be revoked when the ledger begins anew."""

    revoke: Annotated[tuple[str, ...], Meta(max_length=64)] = ()


class OfSurvival(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who is revoked; whether though others have more; and the recovery key, unless the owner's is here."""

    revoke: Annotated[tuple[str, ...], Meta(max_length=64)] = ()
    force: bool = False
    recovery_key: Annotated[str, Meta(max_length=1024)] | None = None


class OfLedger(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A ledger: the hash of its incarnation, or its beginning; and the recovery key, as OfSurvival."""

    ledger: Annotated[str, Meta(min_length=1, max_length=64)]
    recovery_key: Annotated[str, Meta(max_length=1024)] | None = None


class OfMemberRole(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A member and its new role."""

    node: str
    role: Role


class OfAgent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An agent's id."""

    agent: str


class OfPath(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A folder of this machine."""

    path: AbsolutePath


class OfTask(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A task's id or start of an id."""

    task: str


class OfEffects(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A task's id or start of an id; none: all tasks. `after`: the place behind which to begin."""

    task: str | None = None
    after: Annotated[int, Meta(ge=0, le=2**53)] = 0


class OfSubmission(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A task to be done."""

    agent: Annotated[str, Meta(max_length=64)]
    input: str = ""
    artifacts: tuple[AbsolutePath, ...] = ()
    on: str | None = None
    direct: bool = False
    key: str | None = None
    deadline_s: float | None = None
    outbox: bool = True
    """Whether it is kept here when no quorum can commit it."""
    wait: bool = False


class OfPartition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The ids of all nodes from which this one is cut off from now on; none heals it."""

    cut_off_from: Annotated[tuple[NodeId, ...], Meta(max_length=32)]


class OfLog(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many of the last lines, and whether to go on with new ones."""

    lines: Annotated[int, Meta(ge=0, le=LOG_LINES_READ)] = 20
    follow: bool = False
