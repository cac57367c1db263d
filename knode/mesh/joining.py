"""Joining a cell with a ticket: the inviter's side and the joining node's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec

from knode.errors import Code, KnodeError
from knode.home.folder import NodeName
from knode.klp.codec import Decoder
from knode.mesh.contact import SignedContact, open_contact
from knode.mesh.conversation import Conversation
from knode.mesh.dialling import race
from knode.mesh.discovery import Discovery
from knode.mesh.gossip import Gossip, Signed, fitting, telling_order
from knode.mesh.membership import Membership
from knode.mesh.methods import Call, Methods
from knode.mesh.peer import Peer
from knode.mesh.peers import Peers
from knode.mesh.roster import MAX_STATEMENTS, Member
from knode.mesh.statements import Add, OfTheCell, Revoke, SetRole, SignedStatement, open_statement
from knode.mesh.ticket import Ticket
from knode.mesh.ways import Way
from knode.mesh.words import four_words
from knode.world import Monotonic, World

JOIN_S = 15.0
FIND_S = 3.0
"""How long an inviter that has moved is looked for on the local network."""


class Join(msgspec.Struct, frozen=True, array_like=True):
    """What the joining node asks: to be called `name`, and to be reached at its contact's addresses."""

    name: NodeName
    contact: Signed


class Joined(msgspec.Struct, frozen=True, array_like=True):
    """The roster and the contacts that the new member begins with."""

    statements: Annotated[tuple[Signed, ...], msgspec.Meta(max_length=MAX_STATEMENTS)]
    contacts: Annotated[tuple[Signed, ...], msgspec.Meta(max_length=MAX_STATEMENTS)]


_joined: Decoder[Joined] = Decoder(Joined)


@dataclass(frozen=True, slots=True)
class Welcome:
    """What joining gave."""

    member: Member
    words: tuple[str, ...]


class Joining:
    """Both sides of a join."""

    def __init__(
        self,
        world: World,
        membership: Membership,
        peers: Peers,
        gossip: Gossip,
        methods: Methods,
        discovery: Discovery | None = None,
    ) -> None:
        self._world = world
        self._membership = membership
        self._peers = peers
        self._gossip = gossip
        self._discovery = discovery
        methods.add("roster.join", Join, self._grant, roles=frozenset(), before_sync=True)

    async def join(self, ticket: Ticket, name: str, contact: SignedContact) -> Welcome:
        """Join the cell of `ticket`, over the best way to its inviter that answers.

        When it fails nothing has changed here, and this node may use the ticket again: an inviter that
        took it in and could not say so says it then.

        Raises:
            KnodeError: UNAVAILABLE when no address answers; TICKET_INVALID, TICKET_USED, TICKET_EXPIRED,
                NOT_RECIPIENT (another node answers there), CHANNEL_MISMATCH, HOME_EXISTS.
        """
        if self._membership.in_cell:
            raise KnodeError(
                Code.HOME_EXISTS, "this node belongs to a cell already", "use another folder: '--home PATH'"
            )
        inviter, conversation = await self._reach(ticket)
        try:
            deadline = Monotonic(self._world.clock.monotonic() + JOIN_S)
            answer = await inviter.request("roster.join", Join(name, contact.data), deadline=deadline)
        except KnodeError as error:
            if error.code in (Code.UNKNOWN, Code.TIMEOUT):
                # Not UNKNOWN: whoever has used this ticket may show it again, so asking again is safe.
                raise KnodeError(
                    Code.UNAVAILABLE, "joining was cut off", "join again, with the same ticket"
                ) from error
            raise
        finally:
            conversation.close("joined")
        joined = _joined.decode(answer)
        await self._membership.adopt(
            ticket.cell,
            [open_statement(data) for data in joined.statements],
            [open_contact(data) for data in joined.contacts],
        )
        return Welcome(self._membership.own, four_words(conversation.established.session_id))

    async def _reach(self, ticket: Ticket) -> tuple[Peer, Conversation]:
        """Open a conversation with the inviter, over the way of the ticket that answers first.

        When none does, it may have moved since it invited: then where it is heard on the local network.
        """
        reached: list[tuple[Peer, Conversation]] = []
        failed: dict[Way, KnodeError] = {}
        ways = self._peers.ways_to(ticket.addresses)

        async def attempt(way: Way) -> bool:
            try:
                reached.append(
                    await self._peers.open_with_ticket(way, ticket.inviter_key, ticket.cell, ticket.key)
                )
            except KnodeError as error:
                failed[way] = error
            return bool(reached)

        await race(ways, attempt, is_over=lambda: bool(reached))
        if not reached and self._discovery is not None:
            heard = await self._discovery.find(ticket.inviter_key.node_id, within_s=FIND_S)
            await race(self._peers.ways_to(heard), attempt, is_over=lambda: bool(reached))
        for _, surplus in reached[1:]:
            surplus.close("another way was faster")
        if reached:
            return reached[0]
        # At an address of the local network another node may answer; what the inviter said counts more.
        # What is said where somebody only claims that it is counts nothing.
        said = [failed[way] for way in ways if way in failed]
        for error in sorted(said, key=lambda error: error.code is Code.NOT_RECIPIENT):
            if error.code is not Code.UNAVAILABLE:
                raise error
        tried = "; ".join(f"{way}: {error.message}" for way, error in failed.items())
        raise KnodeError(
            Code.UNAVAILABLE,
            f"the inviter did not answer ({tried or 'its ticket has no address that this node can dial'})",
            "check that it is up ('knode status' there) and that both machines share a network; "
            "then join again, with the same ticket",
        )

    async def _grant(self, call: Call, join: Join) -> Joined:
        contact = open_contact(join.contact)
        if contact.body.key != call.caller.raw:
            raise KnodeError(Code.NOT_RECIPIENT, "a contact speaks for its own key alone")
        words = four_words(call.session_id)
        await self._membership.redeem(call.ticket, call.caller, join.name, words)
        self._gossip.push_contacts(await self._membership.add_contacts([contact]), but=call.caller)
        return self._joined(call.caller.raw)

    def _joined(self, member: bytes) -> Joined:
        """Return what fits of roster and contacts, most needed first; the new member pulls the rest."""
        roster, contacts = self._membership.roster, self._membership.contacts
        grants = [s.body for s in roster.statements.values() if isinstance(s.body, Add | SetRole)]
        # Who does not know this node for a member neither dials it nor lets it in: nothing would be pulled.
        both = {member, self._membership.own.id.raw}
        signers = {body.signer for body in grants if body.member in both} & set(roster.holders)
        needed = both | {roster.holders[signer].id.raw for signer in signers}

        def is_needed(statement: SignedStatement) -> bool:
            body = statement.body
            return isinstance(body, OfTheCell) or (not isinstance(body, Revoke) and body.member in needed)

        order = sorted(telling_order(roster), key=is_needed, reverse=True)
        statements = fitting([s.data for s in order])
        own_first = sorted(contacts, key=lambda key: key != self._membership.key.public.raw)
        beside = fitting([contacts[key].data for key in own_first], beside_bytes=sum(map(len, statements)))
        return Joined(tuple(statements), tuple(beside))
