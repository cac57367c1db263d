"""Which agents each member has running: every node tells all others, and keeps what they tell."""

from __future__ import annotations

from knode.agents.registry import Registry, State
from knode.agents.runtime import Runner
from knode.identity import PublicKey
from knode.klp.codec import Decoder, encode
from knode.mesh.peers import Peers
from knode.tasks.messages import Offer

OFFER_TOPIC = "agents.offer"

_offer: Decoder[Offer] = Decoder(Offer)


class Offers:
    """What this node and its peers can run."""

    def __init__(self, own: PublicKey, peers: Peers, registry: Registry, runner: Runner) -> None:
        self._own = own
        self._peers = peers
        self._registry = registry
        self._runner = runner
        self._of_others: dict[PublicKey, frozenset[str]] = {}
        peers.on_bulletin(OFFER_TOPIC, self._take)

    def announce(self) -> None:
        """Tell every member which agents run here. Call it whenever that changes."""
        self._peers.announce(OFFER_TOPIC, encode(Offer(tuple(self._running_here()))))

    def of(self, key: PublicKey) -> frozenset[str]:
        """Return the ids of the agents that a member has running, as far as is known here."""
        if key == self._own:
            return frozenset(agent for agent, _ in self._running_here())
        return self._of_others.get(key, frozenset())

    def _running_here(self) -> list[tuple[str, str]]:
        manifests = [entry.manifest for entry in self._registry.list() if entry.state is State.RUNNING]
        return [(m.id, m.version) for m in manifests if self._runner.can_run(m.id)]

    def _take(self, key: PublicKey, body: bytes) -> None:
        self._of_others[key] = frozenset(agent for agent, _ in _offer.decode(body).agents)
