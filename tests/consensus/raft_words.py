"""How scripts and traces write messages, logs and configurations: `a->b append term=2 previous=1`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec.structs import replace
from raft_replica import Log

from knode.consensus.messages import (
    Append,
    AppendReply,
    Configuration,
    Entry,
    Heartbeat,
    HeartbeatReply,
    InstallSnapshot,
    Kind,
    Message,
    PreVote,
    PreVoteReply,
    TimeoutNow,
    Vote,
    VoteReply,
)

KINDS: dict[str, type[Message]] = {
    "pre-vote": PreVote,
    "pre-vote-reply": PreVoteReply,
    "vote": Vote,
    "vote-reply": VoteReply,
    "append": Append,
    "append-reply": AppendReply,
    "heartbeat": Heartbeat,
    "heartbeat-reply": HeartbeatReply,
    "snapshot": InstallSnapshot,
    "timeout-now": TimeoutNow,
}
NAMES = {kind: name for name, kind in KINDS.items()}
FLAGS = ("granted", "accepted", "refused", "transfer")
LONG = {
    "previous": "previous_index",
    "previous-term": "previous_term",
    "last": "last_index",
    "last-term": "last_term",
    "hint": "hint_index",
    "hint-term": "hint_term",
}
"""What a script calls shorter than the core."""


def fields_of(message: Message) -> dict[str, Any]:
    """Say what a pattern may ask of a message."""
    fields = msgspec.structs.asdict(message)
    fields |= {short: fields[long] for short, long in LONG.items() if long in fields}
    match message:
        case Append(previous_index=previous, entries=entries):
            fields |= {"entries": len(entries), "last": entries[-1].index if entries else previous}
        case InstallSnapshot(snapshot=snapshot):
            fields |= {"index": snapshot.index}
        case _:
            pass
    return fields


def tell(message: Message) -> str:
    """One message as a script writes it."""
    fields = fields_of(message)
    words = [
        f"{message.source.decode()}->{message.target.decode()}",
        NAMES[type(message)],
        f"term={message.term}",
    ]
    for name in ("previous", "entries", "last", "last-term", "index", "hint", "commit", "read"):
        if name in fields:
            words.append(f"{name}={fields[name]}")
    for name in ("granted", "accepted"):
        if name in fields:
            words.append(name if fields[name] else "refused")
    return " ".join(words + (["transfer"] if fields.get("transfer") else []))


@dataclass(frozen=True)
class Pattern:
    """Which messages a line means."""

    source: str
    target: str
    kind: type[Message] | None
    wanted: tuple[tuple[str, Any], ...]

    @classmethod
    def read(cls, text: str) -> Pattern:
        """Read `a->b append term=2 accepted`."""
        ends, *words = text.split()
        source, arrow, target = ends.partition("->")
        assert arrow, f"{ends!r} is no a->b"
        kind = KINDS[words.pop(0)] if words else None
        wanted: list[tuple[str, Any]] = []
        for word in words:
            name, equals, value = word.partition("=")
            assert equals or name in FLAGS, f"a message is never {word!r}"
            wanted.append((name, read_value(value) if equals else True))
        return cls(source, target, kind, tuple(wanted))

    def matches(self, message: Message) -> bool:
        """Whether it means this one."""
        ends = ((self.source, message.source), (self.target, message.target))
        if any(name not in ("*", id.decode()) for name, id in ends):
            return False
        if self.kind is not None and not isinstance(message, self.kind):
            return False
        fields = fields_of(message)
        for name, value in self.wanted:
            if name == "refused":
                if fields.get("granted", fields.get("accepted")) is not False:
                    return False
            elif name not in fields:
                raise AssertionError(f"{NAMES[type(message)]} has no {name!r}")
            elif fields[name] != value:
                return False
        return True

    def forged(self) -> Message:
        """Return a message that it means; what it does not say is zero, false or nothing."""
        assert self.kind is not None, "of what kind?"
        said = {LONG.get(name, name): value for name, value in self.wanted if name != "refused"}
        nothing: dict[str, Any] = {"granted": False, "accepted": False, "transfer": False, "entries": ()}
        names = [field.name for field in msgspec.structs.fields(self.kind)]
        fields = {name: said.pop(name, nothing.get(name, 0)) for name in names}
        assert not said, f"{NAMES[self.kind]} has no {said}"
        fields |= {"source": self.source.encode(), "target": self.target.encode()}
        if fields.get("entries"):
            first = fields["previous_index"] + 1
            fields["entries"] = tuple(replace(e, index=first + at) for at, e in enumerate(fields["entries"]))
        return self.kind(**fields)


def read_value(text: str) -> Any:
    """Read a number, or the entries of a forged append: `2:"x",2:"y"`."""
    if text.isdigit():
        return int(text)
    parts = [part.partition(":") for part in text.split(",")]
    return tuple(Entry(int(term), 0, Kind.COMMAND, data.strip('"').encode()) for term, _, data in parts)


def entry_text(entry: Entry) -> str:
    """`1:"x"`."""
    if entry.kind is Kind.CONFIGURATION:
        return f"{entry.term}:config"
    return f"{entry.term}:" + (f'"{entry.data.decode()}"' if entry.data else "noop")


def log_text(log: Log) -> str:
    """`[3.. 2:"y"]`."""
    words = [f"{log.snapshot.index}.."] if log.snapshot.index else []
    return "[" + " ".join(words + [entry_text(entry) for entry in log.entries]) + "]"


def configuration_text(configuration: Configuration) -> str:
    """`voters a b, learners c`."""
    parts = [
        f"{name} " + " ".join(id.decode() for id in ids)
        for name, ids in msgspec.structs.asdict(configuration).items()
        if ids
    ]
    return ", ".join(parts) or "nobody"


def read_configuration(text: str) -> Configuration:
    """Read what `configuration_text` writes."""
    parts: dict[str, tuple[bytes, ...]] = {}
    for part in text.split(","):
        name, *ids = part.split()
        parts[name] = tuple(sorted(id.encode() for id in ids))
    return Configuration(**parts)
