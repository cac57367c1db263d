"""A scenario: what happens, which faults, and which promises must hold. A short TOML file each."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

import msgspec

from knode.errors import Code, KnodeError
from knode.transport.memory import MemorySettings
from knode.world.real import RealDisk

FOLDER = Path(__file__).parent / "scenarios"
"""The scenarios that come with knode."""
DEFAULT = "calm"
LONGEST_S = 3600.0
MOST_NODES = 64
LIMIT_BYTES = 64 * 1024

Seconds = Annotated[float, msgspec.Meta(ge=0, le=LONGEST_S)]
Jump = Annotated[float, msgspec.Meta(ge=-LONGEST_S, le=LONGEST_S)]
Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=60_000)]
Probability = Annotated[float, msgspec.Meta(ge=0, lt=1)]
Span = tuple[Seconds, Seconds]
"""From, to: the value is drawn anew each time."""


class NetworkConditions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How frames travel."""

    delay_ms: tuple[Milliseconds, Milliseconds] = (0.2, 2.0)
    loss: Probability = 0.0
    """Of a frame. It is sent again, so a loss is a delay."""
    breaks: Probability = 0.0
    """That a frame breaks its link for good."""
    grain_ms: Milliseconds = 0.0
    """Frames arrive only at multiples of this: many at once, so that a large cell can be simulated."""

    def settings(self) -> MemorySettings:
        """Return them as the memory network takes them."""
        low, high = self.delay_ms
        return MemorySettings(
            delay_seconds=(low / 1000, high / 1000),
            loss=self.loss,
            breaks=self.breaks,
            grain_seconds=self.grain_ms / 1000,
        )


class MachineConditions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the machines are."""

    work_ms: tuple[Milliseconds, Milliseconds] = (0.1, 20.0)
    """What a disk write or an agent's work takes."""
    clock_skew_s: Seconds = 0.0
    """How wrong their clocks are at most, either way."""


class Clients(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who submits tasks."""

    every_s: Span = (0.02, 0.2)
    deadline_s: Span = (2.0, 10.0)
    with_file: Probability = 0.05
    """How many of the tasks have a file with them."""
    cancelled: Probability = 0.02
    """How many of the tasks are cancelled again."""


class DurableClients(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who submits durable tasks, looks at them and cancels them."""

    every_s: Span = (0.05, 0.4)
    deadline_s: Annotated[float, msgspec.Meta(ge=1, le=LONGEST_S)] = 30.0
    repeated: Probability = 0.2
    """How many submits are one of before, with its key."""
    failing: Probability = 0.05
    """How many of the tasks fail."""
    cancelled: Probability = 0.03


class _Recurring(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind"):
    """What happens again and again."""

    every_s: Span
    """How long until the next."""


class _Lasting(_Recurring, frozen=True):
    """And is undone each time."""

    lasts_s: Span
    """How long until then."""


class Kill(_Lasting, frozen=True, tag="kill"):
    """A node's process is killed, and started again: its links end at once, its disk stays."""


class PowerCut(_Lasting, frozen=True, tag="power-cut"):
    """A machine falls silent, what its disk had not synced is lost, and it comes back."""


class Stop(_Lasting, frozen=True, tag="stop"):
    """A node is stopped in order, and started again."""


class Partition(_Lasting, frozen=True, tag="partition"):
    """The nodes fall into two sides that cannot reach each other."""


class Cut(_Lasting, frozen=True, tag="cut"):
    """Two nodes cannot reach each other, while both reach the others."""


class OneWayCut(_Lasting, frozen=True, tag="one-way-cut"):
    """Nothing passes from one node to another, and all that goes back."""


class Flapping(_Lasting, frozen=True, tag="flapping"):
    """The network between two nodes goes and comes, again and again."""

    gone_s: Span
    here_s: Span


class Sleep(_Lasting, frozen=True, tag="sleep"):
    """A node stands still, as a stopped process or a suspended laptop, and goes on later."""


class ClockJump(_Lasting, frozen=True, tag="clock-jump"):
    """A machine's wall clock goes wrong, and is set right again."""

    by_s: tuple[Jump, Jump] = (-3600.0, 3600.0)


class FullDisk(_Lasting, frozen=True, tag="full-disk"):
    """Nothing more fits on a machine's disk."""


Files = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
"""Which files of a machine, by their paths, with wildcards."""
LOG_FILES = "*/raft/*.log"


Machines = Annotated[int, msgspec.Meta(ge=1, le=MOST_NODES)] | None
"""Only so many of the machines, the last ones, so that a majority keeps its disks; None: any."""


class BitFlip(_Recurring, frozen=True, tag="bit-flip"):
    """One bit of a machine's disk turns over, for ever; nobody notices before it is read. Not one of
    what was synced last: together with a crash that is a torn write, which no one can tell from it."""

    files: Files = LOG_FILES
    machines: Machines = None


class FailedSync(_Lasting, frozen=True, tag="failed-sync"):
    """A machine's next sync of such a file fails, and what was to be synced is lost; all later ones
    succeed. None failed by the end of `lasts_s`: none does."""

    files: Files = LOG_FILES
    machines: Machines = None


class SlowDisk(_Lasting, frozen=True, tag="slow-disk"):
    """A machine's disk, and all other blocking work on it, takes long."""

    work_ms: tuple[Milliseconds, Milliseconds] = (50.0, 1000.0)


class OldCopy(_Lasting, frozen=True, tag="old-copy"):
    """A machine's disk is copied, its node is restarted, and `age_s` later killed and the copy put back;
    it is gone for `lasts_s`."""

    age_s: Span
    machines: Machines = None


class RoleChange(_Lasting, frozen=True, tag="role-change"):
    """The owner makes a worker an observer, and a worker again: news for every roster."""


class Revocation(_Recurring, frozen=True, tag="revocation"):
    """The owner revokes a member, for ever; it goes on as if nothing had happened. Two members stay."""


class Rolling(_Lasting, frozen=True, tag="rolling"):
    """All nodes are stopped and started again, in order, one after the other, as for an update.
    Each is gone for `lasts_s`."""

    between_s: Span


class Hunt(_Lasting, frozen=True, tag="hunt"):
    """Whoever leads the cell's voters is killed, or cut off from all others."""


class Newcomer(_Recurring, frozen=True, tag="newcomer"):
    """Another machine joins the cell, by a ticket of the owner."""

    most: Annotated[int, msgspec.Meta(ge=1, le=MOST_NODES)] = 3
    """How many at most."""


class LostMajority(_Lasting, frozen=True, tag="lost-majority"):
    """Most voters are killed, and the owner's node begins the ledger anew with what it has. In the end the
    others come back, with what they had."""


Fault = (
    Kill
    | PowerCut
    | Stop
    | Sleep
    | Partition
    | Cut
    | OneWayCut
    | Flapping
    | ClockJump
    | FullDisk
    | BitFlip
    | FailedSync
    | SlowDisk
    | OldCopy
    | RoleChange
    | Revocation
    | Rolling
    | Hunt
    | Newcomer
    | LostMajority
)


class Scenario(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One scenario. The name is its file's."""

    what: Annotated[str, msgspec.Meta(min_length=1, max_length=500)]
    lasts_s: Seconds
    invariants: tuple[str, ...]
    nodes: Annotated[int, msgspec.Meta(ge=1, le=MOST_NODES)] = 3
    """How many, unless another number is asked for."""
    check_every_s: Annotated[float, msgspec.Meta(ge=0.1, le=60)] = 0.5
    """How often it is asked whether what must hold at any time does."""
    network: NetworkConditions = NetworkConditions()
    machines: MachineConditions = MachineConditions()
    clients: Clients = Clients()
    """Of direct tasks."""
    durable: DurableClients | None = None
    """Of durable tasks; none unless the scenario says so."""
    faults: Annotated[tuple[Fault, ...], msgspec.Meta(max_length=16)] = ()


def names() -> list[str]:
    """Return the names of the scenarios that come with knode, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str) -> Scenario:
    """Return a scenario by its name, or read from a file when the name ends in `.toml`.

    Raises:
        KnodeError: NOT_FOUND, naming the scenarios that there are; INVALID_ARGUMENT for a file that is none,
            TOO_LARGE over 64 KiB, or the disk's errors.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file() or (path.parent == FOLDER and path.stem not in names()):
        raise KnodeError(
            Code.NOT_FOUND,
            f"there is no scenario {name[:80]!r}",
            f"choose one of {', '.join(names())}, or give a file that ends in .toml",
        )
    try:
        text = RealDisk().read(path, limit_bytes=LIMIT_BYTES).decode()
        scenario = msgspec.convert(tomllib.loads(text), Scenario)
        scenario.network.settings()
    except (ValueError, RecursionError) as error:
        raise KnodeError(
            Code.INVALID_ARGUMENT, f"{path.name} is no scenario ({error})", "see docs/guides/simulation.md"
        ) from error
    return scenario
