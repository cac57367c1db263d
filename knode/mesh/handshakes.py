"""Handshakes over links that were just opened: who speaks there, within which time, how many at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable

import trio

from knode.errors import Code, KnodeError
from knode.identity import KeyPair, PublicKey
from knode.klp.frames import refusal
from knode.klp.handshake import Established, Initiator, Introduction, Responder
from knode.mesh.membership import Membership
from knode.transport import Link, LinkClosed, LinkFault
from knode.transport.strangers import StrangerLines
from knode.world import Log, World

HANDSHAKE_S = 10.0
ANSWERED_AT_ONCE = 64
FAREWELLS_AT_ONCE = 64
REFUSAL_S = 1.0
NO_ROSTER = bytes(32)


class Handshakes:
    """Both ends of a node's handshakes. A link whose handshake fails is told why, and closed.

    Every refusal is counted; of those with one host a line a minute is logged.
    """

    def __init__(self, world: World, key: KeyPair, boot: bytes, membership: Membership, log: Log) -> None:
        self.refusals: Counter[str] = Counter()
        """How many handshakes each error refused, at either end, since the start."""
        self._world = world
        self._key = key
        self._boot = boot
        self._membership = membership
        self._log = log
        self._lines = StrangerLines()
        self._farewells = 0
        self._answering: dict[trio.CancelScope, None] = {}

    async def with_member(self, link: Link, peer: PublicKey) -> Established:
        """Open a session with the member at the other end of a link that was dialled.

        Raises:
            KnodeError: what either end refuses, or UNAVAILABLE when the link was lost or is too slow.
        """
        return await self._conclude(link, self._initiate(link, self._introduction(), peer, None), _limit())

    async def with_ticket(
        self, link: Link, inviter: PublicKey, cell_id: bytes, ticket: KeyPair
    ) -> Established:
        """Open a session with an inviter, proving the ticket. Raises as `with_member`."""
        introduction = Introduction(cell_id, self._boot, NO_ROSTER)
        return await self._conclude(link, self._initiate(link, introduction, inviter, ticket), _limit())

    async def identify(self, link: Link, peer: PublicKey) -> None:
        """See that `peer` is at the other end of a link that was dialled, and close it: no session is opened.

        Raises:
            KnodeError: as `with_member`; then somebody else is there, or nobody.
        """

        async def ask() -> Established:
            _, established = await self._greet(link, self._introduction(), peer, None)
            return established

        await self._conclude(link, ask(), _limit())
        await self._say_farewell(link, KnodeError(Code.CANCELLED, "it was only asked who is here"))

    async def answer(self, link: Link) -> Established:
        """Open a session with whoever dialled. Raises as `with_member`, and RATE_LIMITED.

        When too many are under way, the oldest makes room: an honest one takes milliseconds, so who
        opens links and says nothing shuts nobody out.
        """
        if len(self._answering) >= ANSWERED_AT_ONCE:
            oldest = next(iter(self._answering))
            del self._answering[oldest]
            oldest.cancel()
        scope = _limit()
        self._answering[scope] = None
        try:
            return await self._conclude(link, self._respond(link), scope)
        finally:
            self._answering.pop(scope, None)

    async def _conclude(
        self, link: Link, handshake: Awaitable[Established], scope: trio.CancelScope
    ) -> Established:
        address = link.remote_address
        try:
            with scope:
                return await handshake
            if trio.current_time() >= scope.deadline:
                error = KnodeError(Code.UNAVAILABLE, f"the handshake with {address} took too long")
            else:
                error = KnodeError(Code.RATE_LIMITED, "too many handshakes at once", "try again")
        except KnodeError as refused:
            error = refused
        except LinkFault as fault:
            error = KnodeError(Code.BAD_FRAME, fault.reason)
        except LinkClosed as closed:
            why = f"the handshake with {address} was cut off ({closed.reason})"
            error = KnodeError(Code.UNAVAILABLE, why, "try again")
        except BaseException:
            await link.aclose()
            raise
        self.refusals[error.code] += 1
        if error.code is Code.CANCELLED:  # see `identify`
            self._log.debug("handshake cancelled", address=address)
        elif (left_out := self._lines.admit(address, trio.current_time())) is not None:
            self._log.warning(
                "handshake refused", code=error.code, why=str(error), address=address, left_out=left_out
            )
        await self._say_farewell(link, error)
        raise error

    async def _say_farewell(self, link: Link, error: KnodeError) -> None:
        """Close a refused link, saying why; at once when many who were refused do not hang up."""
        with trio.CancelScope() as scope:
            if self._farewells >= FAREWELLS_AT_ONCE:
                scope.cancel()
            self._farewells += 1
            try:
                await close_saying(link, error)
            finally:
                self._farewells -= 1

    async def _initiate(
        self, link: Link, introduction: Introduction, peer: PublicKey, ticket: KeyPair | None
    ) -> Established:
        proof, established = await self._greet(link, introduction, peer, ticket)
        await link.send_frame(proof)
        return established

    async def _greet(
        self, link: Link, introduction: Introduction, peer: PublicKey, ticket: KeyPair | None
    ) -> tuple[bytes, Established]:
        """Say hello and see that `peer` answers; return the proof that opens the session."""
        initiator = Initiator(
            self._key,
            introduction,
            expected_peer=peer,
            channel_binding=link.channel_binding,
            nonce=self._world.randomness.token(32),
            ticket=ticket,
        )
        await link.send_frame(initiator.hello())
        return initiator.receive(await link.receive_frame())

    async def _respond(self, link: Link) -> Established:
        responder = Responder(
            self._key,
            self._introduction(),
            admit=self._membership.admit,
            channel_binding=link.channel_binding,
            nonce=self._world.randomness.token(32),
        )
        await link.send_frame(responder.receive_hello(await link.receive_frame()))
        return responder.receive_auth(await link.receive_frame())

    def _introduction(self) -> Introduction:
        roster = self._membership.roster
        return Introduction(roster.cell_id, self._boot, roster.digest)


async def close_saying(link: Link, error: KnodeError | None) -> None:
    """Close a link, telling the other end the error, when there is one, within a second at most."""
    try:
        if error is not None:
            with trio.move_on_after(REFUSAL_S):
                await link.send_frame(refusal(error))
    except LinkClosed:
        pass  # it was the other end that refused
    finally:
        await link.aclose()


def _limit() -> trio.CancelScope:
    return trio.CancelScope(deadline=trio.current_time() + HANDSHAKE_S)
