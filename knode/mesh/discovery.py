"""Finding members on the local network: telling where this node is, and trying where others say they are.

Anybody in the network can say anything. So what is heard never grants trust, is bounded per node and
altogether, and ends in `Peers.discovered`, which takes members alone; their handshake proves who is there.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import trio

from knode.errors import KnodeError
from knode.identity import NodeId
from knode.identity.names import parse_node_id
from knode.mesh.announcement import local_hosts, local_port, read_announcement, write_announcement
from knode.mesh.membership import Membership
from knode.mesh.peers import Peers
from knode.world import Log, World

LOOK_EVERY_S = 5.0
"""How often this machine's addresses are looked at."""
TRY_AGAIN_S = 60.0
"""How long a network that takes no multicast, or is flooded with it, is left alone."""
ECHO_S = 15.0
"""By when a node hears its own announcement, where multicast works."""
WINDOW_S = 10.0
CLAIMS_A_WINDOW = 64
CLAIMS_A_NODE = 4
"""How many announcements are taken in a window: of all, and about one node."""
NODES_REMEMBERED = 256
"""Nodes whose addresses are kept although they are no members: they may be invited or become ones."""
LINE_EVERY_S = 60.0


class Announcer(Protocol):
    """Tells the local network a text, and hears what others tell (`knode.transport.mdns`)."""

    async def run(self, text: bytes, hosts: Sequence[str], port: int, heard: Callable[[bytes], None]) -> None:
        """Tell and hear until cancelled, or until that is better begun anew.

        Raises:
            KnodeError: UNAVAILABLE when it cannot be done here.
        """
        ...


class _Here(NamedTuple):
    """What is announced of this node, and from which of its IP addresses."""

    text: bytes
    hosts: tuple[str, ...]
    port: int


class Discovery:
    """This node in the local network's announcements."""

    def __init__(
        self,
        world: World,
        membership: Membership,
        peers: Peers,
        announcer: Announcer,
        addresses: Callable[[], Sequence[str]],
        log: Log,
    ) -> None:
        """Make it; `addresses` are those that the node's listeners give at the moment."""
        self.problem: str | None = None
        """Why nobody can be found this way now; None while all is well."""
        self.ignored: Counter[str] = Counter()
        """How many announcements were ignored, by why: `malformed`, `too many`."""
        self._world = world
        self._membership = membership
        self._peers = peers
        self._announcer = announcer
        self._addresses = addresses
        self._log = log
        self._node_id = membership.key.node_id
        self._nodes: OrderedDict[NodeId, tuple[str, ...]] = OrderedDict()
        """What was claimed last for each node, the newest claim last."""
        self._told: bytes = b""
        self._echo = trio.Event()
        self._news = trio.Event()
        self._window_ends = -math.inf
        self._window: Counter[NodeId] = Counter()
        self._next_line_at = -math.inf
        self._unsaid = 0
        membership.changed.append(lambda _: self._follow_roster())

    async def run(self) -> None:
        """Announce this node and try what is heard, until cancelled, with new addresses when they change."""
        while True:
            here = self._here()
            if not here.hosts:
                self._have_problem("this machine has no address in a local network", warn=False)
                await trio.sleep(LOOK_EVERY_S)
                continue
            self.problem, self._echo = None, trio.Event()
            self._told = here.text
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._announce, here)
                nursery.start_soon(self._watch_echo)
                while self._here() == here:  # noqa: ASYNC110 - no system tells
                    await trio.sleep(LOOK_EVERY_S)
                nursery.cancel_scope.cancel()

    def hear(self, text: bytes) -> None:
        """Take an announcement of anybody."""
        if text == self._told:
            self._echo.set()
            return
        try:
            claim = read_announcement(text)
        except KnodeError as error:
            self._ignore("malformed", error.message)
            return
        if claim is None or claim.node_id == self._node_id:
            return
        now = self._world.clock.monotonic()
        if now >= self._window_ends:
            self._window_ends = now + WINDOW_S
            self._window.clear()
        if self._window.total() >= CLAIMS_A_WINDOW or self._window[claim.node_id] >= CLAIMS_A_NODE:
            self._ignore("too many", f"{WINDOW_S:g} s are not over")
            return
        self._window[claim.node_id] += 1
        self._nodes[claim.node_id] = claim.addresses
        self._nodes.move_to_end(claim.node_id)
        if len(self._nodes) > NODES_REMEMBERED:
            self._nodes.popitem(last=False)
        self._news.set()
        self._news = trio.Event()
        self._peers.discovered(claim.node_id, claim.addresses)

    async def find(self, node_id: NodeId, *, within_s: float) -> tuple[str, ...]:
        """Return where somebody says that a node is, member or not; empty when nobody does in time."""
        with trio.move_on_after(within_s):
            while node_id not in self._nodes:
                await self._news.wait()
        return self._nodes.get(node_id, ())

    async def hears_itself(self, *, within_s: float) -> bool:
        """Tell whether this node's own announcement has come back from the network, or does so in time."""
        with trio.move_on_after(within_s):
            await self._echo.wait()
        return self._echo.is_set()

    def _follow_roster(self) -> None:
        """Try what was heard of those who were no members then."""
        for node_id, addresses in self._nodes.items():
            if parse_node_id(node_id) in self._membership.roster.members:
                self._peers.discovered(node_id, addresses)

    def _here(self) -> _Here:
        addresses = self._addresses()
        text = write_announcement(self._node_id, addresses)
        return _Here(text, local_hosts(addresses), local_port(addresses))

    async def _announce(self, here: _Here) -> None:
        while True:
            try:
                await self._announcer.run(here.text, here.hosts, here.port, self.hear)
            except KnodeError as error:
                self._have_problem(str(error), warn=True)
            await trio.sleep(TRY_AGAIN_S)

    async def _watch_echo(self) -> None:
        """Notice a network or firewall that swallows multicast without an error."""
        with trio.move_on_after(ECHO_S):
            await self._echo.wait()
        if not self._echo.is_set() and self.problem is None:
            self._have_problem(
                "this machine does not hear its own announcement: its firewall or network swallows multicast "
                "(UDP port 5353)",
                warn=True,
            )
        await self._echo.wait()
        self.problem = None

    def _have_problem(self, problem: str, *, warn: bool) -> None:
        if warn and problem != self.problem:
            self._log.warning("no discovery on the local network", why=problem)
        self.problem = problem

    def _ignore(self, why: str, detail: str) -> None:
        """Count it, and say so once a minute: nobody from outside sets the log's pace."""
        self.ignored[why] += 1
        self._unsaid += 1
        now = self._world.clock.monotonic()
        if now >= self._next_line_at:
            self._next_line_at = now + LINE_EVERY_S
            self._log.warning("announcements ignored", why=why, detail=detail, count=self._unsaid)
            self._unsaid = 0
