"""A cell of pure cores under random faults, with every rule checked at every step; a seed is a run.

`python tests/consensus/raft_fuzz.py --seeds 2000 [--first N] [--steps N]` runs many;
`… --first N --seeds 1 --trace` tells one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from random import Random

from raft_invariants import Invariants, Violation, require
from raft_replica import Replica, Sent
from raft_words import configuration_text, tell

from knode.consensus import configuration as configurations
from knode.consensus.messages import Configuration, InstallSnapshot, ReplicaId
from knode.consensus.ready import Recovered, Role
from knode.consensus.refusals import Refusal
from knode.consensus.settings import Settings

STEPS = 1000
"""Of one seed; each is a message, a tick, a disk at work or a fault."""
POOL = tuple(name.encode() for name in "abcdef")
MAX_FLYING = 300
KEPT = 100
"""Old messages, of which any may come again."""
HEALING_ROUNDS = 150
"""After the faults: every replica's time goes on, every message arrives. By then all agree and work."""


class Weather:
    """What goes wrong for a while.

    Args:
        leader: who leads when it begins, or anybody.
    """

    def __init__(self, random: Random, leader: ReplicaId) -> None:
        self.loss = random.choice((0, 0, 0.05, 0.2))
        self.again = random.choice((0, 0.05, 0.3))
        self.reorder = random.choice((0, 0.1, 1))
        self.disk = random.choice((0.3, 0.8, 1, 1))
        """How likely a batch becomes durable as soon as it is there."""
        self.crash = random.choice((0, 0, 0.005, 0.02))
        self.restart = random.choice((0.05, 0.2))
        self.change = random.choice((0, 0.02, 0.06))
        self.ticks = random.choice((0.05, 0.1, 0.2))
        self.pace = random.choice((0.3, 0.8, 1))
        """How likely a clock goes on when others do."""
        self.impatience = random.choice((0, 0.01, 0.03))
        """How likely somebody's clock leaps."""
        self.cut: frozenset[tuple[ReplicaId, ReplicaId]] = frozenset()
        self.asleep: ReplicaId | None = None
        """Whose clock stands still."""
        match random.randrange(8):
            case 0:
                side = {id for id in POOL if random.random() < 0.5}
                self.cut = frozenset((a, b) for a in POOL for b in POOL if (a in side) != (b in side))
            case 1:
                self.cut = frozenset((a, b) for a in POOL for b in POOL if random.random() < 0.25)
            case 2:
                alone, deaf = random.choice(POOL), random.random() < 0.5
                self.cut = frozenset((a, alone) if deaf else (alone, a) for a in POOL)
            case 3 | 4:
                self.cut = frozenset((a, b) for a in POOL for b in POOL if (a == leader) != (b == leader))
                self.asleep = leader if random.random() < 0.6 else None  # it goes on believing that it leads
                self.ticks = 0.3
            case _:
                pass


class Fuzz:
    """One seed's cell.

    Args:
        trace: is told what happens.
    """

    def __init__(self, seed: int, trace: Callable[[str], None] | None = None) -> None:
        self.random = Random(seed)
        self.trace = trace
        self.counts: Counter[str] = Counter()
        random = self.random
        settings = Settings(
            election_ticks=random.choice((3, 5, 8)),
            heartbeat_ticks=1,
            max_append_bytes=random.choice((1, 100, 10_000)),
            max_in_flight=random.choice((1, 2, 256)),
            max_in_flight_bytes=random.choice((200, 100_000)),
            max_uncommitted_bytes=random.choice((400, 100_000)),
            max_reads=random.choice((2, 100)),
        )
        founders = POOL[: random.choice((1, 2, 3, 3, 4, 5, 5))]
        learners = POOL[len(founders) :][: random.choice((0, 0, 1))]
        founded = configurations.founded(Configuration(founders, (), learners))
        self.replicas = {
            id: Replica(
                id,
                founded if id in founders + learners else Recovered(),
                choose=Random(random.random()).randrange,
                settings=settings,
            )
            for id in POOL
        }
        self.running = list(self.replicas.values())
        self.flying: list[Sent] = []
        self.old: list[Sent] = []
        self.invariants = Invariants(self.replicas)
        self.weather = Weather(random, POOL[0])
        self.writes = 0

    def run(self, steps: int) -> None:
        """Run the faults, then heal, and see that all work again.

        Raises:
            Violation: a rule did not hold.
        """
        random = self.random
        left = 0
        for _ in range(steps):
            if not left:
                left = random.randint(20, 200)
                leader = self.leader()
                self.weather = Weather(random, leader.id if leader else random.choice(POOL))
                self._tell(f"-- {vars(self.weather)}")
            left -= 1
            self.step()
        self.heal()
        self.invariants.finish()

    def step(self) -> None:
        """Let one thing happen."""
        random, weather = self.random, self.weather
        dice = random.random()
        if dice < weather.ticks:
            for replica in random.sample(self.running, len(self.running)):
                if replica.id != weather.asleep and random.random() < weather.pace:
                    self.tick(replica)
        elif dice < 0.85:
            for _ in range(1 + len(self.flying) // 8):
                self.deliver()
        elif dice < 0.9:
            if self.running:
                self.work(random.choice(self.running), 1)
        elif dice < 0.97 and self.running:
            self.ask(random.choice(self.running))
        self.misfortune()

    def tick(self, replica: Replica) -> None:
        """Let a replica's clock go on."""
        self.counts["ticks"] += 1
        replica.core.tick()
        self.work(replica, self.weather.disk)

    def deliver(self) -> None:
        """Let a message arrive, or get lost, or come again."""
        random, weather = self.random, self.weather
        if self.old and random.random() < weather.again:
            self.arrive(random.choice(self.old))
            return
        if not self.flying:
            return
        at = random.randrange(len(self.flying)) if random.random() < weather.reorder else 0
        sent = self.flying.pop(at)
        message = sent.message
        if (message.source, message.target) in weather.cut or random.random() < weather.loss:
            self.drop(sent)
            return
        self.arrive(sent)
        if len(self.old) < KEPT:
            self.old.append(sent)
        else:
            self.old[random.randrange(KEPT)] = sent

    def arrive(self, sent: Sent) -> None:
        """Give a message to whom it is for."""
        replica = self.replicas[sent.message.target]
        if replica.raft is None:
            self.drop(sent)
            return
        self.counts["messages"] += 1
        if self.trace is not None:
            self.trace(tell(sent.message))
        replica.receive(sent)
        self.work(replica, self.weather.disk)

    def drop(self, sent: Sent) -> None:
        """Lose a message. A shell notices when that happens to a snapshot."""
        source = self.replicas[sent.message.source]
        if isinstance(sent.message, InstallSnapshot) and source.raft is not None:
            source.core.snapshot_failed(sent.message.target)

    def work(self, replica: Replica, disk: float) -> None:
        """Do what a core wants, and of what waits for its disk as much as luck wills."""
        while True:
            ready, messages = replica.take()
            if ready is not None:
                self.invariants.taken(replica, ready, messages)
                self.send(messages)
            if not replica.waiting or self.random.random() >= disk:
                return
            done, messages = replica.persist()
            self.invariants.persisted(replica, done, messages)
            self.send(messages)

    def send(self, messages: list[Sent]) -> None:
        """Put messages on their way."""
        self.flying += messages
        while len(self.flying) > MAX_FLYING:
            self.drop(self.flying.pop(0))

    def ask(self, replica: Replica) -> None:
        """Be a client."""
        core, random = replica.core, self.random
        if core.role is not Role.LEADER and random.random() < 0.95:
            replica = random.choice(self.leaders() or [replica])
            core = replica.core
        try:
            if random.random() < 0.5:
                for _ in range(random.choice((1, 1, 5))):
                    self.writes += 1
                    data = str(self.writes).encode()
                    self.invariants.proposes(core.propose(data), data)
            else:
                self.invariants.asks(replica, core.read())
        except Refusal as refusal:
            self.counts[type(refusal).__name__] += 1
        self.work(replica, self.weather.disk)

    def misfortune(self) -> None:
        """Perhaps do what seldom happens."""
        random, weather = self.random, self.weather
        if random.random() < weather.crash:
            if self.running:
                self.crash(random.choice(self.running))
        elif random.random() < weather.restart:
            down = [replica for replica in self.replicas.values() if replica.raft is None]
            if down:
                self.restart(random.choice(down))
        elif random.random() < weather.change:
            leaders = self.leaders()
            if leaders:
                self.command(random.choice(leaders))
        elif random.random() < weather.impatience and self.running:
            replica = random.choice(self.running)
            for _ in range(2 * replica.settings.election_ticks):
                self.tick(replica)
        elif random.random() < 0.02 and self.running:
            replica = random.choice(self.running)
            if replica.applied > replica.disk.snapshot.index:
                self.counts["compactions"] += 1
                replica.compact(random.randint(replica.disk.snapshot.index + 1, replica.applied))
        elif random.random() < 0.02 and self.running:
            one = random.choice(self.running)
            one.core.lost(one.core.leader or random.choice(POOL))

    def command(self, leader: Replica) -> None:
        """Ask a leader for something else than its log."""
        random, core = self.random, leader.core
        try:
            match random.randrange(5):
                case 0 | 1:
                    to = random.choice(POOL)
                    core.transfer(to)
                    self._tell(f"-- transfer {leader.id.decode()} -> {to.decode()}")
                    self.counts["transfers"] += 1
                case 2:
                    core.snapshot_failed(random.choice(POOL))
                case _:
                    target = self.target(core.configuration)
                    core.change(target)
                    self._tell(f"-- change {leader.id.decode()}: {configuration_text(target)}")
                    self.counts["changes"] += 1
        except Refusal as refusal:
            self.counts[type(refusal).__name__] += 1
        self.work(leader, self.weather.disk)

    def target(self, present: Configuration) -> Configuration:
        """Draw a configuration: mostly a step from the present one, sometimes any."""
        random = self.random
        if random.random() < 0.3:
            voters = set(random.sample(POOL, random.randint(1, 5)))
        else:
            voters = set(present.voters) ^ {random.choice(POOL)} or set(present.voters)
        learners = {id for id in POOL if id not in voters and random.random() < 0.2}
        return Configuration(tuple(sorted(voters)), (), tuple(sorted(learners)))

    def crash(self, replica: Replica) -> None:
        """Let a replica die, somewhere between core, disk and network."""
        self.counts["crashes"] += 1
        durable = self.random.randint(0, len(replica.waiting))
        self._tell(f"-- crash {replica.id.decode()}: {durable} of {len(replica.waiting)} durable")
        applied = None
        if self.random.random() < 0.5:
            applied = self.random.randint(replica.disk.snapshot.index, replica.applied)
        replica.crash(durable=durable, applied=applied)
        self.running.remove(replica)
        for other in self.running:
            other.core.lost(replica.id)

    def restart(self, replica: Replica) -> None:
        """Let it begin again."""
        self._tell(f"-- restart {replica.id.decode()}")
        replica.start()
        self.running.append(replica)
        self.invariants.restarted(replica)
        self.work(replica, self.weather.disk)

    def heal(self) -> None:
        """End all faults, and see that everybody who belongs to the cell comes to the same, and works."""
        self._tell("-- heal")
        weather = self.weather
        weather.cut, weather.loss, weather.again, weather.reorder, weather.disk = frozenset(), 0, 0, 0, 1
        for replica in self.replicas.values():
            if replica.raft is None:
                self.restart(replica)
        asked = False
        for _ in range(HEALING_ROUNDS):
            for replica in self.running:
                self.tick(replica)
            for _ in range(MAX_FLYING * 10):
                self.deliver()
            require(not self.flying, "the cell comes to rest between two ticks")
            if asked and self.agree():
                return
            leader = self.leader()
            if leader is not None and not asked:
                asked = self.writes_are_taken(leader)
        state = ", ".join(
            f"{r.id.decode()} {r.core.role} in {r.core.term}, {r.core.committed} of {r.core.last_index}"
            for r in self.running
        )
        require(False, f"after {HEALING_ROUNDS} rounds without faults all agree", state)

    def leader(self) -> Replica | None:
        """Return who leads in the highest term."""
        return max(self.leaders(), key=lambda replica: replica.core.term, default=None)

    def leaders(self) -> list[Replica]:
        """Return all who lead, each in a term of its own."""
        return [replica for replica in self.running if replica.core.role is Role.LEADER]

    def writes_are_taken(self, leader: Replica) -> bool:
        """Ask for one more write and read."""
        try:
            self.invariants.proposes(leader.core.propose(b"last"), b"last")
            self.invariants.asks(leader, leader.core.read())
        except Refusal:
            return False
        self.work(leader, 1)
        return True

    def agree(self) -> bool:
        """Whether all who belong to the cell have applied the same, to the end."""
        leader = self.leader()
        if leader is None or leader.core.configuration.outgoing:
            return False
        members = configurations.everyone(leader.core.configuration)
        end = leader.core.last_index
        return all(self.replicas[id].applied == end for id in members) and leader.state[-1:] == [b"last"]

    def _tell(self, line: str) -> None:
        if self.trace is not None:
            self.trace(line)


def run(seed: int, steps: int = STEPS, trace: Callable[[str], None] | None = None) -> Counter[str]:
    """Run a seed; return what happened, counted.

    Raises:
        Violation: a rule did not hold, or a core failed; it names the command that shows it.
    """
    fuzz = Fuzz(seed, trace)
    try:
        fuzz.run(steps)
    except Exception as error:
        again = f"python tests/consensus/raft_fuzz.py --first {seed} --seeds 1 --steps {steps} --trace"
        raise Violation(f"{type(error).__name__}: {error}; see it with '{again}'") from error
    counts = fuzz.counts
    counts["committed"] = len(fuzz.invariants.committed)
    counts["reads"] = fuzz.invariants.answered
    counts["terms"] = len(fuzz.invariants.leaders)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--trace", action="store_true")
    options = parser.parse_args()
    total: Counter[str] = Counter()
    violations = 0
    begun = time.perf_counter()
    for seed in range(options.first, options.first + options.seeds):
        try:
            total += run(seed, options.steps, print if options.trace else None)
        except Violation as violation:
            violations += 1
            print(f"seed {seed}: {violation}")
            if options.trace:
                raise
    seconds = time.perf_counter() - begun
    print(f"{options.seeds} seeds, {violations} violations, {seconds:.1f} s: {dict(total)}")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
