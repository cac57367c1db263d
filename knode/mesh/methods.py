"""What a peer may ask of this node: one table of methods, each with its typed body and who may call it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from knode.errors import Code, KnodeError
from knode.identity import PublicKey
from knode.klp.codec import Decoder
from knode.klp.messages import Context
from knode.mesh.conversation import IncomingStream
from knode.mesh.statements import Role
from knode.world import Monotonic

T = TypeVar("T")

ANY_MEMBER = frozenset(Role)


@dataclass(frozen=True, slots=True)
class Call:
    """Who asks, and under which conditions."""

    caller: PublicKey
    session_id: bytes
    ticket: bytes
    """Public key of the ticket that a joining node proved; empty for a member."""
    context: Context
    deadline: Monotonic
    stream: IncomingStream | None
    progress: Callable[[bytes], None]
    """Send an event about this call to the caller; dropped when it is away."""


Handle = Callable[[Call, Any], Awaitable[msgspec.Struct | None]]


@dataclass(frozen=True, slots=True)
class Method:
    """One thing that can be asked."""

    name: str
    decoder: Decoder[Any]
    handle: Handle
    roles: frozenset[Role]
    """Whose requests are taken; empty: only a joining node's."""
    before_sync: bool
    """Whether it is answered before both ends have the same roster."""


class Methods:
    """The table. Filled while the node is put together, then only read."""

    def __init__(self) -> None:
        self._by_name: dict[str, Method] = {}

    def add(
        self,
        name: str,
        body: type[T],
        handle: Callable[[Call, T], Awaitable[msgspec.Struct | None]],
        *,
        roles: frozenset[Role] = ANY_MEMBER,
        before_sync: bool = False,
    ) -> None:
        """Add a method. `before_sync` ones are answered before both ends have the same roster."""
        assert name not in self._by_name
        self._by_name[name] = Method(name, Decoder(body), handle, roles, before_sync)

    def before_sync(self, name: str) -> bool:
        """Tell whether a method is answered before both ends have the same roster."""
        return name in self._by_name and self._by_name[name].before_sync

    def admitted(self, name: str, role: Role | None) -> Method:
        """Return the method if `role` (None: a joining node) may call it.

        Raises:
            KnodeError: NOT_ALLOWED; a joining node learns of nothing else. NOT_FOUND.
        """
        method = self._by_name.get(name)
        if role is None:
            if method is None or method.roles:
                raise KnodeError(Code.NOT_ALLOWED, "a joining node may only join")
            return method
        if method is None:
            raise KnodeError(Code.NOT_FOUND, f"this node answers no {name!r}", "upgrade the older node")
        if role not in method.roles:
            raise KnodeError(
                Code.NOT_ALLOWED,
                f"a member with the role {role} may not ask for {name}",
                "ask an admin: 'knode member role NODE worker'",
            )
        return method
