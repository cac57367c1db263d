"""One node: which rooms it has, how they are put together, and in which order they start and stop."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass

import trio

from knode import __version__
from knode.agents.registry import Registry
from knode.agents.runtime import Runner
from knode.agents.sandbox import Sandbox
from knode.consensus.clocks import Clocks
from knode.consensus.electorate import Electorate
from knode.consensus.recovery import Recovery
from knode.consensus.replica import Replica
from knode.errors import Code, KnodeError
from knode.home.configuration import Settings
from knode.home.layout import Home
from knode.identity import KeyPair, PublicKey
from knode.identity.keystore import load_key
from knode.klp.codec import encode
from knode.klp.keepalive import Load
from knode.mesh.contact import MAX_ADDRESSES, Contact, SignedContact, sign_contact
from knode.mesh.discovery import Announcer, Discovery
from knode.mesh.gossip import Gossip
from knode.mesh.incarnations import Incarnation
from knode.mesh.joining import Joining, Welcome
from knode.mesh.liveness import PeerState
from knode.mesh.lookup import Finder, Lookup
from knode.mesh.membership import Membership
from knode.mesh.methods import Methods
from knode.mesh.peers import Peers
from knode.mesh.pinging import Pinging
from knode.mesh.reaching import Reaching
from knode.mesh.roster import Member
from knode.mesh.statements import Role
from knode.mesh.ticket import Ticket
from knode.mesh.ways import fitting
from knode.node.database import open_database, open_ledger
from knode.node.keys import install_next_key, make_next_key
from knode.storage import Database
from knode.tasks.attempts import Attempts
from knode.tasks.candidates import Candidates
from knode.tasks.commands import LEVEL, Begin, RaiseLevel
from knode.tasks.direct import DirectTasks
from knode.tasks.dispatch import Dispatcher
from knode.tasks.durable import Durable
from knode.tasks.folders import Folders
from knode.tasks.following import Following
from knode.tasks.holding import Holding
from knode.tasks.inputs import Inputs
from knode.tasks.leader import Leader
from knode.tasks.offers import Offers
from knode.tasks.outbox import Outbox
from knode.tasks.places import Places
from knode.tasks.reception import Reception
from knode.tasks.store import LedgerStore
from knode.tasks.work import Work
from knode.tasks.worker import Worker
from knode.tasks.workers import Workers
from knode.transport import Carrier, Listener
from knode.world import Log, Monotonic, World

CONTACT_EVERY_S = 5.0
RAISE_S = 5.0


@dataclass(frozen=True, slots=True)
class Machine:
    """What the machine can do, as the node tells others."""

    cores: int
    busy_percent: Callable[[], int]
    """How busy its processors are, all together: 0 to 100."""
    sandbox: Sandbox | None
    sandbox_problems: tuple[str, ...] = ()


class Node:
    """A node at work. Make one with `open`, then `run` it."""

    def __init__(
        self,
        world: World,
        home: Home,
        settings: Settings,
        database: Database,
        key: KeyPair,
        owner_key: KeyPair | None,
        carriers: Mapping[str, Carrier],
        machine: Machine,
        ledger: LedgerStore,
        work: Work,
        announcer: Announcer | None,
        finder: Finder | None,
        log: Log,
    ) -> None:
        self.world = world
        self.home = home
        self.settings = settings
        self.key = key
        self.machine = machine
        self.log = log
        self.started_at = world.clock.monotonic()
        self.methods = Methods()
        self.membership = Membership(world, database, key, owner_key)
        self.peers = Peers(
            world,
            key,
            self.membership,
            self.methods,
            carriers,
            log,
            keepalive_s=settings.mesh.keepalive_s,
            dead_after_s=settings.mesh.dead_after_s,
            load=self._load,
        )
        self.gossip = Gossip(world, self.membership, self.peers, self.methods, log)
        self.discovery: Discovery | None = None
        if announcer is not None:
            self.discovery = Discovery(
                world, self.membership, self.peers, announcer, lambda: self._listened, log
            )
        self.lookup = Lookup(world, self.peers, finder, log) if finder is not None else None
        self.joining = Joining(world, self.membership, self.peers, self.gossip, self.methods, self.discovery)
        self.pinging = Pinging(world, self.methods)
        self.reaching = Reaching(world, self.membership, self.peers, self.methods)
        self.ledger = ledger
        self.replica = Replica(
            world,
            self.membership,
            self.peers,
            self.methods,
            database,
            ledger,
            home.raft,
            log,
            first_command=self._first_command,
        )
        self.electorate = Electorate(
            world, self.membership, self.peers, self.replica, log, level=LEVEL, on_level=self._raise_level
        )
        self.clocks = Clocks(world, self.membership, self.peers, self.electorate, log)
        ledger.wall = self.clocks.wall
        self.recovery = Recovery(
            world, self.membership, self.peers, self.methods, self.replica, self.electorate, log
        )
        self.registry = Registry(world, home.agents, key, self._is_publisher_trusted)
        self.runner = Runner(world, self.registry, machine.sandbox, home.attempts)
        self.offers = Offers(key.public, self.peers, self.registry, self.runner)
        self.places = Places(
            self.runner, running=settings.tasks.running or machine.cores, queued=settings.tasks.queued
        )
        self.folders = Folders(world, home.attempts, log, task_bytes=settings.tasks.artifact_bytes)
        self.worker = Worker(
            world, self.runner, self.places, self.folders, self.membership, self.peers, self.methods, log
        )
        self.candidates = Candidates(self.membership, self.peers, self.offers, self._load)
        self.tasks = DirectTasks(world, self.membership, self.peers, self.candidates, self.worker, log)
        self.leader = Leader(world, self.membership, self.peers, self.methods, self.replica)
        self.inputs = Inputs(
            world,
            Holding(world, home.inputs, log, task_bytes=settings.tasks.artifact_bytes),
            self.membership,
            self.peers,
            self.methods,
            lambda tasks: self.durable.fates(tasks),
            log,
        )
        self.attempts = Attempts(
            world,
            work,
            self.runner,
            self.places,
            self.folders,
            self.inputs.bring,
            self.membership,
            self.leader,
            self.methods,
            log,
        )
        workers = Workers(world, self.membership, self.peers, self.attempts)
        self.dispatcher = Dispatcher(
            world, self.membership, self.peers, self.replica, ledger, self.candidates, workers, log
        )
        self.reception = Reception(world, self.leader, self.replica, ledger, self.dispatcher, log)
        self.outbox = Outbox(world, database, log)
        self.durable = Durable(world, self.membership, self.leader, ledger, self.inputs, self.outbox, log)
        self.following = Following(world, self.leader, self.outbox, log)
        self._work = work
        self._database = database
        self._listeners: list[Listener] = []
        self._going_down = trio.Event()
        self._joining = trio.Lock()
        self._changing_keys = trio.Lock()

    @classmethod
    async def open(
        cls,
        world: World,
        home: Home,
        settings: Settings,
        carriers: Mapping[str, Carrier],
        machine: Machine,
        log: Log,
        *,
        announcer: Announcer | None = None,
        finder: Finder | None = None,
    ) -> Node:
        """Read the node's home; nothing is sent or listened to yet.

        Args:
            world: what it takes from outside.
            home: its folder.
            settings: its configuration.
            carriers: its kinds of links by name.
            machine: what the machine can do.
            log: where it says what happens.
            announcer: how it finds others on the local network; None: not at all.
            finder: whom it asks where absent members are; None: nobody.

        Raises:
            KnodeError: HOME_DAMAGED, HOME_TOO_NEW, LOCKED, DISK_FULL, DISK_READ_ONLY.
        """
        key = load_key(world, home.node_key)
        owner_key = load_key(world, home.owner_key) if world.disk.exists(home.owner_key) else None
        async with AsyncExitStack() as opened:
            database = await open_database(world, home)
            opened.push_async_callback(database.aclose)
            ledger = await open_ledger(world, home, database, log)
            opened.push_async_callback(ledger.aclose)
            work = await Work.open(world, home.work, log)
            opened.push_async_callback(work.aclose)
            node = cls(
                world,
                home,
                settings,
                database,
                key,
                owner_key,
                carriers,
                machine,
                ledger,
                work,
                announcer,
                finder,
                log,
            )
            await node.membership.load()
            await world.blocking.run(node.registry.load)
            await node.replica.open()
            await node.outbox.load()
            opened.pop_all()
        return node

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen, keep the mesh and do tasks until cancelled; then say good-bye and close everything.

        Started once others can dial it. Cancelling takes about a second at most.

        Raises:
            KnodeError: PORT_IN_USE or INVALID_ARGUMENT, when it cannot listen.
        """
        try:
            node = self.settings.node
            self._listeners = await self.peers.listen(node.host, node.port)
            async with trio.open_nursery() as nursery:
                up = trio.Event()
                # Not `start`: cancelled, it would wait for a room that waits for the good-byes.
                nursery.start_soon(self._run_rooms, up)
                try:
                    await up.wait()
                    task_status.started()
                    await trio.sleep_forever()
                finally:
                    self._going_down.set()
        finally:
            with trio.CancelScope(shield=True):
                for listener in self._listeners:
                    await listener.aclose()
                await self.aclose()

    async def aclose(self) -> None:
        """Close the files of a node that was opened; `run` does it in the end."""
        await self.replica.aclose()
        await self.ledger.aclose()
        await self._work.aclose()
        await self._database.aclose()

    async def _run_rooms(self, up: trio.Event) -> None:
        """Run the rooms. Cancelling does not reach them before the good-byes are said."""
        async with trio.open_nursery() as nursery:
            nursery.cancel_scope.shield = True
            await nursery.start(self.worker.run)
            await nursery.start(self.tasks.run)
            self.offers.announce()
            await nursery.start(self.replica.run)
            nursery.start_soon(self.electorate.run)
            nursery.start_soon(self.clocks.run)
            await nursery.start(self.inputs.run)
            await nursery.start(self.attempts.run)
            nursery.start_soon(self.dispatcher.run)
            nursery.start_soon(self.durable.run)
            nursery.start_soon(self.following.run)
            await nursery.start(self.peers.run, self._listeners)
            nursery.start_soon(self.gossip.run)
            nursery.start_soon(self._keep_contact)
            if self.discovery is not None:
                nursery.start_soon(self.discovery.run)
            if self.lookup is not None:
                nursery.start_soon(self.lookup.run)
            self.log.info("node is up", node=self.key.node_id, addresses=self.addresses)
            up.set()
            await self._going_down.wait()
            await self.replica.hand_over()
            await self.peers.leave()
            nursery.cancel_scope.cancel()

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others can dial this node: what was configured, else what it listens on."""
        advertised = self.settings.node.advertise
        return advertised or self._listened

    @property
    def _listened(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(a for listener in self._listeners for a in listener.addresses))

    @property
    def dropped(self) -> int:
        """How many connections became no link, since the start."""
        return sum(listener.dropped for listener in self._listeners)

    async def invite(self, role: Role) -> tuple[Ticket, int]:
        """Make a ticket; see `Membership.issue_ticket`."""
        return await self.membership.issue_ticket(role, self.addresses)

    async def join(self, ticket: Ticket, name: str | None) -> Welcome:
        """Join the cell of a ticket; see `Joining.join`."""
        async with self._joining:
            welcome = await self.joining.join(ticket, name or self.settings.node.name, self._contact())
        await self._tell_contact()
        return welcome

    async def rotate(self, *, though_away: bool = False) -> PublicKey:
        """Give this node another key; see `Membership.rotate`. It must be opened again to use it.

        Stopped in between, it has the key that others were told: `settle_keys`.

        Args:
            though_away: also while a member is away. It knows neither key for this node's then, until it
                hears of the change from another member.

        Raises:
            KnodeError: UNAVAILABLE when a member is away; as `Membership.rotate`; DISK_FULL, DISK_READ_ONLY.
        """
        path = self.home.node_key
        async with self._changing_keys:
            away = [p for p in self.peers.members() if p.state is not PeerState.ALIVE]
            if away and not though_away:
                names = ", ".join(self.membership.roster.members[p.key.raw].name for p in away)
                raise KnodeError(
                    Code.UNAVAILABLE,
                    f"{names} would not know this node any more: not here now",
                    "wait until all members are here, or revoke who never comes back; --force leaves it to "
                    "the other members to tell them",
                )
            new = await self.world.blocking.run(lambda: make_next_key(self.world, path))
            await self.membership.rotate(new)
            await self.world.blocking.run(lambda: install_next_key(self.world, path))
        return new.public

    async def revoke(self, member: Member, *, undo_since: int | None = None) -> None:
        """Revoke a member, unless the cell could not go on; see `Membership.revoke`.

        Raises:
            KnodeError: as `Membership.revoke`; UNAVAILABLE, with the way out.
        """
        self.membership.check_may_revoke(member)
        self.electorate.check_revocation(member)
        await self.membership.revoke(member, undo_since=undo_since)

    async def recover(self, recovery: KeyPair, *, lost: Collection[Member], undo_since: int | None) -> None:
        """Make this the owner's node; see `Membership.recover`. Stopped in between, as `rotate`."""
        path = self.home.owner_key
        async with self._changing_keys:
            new = await self.world.blocking.run(lambda: make_next_key(self.world, path))
            await self.membership.recover(recovery, new, lost=lost, undo_since=undo_since)
            await self.world.blocking.run(lambda: install_next_key(self.world, path))

    def _first_command(self, incarnation: Incarnation) -> bytes:
        return encode(Begin(self.ledger.time(), incarnation.number, incarnation.hash))

    async def _raise_level(self, level: int) -> None:
        """Let the ledger take the commands that every replica understands."""
        if level > self.ledger.level:
            command = encode(RaiseLevel(self.ledger.time(), level))
            deadline = Monotonic(self.world.clock.monotonic() + RAISE_S)
            await self.replica.propose(command, deadline=deadline)

    def _load(self) -> Load:
        load = self.places.load
        return Load(load.running, load.queued, load.capacity, self.machine.busy_percent())

    def _is_publisher_trusted(self, publisher: PublicKey) -> bool:
        return self.membership.in_cell and publisher.raw in self.membership.roster.holders

    def _contact(self) -> SignedContact:
        """Sign this node's addresses; later than what it signed before, whatever the clock says."""
        last = self.membership.contacts.get(self.key.public.raw)
        issued = max(self.world.clock.wall(), last.body.issued + 1 if last is not None else 0)
        addresses = fitting(self.addresses, MAX_ADDRESSES)
        return sign_contact(self.key, Contact(self.key.public.raw, addresses, __version__, issued))

    async def _tell_contact(self) -> None:
        """Tell this node's addresses, when they are not those that were told last."""
        if not self.membership.in_cell:
            return
        last = self.membership.contacts.get(self.key.public.raw)
        told = None if last is None else (last.body.key, last.body.addresses, last.body.version)
        if told == (self.key.public.raw, fitting(self.addresses, MAX_ADDRESSES), __version__):
            return
        try:
            self.gossip.push_contacts(await self.membership.add_contacts([self._contact()]))
        except KnodeError as error:  # of the disk: others still find this node as they did
            self.log.warning("addresses not kept", why=str(error))

    async def _keep_contact(self) -> None:
        """Notice when the machine's addresses change."""
        while True:
            await self._tell_contact()
            await trio.sleep(CONTACT_EVERY_S)
