"""An independent reader of KLP 1: made from docs/klp.md alone, without knode.

`python tests/klp/klp_checker.py` checks every vector in tests/vectors and names what differs.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
from nacl.bindings import crypto_core_ed25519_is_valid_point
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

ROOT = Path(__file__).parent.parent.parent
VECTORS = ROOT / "tests" / "vectors"
KIB = 1024
HELLO, WELCOME, PROOF, REFUSE, BUNDLE, DATA, KEEPALIVE = range(1, 8)


class Refused(Exception):
    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


def need(condition: bool, code: str) -> None:
    if not condition:
        raise Refused(code)


# -- section 1: keys and signatures -------------------------------------------------------------


def verify(key: bytes, domain: str, signature: bytes, body: bytes) -> None:
    need(len(key) == 32 and crypto_core_ed25519_is_valid_point(key), "BAD_SIGNATURE")
    need(len(signature) == 64, "BAD_SIGNATURE")
    try:
        VerifyKey(key).verify(b"KLP/1/" + domain.encode() + b"\0" + body, signature)
    except BadSignatureError:
        raise Refused("BAD_SIGNATURE") from None


# -- section 2: encoding ------------------------------------------------------------------------

Check = Callable[[Any], bool]


def integer(low: int, high: int = 2**64 - 1) -> Check:
    return lambda value: type(value) is int and low <= value <= high


def binary(*sizes: int) -> Check:
    return lambda value: type(value) is bytes and len(value) in sizes


def blob(most: int) -> Check:
    return lambda value: type(value) is bytes and len(value) <= most


def string(most: int) -> Check:
    return lambda value: type(value) is str and len(value) <= most


def record(*checks: Check) -> Check:
    return lambda value: (
        type(value) is list
        and len(value) == len(checks)
        and all(check(item) for check, item in zip(checks, value, strict=True))
    )


def array(check: Check, least: int, most: int) -> Check:
    return lambda value: type(value) is list and least <= len(value) <= most and all(map(check, value))


def decode(data: bytes, check: Check) -> Any:
    try:
        value = msgpack.unpackb(data, raw=False, strict_map_key=False)
    except (ValueError, msgpack.UnpackException):
        raise Refused("BAD_FRAME") from None
    need(check(value), "BAD_FRAME")
    need(msgpack.packb(value, use_bin_type=True) == data, "NON_CANONICAL")
    return value


# -- section 6: messages ------------------------------------------------------------------------

counter = integer(1)
u32, u64 = integer(0, 2**32 - 1), integer(0)
stream_id = integer(1, 2**32 - 1)
body = blob(256 * KIB)
context = record(binary(0, 16), binary(0, 16), binary(0, 25))
FIELDS: dict[int, tuple[Check, ...]] = {
    1: (counter, binary(16), string(64), integer(1, 300_000), u32, context, body),
    2: (counter, body),
    3: (counter, string(32), string(1024), string(512)),
    4: (array(counter, 1, 256),),
    5: (counter,),
    6: (string(64), context, body),
    8: (stream_id, u64),
    9: (stream_id, u64, binary(32)),
    10: (stream_id, string(32)),
    11: (string(32), string(1024)),
}
REQUEST, CREDIT, STREAM_END, STREAM_RESET = 1, 8, 9, 10


def is_message(value: Any) -> bool:
    return (
        type(value) is list
        and bool(value)
        and type(value[0]) is int
        and value[0] in FIELDS
        and record(*FIELDS[value[0]])(value[1:])
    )


# -- section 4: handshake -----------------------------------------------------------------------


def is_hello(value: Any) -> bool:
    fields = record(
        array(integer(1, 65_535), 1, 16),
        binary(32),
        binary(32),
        binary(32),
        binary(16),
        binary(32),
        binary(32),
        binary(0, 32),
    )
    return fields(value) and value[0] == sorted(set(value[0]))


def read_handshake(hello_frame: bytes, welcome_frame: bytes, proof_frame: bytes) -> dict[str, Any]:
    """Check a whole handshake as both ends do, but for who may come in."""
    frames = (hello_frame, welcome_frame, proof_frame)
    need([frame[0] for frame in frames] == [HELLO, WELCOME, PROOF], "BAD_FRAME")
    need(all(len(frame) <= KIB for frame in frames), "TOO_LARGE")
    hello = decode(hello_frame[1:], is_hello)
    signature, welcome_body = welcome_frame[1:65], welcome_frame[65:]
    theirs, version = decode(welcome_body, record(is_hello, integer(1, 65_535)))
    need(theirs[7] == b"", "BAD_FRAME")
    need(hello[6] == theirs[6], "CHANNEL_MISMATCH")
    common = set(hello[0]) & set(theirs[0])
    need(bool(common), "UNSUPPORTED_VERSION")
    need(version == max(common), "DOWNGRADE")
    need(hello[1] == theirs[1], "WRONG_NETWORK")
    parts = (hello_frame[1:], welcome_body)
    transcript = b"KLP/1/transcript\0" + b"".join(struct.pack(">I", len(part)) + part for part in parts)
    verify(theirs[2], "hs-r", signature, transcript)
    need(len(proof_frame) == (129 if hello[7] else 65), "BAD_FRAME")
    verify(hello[2], "hs-i", proof_frame[1:65], transcript)
    if hello[7]:
        verify(hello[7], "ticket", proof_frame[65:], transcript)
    return {
        "initiator": hello[2],
        "responder": theirs[2],
        "ticket": hello[7],
        "cell_id": hello[1],
        "initiator_boot": hello[4],
        "responder_boot": theirs[4],
        "roster_digest": hello[5],
        "channel_binding": hello[6],
        "version": version,
        "session_id": hashlib.sha256(transcript).digest(),
    }


# -- sections 5 and 7: one direction of a session -----------------------------------------------


@dataclass
class Stream:
    received: bytes = b""
    credit: int = 1024 * KIB
    stopping: bool = False


@dataclass
class Direction:
    """What one end knows of the other's frames."""

    source: bytes
    destination: bytes
    session: bytes
    odd: bool
    next_sequence: int = 1
    named: int = 0
    streams: dict[int, Stream] = field(default_factory=dict)
    told_us: int = 0

    def read(self, frame: bytes, back: Direction) -> list[list[Any]]:
        need(len(frame) > 0 and HELLO <= frame[0] <= KEEPALIVE, "BAD_FRAME")
        need(frame[0] in (BUNDLE, DATA, KEEPALIVE), "BAD_FRAME")
        if frame[0] == KEEPALIVE:
            return self.keepalive(frame, back)
        return self.bundle(frame, back) if frame[0] == BUNDLE else self.data(frame)

    def bundle(self, frame: bytes, back: Direction) -> list[list[Any]]:
        need(len(frame) <= 512 * KIB + 176, "TOO_LARGE")
        need(len(frame) >= 1 + 64 + 108 + 2, "BAD_FRAME")
        signature, signed = frame[1:65], frame[65:]
        source, destination, session, lane, sequence = struct.unpack(">32s32s32sIQ", signed[:108])
        expected = (self.source, self.destination, self.session)
        need((source, destination, session) == expected, "NOT_RECIPIENT")
        need(lane == 0, "BAD_FRAME")
        verify(source, "bundle", signature, signed)
        need(sequence == self.next_sequence, "REPLAY")
        messages: list[list[Any]] = decode(signed[108:], array(is_message, 1, 64))
        self.next_sequence += len(messages)
        for message in messages:
            self.streams_of(message, back)
        return messages

    def streams_of(self, message: list[Any], back: Direction) -> None:
        if message[0] == REQUEST and message[5]:
            stream = message[5]
            need(stream % 2 == self.odd and stream > self.named, "BAD_FRAME")
            need(len(self.streams) < 64, "RATE_LIMITED")
            self.named = stream
            self.streams[stream] = Stream()
        elif message[0] == CREDIT:
            need(message[1] % 2 == back.odd and message[1] <= back.named, "BAD_FRAME")
            if message[1] in back.streams:
                need(message[2] >= back.streams[message[1]].credit, "BAD_FRAME")
                back.streams[message[1]].credit = message[2]
        elif message[0] == STREAM_END:
            stream = self.streams.pop(message[1], None)
            need(stream is not None, "BAD_FRAME")
            found = [len(stream.received), hashlib.sha256(stream.received).digest()]
            need(stream.stopping or message[2:] == found, "BAD_SIGNATURE")
        elif message[0] == STREAM_RESET:
            if message[1] % 2 == self.odd:
                need(self.streams.pop(message[1], None) is not None, "BAD_FRAME")
            else:
                need(message[1] <= back.named, "BAD_FRAME")
                if message[1] in back.streams:
                    back.streams[message[1]].stopping = True

    def keepalive(self, frame: bytes, back: Direction) -> list[list[Any]]:
        need(len(frame) == 32, "BAD_FRAME")
        sent_us, echo_us, _, _, _, _, cpu_percent = struct.unpack(">QQQHHHB", frame[1:])
        need(sent_us >= 1 and cpu_percent <= 100, "BAD_FRAME")
        need(sent_us >= self.told_us and echo_us <= back.told_us, "BAD_FRAME")
        self.told_us = sent_us
        return []

    def data(self, frame: bytes) -> list[list[Any]]:
        need(len(frame) <= 5 + 64 * KIB, "TOO_LARGE")
        need(len(frame) > 5, "BAD_FRAME")
        (number,) = struct.unpack(">I", frame[1:5])
        need(number in self.streams, "BAD_FRAME")
        stream = self.streams[number]
        stream.received += frame[5:]
        need(len(stream.received) <= stream.credit, "NO_CREDIT")
        return []


def directions(vector: dict[str, Any]) -> tuple[Direction, Direction]:
    initiator, responder, session = (
        bytes.fromhex(vector[name]) for name in ("initiator", "responder", "session_id")
    )
    return Direction(initiator, responder, session, True), Direction(responder, initiator, session, False)


# -- section 6: at most once --------------------------------------------------------------------


@dataclass
class Memory:
    """What one node remembers of one source, by the letter of the document."""

    own_boot: str
    seen: dict[str, set[int]] = field(default_factory=dict)
    entries: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)

    def ask(self, step: dict[str, Any]) -> str:
        name = (step["boot"], step["counter"])
        if step["destination_boot"] != self.own_boot:
            return "UNKNOWN"
        entry = self.entries.get(name)
        if entry and not entry["acknowledged"]:
            if entry["answer"] is None:
                return "running"
            if step["now"] < entry["until"]:
                return str(entry["answer"])
        seen = self.seen.setdefault(step["boot"], set())
        if step["counter"] in seen or (seen and max(seen) - step["counter"] >= 4096):
            return "UNKNOWN"
        seen.add(step["counter"])
        until = step["now"] + step["ttl_ms"] / 1000 + 60
        self.entries[name] = {"answer": None, "acknowledged": False, "until": until}
        return "run"


# -- section 14: the roster ---------------------------------------------------------------------

is_id, is_key = binary(32), binary(32)
issued = integer(0, 2**62)
kept_ids = array(is_id, 0, 1024)
ROLES = ("admin", "worker", "voter", "observer")


def is_role(value: Any) -> bool:
    return value in ROLES


def is_name(value: Any) -> bool:
    return type(value) is str and re.fullmatch("[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", value) is not None


STATEMENTS: dict[str, tuple[int, dict[str, Check]]] = {
    "GENESIS": (1, {"signer": is_key, "recovery": is_key, "nonce": binary(16), "issued": issued}),
    "ADD": (
        2,
        {
            "signer": is_key,
            "era": is_id,
            "member": is_key,
            "name": is_name,
            "role": is_role,
            "issued": issued,
        },
    ),
    "ROLE": (
        3,
        {
            "signer": is_key,
            "era": is_id,
            "member": is_key,
            "role": is_role,
            "kept": kept_ids,
            "issued": issued,
        },
    ),
    "REVOKE": (4, {"signer": is_key, "era": is_id, "member": is_key, "kept": kept_ids, "issued": issued}),
    "ROTATE": (
        5,
        {
            "signer": is_key,
            "era": is_id,
            "member": is_key,
            "key": is_key,
            "proof": binary(64),
            "kept": kept_ids,
            "issued": issued,
        },
    ),
    "RECOVER": (
        6,
        {
            "signer": is_key,
            "cell": is_id,
            "owner": is_key,
            "members": array(record(is_key, is_name, is_role, issued), 0, 256),
            "revoked": array(is_key, 0, 768),
            "issued": issued,
        },
    ),
    "INCARNATION": (
        7,
        {
            "signer": is_key,
            "era": is_id,
            "number": integer(1, 2**31),
            "predecessor": is_id,
            "replica": binary(40),
            "index": issued,
            "term": issued,
            "issued": issued,
        },
    ),
    "KEEP": (8, {"signer": is_key, "era": is_id, "incarnation": is_id, "issued": issued}),
}
KINDS = {tag: (name, fields) for name, (tag, fields) in STATEMENTS.items()}


def is_statement(value: Any) -> bool:
    if type(value) is not list or not value or type(value[0]) is not int or value[0] not in KINDS:
        return False
    return record(*KINDS[value[0]][1].values())(value[1:])


@dataclass(frozen=True)
class Statement:
    id: bytes
    kind: str
    fields: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.fields[name]

    @property
    def turn(self) -> tuple[int, bytes]:
        return self.issued, self.id


def read_statement(data: bytes) -> Statement:
    value = decode(data[64:], is_statement)
    kind, names = KINDS[value[0]]
    fields = dict(zip(names, value[1:], strict=True))
    if kind == "ROTATE":
        parts = (fields[name] for name in ("era", "member", "signer", "key"))
        verify(fields["key"], "rotate", fields["proof"], b"".join(parts))
    verify(fields["signer"], "member", data[:64], data[64:])
    return Statement(hashlib.sha256(data[64:]).digest(), kind, fields)


@dataclass
class Path:
    keys: list[bytes]
    taken: list[Statement] = field(default_factory=list)
    parted: bool = False

    @property
    def every_key(self) -> set[bytes]:
        return {*self.keys, *(step.key for step in self.taken)}


def read_roster(cell: bytes, statements: list[Statement]) -> dict[str, Any]:
    """Say what a set means, by the letter of the document."""
    genesis = next(s for s in statements if s.id == cell)
    # 1. Eras.
    recovers = [
        s for s in statements if s.kind == "RECOVER" and (s.cell, s.signer) == (cell, genesis.recovery)
    ]
    recovers.sort(key=lambda s: s.turn)
    eras = [(cell, genesis.signer, {}, [])]
    eras += [(s.id, s.owner, {m[0]: m[1:] for m in s.members}, s.revoked) for s in recovers]
    era, owner, began_with, era_revoked = eras[-1]
    names = [one[0] for one in eras]

    # 2. Paths.
    def counts(step: Statement) -> bool:
        return step.era in names and all(step.member in one[2] for one in eras[names.index(step.era) + 1 :])

    rotates = sorted((s for s in statements if s.kind == "ROTATE" and counts(s)), key=lambda s: s.id)

    def path_of(member: bytes) -> Path:
        path = Path([member])
        while len(path.keys) <= 16:
            steps = [s for s in rotates if (s.member, s.signer) == (member, path.keys[-1])][:2]
            path.taken += steps
            if not steps:
                return path
            if len(steps) == 2 or steps[0].key in path.keys:
                path.parted = True
                return path
            path.keys.append(steps[0].key)
        return path

    # 3. Revocations.
    revokes = [
        s
        for s in statements
        if s.kind == "REVOKE"
        and ((s.signer == genesis.recovery and s.era in names) or (s.signer, s.era) == (owner, era))
    ]
    kept_of: dict[bytes, set[bytes]] = {}
    for s in revokes:
        kept_of[s.member] = kept_of.get(s.member, set(s.kept)) & set(s.kept)
    # 4. Grants.
    grants = sorted(
        (s for s in statements if s.kind in ("ADD", "ROLE") and s.era == era), key=lambda s: s.turn
    )
    of_owner = [s for s in grants if s.signer == owner]
    last_of_owner = {s.member: s for s in of_owner}
    admins = {s.member for s in of_owner if s.role == "admin"}
    admins |= {member for member, known in began_with.items() if known[1] == "admin"}
    kept_grants, counting = set(of_owner_ids := {s.id for s in of_owner}), set(of_owner_ids)
    for admin in admins:
        path = path_of(admin)
        theirs = [
            s
            for s in grants
            if s.signer in path.every_key
            and s.signer != owner
            and s.role != "admin"
            and (admin not in kept_of or s.id in kept_of[admin])
        ][:512]
        kept_grants |= {s.id for s in theirs}
        for s in theirs:
            ending = last_of_owner.get(admin)
            if admin in kept_of:
                good = True
            elif ending is not None and ending.role != "admin":
                good = s.id in ending.fields.get("kept", ())
            else:
                ends = [step for step in path.taken if step.signer == s.signer]
                good = s.signer in path.keys and all(s.id in step.kept for step in ends)
            if good:
                counting.add(s.id)
    # 5. Members.
    last_add = {s.member: s for s in grants if s.id in counting and s.kind == "ADD"}
    last_grant = {s.member: s for s in grants if s.id in counting}
    members: dict[bytes, dict[str, Any]] = {}
    for member in {*began_with, *last_add}:
        name, role, joined = began_with.get(member, (None, None, None))
        began_admin = role == "admin"
        if member in last_add:
            name, joined = last_add[member].name, last_add[member].issued
        if member in last_grant:
            role = last_grant[member].role
        if member in last_of_owner and last_of_owner[member].role == "admin":
            role = "admin"
        if member not in last_of_owner and began_admin:
            role = "admin"
        members[member] = {"name": name, "role": role, "joined": joined}
    # 6. Who is in.
    known = {*began_with, *(s.member for s in of_owner)}
    known |= {s.member for s in grants if s.id in kept_grants and s.kind == "ADD"}
    paths = {member: path_of(member) for member in known}
    taken = {step.id: step for path in paths.values() for step in path.taken}
    leads_to = [step.key for step in taken.values()]
    revoked_ids = {*kept_of, *era_revoked}
    revoked = {key for i in revoked_ids for key in (paths[i].every_key if i in known else (i,))}
    contested = {
        member
        for member, path in paths.items()
        if path.parted
        or member in leads_to
        or any(leads_to.count(key) > 1 for key in path.keys[1:])
        or path.every_key & revoked
    }
    # 7. Incarnations.
    owner_of = {one[0]: one[1] for one in eras}
    begun = [
        s
        for s in statements
        if s.kind == "INCARNATION" and s.era in owner_of and s.signer in (owner_of[s.era], genesis.recovery)
    ]
    keeps = [
        s
        for s in statements
        if s.kind == "KEEP"
        and ((s.signer == genesis.recovery and s.era in names) or (s.signer, s.era) == (owner, era))
    ]
    keeps.sort(key=lambda s: s.turn)

    def is_counting(s: Statement) -> bool:
        return (
            s.signer == genesis.recovery
            or (s.signer, s.era) == (owner, era)
            or any(keep.incarnation == s.id for keep in keeps)
        )

    number, at = 0, cell
    for keep in keeps:
        for s in begun:
            if s.id == keep.incarnation:
                number, at = s.number, s.id
    while True:
        following = [s for s in begun if is_counting(s) and (s.number, s.predecessor) == (number + 1, at)]
        if len(following) != 1:
            break
        number, at = following[0].number, following[0].id
    voiced: dict[bytes, int] = {}
    kept_begun = []
    for s in sorted(begun, key=lambda s: s.turn):
        if not is_counting(s):
            voiced[s.signer] = voiced.get(s.signer, 0) + 1
        if is_counting(s) or voiced[s.signer] <= 16:
            kept_begun.append(s.id)
    # The digest.
    kept = sorted(
        {
            cell,
            *(s.id for s in recovers),
            *(s.id for s in revokes),
            *kept_grants,
            *taken,
            *kept_begun,
            *(s.id for s in keeps),
        }
    )
    return {
        "era": era.hex(),
        "owner": owner.hex(),
        "kept": [i.hex() for i in kept],
        "digest": hashlib.sha256(b"KLP/1/roster\0" + b"".join(kept)).hexdigest(),
        "members": [
            {"id": member.hex(), "key": paths[member].keys[-1].hex(), **members[member]}
            for member in sorted(members)
            if member not in revoked_ids | contested
        ],
        "contested": [member.hex() for member in sorted(members) if member in contested - revoked_ids],
        "revoked": [key.hex() for key in sorted(revoked)],
        "incarnation": [number, at.hex()],
        "rivals": sorted(s.id.hex() for s in following),
    }


# -- the vectors --------------------------------------------------------------------------------

ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def base58(data: bytes) -> str:
    number, text = int.from_bytes(data, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        text = ALPHABET[digit] + text
    return "1" * (len(data) - len(data.lstrip(b"\0"))) + text


def untyped(value: Any) -> Any:
    """Turn {"hex": …} of a vector into bytes."""
    if isinstance(value, dict):
        return bytes.fromhex(value["hex"])
    return [untyped(item) for item in value] if isinstance(value, list) else value


def refusal_of(action: Callable[[], object]) -> str:
    try:
        action()
    except Refused as refused:
        return refused.code
    return "nothing"


def check_keys(vector: dict[str, Any]) -> None:
    for key in vector["keys"]:
        public = bytes(SigningKey(bytes.fromhex(key["seed"])).verify_key)
        assert public.hex() == key["public"]
        assert base58(bytes.fromhex("002408011220") + public) == key["peer_id"]
        assert "did:key:z" + base58(bytes.fromhex("ed01") + public) == key["did"]
    for ticket in vector["tickets"]:
        seed = hashlib.sha256(b"KLP/1/ticket-key\0" + bytes.fromhex(ticket["secret"])).digest()
        assert seed.hex() == ticket["seed"]
        assert bytes(SigningKey(seed).verify_key).hex() == ticket["public"]


def check_objects(vector: dict[str, Any]) -> None:
    for item in vector["objects"]:
        signed = bytes.fromhex(item["signed"])
        verify(bytes.fromhex(item["key"]), item["domain"], signed[:64], signed[64:])
        assert signed[64:].hex() == item["body"]
        assert hashlib.sha256(signed[64:]).hexdigest() == item["id"]
    for item in vector["refused"]:
        key, signed = bytes.fromhex(item["key"]), bytes.fromhex(item["signed"])
        code = refusal_of(
            lambda key=key, item=item, signed=signed: verify(key, item["domain"], signed[:64], signed[64:])
        )
        assert code == "BAD_SIGNATURE", item["why"]


def check_messages(vector: dict[str, Any]) -> None:
    for item in vector["messages"]:
        value = untyped(item["value"])
        assert decode(bytes.fromhex(item["encoded"]), is_message) == value
        assert msgpack.packb(value, use_bin_type=True).hex() == item["encoded"]
    assert {untyped(item["value"])[0] for item in vector["messages"]} == set(FIELDS)


def check_handshakes(vector: dict[str, Any]) -> None:
    for item in vector["handshakes"]:
        hello, welcome, proof = (bytes.fromhex(item[name]) for name in ("hello", "welcome", "proof"))
        for name, value in read_handshake(hello, welcome, proof).items():
            assert item[name] == (value.hex() if isinstance(value, bytes) else value), name
        for index in range(1, len(proof)):
            changed = proof[:index] + bytes([proof[index] ^ 1]) + proof[index + 1 :]
            code = refusal_of(
                lambda hello=hello, welcome=welcome, changed=changed: read_handshake(hello, welcome, changed)
            )
            assert code == "BAD_SIGNATURE"
    for item in vector["refusals"]:
        frame = bytes.fromhex(item["frame"])
        assert frame[0] == REFUSE
        told = decode(frame[1:], record(string(32), string(1024), string(512)))
        assert told == [item["code"], item["message"], item["next_step"]]


def check_session(vector: dict[str, Any]) -> None:
    initiator, responder = directions(vector)
    for step in vector["steps"]:
        here, back = (initiator, responder) if step["from"] == "initiator" else (responder, initiator)
        here.read(bytes.fromhex(step["frame"]), back)
    assert not initiator.streams
    assert not responder.streams
    assert initiator.next_sequence > 20
    assert initiator.told_us
    assert responder.told_us


def check_rejections(vector: dict[str, Any]) -> None:
    for item in vector["frames"]:
        initiator, responder = directions(vector)
        code = refusal_of(
            lambda item=item, initiator=initiator, responder=responder: initiator.read(
                bytes.fromhex(item["frame"]), responder
            )
        )
        assert code == item["code"], f"{item['why']}: {code} instead of {item['code']}"


def check_answers(vector: dict[str, Any]) -> None:
    memory = Memory(vector["own_boot"])
    for step in vector["steps"]:
        if step["do"] == "ask":
            assert memory.ask(step) == step["verdict"], step
            continue
        entry = memory.entries[vector["source_boot"], step["counter"]]
        if step["do"] == "finish":
            entry["answer"] = step["answer"]
        else:
            entry["acknowledged"] = True


def check_errors(vector: dict[str, Any]) -> None:
    section = (ROOT / "docs" / "klp.md").read_text().split("## 8.")[1].split("## 9.")[0]
    rows = re.findall(r"^\| ([A-Z_]+) \| (.+) \| (yes|no) \| (\d+) \|$", section, re.MULTILINE)
    written = [
        {"code": code, "meaning": meaning, "retryable": retryable == "yes", "exit_code": int(exit_code)}
        for code, meaning, retryable, exit_code in rows
    ]
    assert written == vector["errors"]


def check_roster(vector: dict[str, Any]) -> None:
    cell = bytes.fromhex(vector["cell"])
    for item in vector["rosters"]:
        statements = [read_statement(bytes.fromhex(data)) for data in item["statements"]]
        for name, value in read_roster(cell, statements).items():
            assert value == item[name], f"{item['name']}: {name}"
        kept = [s for s in reversed(statements) if s.id.hex() in item["kept"]]
        assert read_roster(cell, kept) == read_roster(cell, statements), item["name"]
    for item in vector["refused"]:
        code = refusal_of(lambda item=item: read_statement(bytes.fromhex(item["statement"])))
        assert code == item["code"], item["why"]


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "keys": check_keys,
    "objects": check_objects,
    "messages": check_messages,
    "handshakes": check_handshakes,
    "session": check_session,
    "rejections": check_rejections,
    "answers": check_answers,
    "errors": check_errors,
    "roster": check_roster,
}


def main() -> int:
    files = {path.stem: path for path in VECTORS.glob("*.json")}
    if set(files) != set(CHECKS):
        print(f"vectors {sorted(files)}, checks {sorted(CHECKS)}")
        return 1
    for name, check in CHECKS.items():
        check(json.loads(files[name].read_text()))
        print(f"{name}: agrees")
    assert "knode" not in sys.modules
    return 0


if __name__ == "__main__":
    sys.exit(main())
