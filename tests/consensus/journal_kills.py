"""A process that writes a log is killed again and again; `python tests/consensus/journal_kills.py ROUNDS`.

What the log must hold is a function of how many changes were made to it, and that is the term of its hard
state. The writer says the number of each change once it is durable; the log may hold one more, never one
less.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from knode.consensus import journal as journal_module
from knode.consensus.journal import Journal
from knode.consensus.messages import Entry, HardState, Kind, Snapshot
from knode.consensus.ready import Recovered
from knode.world.real import RealDisk

SEGMENT_BYTES = 4096
NUMBER_BYTES = 8


def change(number: int, last: int) -> tuple[HardState, list[Entry]]:
    """Return change number `number` of a log that ends at `last`: some replace, one in fifty begins anew."""
    first = last + 1 if number % 3 or number % 50 < 4 else last
    count = 1 + number % 5
    data = b"%d " % number * (number % 40)
    return HardState(number, b"x", 0), [
        Entry(number, index, Kind.COMMAND, data) for index in range(first, first + count)
    ]


def begins_anew(number: int) -> bool:
    return number % 50 == 0


class Model:
    """What the log must hold after so many changes."""

    def __init__(self) -> None:
        self.number = 0
        self.base = 0
        self.entries: list[Entry] = []

    def advance(self) -> None:
        self.number += 1
        last = self.base + len(self.entries)
        if begins_anew(self.number):
            self.base, self.entries = last + 7, []
        else:
            _, entries = change(self.number, last)
            del self.entries[entries[0].index - self.base - 1 :]
            self.entries += entries

    def must_equal(self, recovered: Recovered) -> None:
        """Raise AssertionError unless this is what was recovered, wherever it was compacted."""
        compacted = recovered.snapshot.index - self.base
        assert compacted >= 0, "older than the last new beginning"
        assert recovered.entries == tuple(self.entries[compacted:])
        assert recovered.hard_state.term == self.number


def write(folder: Path) -> None:
    """Change the log until killed, and say the number of each change that is durable."""
    journal_module.SEGMENT_BYTES = SEGMENT_BYTES
    journal, recovered = Journal.open(RealDisk(), folder)
    number = recovered.hard_state.term
    last = recovered.snapshot.index + len(recovered.entries)
    while True:
        number += 1
        if begins_anew(number):
            last += 7
            journal.reset(Snapshot(last, number), HardState(number))
        else:
            hard_state, entries = change(number, last)
            journal.append(hard_state, entries, sync=True)
            last = entries[-1].index
            if number % 10 == 9:
                journal.compact(Snapshot(last - 1, number))
        sys.stdout.buffer.write(number.to_bytes(NUMBER_BYTES, "big"))
        sys.stdout.buffer.flush()


def kill_again_and_again(folder: Path, rounds: int, seed: int) -> int:
    """Let a writer go on, kill it at a random moment and look what it left, `rounds` times; return how many
    changes were made."""
    dice, model = random.Random(seed), Model()
    for _ in range(rounds):
        writer = subprocess.Popen([sys.executable, __file__, "write", folder], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        said = b""
        for _ in range(dice.randrange(1, 40)):
            said = writer.stdout.read(NUMBER_BYTES) or said
        # The moment is drawn: anywhere in the midst of the next changes, which nobody need read.
        deadline = time.perf_counter() + dice.uniform(0, 0.02)
        while time.perf_counter() < deadline:
            pass
        writer.kill()
        rest = writer.stdout.read()
        writer.wait()
        said = (said + rest)[: (len(said) + len(rest)) // NUMBER_BYTES * NUMBER_BYTES][-NUMBER_BYTES:]
        acknowledged = int.from_bytes(said, "big")
        assert acknowledged > model.number, "the writer ended by itself"
        journal, recovered = Journal.open(RealDisk(), folder)
        journal.close()
        assert recovered.hard_state.term in (acknowledged, acknowledged + 1), "what was acknowledged is lost"
        while model.number < recovered.hard_state.term:
            model.advance()
        model.must_equal(recovered)
    return model.number


def main(arguments: Sequence[str]) -> None:
    if arguments[0] == "write":
        write(Path(arguments[1]))
    with tempfile.TemporaryDirectory() as folder:
        rounds = int(arguments[0])
        seed = int(arguments[1]) if arguments[1:] else random.randrange(1_000_000)
        print(f"{rounds} kills, seed {seed}", flush=True)
        changes = kill_again_and_again(Path(folder) / "raft", rounds, seed)
        print(f"{changes} changes; nothing that was acknowledged is lost")


if __name__ == "__main__":
    main(sys.argv[1:])
