"""A program that speaks the protocol by hand, as a test wants it."""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

import trio

from knode.errors import KnodeError
from knode.identity import KeyPair
from knode.klp import Session
from knode.klp.handshake import Initiator, Introduction
from knode.klp.keepalive import Keepalive, Load
from knode.klp.messages import Answer, Context, Failure, Message, Request, Response
from knode.transport import Carrier, LinkClosed


class Dialled(Protocol):
    """What a stranger knows of the node that it dials; a running node of a test is one, too."""

    address: str
    key: Any
    """`key.public` is the node's."""
    membership: Any
    """`membership.roster` has the cell's id and digest."""


class Stranger:
    """Speaks the protocol by hand, as a test wants it, over a link of its own."""

    def __init__(self, carrier: Carrier, key: KeyPair) -> None:
        self.key = key
        self._carrier = carrier
        self.boot = hashlib.sha256(key.public.raw).digest()[:16]

    async def shake_hands(
        self,
        node: Dialled,
        *,
        ticket: KeyPair | None = None,
        cell_id: bytes | None = None,
        roster_digest: bytes | None = None,
        versions: tuple[int, ...] = (1,),
    ) -> None:
        """Open a session with `node`. Raises what the node refuses it with."""
        roster = node.membership.roster
        self.link = await self._carrier.dial(node.address)
        initiator = Initiator(
            self.key,
            Introduction(
                roster.cell_id if cell_id is None else cell_id,
                self.boot,
                roster.digest if roster_digest is None else roster_digest,
                versions,
            ),
            expected_peer=node.key.public,
            channel_binding=self.link.channel_binding,
            nonce=bytes(32),
            ticket=ticket,
        )
        await self.link.send_frame(initiator.hello())
        proof, established = initiator.receive(await self.link.receive_frame())
        await self.link.send_frame(proof)
        self.node_boot = established.peer_boot
        self.session = Session(self.key, established)

    async def say(self, *messages: Message) -> None:
        """Send messages, and what else waits."""
        for message in messages:
            self.session.send(message)
        while (frame := self.session.next_frame()) is not None:
            await self.link.send_frame(frame)

    async def keep_alive(self, sent_us: int) -> None:
        """Say that it is there."""
        self.session.keep_alive(Keepalive(sent_us, 0, 0, Load(0, 0, 1, 0)))
        await self.say()

    def say_later(self, message: Message) -> None:
        """Let a message wait for the next `say`."""
        self.session.send(message)

    async def shake_again_if_refused(self, node: Dialled) -> Stranger:
        """Read what has come; when the node has ended the session, return one with a new session."""
        try:
            with trio.move_on_after(0.5):
                while True:
                    await self.hear()
        except (KnodeError, LinkClosed):
            await self.link.aclose()
            again = Stranger(self._carrier, self.key)
            await again.shake_hands(node)
            return again
        return self

    async def hear_quietly(self) -> list[Any]:
        """Return what the next frame brings; nothing, for ever, once the session has ended."""
        try:
            return await self.hear()
        except (KnodeError, LinkClosed):
            await trio.sleep_forever()
            raise

    def request(self, counter: int, method: str, body: bytes = b"", **more: Any) -> Request:
        fields = {"ttl_ms": 60_000, "stream": 0, "context": Context()} | more
        return Request(counter=counter, destination_boot=self.node_boot, method=method, body=body, **fields)

    async def hear(self) -> list[Any]:
        """Return what the next frame brings. Raises what a REFUSE frame tells."""
        return self.session.receive(await self.link.receive_frame())

    async def answer(self, counter: int) -> Answer:
        """Return the answer to a request."""
        while True:
            for message in await self.hear():
                if isinstance(message, Response | Failure) and message.counter == counter:
                    return message

    async def ask(self, counter: int, method: str, body: bytes = b"") -> Answer:
        await self.say(self.request(counter, method, body))
        return await self.answer(counter)
