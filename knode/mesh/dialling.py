"""Keeping a conversation with every member: which ways are tried, when, and what came of each."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

import trio

from knode.errors import Code, KnodeError
from knode.mesh.membership import Membership
from knode.mesh.peer import Peer
from knode.mesh.ways import SCOPE_NAMES, Way, quality_of, scope_of_link, ways_to
from knode.transport import Carrier
from knode.world import Log, World

BACKOFF_FIRST_S = 0.2
BACKOFF_LONGEST_S = 15.0
BACKOFF_SHUT_OUT_S = 300.0
"""Between dials of a node that does not know this one as a member: more dials would not change that."""
STEADY_S = 5.0
"""A conversation that lasted so long was a good one: the next dial does not back off any further."""
HEAD_START_S = 0.3
"""How much earlier the smaller key dials, and a better way is tried before a worse one."""
NEXT_EQUAL_S = 0.05
"""How much earlier the first of two equal ways is tried: the faster answer wins."""
DIALS_AT_ONCE = 24
"""To one peer: more than there are ways to addresses that anybody may claim, so that whoever answers there
and says nothing does not hold up the others."""
BETTER_FIRST_S = 30.0
BETTER_LONGEST_S = 600.0
"""Between attempts to find a better way than the one in use."""
CLAIMED_ADDRESSES = 8
"""How many addresses that somebody claimed for a member are kept."""
CLAIM_EVERY_S = 5.0
"""Claims lead to a dial of a member at most so often: anybody on the network can make them."""
MAX_ADDRESS_LENGTH = 261
_NOT_THERE = (Code.UNAVAILABLE, Code.NOT_RECIPIENT)
"""Nobody answers at an address, or another node does: the peer has refused nothing."""


class Dialling:
    """Dials members, and whoever has a better way than the one in use.

    Args:
        open_conversation: dials a way, shakes hands there, and gives the conversation to the peer.
        is_wanted: whether a conversation with this peer is to be kept.
        let_go: called when one is not kept any more.
    """

    def __init__(
        self,
        world: World,
        own_key: bytes,
        membership: Membership,
        carriers: Mapping[str, Carrier],
        log: Log,
        *,
        open_conversation: Callable[[Peer, Way], Awaitable[None]],
        is_wanted: Callable[[Peer], bool],
        let_go: Callable[[Peer], None],
    ) -> None:
        self._world = world
        self._own_key = own_key
        self._membership = membership
        self._carriers = carriers
        self._log = log
        self._open_conversation = open_conversation
        self._is_wanted = is_wanted
        self._let_go = let_go
        self._kept: dict[bytes, trio.Event] = {}
        """For each member that is being kept: set to dial at once."""
        self._claimed: dict[bytes, tuple[str, ...]] = {}
        self._claim_dialled_at: dict[bytes, float] = {}
        self._failures: dict[bytes, dict[Way, str]] = {}

    def follow(self, peer: Peer, nursery: trio.Nursery) -> None:
        """Keep the best conversation with a member, in a task of `nursery`, for as long as it is wanted."""
        if peer.key.raw not in self._kept and self._is_wanted(peer):
            self._kept[peer.key.raw] = trio.Event()
            nursery.start_soon(self._keep, peer)

    def dial_now(self, key: bytes) -> None:
        """Dial this member without waiting any longer: an address of it was learned."""
        if key in self._kept:
            self._kept[key].set()

    def claim(self, key: bytes, addresses: Sequence[str]) -> None:
        """Note addresses that somebody, trusted or not, claims for a member, the latest first."""
        before = self._claimed.get(key, ())
        usable = [a for a in addresses if len(a) <= MAX_ADDRESS_LENGTH and ways_to([a], self._carriers)]
        now = tuple(dict.fromkeys([*usable, *before]))[:CLAIMED_ADDRESSES]
        self._claimed[key] = now
        moment = self._world.clock.monotonic()
        if (
            set(now) - set(before)
            and moment >= self._claim_dialled_at.get(key, -CLAIM_EVERY_S) + CLAIM_EVERY_S
        ):
            self._claim_dialled_at[key] = moment
            self.dial_now(key)

    def ways(self, peer: Peer) -> list[Way]:
        """Return every known way to a peer, best first."""
        claimed = self._claimed.get(peer.key.raw, ())
        return ways_to((*self._told(peer), *claimed), self._carriers)

    def failure(self, peer: Peer, way: Way) -> str | None:
        """Return why a way could not be taken when it was tried last; None when it could, or was not."""
        return self._failures.get(peer.key.raw, {}).get(way)

    def explain(self, peer: Peer) -> str:
        """Say, for people, why the link in use is the one, or why there is none."""
        failures = self._failures.get(peer.key.raw, {})
        ways = self.ways(peer)
        conversation = peer.conversation
        if conversation is None:
            tried = [f"{way} ({failures.get(way, 'not tried yet')})" for way in ways]
            return "; ".join(tried) or "no address of it is known"
        where = f"{conversation.link.carrier} {SCOPE_NAMES[scope_of_link(conversation.link)]}"
        better = _better_than_now(peer, ways)
        if not better:
            return f"{where}: no better way is known"
        return f"{where}: " + "; ".join(
            f"{w} is better but {failures.get(w, 'not tried yet')}" for w in better
        )

    def _told(self, peer: Peer) -> tuple[str, ...]:
        """Return the addresses that the peer itself told."""
        contact = self._membership.contacts.get(peer.key.raw)
        return contact.body.addresses if contact is not None else ()

    async def _keep(self, peer: Peer) -> None:
        backoff_s = BACKOFF_FIRST_S
        if self._own_key > peer.key.raw:
            await trio.sleep(HEAD_START_S)  # so that both seldom dial at once
        try:
            while self._is_wanted(peer):
                learned = self._kept[peer.key.raw] = trio.Event()
                await self._reach(peer)
                begun = self._world.clock.monotonic()
                await self._improve(peer)
                if self._world.clock.monotonic() - begun >= STEADY_S:
                    backoff_s = BACKOFF_FIRST_S
                if not learned.is_set():
                    learned = self._kept[peer.key.raw]  # it was replaced meanwhile
                with trio.move_on_after(backoff_s * self._world.randomness.uniform(0.5, 1.5)):
                    await learned.wait()
                longest_s = BACKOFF_SHUT_OUT_S if peer.shuts_out else BACKOFF_LONGEST_S
                backoff_s = min(longest_s, backoff_s * 2)
        finally:
            del self._kept[peer.key.raw]
            self._claimed.pop(peer.key.raw, None)
            self._claim_dialled_at.pop(peer.key.raw, None)
            self._failures.pop(peer.key.raw, None)
            self._let_go(peer)

    async def _reach(self, peer: Peer) -> None:
        """Race all ways to a peer once; anew when it tells other addresses while that lasts.

        What others claim of it waits for the next race: else they could end every dial.
        """
        told: tuple[str, ...] | None = None
        while peer.conversation is None and told != self._told(peer):
            told = self._told(peer)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._end_when_told, peer, told, nursery.cancel_scope)
                await race(
                    self.ways(peer), partial(self._opens, peer), is_over=lambda: peer.conversation is not None
                )
                nursery.cancel_scope.cancel()

    async def _end_when_told(self, peer: Peer, told: tuple[str, ...], scope: trio.CancelScope) -> None:
        while self._told(peer) == told:
            await self._kept[peer.key.raw].wait()
            if self._told(peer) == told:
                self._kept[peer.key.raw] = trio.Event()
        scope.cancel()

    async def _improve(self, peer: Peer) -> None:
        """Return when there is no conversation any more; until then look for a better way now and then."""
        pause_s = BETTER_FIRST_S
        while peer.conversation is not None:
            learned = self._kept[peer.key.raw] = trio.Event()
            changed = peer.changed
            with trio.move_on_after(pause_s * self._world.randomness.uniform(0.75, 1.25)):
                await _either(learned, changed)
            if not changed.is_set() and (better := _better_than_now(peer, self.ways(peer))):
                is_over = partial(_has_none_better, peer, better)
                await race(better, partial(self._opens, peer), is_over=is_over)
                pause_s = min(BETTER_LONGEST_S, pause_s * 2)

    async def _opens(self, peer: Peer, way: Way) -> bool:
        failures = self._failures.setdefault(peer.key.raw, {})
        try:
            await self._open_conversation(peer, way)
        except trio.Cancelled:
            failures[way] = "had not answered when another way did"
            raise
        except KnodeError as error:
            # A refusal is not signed: only at an address of its own is it taken for the peer's.
            if error.code not in _NOT_THERE and way.address in self._told(peer):
                peer.refusal = error.bare()
            known = set(self.ways(peer))
            for gone in [old for old in failures if old not in known]:
                del failures[gone]
            failures[way] = error.message
            self._log.debug("dial failed", peer=peer.node_id, way=str(way), why=error.message)
            return False
        failures.pop(way, None)
        return True


async def race(
    ways: Sequence[Way],
    attempt: Callable[[Way], Awaitable[bool]],
    *,
    is_over: Callable[[], bool],
) -> None:
    """Try `ways` in their order until an attempt returns True, or `is_over`; the others are cancelled then.

    A better way gets a head start, as RFC 8305 gives to the preferred address; an attempt that has failed
    lets the next begin at once. At most DIALS_AT_ONCE are under way.
    """
    ended = trio.Event()
    under_way = 0

    async def run(way: Way) -> None:
        nonlocal ended, under_way
        under_way += 1
        try:
            if await attempt(way):
                nursery.cancel_scope.cancel()
        finally:
            under_way -= 1
            ended.set()
            ended = trio.Event()

    async with trio.open_nursery() as nursery:
        for number, way in enumerate(ways, 1):
            if is_over():
                break
            nursery.start_soon(run, way)
            if number == len(ways):
                break
            is_next_equal = ways[number].quality == way.quality
            with trio.move_on_after(NEXT_EQUAL_S if is_next_equal else HEAD_START_S):
                await ended.wait()
            while under_way >= DIALS_AT_ONCE:
                await ended.wait()


def _better_than_now(peer: Peer, ways: Sequence[Way]) -> list[Way]:
    """Return those of `ways` that are better than the one in use; none when the peer is not here."""
    if peer.conversation is None:
        return []
    quality = quality_of(peer.conversation.link)
    return [way for way in ways if way.quality > quality]


def _has_none_better(peer: Peer, ways: Sequence[Way]) -> bool:
    return not _better_than_now(peer, ways)


async def _either(one: trio.Event, other: trio.Event) -> None:
    """Return when one of two events is set."""

    async def wait(event: trio.Event) -> None:
        await event.wait()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, one)
        nursery.start_soon(wait, other)
