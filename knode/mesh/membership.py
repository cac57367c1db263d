"""The roster and the members' contacts on disk, and every change to them.

Each change is durable before it is told to anyone. Nothing here touches a link.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import apsw
import trio

from knode.errors import Code, KnodeError
from knode.identity import KeyPair, PublicKey
from knode.klp.handshake import Established, Hello
from knode.mesh.contact import SignedContact, open_contact
from knode.mesh.incarnations import Incarnation
from knode.mesh.invitations import SCHEMA as TICKET_SCHEMA
from knode.mesh.invitations import Invitations
from knode.mesh.roster import MAX_STATEMENTS, Member, Roster, resolve
from knode.mesh.rotations import MAX_ROTATIONS
from knode.mesh.statements import (
    MAX_RECOVERED_MEMBERS,
    MAX_RECOVERED_REVOKED,
    Add,
    BeginIncarnation,
    Genesis,
    KeepIncarnation,
    Known,
    Recover,
    Revoke,
    Role,
    SetRole,
    SignedStatement,
    open_statement,
    sign_rotation,
    sign_statement,
)
from knode.mesh.ticket import MAX_ADDRESSES, SECRET_BYTES, VERSION, Ticket
from knode.mesh.ways import fitting
from knode.storage import Database
from knode.world import World

MAX_STATEMENTS_OF_OTHERS = 3072
"""Of all but the owner and the recovery key, who always have room for the last word."""
ASK_OWNER = "run it on the owner's node: where 'knode init' or, later, 'knode member recover' was run"

_TABLES = (
    """
CREATE TABLE cell (id BLOB NOT NULL);
CREATE TABLE statement (id BLOB PRIMARY KEY, data BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE contact (key BLOB PRIMARY KEY, issued INTEGER NOT NULL, data BLOB NOT NULL) WITHOUT ROWID;
"""
    + TICKET_SCHEMA
)
_SEEN = """
-- Wall time in milliseconds at which this node first heard of it; nobody can backdate that. 0: not known.
ALTER TABLE statement ADD COLUMN seen INTEGER NOT NULL DEFAULT 0;
"""
MIGRATIONS = (_TABLES, _SEEN)


async def stored_statements(database: Database) -> list[SignedStatement]:
    """Return the statements that a node has made durable."""

    def read(connection: apsw.Connection) -> list[Any]:
        return connection.execute("SELECT data FROM statement ORDER BY id").fetchall()

    return [open_statement(data) for [data] in await database.read(read)]


async def stored_members(database: Database) -> int:
    """Return how many members the cell has, as far as a node has made it durable; 0 outside of a cell."""

    def read(connection: apsw.Connection) -> list[Any]:
        return connection.execute("SELECT id FROM cell").fetchall()

    cells = await database.read(read)
    return len(resolve(cells[0][0], await stored_statements(database)).members) if cells else 0


class Membership:
    """What this node knows of its cell. One writer: the node's own tasks."""

    def __init__(self, world: World, database: Database, key: KeyPair, owner_key: KeyPair | None) -> None:
        self.key = key
        self.invitations = Invitations(world.clock, database)
        self.contacts: Mapping[bytes, SignedContact] = {}
        """Where each member can be reached, by its raw key."""
        self.changed: list[Callable[[list[SignedStatement]], None]] = []
        """Called with the statements that are new, once a change of the roster is durable; must not raise."""
        self._owner_key = owner_key
        self._world = world
        self._database = database
        self._roster: Roster | None = None
        self._seen: dict[bytes, int] = {}
        self._change = trio.Lock()
        self._next_change = trio.Event()

    async def load(self) -> None:
        """Read what is on disk; statements are verified again, as anything that arrives."""

        def read(connection: apsw.Connection) -> tuple[list[Any], ...]:
            queries = (
                "SELECT id FROM cell",
                "SELECT data, seen FROM statement ORDER BY id",
                "SELECT data FROM contact ORDER BY key",
            )
            return tuple(connection.execute(query).fetchall() for query in queries)

        cells, statements, contacts = await self._database.read(read)
        for [cell_id] in cells:
            opened = [(open_statement(data), seen) for data, seen in statements]
            self._roster = resolve(cell_id, [statement for statement, _ in opened])
            self._seen = {statement.id: seen for statement, seen in opened}
            self.contacts = _newest([open_contact(data) for [data] in contacts], self._roster, {})
        await self.invitations.load()

    @property
    def in_cell(self) -> bool:
        """Whether this node belongs to a cell."""
        return self._roster is not None

    @property
    def roster(self) -> Roster:
        """The roster now.

        Raises:
            KnodeError: UNAVAILABLE when this node belongs to no cell yet.
        """
        if self._roster is None:
            raise KnodeError(
                Code.UNAVAILABLE, "this node belongs to no cell yet", "join one: 'knode join TICKET'"
            )
        return self._roster

    @property
    def own(self) -> Member:
        """This node, as a member; KEY_REVOKED or UNKNOWN_PEER when it is none (any more)."""
        return self.roster.admit(self.key.public.raw)

    @property
    def own_if_member(self) -> Member | None:
        """This node, as a member; None when it is none (any more)."""
        return self.roster.holders.get(self.key.public.raw)

    async def found(self, *, recovery: PublicKey, name: str) -> None:
        """Found a cell with this node as its first member, an admin."""
        if self._owner_key is None or self.in_cell:
            raise KnodeError(Code.HOME_EXISTS, "this node belongs to a cell already")
        owner, now = self._owner_key, self._world.clock.wall()
        genesis = sign_statement(
            owner, Genesis(owner.public.raw, recovery.raw, self._world.randomness.token(16), now)
        )
        add = Add(owner.public.raw, genesis.id, self.key.public.raw, name, Role.ADMIN, now)
        await self.adopt(genesis.id, [genesis, sign_statement(owner, add)])

    async def adopt(
        self, cell_id: bytes, statements: Iterable[SignedStatement], contacts: Iterable[SignedContact] = ()
    ) -> None:
        """Belong to this cell from now on.

        Args:
            cell_id: id of its genesis.
            statements: its roster as far as it is known; it must name this node a member.
            contacts: where other members can be reached.

        Raises:
            KnodeError: HOME_EXISTS when this node belongs to a cell already, WRONG_NETWORK, UNKNOWN_PEER
                or KEY_REVOKED when the statements make it no member; then nothing has changed.
        """
        roster = resolve(cell_id, statements)
        roster.admit(self.key.public.raw)
        async with self._change:
            if self.in_cell:
                raise KnodeError(Code.HOME_EXISTS, "this node belongs to a cell already")
            known = _newest(contacts, roster, {})

            def write(connection: apsw.Connection) -> None:
                connection.execute("INSERT INTO cell VALUES (?)", (cell_id,))

            await self._become(roster, known, write)

    async def add(self, statements: Iterable[SignedStatement]) -> list[SignedStatement]:
        """Merge statements into the roster; return those that were new and count.

        Raises:
            KnodeError: RATE_LIMITED when the roster would hold too many, UNAVAILABLE without a cell,
                DISK_FULL, DISK_READ_ONLY; then nothing has changed.
        """
        async with self._change:
            return await self._merge(statements)

    async def add_contacts(self, contacts: Iterable[SignedContact]) -> list[SignedContact]:
        """Keep the contacts of members that are newer than ours; return those."""
        async with self._change:
            newer = _newest(contacts, self.roster, self.contacts)
            if newer:
                before, after = self.contacts, {**self.contacts, **newer}
                await self._database.write(lambda connection: _keep_contacts(connection, before, after))
                self.contacts = after
        return list(newer.values())

    async def issue_ticket(self, role: Role, addresses: tuple[str, ...]) -> tuple[Ticket, int]:
        """Make a one-use ticket; return it and when it expires (wall time, milliseconds).

        Raises:
            KnodeError: NOT_ALLOWED when this node may not invite, UNAVAILABLE without address, RATE_LIMITED.
        """
        self._signer("invite", role)
        if not addresses:
            raise KnodeError(
                Code.UNAVAILABLE, "this node has no address that others could dial", "set node.advertise"
            )
        ticket = Ticket(
            VERSION,
            self.key.public.raw,
            self.roster.cell_id,
            self._world.randomness.token(SECRET_BYTES),
            fitting(addresses, MAX_ADDRESSES),
        )
        return ticket, await self.invitations.keep(ticket.key.public.raw, role)

    async def redeem(self, public_key: bytes, joiner: PublicKey, name: str, words: tuple[str, ...]) -> Member:
        """Use a ticket: the joiner becomes a member, in the same transaction.

        A node that is a member already, since its join was cut off, stays what it is.

        Raises:
            KnodeError: as `Invitations.check`; KEY_REVOKED; NOT_ALLOWED when this node may not invite any
                more; RATE_LIMITED when it has signed as many statements as an admin may.
        """
        async with self._change:
            invitation, roster = self.invitations.check(public_key, joiner.raw), self.roster
            used = replace(invitation, used_by=joiner.raw, words=words)

            def write(connection: apsw.Connection) -> None:
                self.invitations.write_used(connection, public_key, used)

            if joiner.raw in roster.revoked or joiner.raw in roster.replaced:
                raise KnodeError(Code.KEY_REVOKED, "this node was revoked", "make a new home on that machine")
            if joiner.raw in roster.members:
                await self._database.write(write)
            else:
                add = self._sign_add(joiner.raw, name, invitation.role)
                after = resolve(roster.cell_id, [*roster.statements.values(), add])
                if add.id not in after.statements:
                    raise KnodeError(
                        Code.RATE_LIMITED, "this admin has signed too many statements", "invite from another"
                    )
                await self._become(after, self.contacts, write)
            self.invitations.note_used(public_key, used)
        return self.roster.admit(joiner.raw)

    def next_change(self) -> trio.Event:
        """Return an event that is set with the next change of the roster."""
        return self._next_change

    async def set_role(self, member: Member, role: Role) -> Member:
        """Give a member another role.

        Raises:
            KnodeError: NOT_ALLOWED when this node may not.
        """
        async with self._change:
            signer, roster = self._signer("change a role", role), self.roster
            if member.role is Role.ADMIN and signer.public != roster.owner:
                raise KnodeError(Code.NOT_ALLOWED, "only the owner changes an admin's role", ASK_OWNER)
            body = SetRole(
                signer.public.raw,
                roster.era,
                member.id.raw,
                role,
                roster.in_force_by(member),
                self._issued(member),
            )
            await self._merge([sign_statement(signer, body)])
            return self.roster.admit(member.key.raw)

    async def revoke(self, member: Member, *, undo_since: int | None = None) -> None:
        """Revoke a member for ever.

        Args:
            member: a contested one too.
            undo_since: wall time in milliseconds; of what the member signed as an admin, only what was in
                force here then stays valid. None: what is in force now.

        Raises:
            KnodeError: NOT_ALLOWED without the owner's key, or for this node itself; INVALID_ARGUMENT when
                this node was no member at `undo_since`.
        """
        async with self._change:
            owner, roster = self.check_may_revoke(member), self.roster
            kept = self._roster_at(undo_since).in_force_by(member)
            body = Revoke(owner.public.raw, roster.era, member.id.raw, kept, self._issued(member))
            await self._merge([sign_statement(owner, body)])

    def check_may_revoke(self, member: Member) -> KeyPair:
        """Return the owner's key, if this node may revoke a member.

        Raises:
            KnodeError: NOT_ALLOWED.
        """
        owner = self._present_owner_key
        if owner is None:
            raise KnodeError(Code.NOT_ALLOWED, "only the cell's owner revokes members", ASK_OWNER)
        if self.key.public in member.keys:
            raise KnodeError(
                Code.NOT_ALLOWED,
                "the owner's own node cannot revoke itself",
                "'knode member list' shows the others; for a stolen owner key: 'knode member recover'",
            )
        return owner

    async def rotate(self, new: KeyPair) -> None:
        """Say that this node has the key `new` from now on: who hears of it closes its sessions.

        This object keeps the present key; the node must be opened again with the other.

        Raises:
            KnodeError: KEY_REVOKED or UNKNOWN_PEER when this node is no member, RATE_LIMITED when it has
                rotated too often.
        """
        async with self._change:
            own, roster = self.own, self.roster
            if len(own.keys) > MAX_ROTATIONS:
                raise KnodeError(
                    Code.RATE_LIMITED,
                    f"a member changes its key at most {MAX_ROTATIONS} times",
                    "let the owner revoke this node, and join with a new home",
                )
            kept, issued = roster.in_force_by(own), self._issued(own)
            await self._merge(
                [sign_rotation(self.key, new, era=roster.era, member=own.id.raw, kept=kept, issued=issued)]
            )

    async def recover(
        self,
        recovery: KeyPair,
        owner: KeyPair,
        *,
        lost: Collection[Member] = (),
        undo_since: int | None = None,
    ) -> None:
        """Begin an era, in which `owner` owns the cell in place of whoever did.

        Args:
            recovery: the cell's recovery key.
            owner: a key that was made for this, and that this node holds from now on.
            lost: members that are revoked in the same step, for ever.
            undo_since: wall time in milliseconds; the era begins with the members and revoked keys of
                then, as this node knew them. None: with those of now.

        Raises:
            KnodeError: NOT_ALLOWED for another recovery key, or when this node is among `lost`;
                INVALID_ARGUMENT when this node was no member at `undo_since`; RATE_LIMITED when the cell
                has more members or revoked keys than an era can begin with; or as `add`.
        """
        async with self._change:
            own, roster = self.own, self.roster
            self._check_recovery(recovery)
            if own in lost:
                raise KnodeError(
                    Code.NOT_ALLOWED,
                    "the node on which the cell is recovered stays in it",
                    "run it on another member",
                )
            era = sign_statement(recovery, self._recovered(owner.public, lost, self._roster_at(undo_since)))
            # An era that somebody begins elsewhere, not knowing of this one, must not bring them back.
            revokes = [Revoke(recovery.public.raw, era.id, m.id.raw, (), self._issued(m)) for m in lost]
            last = [era, *(sign_statement(recovery, body) for body in revokes)]
            if roster.incarnations.begun is not None:
                # The new era takes no earlier owner's word for which ledger counts.
                last.append(self._keeping(recovery, era.id, roster.incarnations.present.hash))
            await self._merge(last)
            self._owner_key = owner

    async def begin_incarnation(
        self,
        replica: bytes,
        index: int,
        term: int,
        *,
        recovery: KeyPair | None = None,
        lost: Collection[Member] = (),
    ) -> Incarnation:
        """Say that the cell's ledger begins anew with what one replica has; the rest is void.

        Args:
            replica: the survivor, 40 bytes.
            index: of the last entry that it has.
            term: of that entry.
            recovery: the cell's recovery key; None: the owner's key, which this node must hold.
            lost: members that are revoked in the same step, for ever.

        Raises:
            KnodeError: NOT_ALLOWED without either key, or when this node is among `lost`; UNAVAILABLE while
                two incarnations stand against each other; or as `add`.
        """
        async with self._change:
            signer, roster = self._last_word("begin its ledger anew", recovery), self.roster
            if self.own in lost:
                raise KnodeError(
                    Code.NOT_ALLOWED, "this node cannot revoke itself", "run it on another member"
                )
            if roster.incarnations.rivals:
                raise KnodeError(
                    Code.UNAVAILABLE,
                    "two ledgers stand against each other already",
                    "name the one to keep: 'knode member recover --keep LEDGER'; 'knode status' shows them",
                )
            present = roster.incarnations.present
            body = BeginIncarnation(
                signer.public.raw,
                roster.era,
                present.number + 1,
                present.hash,
                replica,
                index,
                term,
                roster.next_incarnation_time(self._world.clock.wall()),
            )
            revokes = [
                Revoke(signer.public.raw, roster.era, m.id.raw, roster.in_force_by(m), self._issued(m))
                for m in lost
            ]
            begun = sign_statement(signer, body)
            await self._merge([begun, *(sign_statement(signer, each) for each in revokes)])
            return Incarnation(body.number, begun.id)

    async def keep_incarnation(self, incarnation: bytes, *, recovery: KeyPair | None = None) -> None:
        """Say which of several incarnations counts.

        Args:
            incarnation: its hash; one that this node has heard of.
            recovery: as `begin_incarnation`.

        Raises:
            KnodeError: NOT_ALLOWED without either key, NOT_FOUND; or as `add`.
        """
        async with self._change:
            signer = self._last_word("say which ledger it keeps", recovery)
            if incarnation not in self.roster.incarnations.known:
                raise KnodeError(Code.NOT_FOUND, "no such ledger is known here", "'knode status' shows them")
            await self._merge([self._keeping(signer, self.roster.era, incarnation)])

    def _keeping(self, signer: KeyPair, era: bytes, incarnation: bytes) -> SignedStatement:
        issued = self.roster.next_incarnation_time(self._world.clock.wall())
        return sign_statement(signer, KeepIncarnation(signer.public.raw, era, incarnation, issued))

    def _last_word(self, what: str, recovery: KeyPair | None) -> KeyPair:
        """Return the recovery key that was given, or else the owner's, if it is the cell's."""
        if recovery is not None:
            self._check_recovery(recovery)
            return recovery
        if self._present_owner_key is None:
            raise KnodeError(
                Code.NOT_ALLOWED,
                f"only the cell's owner may {what}",
                f"{ASK_OWNER}; or give the recovery key",
            )
        return self._present_owner_key

    def _check_recovery(self, recovery: KeyPair) -> None:
        if recovery.public != self.roster.recovery:
            raise KnodeError(
                Code.NOT_ALLOWED,
                "this is not the recovery key of this cell",
                "give the one that 'knode init' showed when the cell was founded",
            )

    def check_last_word(self, recovery: KeyPair | None) -> None:
        """Check that this node may begin an incarnation, with this recovery key or, None, the owner's key.

        Raises:
            KnodeError: NOT_ALLOWED.
        """
        self._last_word("begin its ledger anew", recovery)

    @property
    def owns_cell(self) -> bool:
        """Whether this node holds the owner's key."""
        return self._present_owner_key is not None

    def _recovered(self, owner: PublicKey, lost: Collection[Member], then: Roster) -> Recover:
        members = [m for m in then.members.values() if m.id not in {gone.id for gone in lost}]
        gone = {key.raw for m in (*lost, *then.contested.values()) for key in m.keys}
        revoked = tuple(sorted({*then.revoked, *gone}))
        if len(members) > MAX_RECOVERED_MEMBERS or len(revoked) > MAX_RECOVERED_REVOKED:
            raise KnodeError(
                Code.RATE_LIMITED,
                f"an era begins with at most {MAX_RECOVERED_MEMBERS} members and "
                f"{MAX_RECOVERED_REVOKED} revoked keys",
                "found a new cell: 'knode init'",
            )
        return Recover(
            self.roster.recovery.raw,
            self.roster.cell_id,
            owner.raw,
            tuple(Known(m.id.raw, m.name, m.role, m.joined) for m in members),
            revoked,
            self.roster.next_era_time(self._world.clock.wall()),
        )

    def _roster_at(self, moment: int | None) -> Roster:
        """Return the roster as this node knew it at a wall time in milliseconds; None: now."""
        roster = self.roster
        if moment is None:
            return roster
        heard = {i: s for i, s in roster.statements.items() if self._seen[i] < moment}
        if roster.cell_id in heard:
            then = resolve(roster.cell_id, heard.values())
            if self.own.id in {member.id for member in then.members.values()}:
                return then
        raise KnodeError(
            Code.INVALID_ARGUMENT,
            "this node was no member of the cell at that time",
            "give a later time, or run it on a node that has been a member for longer",
        )

    def _issued(self, member: Member) -> int:
        return self.roster.next_issue_time(member.id.raw, self._world.clock.wall())

    def admit(self, peer: Hello | Established) -> None:
        """Check that whoever holds this key may speak at all: the gate before any signature.

        A member may; so may a node with a living ticket, to join and for nothing else.

        Raises:
            KnodeError: UNKNOWN_PEER, KEY_REVOKED, TICKET_INVALID, TICKET_USED or TICKET_EXPIRED.
        """
        raw_key = peer.key if isinstance(peer, Hello) else peer.peer.raw
        if peer.ticket:
            self.invitations.check(peer.ticket, raw_key)
        else:
            self.roster.admit(raw_key)

    async def _merge(self, statements: Iterable[SignedStatement]) -> list[SignedStatement]:
        """Merge statements, as `add`; the caller holds `_change`."""
        known, given = self.roster.statements, list(statements)
        roster = resolve(self.roster.cell_id, [*known.values(), *given])
        if roster.digest == self.roster.digest:
            return []
        try:
            return await self._become(roster, self.contacts)
        except KnodeError as error:
            last_words = (roster.owner.raw, roster.recovery.raw)
            urgent = [s for s in given if s.body.signer in last_words]
            if error.code is Code.RATE_LIMITED and urgent:
                # What everybody else said must not keep them from being heard.
                await self._become(resolve(roster.cell_id, [*known.values(), *urgent]), self.contacts)
            raise

    @property
    def _present_owner_key(self) -> KeyPair | None:
        """The owner's key, when this node has it and no recovery has replaced it."""
        owner = self._owner_key
        return owner if owner is not None and owner.public == self.roster.owner else None

    def _signer(self, what: str, role: Role) -> KeyPair:
        """Return the key with which this node may make someone a member with `role`."""
        if self._present_owner_key is not None:
            return self._present_owner_key
        if not self.roster.may_sign_members(self.key.public):
            admins = [m.name for m in self.roster.members.values() if m.role is Role.ADMIN]
            raise KnodeError(
                Code.NOT_ALLOWED,
                f"this node may not {what}: it is no admin",
                f"run it on {' or '.join(admins) or 'the owner'}",
            )
        if role is Role.ADMIN:
            raise KnodeError(Code.NOT_ALLOWED, "only the owner makes admins", ASK_OWNER)
        return self.key

    def _sign_add(self, member: bytes, name: str, role: Role) -> SignedStatement:
        signer, roster = self._signer("add a member", role), self.roster
        issued = roster.next_issue_time(member, self._world.clock.wall())
        add = Add(signer.public.raw, roster.era, member, roster.free_name(name), role, issued)
        return sign_statement(signer, add)

    async def _become(
        self,
        roster: Roster,
        contacts: Mapping[bytes, SignedContact],
        also: Callable[[apsw.Connection], None] = lambda connection: None,
    ) -> list[SignedStatement]:
        """Make `roster` durable, and whatever `also` writes; then use it, and tell who listens.

        The caller holds `_change`.

        Args:
            roster: what follows from the present one.
            contacts: the newest of each of its members are kept.
            also: runs in the same transaction.

        Returns:
            The statements that are new.
        """
        known = self._roster.statements if self._roster is not None else {}
        _check_room(roster, known)
        now = self._world.clock.wall()
        new = [s for i, s in roster.statements.items() if i not in known]
        rows = [(s.id, s.data, now) for s in new]
        void = [(i,) for i in known if i not in roster.statements]
        before, after = self.contacts, _newest(contacts.values(), roster, {})

        def write(connection: apsw.Connection) -> None:
            connection.executemany("INSERT OR IGNORE INTO statement (id, data, seen) VALUES (?, ?, ?)", rows)
            connection.executemany("DELETE FROM statement WHERE id = ?", void)
            _keep_contacts(connection, before, after)
            also(connection)

        await self._database.write(write)
        self._roster = roster
        self._seen = {i: self._seen.get(i, now) for i in roster.statements}
        self.contacts = after
        for tell in self.changed:
            tell(new)
        self._next_change.set()
        self._next_change = trio.Event()
        return new


def _check_room(roster: Roster, known: Mapping[bytes, SignedStatement]) -> None:
    """Check that a roster, in which `known` came before, is within its limits or does not grow over them."""
    last_words = (roster.owner.raw, roster.recovery.raw)

    def of_others(statements: Mapping[bytes, SignedStatement]) -> int:
        return sum(s.body.signer not in last_words for s in statements.values())

    if len(roster.statements) > max(MAX_STATEMENTS, len(known)) or of_others(roster.statements) > max(
        MAX_STATEMENTS_OF_OTHERS, of_others(known)
    ):
        raise KnodeError(
            Code.RATE_LIMITED,
            f"a roster holds at most {MAX_STATEMENTS} statements, {MAX_STATEMENTS_OF_OTHERS} of other keys "
            "than the owner's",
            "revoke the admin who signed so many: 'knode member revoke NODE'",
        )


def _newest(
    contacts: Iterable[SignedContact], roster: Roster, known: Mapping[bytes, SignedContact]
) -> dict[bytes, SignedContact]:
    """Return, by each member's present key, the newest of `contacts` that is newer than what is known.

    A member's earlier keys may speak of it until the present one does: only they told where it is.
    """
    newest: dict[bytes, SignedContact] = {}

    def age(contact: SignedContact, member: Member) -> tuple[int, int]:
        return [key.raw for key in member.keys].index(contact.body.key), contact.body.issued

    for contact in contacts:
        member = roster.holders.get(contact.body.key)
        if member is not None:
            best = newest.get(member.key.raw, known.get(member.key.raw))
            if best is None or age(contact, member) > age(best, member):
                newest[member.key.raw] = contact
    return newest


def _keep_contacts(
    connection: apsw.Connection, before: Mapping[bytes, SignedContact], after: Mapping[bytes, SignedContact]
) -> None:
    kept = {contact.body.key: contact for contact in after.values()}
    gone = [(contact.body.key,) for contact in before.values() if contact.body.key not in kept]
    connection.executemany("DELETE FROM contact WHERE key = ?", gone)
    known = set(before.values())
    rows = [(key, c.body.issued, c.data) for key, c in kept.items() if c not in known]
    connection.executemany("INSERT OR REPLACE INTO contact VALUES (?, ?, ?)", rows)
