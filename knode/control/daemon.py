"""The daemon: one process that runs a home's node and answers on its socket, until told to stop."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from functools import partial

import trio

from knode import __version__
from knode.agents.sandbox.choice import SANDBOXES, Choice, choose_sandbox
from knode.control.methods import ControlMethods
from knode.control.protocol import PROTOCOL
from knode.control.server import serve
from knode.errors import EXIT_OK, Code, KnodeError
from knode.home.configuration import Configuration, DiscoverySettings, load_configuration
from knode.home.folder import open_home
from knode.home.layout import Home
from knode.home.lock import hold_home, make_socket_folder
from knode.home.logging import OpenLog, open_log
from knode.identity import PublicKey
from knode.identity.keystore import load_key
from knode.node.keys import settle_keys
from knode.node.node import Machine, Node
from knode.transport import Carrier
from knode.transport.certificate import make_certificate
from knode.transport.libp2p_address import parse_peer_address
from knode.transport.libp2p_carrier import Libp2pCarrier, Libp2pSettings
from knode.transport.mdns import MulticastDns
from knode.transport.partition import Partition, PartitionedCarrier
from knode.transport.quic import QuicCarrier
from knode.transport.websocket import WebSocketCarrier
from knode.world import World
from knode.world.real import real_world


def run_daemon(home: Home, *, flags: Mapping[str, str], foreground: bool) -> int:
    """Run the node of `home` until SIGTERM, SIGINT or the `stop` method; return the exit code.

    When the node is to be opened anew, with another key, the program runs itself again in this process.

    Raises:
        KnodeError: HOME_MISSING, HOME_TOO_NEW, HOME_DAMAGED, CONFIG_INVALID, LOCKED, PORT_IN_USE,
            DISK_FULL, DISK_READ_ONLY: then nothing runs and nothing was half-written.
    """
    world = real_world()
    open_home(world, home)
    configuration = load_configuration(world, home, os.environ, flags)
    with hold_home(home):
        make_socket_folder(home)
        if not world.disk.exists(home.certificate):
            world.disk.write(home.certificate, make_certificate(world.clock.wall()))
        log = open_log(world, home, configuration.values.log, terminal=sys.stderr if foreground else None)
        try:
            again = trio.run(_serve, world, home, configuration, log, strict_exception_groups=True)
        except BaseExceptionGroup as group:
            error = _first_named(group)
            if isinstance(error, KnodeError):
                log.logger.warning("node cannot go on", code=error.code, why=str(error))
            else:
                log.logger.exception("node failed")
            raise error from group
        except trio.TrioInternalError:  # a task that belongs to no nursery failed
            log.logger.exception("node failed")
            raise
        finally:
            log.close()
    if again:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    return EXIT_OK


async def _serve(world: World, home: Home, configuration: Configuration, log: OpenLog) -> bool:
    """Run the node until it is stopped; return whether it is to be opened anew."""
    settings = configuration.values
    again = False
    async with trio.open_nursery() as nursery:

        def stop() -> None:
            log.logger.info("node goes down")
            nursery.cancel_scope.cancel()

        node_at_work = trio.CancelScope()

        def restart() -> None:
            nonlocal again
            again = True
            log.logger.info("node goes down, to be opened anew")
            node_at_work.cancel()  # the socket stays meanwhile, so that whoever asked for it gets his answer

        # From here on a signal ends even a start in order.
        await nursery.start(_stop_at_signal, stop)
        await settle_keys(world, home)
        choice = await _sandbox(world, home, settings.sandbox.prefer)
        machine = Machine(os.cpu_count() or 1, _busy_percent, choice.sandbox, choice.problems)
        carriers: dict[str, Carrier] = {
            "websocket": WebSocketCarrier(home.certificate, log.logger),
            "quic": QuicCarrier(home.certificate, log.logger),
        }
        libp2p = _libp2p(world, home, settings.discovery, log) if settings.discovery.libp2p else None
        if libp2p is not None:
            carriers["libp2p"] = libp2p
        partition = Partition(settings.testnet.cut_off_from) if settings.testnet.faults else None
        if partition is not None:
            carriers = {name: PartitionedCarrier(each, partition) for name, each in carriers.items()}
        announcer = MulticastDns(world.randomness.token(20).hex()) if settings.discovery.mdns else None
        finder = libp2p if settings.discovery.relays or settings.discovery.bootstrap else None
        node = await Node.open(
            world, home, settings, carriers, machine, log.logger, announcer=announcer, finder=finder
        )
        if libp2p is not None:
            guests = settings.discovery.relay_guests
            libp2p.may_reserve = lambda node_id: (
                node_id in guests or any(peer.node_id == node_id for peer in node.peers.members())
            )
        if partition is not None:
            _tell_owners(partition, node)
            nursery.start_soon(partition.run)

        async def run_node(*, task_status: trio.TaskStatus[None]) -> None:
            with node_at_work:
                await node.run(task_status=task_status)
            nursery.cancel_scope.cancel()

        await nursery.start(run_node)
        await nursery.start(
            partial(
                serve,
                home.socket,
                ControlMethods(node, log.lines, stop, restart, partition).table(),
                hello={"protocol": PROTOCOL, "version": __version__},
                on_fault=lambda method, error: log.logger.error(
                    "a command failed", method=method, exc_info=error
                ),
            )
        )
    return again


def _libp2p(world: World, home: Home, settings: DiscoverySettings, log: OpenLog) -> Libp2pCarrier:
    """Make the carrier of libp2p links, which imports libp2p when the node listens.

    Raises:
        KnodeError: CONFIG_INVALID for a multiaddr that only looks like one; HOME_DAMAGED without a key.
    """
    try:
        relays, bootstrap = (
            [parse_peer_address(text) for text in texts] for texts in (settings.relays, settings.bootstrap)
        )
    except ValueError as error:
        raise KnodeError(
            Code.CONFIG_INVALID, str(error), "correct it with 'knode config set discovery.relays'"
        ) from error
    ours = Libp2pSettings(settings.libp2p_port, relays, bootstrap, offers_relay=settings.relay_server)
    return Libp2pCarrier(world, load_key(world, home.node_key), log.logger, ours)


def _tell_owners(partition: Partition, node: Node) -> None:
    """Let a partition know whose a link is: by the address that was dialled, and by the handshake."""

    def owner_of(address: str) -> str | None:
        contacts = node.membership.contacts.values()
        keys = (contact.body.key for contact in contacts if address in contact.body.addresses)
        return next((PublicKey(key).node_id for key in keys), None)

    partition.owner_of = owner_of
    node.peers.on_conversation.append(
        lambda peer, conversation: partition.claim(conversation.link, peer.node_id)
    )


async def _stop_at_signal(
    stop: Callable[[], None], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for _ in signals:
            stop()


async def _sandbox(world: World, home: Home, prefer: str) -> Choice:
    names = {"auto": tuple(SANDBOXES), "none": ()}.get(prefer, (prefer,))
    if not names:
        return Choice(None, ("sandbox.prefer is none",))
    return await choose_sandbox(world, home.run / "sandbox-probe", names)


def _busy_percent() -> int:
    return min(100, round(100 * os.getloadavg()[0] / (os.cpu_count() or 1)))


def _first_named(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the error of the table that ended the daemon, or the whole group: a fault of its own."""
    named, rest = group.split(KnodeError)
    if named is None or rest is not None:
        return group
    error: BaseException = named
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
