"""A member of a daemon's cell that is no knode: it joins by a ticket, and then says what a test wants."""

from __future__ import annotations

import hashlib
import itertools
from types import SimpleNamespace

import msgspec
import trio
from stranger import Stranger

from knode.identity import KeyPair
from knode.klp.codec import encode
from knode.klp.messages import Request, Response
from knode.mesh.contact import Contact, sign_contact
from knode.mesh.gossip import Pulled
from knode.mesh.joining import Join
from knode.mesh.ticket import Ticket, parse_ticket
from knode.transport import Carrier
from knode.world.real import RealClock

NO_DIGEST = bytes(32)


def daemon_of(ticket: Ticket) -> SimpleNamespace:
    """Return what a stranger must know of the node that invites."""
    roster = SimpleNamespace(cell_id=ticket.cell, digest=NO_DIGEST)
    return SimpleNamespace(
        address=ticket.addresses[0],
        key=SimpleNamespace(public=ticket.inviter_key),
        membership=SimpleNamespace(roster=roster),
    )


class Rogue:
    """One member, with as many conversations as it likes."""

    def __init__(self, carrier: Carrier, name: str, ticket: Ticket) -> None:
        self.key = KeyPair(hashlib.sha256(name.encode()).digest())
        self.name = name
        self.daemon = daemon_of(ticket)
        self._carrier = carrier
        self._boots = itertools.count(1)

    @classmethod
    async def join(cls, carrier: Carrier, name: str, ticket_text: str, *addresses: str) -> Rogue:
        """Become a member, to be reached at `addresses`."""
        ticket = parse_ticket(ticket_text)
        rogue = cls(carrier, name, ticket)
        joining = Stranger(carrier, rogue.key)
        await joining.shake_hands(rogue.daemon, ticket=ticket.key)
        contact = Contact(rogue.key.public.raw, addresses, "0.1.0", RealClock().wall())
        answer = await joining.ask(
            1, "roster.join", encode(Join(name, sign_contact(rogue.key, contact).data))
        )
        assert isinstance(answer, Response), answer
        await joining.link.aclose()
        return rogue

    async def dial(self) -> Stranger:
        """Open a conversation and nothing more."""
        stranger = Stranger(self._carrier, self.key)
        stranger.boot = next(self._boots).to_bytes(16)
        await stranger.shake_hands(self.daemon)
        return stranger

    async def open(self) -> Stranger:
        """Open a conversation in which requests are answered, since this member keeps no news to itself."""
        stranger = await self.dial()
        with trio.fail_after(60):
            while True:
                for message in await stranger.hear():
                    if isinstance(message, Request) and message.method == "roster.pull":
                        await stranger.say(Response(message.counter, encode(Pulled((), False))))
                        return stranger


def body(*fields: object) -> bytes:
    """Encode a body as its fields."""
    return msgspec.msgpack.encode(fields)
