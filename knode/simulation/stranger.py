"""Someone who is no member, knows all that can be known from outside, and keeps trying to get in."""

from __future__ import annotations

from collections import Counter

import trio

from knode.errors import KnodeError
from knode.identity import KeyPair, PublicKey
from knode.klp.frames import Kind, kind_of, refused
from knode.klp.handshake import Initiator, Introduction
from knode.simulation.cell import Cell
from knode.simulation.world import SimulatedRandomness
from knode.transport import Link, LinkClosed

NAME = "stranger"
EVERY_S = (0.5, 3.0)
ANSWER_S = 10.0
TRICKS = ("its own key", "an invented ticket", "a member's key")


class Impostor(KeyPair):
    """Signs with its own key and says that it is another's."""

    def __init__(self, seed: bytes, claimed: PublicKey) -> None:
        super().__init__(seed)
        self.public = claimed


class Stranger:
    """Dials the members; `served` says with which trick it got more than a refusal."""

    def __init__(self, cell: Cell, randomness: SimulatedRandomness) -> None:
        self.served: list[str] = []
        self.refused: Counter[str] = Counter()
        """By error code."""
        self._cell = cell
        self._randomness = randomness
        self._carrier = cell.network.carrier(NAME)

    async def run(self) -> None:
        """Try again and again, until cancelled."""
        while True:
            await trio.sleep(self._randomness.uniform(*EVERY_S))
            up = list(self._cell.nodes())
            if not up:
                continue
            _, node = up[self._randomness.choose(len(up))]
            trick = TRICKS[self._randomness.choose(len(TRICKS))]
            members = list(node.membership.roster.members.values())
            claimed = members[self._randomness.choose(len(members))].key
            try:
                link = await self._carrier.dial(node.addresses[0])
                try:
                    with trio.move_on_after(ANSWER_S):
                        await self._try(link, trick, node.key.public, claimed, node.membership.roster.cell_id)
                finally:
                    await link.aclose()
            except KnodeError as error:
                self.refused[error.code] += 1
            except LinkClosed:
                self.refused["closed"] += 1

    async def _try(
        self, link: Link, trick: str, member: PublicKey, claimed: PublicKey, cell_id: bytes
    ) -> None:
        seed = self._randomness.token(32)
        key = Impostor(seed, claimed) if trick == "a member's key" else KeyPair(seed)
        initiator = Initiator(
            key,
            Introduction(cell_id, self._randomness.token(16), self._randomness.token(32)),
            expected_peer=member,
            channel_binding=link.channel_binding,
            nonce=self._randomness.token(32),
            ticket=KeyPair(self._randomness.token(32)) if trick == "an invented ticket" else None,
        )
        await link.send_frame(initiator.hello())
        proof, _ = initiator.receive(await link.receive_frame())
        # Whoever says a member's key is welcome to prove it; nobody else gets as far.
        if trick != "a member's key":
            self.served.append(f"a stranger with {trick} was welcome")
        await link.send_frame(proof)
        frame = await link.receive_frame()
        if kind_of(frame) is Kind.REFUSE:
            raise refused(frame)
        self.served.append(f"a stranger with {trick} was served a {kind_of(frame).name} frame")
