"""Doing what a scenario says goes wrong, again and again, each time at a drawn moment."""

from __future__ import annotations

from typing import assert_never

import trio

from knode.consensus.electorate import Votes
from knode.errors import KnodeError
from knode.mesh.statements import Role
from knode.simulation.cell import Cell
from knode.simulation.clients import lay_out_files
from knode.simulation.host import Host
from knode.simulation.image import image_of
from knode.simulation.scenario import (
    BitFlip,
    ClockJump,
    Cut,
    FailedSync,
    Fault,
    Flapping,
    FullDisk,
    Hunt,
    Kill,
    LostMajority,
    Newcomer,
    OldCopy,
    OneWayCut,
    Partition,
    PowerCut,
    Revocation,
    RoleChange,
    Rolling,
    Sleep,
    SlowDisk,
    Stop,
)
from knode.simulation.schedule import running_on
from knode.simulation.world import SimulatedRandomness

DISK_EVENTS = 12
"""A power cut strikes ahead of one of the disk's next twelve writes, when they come soon enough."""
DISK_EVENT_WITHIN_S = 1.0


async def inflict(fault: Fault, cell: Cell, randomness: SimulatedRandomness) -> None:
    """Let `fault` happen again and again until cancelled; then it is undone."""
    while True:
        await trio.sleep(randomness.uniform(*fault.every_s))
        await _once(fault, cell, randomness)


async def _once(fault: Fault, cell: Cell, randomness: SimulatedRandomness) -> None:
    match fault:
        case Kill() | PowerCut() | Stop():
            free = _free(cell)
            if free:
                await _take_down(_choose(free, randomness), fault, cell, randomness)
        case Partition():
            await _split(fault, cell, randomness)
        case Cut() | OneWayCut() | Flapping():
            if len(cell.hosts) > 1:
                await _part(fault, cell, randomness)
        case Sleep():
            await _sleep(fault, cell, randomness)
        case ClockJump():
            host = _choose(cell.hosts, randomness)
            jump_s = randomness.uniform(*fault.by_s)
            host.clock.skew_s += jump_s
            try:
                await trio.sleep(randomness.uniform(*fault.lasts_s))
            finally:
                host.clock.skew_s -= jump_s
        case FullDisk():
            await _fill_disk(fault, cell, randomness)
        case BitFlip():
            host = _choose(_some(cell, fault.machines), randomness)
            cell.trace.note(host.name, "a bit flips", file=host.disk.flip(randomness, fault.files))
        case FailedSync():
            await _fail_sync(fault, cell, randomness)
        case SlowDisk():
            await _slow_down(fault, cell, randomness)
        case OldCopy():
            await _put_back(fault, cell, randomness)
        case RoleChange():
            host = _choose(cell.hosts[1:] or cell.hosts, randomness)
            await _give_role(cell, host, Role.OBSERVER)
            await trio.sleep(randomness.uniform(*fault.lasts_s))
            await _give_role(cell, host, Role.WORKER)
        case Revocation():
            await _revoke(cell, randomness)
        case Rolling():
            for host in list(cell.hosts):
                await _take_down(host, fault, cell, randomness)
                await trio.sleep(randomness.uniform(*fault.between_s))
        case Hunt():
            await _hunt(fault, cell, randomness)
        case Newcomer():
            if cell.newcomers < fault.most:
                with trio.CancelScope(shield=True):
                    await cell.add_newcomer()
                    lay_out_files(cell.hosts[-1:])
        case LostMajority():
            await _lose_majority(fault, cell, randomness)
        case _:
            assert_never(fault)


async def _take_down(
    host: Host, fault: Kill | PowerCut | Stop | Rolling | Hunt, cell: Cell, randomness: SimulatedRandomness
) -> None:
    free = _free(cell)
    if host not in free or len(free) < 2:
        return  # someone stays, so that there is someone to promise anything to
    host.is_in_trouble = True
    try:
        match fault:
            case Kill() | Hunt():
                cell.kill(host)
            case Stop() | Rolling():
                await cell.stop(host)
            case PowerCut():
                await _cut_power(cell, host, randomness)
        await trio.sleep(randomness.uniform(*fault.lasts_s))
    finally:
        with trio.CancelScope(shield=True):
            await host.until_ended()
            if isinstance(fault, PowerCut):
                cell.restore_power(host)
            await cell.start(host)
            host.is_in_trouble = False


async def _hunt(fault: Hunt, cell: Cell, randomness: SimulatedRandomness) -> None:
    leading = [host for host, node in cell.nodes() if node.replica.is_leader and not host.is_in_trouble]
    if not leading:
        return
    host = _choose(leading, randomness)
    if randomness.happens(0.5):
        await _take_down(host, fault, cell, randomness)
    else:
        pairs = [(host, other) for other in cell.hosts if other is not host]
        await _cut_all(fault, cell, pairs, randomness)


async def _lose_majority(fault: LostMajority, cell: Cell, randomness: SimulatedRandomness) -> None:
    owner = cell.hosts[0]
    if owner.node is None or owner.is_in_trouble or not owner.node.replica.is_named:
        return
    voting = [
        host
        for host, _ in cell.nodes()
        if host is not owner
        and not host.is_in_trouble
        and owner.node.electorate.votes(owner.node.membership.roster.find(host.name)) is Votes.VOTER
    ]
    raft = owner.node.replica.raft
    if raft is None or 2 * len(voting) <= len(raft.configuration.voters):
        return
    lost: list[Host] = []
    while 2 * len(lost) <= len(raft.configuration.voters):
        lost.append(voting.pop(randomness.choose(len(voting))))
    for host in lost:
        host.is_in_trouble = True
        cell.kill(host)
    try:
        with trio.move_on_after(randomness.uniform(*fault.lasts_s)):
            is_recovered = False
            while True:
                await trio.sleep(1)
                is_recovered = is_recovered or await _begin_ledger_anew(cell, owner)
    finally:
        with trio.CancelScope(shield=True):
            for host in lost:
                await cell.start(host)
                host.is_in_trouble = False


async def _begin_ledger_anew(cell: Cell, host: Host) -> bool:
    """Do what `member recover --lost-majority --force` does; it is refused until the lost are known dead."""
    node = host.node
    if node is None:
        return False
    with running_on(host.name), trio.CancelScope(shield=True):
        try:
            survived = await image_of(node)
            begun = await node.recovery.begin(though_others_have_more=True)
        except (KnodeError, trio.ClosedResourceError) as error:
            cell.trace.note(host.name, "not recovered", why=repr(error))
            return False
    cell.trace.note(host.name, "is recovered", incarnation=begun.number)
    for tell in cell.on_recovered:
        tell(survived)
    return True


async def _sleep(fault: Sleep, cell: Cell, randomness: SimulatedRandomness) -> None:
    free = _free(cell)
    if len(free) < 2:
        return
    host = _choose(free, randomness)
    host.is_in_trouble = True
    cell.put_to_sleep(host)
    try:
        await trio.sleep(randomness.uniform(*fault.lasts_s))
    finally:
        cell.wake(host)
        host.is_in_trouble = False


async def _cut_power(cell: Cell, host: Host, randomness: SimulatedRandomness) -> None:
    """Cut the power in the midst of the disk's work, or after a second without any."""
    struck = trio.Event()

    def strike() -> None:
        if not struck.is_set() and host.node is not None:
            cell.cut_power(host)
        struck.set()

    host.strike_at(randomness.choose(DISK_EVENTS), strike)
    with trio.CancelScope(shield=True):
        with trio.move_on_after(DISK_EVENT_WITHIN_S):
            await struck.wait()
        strike()


async def _fill_disk(fault: FullDisk, cell: Cell, randomness: SimulatedRandomness) -> None:
    free = _free(cell)
    if not free:
        return
    host = _choose(free, randomness)
    host.is_in_trouble = True
    host.disk.fill()
    try:
        await trio.sleep(randomness.uniform(*fault.lasts_s))
    finally:
        host.disk.free()
        host.is_in_trouble = False


async def _fail_sync(fault: FailedSync, cell: Cell, randomness: SimulatedRandomness) -> None:
    disk = _choose(_some(cell, fault.machines), randomness).disk
    disk.fail_sync(fault.files)
    try:
        await trio.sleep(randomness.uniform(*fault.lasts_s))
    finally:
        disk.mend_sync()


async def _slow_down(fault: SlowDisk, cell: Cell, randomness: SimulatedRandomness) -> None:
    usual = [host for host in cell.hosts if not host.is_slow]
    if not usual:
        return
    host = _choose(usual, randomness)
    host.slow_down(fault.work_ms)
    try:
        await trio.sleep(randomness.uniform(*fault.lasts_s))
    finally:
        host.speed_up()


async def _put_back(fault: OldCopy, cell: Cell, randomness: SimulatedRandomness) -> None:
    host = _choose(_some(cell, fault.machines), randomness)
    if host.is_in_trouble or host not in [each for each, _ in cell.nodes()]:
        return
    copy = host.disk.snapshot()
    host.is_in_trouble = True
    try:
        # Started once more since it was copied: that is what the others notice (docs/guides/lost-voters.md).
        cell.kill(host)
        with trio.CancelScope(shield=True):
            await cell.start(host)
        await trio.sleep(randomness.uniform(*fault.age_s))
        cell.restore(host, copy)
        await trio.sleep(randomness.uniform(*fault.lasts_s))
    finally:
        with trio.CancelScope(shield=True):
            if host.node is None:
                await cell.start(host)
            host.is_in_trouble = False


async def _give_role(cell: Cell, host: Host, role: Role) -> None:
    """Let the owner, if its node is up, give a member another role."""
    owner = cell.hosts[0].node
    if owner is not None and host is not cell.hosts[0]:
        try:
            with running_on(cell.hosts[0].name):
                await owner.membership.set_role(owner.membership.roster.find(host.name), role)
        except (KnodeError, trio.ClosedResourceError) as error:
            cell.trace.note(host.name, "role not changed", why=repr(error))


async def _revoke(cell: Cell, randomness: SimulatedRandomness) -> None:
    owner = cell.hosts[0].node
    members = [host for host in cell.hosts[1:] if not cell.is_revoked(host)]
    if owner is not None and len(members) > 1:
        host = _choose(members, randomness)
        try:
            with running_on(cell.hosts[0].name):
                member = owner.membership.roster.find(host.name)
                owner.electorate.check_revocation(member)
                await owner.membership.revoke(member)
            # An owner that died meanwhile has told nobody that it is done.
            host.is_revoked = cell.hosts[0].node is owner
            cell.trace.note(host.name, "is revoked", acknowledged=host.is_revoked)
        except (KnodeError, trio.ClosedResourceError) as error:
            cell.trace.note(host.name, "not revoked", why=repr(error))


async def _split(fault: Partition, cell: Cell, randomness: SimulatedRandomness) -> None:
    side = {host.name: randomness.happens(0.5) for host in cell.hosts}
    pairs = [(a, b) for a in cell.hosts for b in cell.hosts if side[a.name] and not side[b.name]]
    await _cut_all(fault, cell, pairs, randomness)


async def _part(fault: Cut | OneWayCut | Flapping, cell: Cell, randomness: SimulatedRandomness) -> None:
    one = _choose(cell.hosts, randomness)
    other = _choose([host for host in cell.hosts if host is not one], randomness)
    match fault:
        case Cut():
            await _cut_all(fault, cell, [(one, other)], randomness)
        case OneWayCut():
            cell.cut_way(one, other)
            try:
                await trio.sleep(randomness.uniform(*fault.lasts_s))
            finally:
                cell.heal_way(one, other)
        case Flapping():
            with trio.move_on_after(randomness.uniform(*fault.lasts_s)):
                while True:
                    cell.cut(one, other)
                    try:
                        await trio.sleep(randomness.uniform(*fault.gone_s))
                    finally:
                        cell.heal(one, other)
                    await trio.sleep(randomness.uniform(*fault.here_s))


async def _cut_all(
    fault: Partition | Cut | Hunt, cell: Cell, pairs: list[tuple[Host, Host]], randomness: SimulatedRandomness
) -> None:
    for a, b in pairs:
        cell.cut(a, b)
    try:
        await trio.sleep(randomness.uniform(*fault.lasts_s))
    finally:
        for a, b in pairs:
            cell.heal(a, b)


def _free(cell: Cell) -> list[Host]:
    """Return the machines whose nodes are up and that no fault has taken."""
    return [host for host, _ in cell.nodes() if not host.is_in_trouble]


def _some(cell: Cell, machines: int | None) -> list[Host]:
    """Return the machines of which one may be damaged: never most of them."""
    if machines is None:
        return cell.hosts
    minority = max(1, (len(cell.hosts) - 1) // 2)
    return cell.hosts[-min(machines, minority) :]


def _choose(hosts: list[Host], randomness: SimulatedRandomness) -> Host:
    return hosts[randomness.choose(len(hosts))]
