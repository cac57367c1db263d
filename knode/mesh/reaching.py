"""Can others dial this node, and does its clock agree with theirs? Members are asked, and try.

A member dials for the asking one alone, and only where that one itself has signed that it is; it says no
more than whether the asking node's key was there. So nobody can use it to look into a network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec
import trio

from knode.errors import Code, KnodeError
from knode.identity import PublicKey
from knode.klp.codec import Decoder
from knode.mesh.membership import Membership
from knode.mesh.methods import Call, Methods
from knode.mesh.peer import Peer
from knode.mesh.peers import Peers
from knode.mesh.statements import Milliseconds
from knode.mesh.ticket import Address
from knode.mesh.ways import Way
from knode.world import Monotonic, World

MAX_ADDRESSES = 8
MAX_WAYS = 16
TRY_S = 5.0
"""How long the ways are tried, all at once."""
ANSWER_S = 10.0
EVERY_S = 5.0
"""How often a member may ask."""
ASKED_AT_ONCE = 4


class Reach(msgspec.Struct, frozen=True, array_like=True):
    """Nothing: the addresses are those of the asking node's contact."""


class Tried(msgspec.Struct, frozen=True, array_like=True):
    """One way to the asking node, and what came of it."""

    link: Annotated[str, msgspec.Meta(max_length=16)]
    address: Address
    problem: Annotated[str, msgspec.Meta(max_length=32)]
    """The code of the error; empty when the node was there."""


class Reached(msgspec.Struct, frozen=True, array_like=True):
    """What the asked node found."""

    asked_at: Milliseconds
    """The asked node's time of day when it was asked."""
    tried: Annotated[tuple[Tried, ...], msgspec.Meta(max_length=MAX_WAYS)]


_reached: Decoder[Reached] = Decoder(Reached)


@dataclass(frozen=True, slots=True)
class Reachability:
    """How a member sees this node."""

    tried: tuple[Tried, ...]
    clock_ahead_ms: int
    """How far the member's clock is ahead of this node's, but for half a round trip."""


class Reaching:
    """Both sides of the question."""

    def __init__(self, world: World, membership: Membership, peers: Peers, methods: Methods) -> None:
        self._world = world
        self._membership = membership
        self._peers = peers
        self._asked: dict[bytes, Monotonic] = {}
        """When each member asked last, as far as that is not over yet."""
        self._trying = 0
        methods.add("peer.reach", Reach, self._answer)

    async def ask(self, peer: Peer) -> Reachability:
        """Let a member that is here dial this node.

        Raises:
            KnodeError: UNAVAILABLE, TIMEOUT or UNKNOWN when no answer came within ten seconds; RATE_LIMITED
                when it was asked a moment ago; NOT_FOUND when it is older than this question.
        """
        asked_at, begun = self._world.clock.wall(), self._world.clock.monotonic()
        answer = _reached.decode(
            await peer.request("peer.reach", Reach(), deadline=Monotonic(begun + ANSWER_S))
        )
        rtt_s = (peer.conversation.rtt_s if peer.conversation is not None else None) or 0.0
        return Reachability(answer.tried, round(answer.asked_at - asked_at - rtt_s * 500))

    async def _answer(self, call: Call, reach: Reach) -> Reached:
        asked_at = self._world.clock.wall()
        self._admit(call.caller)
        contact = self._membership.contacts.get(call.caller.raw)
        if contact is None:
            raise KnodeError(
                Code.NOT_FOUND, "the asking node has told no addresses yet", "ask again in a minute"
            )
        ways = self._peers.ways_to(contact.body.addresses[:MAX_ADDRESSES])[:MAX_WAYS]
        self._trying += 1
        try:
            return Reached(asked_at, await self._try(ways, call.caller))
        finally:
            self._trying -= 1

    def _admit(self, caller: PublicKey) -> None:
        now = self._world.clock.monotonic()
        self._asked = {key: at for key, at in self._asked.items() if now < at + EVERY_S}
        if caller.raw in self._asked or self._trying >= ASKED_AT_ONCE:
            raise KnodeError(
                Code.RATE_LIMITED, "it was asked a moment ago", f"ask again in {EVERY_S:.0f} seconds"
            )
        self._asked[caller.raw] = now

    async def _try(self, ways: list[Way], key: PublicKey) -> tuple[Tried, ...]:
        problems: dict[Way, str] = dict.fromkeys(ways, Code.TIMEOUT)

        async def attempt(way: Way) -> None:
            try:
                await self._peers.identify(way, key)
                problems[way] = ""
            except KnodeError as error:
                problems[way] = error.code

        with trio.move_on_after(TRY_S):
            async with trio.open_nursery() as nursery:
                for way in ways:
                    nursery.start_soon(attempt, way)
        return tuple(Tried(way.carrier, way.address, problem) for way, problem in problems.items())
