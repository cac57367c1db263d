"""Plays tests/scenarios/raft/*.txt: stories of a cell of pure cores, one line a step.

Each line is a command; the table at the end has them all. After each, the cell settles: every disk works and
every message arrives, in order, until nothing is left to do, but for what a fault keeps. `expect` says what
must be so then; what it says of messages is about those that the last command caused.

Who draws lots here draws the highest: nobody stands for election before 19 ticks without a leader, and 10
ticks are enough to end every lease.

`python tests/consensus/raft_script.py FILE` plays one and tells what is sent.

    cell a b c [with max_in_flight=2]   a new cell of these voters, with empty logs; nobody leads
    learner d                           and this learner of its first configuration
    newcomer f                          a replica with an empty log that no configuration names
    tick a b 3                          their clocks go on; `all`: everybody's
    elect a                             time passes for the others until no lease stands, then for a alone
    stand a                             only a's time passes, until it stands for election
    propose a "x" "y" [fails ERROR]     a client asks a to append commands
    read a [fails ERROR]                a client reads from a; reads are numbered from 1 in each script
    change a: voters a b, learners c [fails ERROR]
    transfer a -> b [fails ERROR]       a is to hand its leadership to b
    lost a: b                           a learns that its link to b has ended
    compact a                           a forgets the log that it has applied
    snapshot failed a: b                the snapshot did not get from a to b
    partition a b | c                   messages pass only within a group
    drop a->b append term=2             such messages get lost from now on; `*` is everybody
    hold a->b append                    such messages wait from now on
    deliver a->b append [again]         the oldest such message that waits arrives; `again`: it waits on
    lose a->b append                    those that wait are lost
    heal                                no partition, no loss; what waits arrives, in order
    forge a->b vote-reply term=2 granted    b gets a message that a never sent
    forge a->b append term=2 previous=1 previous-term=1 entries=2:"x",2:"y"
    stall a                             a's disk stops: nothing becomes durable
    sync a [1]                          it works again; or so many batches become durable, and no more
    crash a [before-send]               what is not durable is lost; or it became durable, and nothing is sent
    restart a                           it begins with what its disk has
    expect leader a                     a leads, and nobody else does in as high a term
    expect no leader
    expect role a = follower            also pre-candidate, candidate
    expect follows b c = a              whom they hold for the leader; `nobody`
    expect term a b = 2
    expect vote a = b                   on a's disk; `nobody`
    expect commit a b = 3
    expect log a b = [1:noop 1:"x"]     term:entry; also `1:config`; `[3.. 2:"y"]`: compacted up to 3
    expect disk a = [1:noop]            what of it is durable
    expect applied a = "x" "y"          what its state machine saw; `nothing`
    expect configuration a = voters a b, outgoing a b c, learners d
    expect read 1 at 2                  it was answered from a state with index 2
    expect read 1 unanswered
    expect sent a->b vote-reply refused [x 2]   also `not sent`; a count says how often
    expect nothing sent
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from raft_replica import Replica, Sent
from raft_words import Pattern, configuration_text, log_text, read_configuration, tell

from knode.consensus.messages import (
    Append,
    Configuration,
    Heartbeat,
    InstallSnapshot,
    Message,
    PreVote,
    Snapshot,
    Vote,
)
from knode.consensus.ready import Recovered, Role
from knode.consensus.settings import Settings

MAX_ROUNDS = 10_000
"""More messages than any command of a script causes."""
SCRIPTS = sorted((Path(__file__).parents[1] / "scenarios" / "raft").glob("*.txt"))


class ScriptError(AssertionError):
    """A script that does not play as it is written: file, line, and what was instead."""


class Stage:
    """The cell that a script plays with."""

    def __init__(self, trace: Callable[[str], None] = lambda line: None) -> None:
        self.trace = trace
        self._clear()

    def _clear(self) -> None:
        self.replicas: dict[str, Replica] = {}
        self.flying: list[Sent] = []
        self.held: list[Sent] = []
        self.sent: list[Message] = []
        """What the last command caused to be sent, whatever became of it."""
        self.groups: list[set[str]] = []
        self.drops: list[Pattern] = []
        self.holds: list[Pattern] = []
        self.stalled: set[str] = set()
        self.quiet: Counter[bytes] = Counter()
        """For how many ticks each has heard no leader."""
        self.reads: list[tuple[str, int]] = []
        """Who was asked, and the number that it gave."""

    # What happens by itself.

    def settle(self) -> None:
        """Let every disk work and every message arrive, until nothing is left to do."""
        for _ in range(MAX_ROUNDS):
            busy = False
            for name, replica in self.replicas.items():
                busy = self._work(name, replica) or busy
            if self.flying:
                self._arrive(self.flying.pop(0))
            elif not busy:
                return
        raise AssertionError("the cell never comes to rest")

    def _work(self, name: str, replica: Replica) -> bool:
        if replica.raft is None:
            return False
        _, messages = replica.take()
        self._send(messages)
        if not replica.waiting or name in self.stalled:
            return False
        _, messages = replica.persist()
        self._send(messages)
        return True

    def _send(self, messages: list[Sent]) -> None:
        for sent in messages:
            message = sent.message
            self.sent.append(message)
            self.trace(tell(message))
            if any(pattern.matches(message) for pattern in self.drops) or self._parted(message):
                continue
            (self.held if any(p.matches(message) for p in self.holds) else self.flying).append(sent)

    def _parted(self, message: Message) -> bool:
        ends = {message.source.decode(), message.target.decode()}
        return bool(self.groups) and not any(ends <= group for group in self.groups)

    def _arrive(self, sent: Sent) -> None:
        replica = self.replicas.get(sent.message.target.decode())
        if replica is None or replica.raft is None:
            return
        if isinstance(sent.message, Append | Heartbeat | InstallSnapshot):
            self.quiet[replica.id] = 0
        replica.receive(sent)

    # The commands: `do_` and the first word.

    def do_cell(self, rest: str) -> None:
        names, _, options = rest.partition(" with ")
        changed = dict(option.split("=") for option in options.split())
        settings = Settings(**{name: int(value) for name, value in changed.items()})
        self._clear()
        self.settings = settings
        self.initial = read_configuration("voters " + names)
        for name in names.split():
            self._begin(name, self.initial)

    def do_learner(self, rest: str) -> None:
        names = (*self.replicas, rest)
        assert all(r.disk.last_index == 0 for r in self.replicas.values()), "only in a new cell"
        learners = (*self.initial.learners, rest.encode())
        self.initial = Configuration(self.initial.voters, (), tuple(sorted(learners)))
        for name in names:
            self._begin(name, self.initial)

    def do_newcomer(self, rest: str) -> None:
        self._begin(rest, Configuration())

    def _begin(self, name: str, initial: Configuration) -> None:
        recovered = Recovered(snapshot=Snapshot(0, 0, initial))
        self.replicas[name] = Replica(
            name.encode(), recovered, choose=lambda among: among - 1, settings=self.settings
        )

    def do_tick(self, rest: str) -> None:
        *names, count = rest.split()
        for _ in range(int(count)):
            for replica in self._running(names):
                self._tick(replica)
                self.settle()

    def do_elect(self, rest: str) -> None:
        for replica in self._running(["all"]):
            if replica.id != rest.encode() and replica.core.role is not Role.LEADER:
                for _ in range(self.settings.election_ticks - self.quiet[replica.id]):
                    self._tick(replica)
        self.settle()
        core = self.replicas[rest].core
        for _ in range(6 * self.settings.election_ticks):
            self._tick(self.replicas[rest])
            self.settle()
            if core.role is Role.LEADER:
                return
        self.expect_leader(rest)

    def do_stand(self, rest: str) -> None:
        core = self.replicas[rest].core
        before = core.role
        for _ in range(2 * self.settings.election_ticks):
            self._tick(self.replicas[rest])
            self.settle()
            asks = any(isinstance(m, PreVote | Vote) and m.source == core.id for m in self.sent)
            if asks or core.role is not before:
                return
        raise AssertionError(f"{rest} does not stand for election")

    def do_propose(self, rest: str) -> None:
        name, data = rest.split(maxsplit=1)
        assert re.fullmatch(r'("[^"]*" ?)+', data), f"{data} is no list of commands"
        for command in re.findall(r'"([^"]*)"', data):
            self.replicas[name].core.propose(command.encode())

    def do_read(self, rest: str) -> None:
        self.reads.append((rest, self.replicas[rest].core.read()))

    def do_change(self, rest: str) -> None:
        name, target = rest.split(":")
        self.replicas[name].core.change(read_configuration(target))

    def do_transfer(self, rest: str) -> None:
        name, to = rest.split(" -> ")
        self.replicas[name].core.transfer(to.encode())

    def do_lost(self, rest: str) -> None:
        name, of = rest.split(": ")
        self.replicas[name].core.lost(of.encode())

    def do_compact(self, rest: str) -> None:
        replica = self.replicas[rest]
        replica.compact(replica.applied)

    def do_snapshot(self, rest: str) -> None:
        name, of = rest.removeprefix("failed ").split(": ")
        self.replicas[name].core.snapshot_failed(of.encode())

    def do_partition(self, rest: str) -> None:
        self.groups = [set(group.split()) for group in rest.split("|")]
        unknown = set().union(*self.groups) ^ set(self.replicas)
        assert not unknown, f"each replica is in one group: {unknown}"

    def do_drop(self, rest: str) -> None:
        self.drops.append(Pattern.read(rest))

    def do_hold(self, rest: str) -> None:
        self.holds.append(Pattern.read(rest))

    def do_deliver(self, rest: str) -> None:
        pattern = Pattern.read(rest.removesuffix(" again"))
        found = next((sent for sent in self.held if pattern.matches(sent.message)), None)
        assert found is not None, "no such message waits: " + self._told(s.message for s in self.held)
        if not rest.endswith(" again"):
            self.held.remove(found)
        self.flying.append(found)

    def do_lose(self, rest: str) -> None:
        pattern = Pattern.read(rest)
        self.held = [sent for sent in self.held if not pattern.matches(sent.message)]

    def do_heal(self, rest: str) -> None:
        self.groups, self.drops, self.holds = [], [], []
        self.flying, self.held = self.held, []

    def do_forge(self, rest: str) -> None:
        self.flying.append(Sent(Pattern.read(rest).forged()))

    def do_stall(self, rest: str) -> None:
        self.stalled.add(rest)

    def do_sync(self, rest: str) -> None:
        name, *batches = rest.split()
        if not batches:
            self.stalled.remove(name)
        for _ in range(int(batches[0]) if batches else 0):
            _, messages = self.replicas[name].persist()
            self._send(messages)

    def do_crash(self, rest: str) -> None:
        name, *when = rest.split()
        replica = self.replicas[name]
        replica.crash(durable=len(replica.waiting) if when == ["before-send"] else 0)
        self.stalled.discard(name)

    def do_restart(self, rest: str) -> None:
        self.replicas[rest].start()

    def _running(self, names: list[str]) -> list[Replica]:
        wanted = self.replicas if names == ["all"] else names
        return [self.replicas[name] for name in wanted if self.replicas[name].raft is not None]

    def _tick(self, replica: Replica) -> None:
        self.quiet[replica.id] += 1
        replica.core.tick()

    # What is expected: `expect_` and the first word.

    def expect_leader(self, rest: str) -> None:
        leaders = {r.core.term: r.id.decode() for r in self._running(["all"]) if r.core.role is Role.LEADER}
        found = leaders[max(leaders)] if leaders else "nobody"
        assert found == rest, f"it is {found}: " + ", ".join(
            f"{r.id.decode()} is {r.core.role} in term {r.core.term}" for r in self._running(["all"])
        )

    def expect_no(self, rest: str) -> None:
        assert rest == "leader"
        self.expect_leader("nobody")

    def expect_role(self, rest: str) -> None:
        self._each(rest, lambda replica: replica.core.role)

    def expect_follows(self, rest: str) -> None:
        self._each(rest, lambda replica: (replica.core.leader or b"nobody").decode())

    def expect_term(self, rest: str) -> None:
        self._each(rest, lambda replica: str(replica.core.term))

    def expect_vote(self, rest: str) -> None:
        self._each(rest, lambda replica: (replica.disk.hard_state.vote or b"nobody").decode())

    def expect_commit(self, rest: str) -> None:
        self._each(rest, lambda replica: str(replica.core.committed))

    def expect_log(self, rest: str) -> None:
        self._each(rest, lambda replica: log_text(replica.log))

    def expect_disk(self, rest: str) -> None:
        self._each(rest, lambda replica: log_text(replica.disk))

    def expect_applied(self, rest: str) -> None:
        self._each(rest, lambda r: " ".join(f'"{data.decode()}"' for data in r.state) or "nothing")

    def expect_configuration(self, rest: str) -> None:
        self._each(rest, lambda replica: configuration_text(replica.core.configuration))

    def expect_read(self, rest: str) -> None:
        number, *words = rest.split()
        name, real = self.reads[int(number) - 1]
        found = [f"at {r.index}" for r in self.replicas[name].answered if r.number == real]
        assert found == ([] if words == ["unanswered"] else [" ".join(words)]), (
            f"it is {found or 'unanswered'}"
        )

    def expect_sent(self, rest: str) -> None:
        text, times, count = rest.partition(" x ")
        pattern = Pattern.read(text)
        found = sum(map(pattern.matches, self.sent))
        right = found == int(count) if times else found > 0
        assert right, f"it was sent {found} times, of " + self._told(self.sent)

    def expect_not(self, rest: str) -> None:
        assert rest.startswith("sent ")
        pattern = Pattern.read(rest.removeprefix("sent "))
        found = [message for message in self.sent if pattern.matches(message)]
        assert not found, self._told(found)

    def expect_nothing(self, rest: str) -> None:
        assert rest == "sent"
        assert not self.sent, self._told(self.sent)

    def _each(self, rest: str, look: Callable[[Replica], str]) -> None:
        names, _, wanted = rest.partition(" = ")
        assert wanted, "what is expected?"
        for name in names.split():
            found = look(self.replicas[name])
            assert found == wanted, f"{name} has {found}"

    def _told(self, messages: Iterable[Message]) -> str:
        return "; ".join(map(tell, messages)) or "nothing"

    def play(self, line: str) -> None:
        """Do what a line says.

        Raises:
            AssertionError: it does not come out as it says.
        """
        line, _, failure = line.partition(" fails ")
        verb, _, rest = line.partition(" ")
        if verb == "expect":
            what, _, rest = rest.partition(" ")
            getattr(self, f"expect_{what}")(rest)
            return
        self.trace(f"-- {line}")
        self.sent.clear()
        failed = ""
        try:
            getattr(self, f"do_{verb}")(rest)
        except Exception as error:
            failed = type(error).__name__
            if failed != failure:
                raise
        assert failed == failure, f"it does not fail with {failure}"
        self.settle()


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    """The lines of a script that do something, with their numbers."""
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split("#")[0].strip()
        if line:
            yield number, re.sub(r"\s+", " ", line)


def play(path: Path, trace: Callable[[str], None] = lambda line: None) -> None:
    """Play a script.

    Raises:
        ScriptError: with file and line, and what was instead of what it expects.
    """
    stage = Stage(trace)
    for number, line in lines_of(path.read_text()):
        try:
            stage.play(line)
        except Exception as error:
            said = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            raise ScriptError(f"{path.name}:{number}: {line}: {said}") from error


if __name__ == "__main__":
    for file in sys.argv[1:]:
        play(Path(file), print)
