"""This node's part in the consensus of its cell: the shell between the driver of one replica and the mesh.

Every member has a replica. Until the leader's configuration names it, it is silent; and once it is unfit
(`knode.consensus.standing`) or its disk has failed, it takes part no more, while its node goes on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from knode.consensus.backlog import Backlog
from knode.consensus.configuration import gets_log
from knode.consensus.driver import AGAIN_S, Driver, not_leader
from knode.consensus.envelope import (
    REFUSED_TOPIC,
    TOPIC,
    Asked,
    Leading,
    Offer,
    Readable,
    leadings,
    readables,
)
from knode.consensus.holdings import Holdings
from knode.consensus.installation import DISK_TAKES_NOTHING, NO_STATE
from knode.consensus.messages import Configuration, Entry, Index, ReplicaId, Term
from knode.consensus.post import Post, not_taken, unfit
from knode.consensus.raft import Raft
from knode.consensus.settings import Settings
from knode.consensus.standing import Standing
from knode.consensus.state_machine import StateMachine
from knode.consensus.transfer import METHOD as SNAPSHOT_METHOD
from knode.consensus.voters import VOTING_ROLES, member_of
from knode.errors import UNANSWERED, Code, KnodeError
from knode.identity import PublicKey
from knode.mesh.incarnations import Incarnation, Verdict
from knode.mesh.liveness import PeerState
from knode.mesh.membership import Membership
from knode.mesh.methods import Call, Methods
from knode.mesh.peer import Peer
from knode.mesh.peers import Peers
from knode.mesh.roster import Member
from knode.storage import Database
from knode.world import Log, Monotonic, World

HAND_OVER_S = 1.0
ASK_AGAIN_S = 0.2
LOOK_AGAIN_S = 2.0
ANSWER_S = 5.0
_WHY_NOT = {
    Verdict.OVER: (
        "the cell's ledger was begun anew, and this node has not got it yet",
        "'knode status' shows who has: it must be here",
    ),
    Verdict.CONTESTED: (
        "the cell's ledger was begun anew twice, by people who did not know of each other: both stand still",
        "name the one to keep: 'knode member recover --keep LEDGER'; 'knode status' shows them",
    ),
    Verdict.NOT_ACKNOWLEDGED: (
        "this node's ledger was begun anew by a former owner of the cell, and stands still",
        "name it, to go on with it: 'knode member recover --keep LEDGER'; 'knode status' shows it",
    ),
}

OnApplied = Callable[[Sequence[Entry], Sequence[Any]], None]


@dataclass(frozen=True, slots=True)
class _Life:
    """A replica that takes part."""

    standing: Standing
    driver: Driver
    post: Post


class Replica:
    """This node's replica: none before it is in a cell, one after that."""

    def __init__(
        self,
        world: World,
        membership: Membership,
        peers: Peers,
        methods: Methods,
        database: Database,
        state_machine: StateMachine,
        folder: Path,
        log: Log,
        *,
        settings: Settings | None = None,
        first_command: Callable[[Incarnation], bytes] = lambda _: b"",
    ) -> None:
        """Put it together.

        Args:
            folder: for its log, and for states that are on their way.
            settings: of the core.
            first_command: makes the command with which the ledger of an incarnation begins; none if empty.
        """
        self.standing: Standing | None = None
        """What this replica must remember; None outside of a cell."""
        self.stopped: KnodeError | None = None
        """Why it takes no part, though it should; None: it does, or this node is in no cell."""
        self.dropped: Counter[str] = Counter()
        """How many messages were not sent or not taken, by reason."""
        self.on_applied: list[OnApplied] = []
        """Called with each batch that was applied here and its outcomes; must not raise."""
        self.on_leader: list[Callable[[], None]] = []
        """Called whenever this replica begins or ceases to lead; must not raise."""
        self._world = world
        self._membership = membership
        self._peers = peers
        self._database = database
        self._state_machine = state_machine
        self._holdings = Holdings(world, folder, state_machine, first_command)
        self._log = log
        self._settings = settings or Settings()
        self._life: _Life | None = None
        self._told_leader: bytes | None = None
        """Raw id of the member that leads, as another member said."""
        self._scope = trio.CancelScope()
        self._ended_life = trio.Event()
        self._news = trio.Event()
        """Set, and replaced, when there may be something to do for a replica that takes no part."""
        self._considered = trio.Event()
        """Set, and replaced, when it was seen whether this replica may take part."""
        self._suspensions = 0
        self._may_renew = False
        self._stopped_for_now = False
        self._halted = False
        """Until the next start: there is an entry that this version does not know."""
        membership.changed.append(lambda _: self._follow_roster())
        peers.on_event(TOPIC, self._take)
        peers.on_event(REFUSED_TOPIC, self._take_refusal)
        peers.on_lost.append(self._lose)
        methods.add("consensus.read", Asked, self._answer_read)
        methods.add("consensus.leader", Asked, self._answer_leader)
        methods.add(SNAPSHOT_METHOD, Offer, self._answer_snapshot)

    # What the node's rooms ask.

    @property
    def is_leader(self) -> bool:
        """Whether this replica leads, and has applied all that was committed before it did."""
        return self._life is not None and self._life.driver.is_leader

    @property
    def is_named(self) -> bool:
        """Whether the configuration that it knows names this replica: it has, or gets, the ledger.

        Whoever lost its vote with its role while it was cut off does not hear that it is named no more: then
        nobody leads it.
        """
        life = self._life
        if life is None or not gets_log(life.driver.raft.configuration, life.standing.replica_id):
            return False
        own = self._membership.own_if_member
        has_no_vote = own is not None and own.role not in VOTING_ROLES
        return life.driver.raft.leader is not None or not has_no_vote

    @property
    def term(self) -> Term:
        """The latest term that this replica knows; 0 without one."""
        return self._life.driver.raft.term if self._life is not None else 0

    @property
    def applied(self) -> Index:
        """The last index that is applied here."""
        return self._state_machine.applied

    @property
    def dropped_messages(self) -> Counter[str]:
        """How many messages were not sent, not taken, or of no effect, by reason."""
        life = self._life
        if life is None:
            return self.dropped
        mine = {"too many": life.driver.dropped, "contradictory": life.driver.raft.contradictions}
        return self.dropped + Counter(mine)

    @property
    def raft(self) -> Raft | None:
        """The core, to look at; None when this node takes no part."""
        return self._life.driver.raft if self._life is not None else None

    @property
    def trouble(self) -> KnodeError | None:
        """Why it stands still or takes no part; None: it works."""
        return self.stopped or (self._life.driver.trouble if self._life is not None else None)

    def leader(self) -> Member | None:
        """Return who leads: as this replica knows, or while no configuration names it, as others said."""
        life = self._life
        if life is None or not self.is_named:
            leader = self._told_leader
        else:
            leader = life.driver.raft.leader if life.driver.trouble is None else None
        return self._membership.roster.holders.get(member_of(leader)) if leader is not None else None

    async def find_leader(self, *, deadline: Monotonic) -> Member:
        """Return who leads: as this replica knows, or else as another member's does.

        Raises:
            KnodeError: UNAVAILABLE when nobody is known to lead until `deadline`.
        """
        if self.is_named and (known := self.leader()) is not None:
            return known
        with trio.move_on_at(deadline):
            while True:
                if not self.is_named:
                    await self._ask_for_leader()
                leader = self.leader()
                if leader is not None:
                    return leader
                await self.until_leader_changes()
        raise _no_leader()

    async def until_leader_changes(self) -> None:
        """Return when another leads, as far as is known here, or none; or after a moment."""
        with trio.move_on_after(ASK_AGAIN_S):
            if self._life is None or not self.is_named:
                await trio.sleep_forever()
            else:
                await self._life.driver.changed.wait()

    async def propose(self, command: bytes, *, deadline: Monotonic) -> Any:
        """Append a command to the cell's log; return the outcome of its apply here.

        Raises:
            KnodeError: UNAVAILABLE when this is not the leader, or another was elected before it was
                committed: it was not done. RATE_LIMITED, TOO_LARGE: nothing was proposed. TIMEOUT, UNKNOWN:
                it may still be committed.

        Cancelled, it may still be committed.
        """
        driver = self._working().driver
        position, promise = driver.propose(command)
        try:
            with trio.move_on_at(deadline):
                return await promise.value()
        finally:
            driver.forget(position)
        raise KnodeError(
            Code.TIMEOUT, "no quorum in time; it may still be done", "'knode status' shows who is here"
        )

    async def barrier(self, *, deadline: Monotonic) -> None:
        """Return once all that was committed when it was called is applied here (section 6.4).

        Raises:
            KnodeError: UNAVAILABLE when no leader with a quorum is found until `deadline`, or this node has
                no replica that is named; TIMEOUT when this replica does not come up to it until then.
        """
        if not self.is_named:
            raise KnodeError(Code.UNAVAILABLE, "this node does not hold the ledger", "ask another member")
        driver = self._working().driver
        index: Index | None = None
        with trio.move_on_at(deadline):
            while index is None:
                index = await self._readable(deadline)
            await driver.until_applied(index)
            return
        if index is None:
            raise _no_leader()
        raise KnodeError(Code.TIMEOUT, "this node has not caught up in time", "try again")

    def change(self, target: Configuration) -> None:
        """Begin to change who votes and who learns; see `Raft.change`.

        Raises:
            KnodeError: UNAVAILABLE when this is not the leader, or a change is not finished.
        """
        self._working().driver.change(target)

    def transfer(self, to: ReplicaId) -> None:
        """Let another voter lead, if it is here and caught up; UNAVAILABLE when this is not the leader."""
        self._working().driver.transfer(to)

    async def hand_over(self) -> None:
        """Let another lead before this node goes; return when one does, or after a second."""
        life = self._life
        if life is None or not life.driver.is_leader:
            return
        raft = life.driver.raft
        others = {r: s for r, s in raft.progress.items() if r in raft.configuration.voters and s.active}
        best = max(sorted(others), key=lambda replica: others[replica].match, default=None)
        if best is None:
            return
        try:
            life.driver.transfer(best)
        except KnodeError:
            return
        with trio.move_on_after(HAND_OVER_S):
            while raft.leader != best:
                await life.driver.changed.wait()

    # Its life.

    async def open(self) -> None:
        """Read what the disk holds, when this node is in a cell; nothing is said yet.

        Raises:
            KnodeError: HOME_DAMAGED in a cell of one member, which nobody else could bring back;
                HOME_TOO_NEW.
        """
        if not self._membership.in_cell:
            return
        try:
            await self._open()
        except KnodeError as error:
            if error.code not in (*DISK_TAKES_NOTHING, Code.UNAVAILABLE):
                raise
            self._stop_for_now(error)
        standing = self.standing
        if standing is not None and standing.unfit is not None and len(self._membership.roster.members) == 1:
            raise unfit(standing.unfit)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take part until cancelled, as long and as often as this node may.

        It begins when the node is in a cell, stops when it must not count any more, and begins again when it
        has been renewed, or when the cell's owner has said which ledger counts.
        """
        task_status.started()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_asking)
            await self._live_again_and_again()

    async def _live_again_and_again(self) -> None:
        while True:
            news = self._news
            try:
                if self._life is None and self._membership.in_cell:
                    await self._consider()
                if self._life is not None:
                    await self._live(self._life)
                    continue
            except KnodeError as error:
                self._stop_for_now(error)
            with trio.move_on_after(AGAIN_S if self._stopped_for_now else float("inf")):
                await news.wait()

    async def _consider(self) -> None:
        try:
            await self._open()
        finally:
            self._considered.set()
            self._considered = trio.Event()

    async def _live(self, life: _Life) -> None:
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(life.post.run)
                    try:
                        await life.driver.run(life.post.send)
                    except KnodeError as error:
                        await self._stop(life.standing, error)
                    nursery.cancel_scope.cancel()
        finally:
            self.dropped = self.dropped_messages
            self._life = None
            self._ended_life.set()

    @asynccontextmanager
    async def suspended(self) -> AsyncIterator[tuple[Term, Index]]:
        """Take no part inside; gives term and index of the last entry that is durable here.

        Returns once this replica takes part again, or may not any more.

        Raises:
            KnodeError: UNAVAILABLE when this replica takes no part anyway; HOME_DAMAGED and the like.
        """
        standing = self._working().standing
        self._suspensions += 1
        try:
            self._ended_life = trio.Event()
            self._scope.cancel()
            await self._ended_life.wait()
            yield await self._holdings.end(standing)
        finally:
            self._suspensions -= 1
            considered = self._considered
            self._tell_news()
            await considered.wait()

    @property
    def must_be_renewed(self) -> bool:
        """Whether this replica can take part only as another one, which begins with nothing."""
        standing = self.standing
        if standing is None or not self._membership.in_cell:
            return False
        match self._verdict(standing):
            case Verdict.OVER:
                return True
            case Verdict.IN_FORCE | Verdict.SURVIVES:
                return standing.unfit is not None
            case Verdict.CONTESTED | Verdict.NOT_ACKNOWLEDGED:
                return False

    def renew(self) -> None:
        """Let go of log and ledger and begin with nothing, under another id, if this replica must be renewed.

        Whoever asks for it knows that the ledger is held elsewhere.
        """
        if self.must_be_renewed and not self._may_renew:
            self._may_renew = True
            self._tell_news()

    def _verdict(self, standing: Standing) -> Verdict:
        return self._membership.roster.incarnations.judge(standing.incarnation, standing.replica_id)

    def _follow_roster(self) -> None:
        """Stop when another incarnation is in force, or none; see what is to be done when it has changed."""
        if self._life is not None and self._verdict(self._life.standing) is not Verdict.IN_FORCE:
            self._scope.cancel()
        self._tell_news()

    def _tell_news(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def aclose(self) -> None:
        """Close the log of a replica that was opened and never run."""
        life, self._life = self._life, None
        if life is not None:
            with trio.CancelScope(shield=True):
                await life.driver.aclose()

    async def _open(self) -> None:
        """Begin to take part, if this node may; else `stopped` says why not."""
        roster = self._membership.roster
        own = self._membership.own_if_member
        if own is None:
            self.stopped = KnodeError(Code.KEY_REVOKED, "this node is no member of its cell any more")
            return
        present = roster.incarnations.present
        if self.standing is None:
            self.standing = await Standing.open(
                self._world,
                self._database,
                member=own.id.raw,
                key=self._membership.key,
                boot=self._peers.boot,
                incarnation=present,
                founds=roster.is_founder(own) and present.number == 0,
                mark=self._holdings.mark,
            )
        if self._suspensions or self._halted:
            return
        standing = self.standing
        if self._may_renew and self.must_be_renewed:
            await self._holdings.remove()
            await standing.replace(present)
            self._log.info("this node's replica begins anew", replica=standing.replica_id.hex())
        self._may_renew = self._stopped_for_now = False
        verdict = self._verdict(standing)
        if standing.unfit is not None:
            await standing.mark_unfit(standing.unfit)  # again, if the disk did not take it
            self.stopped = unfit(standing.unfit)
        elif verdict in _WHY_NOT:
            self.stopped = KnodeError(Code.UNAVAILABLE, *_WHY_NOT[verdict])
        else:
            await self._try_to_begin(standing, verdict)

    async def _try_to_begin(self, standing: Standing, verdict: Verdict) -> None:
        incarnations = self._membership.roster.incarnations
        try:
            if verdict is Verdict.SURVIVES:
                assert incarnations.begun is not None
                await self._holdings.survive(standing, incarnations.present, incarnations.begun)
            self._life = await self._begin(standing)
        except KnodeError as error:
            if error.code is not Code.HOME_DAMAGED:
                raise
            await self._stop(standing, error)
        else:
            self.stopped = None
            self._scope = trio.CancelScope()
            # The roster may have changed meanwhile.
            self._follow_roster()

    async def _begin(self, standing: Standing) -> _Life:
        journal, installation, recovered = await self._holdings.open(standing)
        applied = self._state_machine.applied
        backlog = Backlog(recovered.snapshot.index)
        backlog.extend(entry for entry in recovered.entries if entry.index <= applied)
        raft = Raft(
            standing.replica_id,
            recovered,
            applied=applied,
            choose=lambda count: min(count - 1, int(self._world.randomness.uniform(0, count))),
            settings=self._settings,
        )
        driver = Driver(
            self._world,
            raft,
            journal,
            self._state_machine,
            backlog,
            installation,
            self._log,
        )
        driver.on_applied.append(self._tell_applied)
        driver.on_leader.append(self._tell_leader)
        post = Post(
            self._world,
            self._membership,
            self._peers,
            standing,
            driver,
            self._holdings.files,
            self._log,
            self.dropped,
        )
        return _Life(standing, driver, post)

    def _stop_for_now(self, error: KnodeError) -> None:
        """Take no part until the disk takes more; it is asked again."""
        if self.stopped is None:
            self._log.error("this node takes no part in the consensus of its cell", why=str(error))
        self.stopped, self._stopped_for_now = error, True

    async def _stop(self, standing: Standing, error: KnodeError) -> None:
        """Take part no more: for good when the disk has lost what this replica promised."""
        self.stopped = error
        self._life = None
        self._log.error("this node takes no part in the consensus of its cell", why=str(error))
        if error.code in NO_STATE:
            return  # what another sent is no state: what is here is as it was, and begins again
        self._halted = error.code is not Code.HOME_DAMAGED
        if self._halted or standing.unfit is not None:
            return
        self.stopped = unfit(error.message)
        try:
            await standing.mark_unfit(error.message)
        except KnodeError as failure:
            self._log.error("that cannot be written down", why=str(failure))

    def _working(self) -> _Life:
        if self._life is None:
            if self.stopped is not None:
                raise KnodeError(Code.UNAVAILABLE, self.stopped.message, self.stopped.next_step)
            _ = self._membership.roster  # says that there is no cell
            raise KnodeError(Code.UNAVAILABLE, "this node is starting or stopping", "try again")
        return self._life

    def _tell_applied(self, entries: Sequence[Entry], outcomes: Sequence[Any]) -> None:
        for tell in self.on_applied:
            tell(entries, outcomes)

    def _tell_leader(self) -> None:
        life = self._life
        assert life is not None
        if life.driver.is_leader:
            self._log.info("this node leads the cell", term=self.term)
        else:
            life.post.stop_sending()
            self._log.info("this node leads the cell no more", term=self.term)
        for tell in self.on_leader:
            tell()

    # What peers say and ask.

    def _take(self, key: PublicKey, body: bytes) -> None:
        if self._life is not None:
            self._life.post.take(key, body)

    def _take_refusal(self, key: PublicKey, body: bytes) -> None:
        if self._life is not None:
            self._life.post.take_refusal(key, body)

    def _lose(self, peer: Peer) -> None:
        if self._life is not None:
            self._life.post.lose(peer)

    async def _answer_read(self, call: Call, asked: Asked) -> Readable:
        life = self._asked(asked)
        return Readable(await life.driver.read().value())

    async def _answer_leader(self, call: Call, asked: Asked) -> Leading:
        self._asked(asked)
        leader = self.leader()
        return Leading(leader.id.raw if leader is not None else b"")

    async def _answer_snapshot(self, call: Call, offer: Offer) -> None:
        await self._working().post.take_state(call, offer)

    def _asked(self, asked: Asked) -> _Life:
        life = self._working()
        if asked.incarnation != life.standing.incarnation.hash:
            raise not_taken()
        return life

    # Whom it asks.

    async def _readable(self, deadline: Monotonic) -> Index | None:
        """Return which index must be applied, or None after a while when nobody can say."""
        life = self._working()
        leader = self.leader()
        try:
            if leader is None:
                raise not_leader()
            if leader.key == self._membership.key.public:
                return await life.driver.read().value()
            asked = Asked(life.standing.incarnation.hash)
            until = Monotonic(min(deadline, self._world.clock.monotonic() + ANSWER_S))
            answer = await self._peers.peer(leader.key).request("consensus.read", asked, deadline=until)
            return readables.decode(answer).index
        except KnodeError as error:
            if error.code not in UNANSWERED | {Code.RATE_LIMITED}:
                raise
        await self.until_leader_changes()
        return None

    async def _keep_asking(self) -> None:
        """Know who leads while no configuration names this replica."""
        while True:
            if self._membership.in_cell and not self.is_named:
                await self._ask_for_leader()
            await trio.sleep(LOOK_AGAIN_S)

    async def _ask_for_leader(self) -> None:
        """Ask the members that are here who leads, one after the other."""
        holders, standing, told = self._membership.roster.holders, self.standing, None
        for peer in self._peers.members():
            if standing is None or peer.state is not PeerState.ALIVE:
                continue
            until = Monotonic(self._world.clock.monotonic() + ANSWER_S)
            try:
                answer = await peer.request(
                    "consensus.leader", Asked(standing.incarnation.hash), deadline=until
                )
                leader = leadings.decode(answer).leader
            except KnodeError as error:
                self._log.debug("a member does not say who leads", peer=peer.node_id, why=str(error))
                continue
            if leader in holders:
                told = leader
                break
        self._told_leader = told


def _no_leader() -> KnodeError:
    why = "no leader is known: more than half of the voters must be here"
    return KnodeError(Code.UNAVAILABLE, why, "'knode status' shows who is")
