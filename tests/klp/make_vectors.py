"""Writes tests/vectors/*.json from knode: `python tests/klp/make_vectors.py`.

Everything is fixed: seeds, nonces, boots. A test makes them again and compares; another lets
klp_checker.py, which knows only docs/klp.md, read them.
"""

from __future__ import annotations

import json
from pathlib import Path

from klp_pair import (
    ALICE,
    ALICE_BOOT,
    ALICE_SAYS,
    BOB,
    BOB_BOOT,
    BOB_SAYS,
    CHANNEL,
    MALLORY,
    initiator,
    request,
    responder,
    sessions,
)
from roster_vectors import roster

from knode.errors import TABLE, Code, KnodeError
from knode.identity import KeyPair
from knode.klp import (
    Acknowledge,
    Answered,
    Answers,
    Cancel,
    Context,
    Credit,
    Domain,
    Established,
    Event,
    Failure,
    Fresh,
    Goodbye,
    Initiator,
    Keepalive,
    Load,
    Message,
    Refused,
    Request,
    Responder,
    Response,
    Running,
    StreamEnd,
    StreamReset,
    encode,
    limits,
    object_id,
    refusal,
    sign,
    ticket_key,
)
from knode.klp.codec import encode_array
from knode.klp.frames import Kind
from knode.klp.objects import signature

VECTORS = Path(__file__).parent.parent / "vectors"
SECRET = bytes(range(16))

MESSAGES: list[Message] = [
    Request(1, BOB_BOOT, "task.run", 30_000, 0, Context(), b""),
    Request(
        2**64 - 1,
        BOB_BOOT,
        "méthode",
        limits.MAX_TTL_MS,
        2**32 - 1,
        Context(b"c" * 16, b"d" * 16, bytes(range(25))),
        b"\x00\xff",
    ),
    Response(1, b"done"),
    Response(65_536, bytes(256)),
    Failure(2, "NO_AGENT", "the node has no such agent", "knode agent list"),
    Acknowledge((1, 127, 128, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32, 2**63)),
    Cancel(3),
    Event("task.progress", Context(b"c" * 16), b"half"),
    Credit(1, 2**40),
    StreamEnd(1, 0, bytes(32)),
    StreamReset(2, "CANCELLED"),
    Goodbye("UNAVAILABLE", "the node is going down"),
]


def plain(value: object) -> object:
    """Return a Struct as what MessagePack holds: arrays, numbers, text; bytes as {"hex": …}."""
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if hasattr(value, "__struct_fields__"):
        tag = value.__struct_config__.tag
        fields = [plain(getattr(value, name)) for name in value.__struct_fields__]
        return fields if tag is None else [tag, *fields]
    return value


def keys() -> dict[str, object]:
    named = {"alice": ALICE, "bob": BOB, "mallory": MALLORY}
    return {
        "keys": [
            {
                "name": name,
                "seed": key.seed.hex(),
                "public": key.public.raw.hex(),
                "peer_id": key.public.node_id,
                "did": key.public.did,
            }
            for name, key in named.items()
        ],
        "tickets": [
            {"secret": secret.hex(), "seed": key.seed.hex(), "public": key.public.raw.hex()}
            for secret in (SECRET, bytes(16), b"\xff" * 16)
            for key in [ticket_key(secret)]
        ],
    }


def objects() -> dict[str, object]:
    body = b"any bytes"
    return {
        "objects": [
            {
                "domain": domain.value,
                "key": ALICE.public.raw.hex(),
                "signed": sign(ALICE, domain, body).hex(),
                "body": body.hex(),
                "id": object_id(sign(ALICE, domain, body)).hex(),
            }
            for domain in Domain
        ],
        "refused": [
            {
                "why": "signed for another domain",
                "domain": Domain.NODE.value,
                "key": ALICE.public.raw.hex(),
                "signed": sign(ALICE, Domain.MEMBER, body).hex(),
            },
            {
                "why": "signed by another key",
                "domain": Domain.NODE.value,
                "key": BOB.public.raw.hex(),
                "signed": sign(ALICE, Domain.NODE, body).hex(),
            },
            {
                "why": "a small-order key, under which R = 1, S = 0 solves the equation for any body",
                "domain": Domain.NODE.value,
                "key": (b"\x01" + bytes(31)).hex(),
                "signed": (b"\x01" + bytes(63) + body).hex(),
            },
        ],
    }


def messages() -> dict[str, object]:
    return {"messages": [{"value": plain(message), "encoded": encode(message).hex()} for message in MESSAGES]}


def _handshake(name: str, a: Initiator, b: Responder, ticket: KeyPair | None) -> dict[str, object]:
    hello = a.hello()
    welcome = b.receive_hello(hello)
    proof, of_a = a.receive(welcome)
    of_b = b.receive_auth(proof)
    assert of_a.session_id == of_b.session_id
    return {
        "name": name,
        "initiator": ALICE.public.raw.hex(),
        "responder": BOB.public.raw.hex(),
        "ticket": ticket.public.raw.hex() if ticket else "",
        "channel_binding": CHANNEL.hex(),
        "cell_id": ALICE_SAYS.cell_id.hex(),
        "initiator_boot": ALICE_SAYS.boot.hex(),
        "responder_boot": BOB_SAYS.boot.hex(),
        "roster_digest": ALICE_SAYS.roster_digest.hex(),
        "hello": hello.hex(),
        "welcome": welcome.hex(),
        "proof": proof.hex(),
        "version": of_a.version,
        "session_id": of_a.session_id.hex(),
    }


def handshakes() -> dict[str, object]:
    ticket = ticket_key(SECRET)
    errors = [
        KnodeError(Code.TICKET_USED, "the invitation was used", "ask for a new one with 'knode invite'"),
        KnodeError(Code.UNKNOWN_PEER, "not a member of this cell"),
    ]
    return {
        "handshakes": [
            _handshake("between members", initiator(), responder(), None),
            _handshake("a node that joins with a ticket", initiator(ticket=ticket), responder(), ticket),
        ],
        "refusals": [
            {
                "code": error.code.value,
                "message": error.message,
                "next_step": error.next_step,
                "frame": refusal(error).hex(),
            }
            for error in errors
        ],
    }


def session() -> dict[str, object]:
    """One conversation, frame by frame, with what each frame says."""
    a, b = sessions()
    steps: list[dict[str, object]] = []

    def carry(source: str) -> None:
        here, there = (a, b) if source == "initiator" else (b, a)
        while (frame := here.next_frame()) is not None:
            there.receive(frame)
            steps.append({"from": source, "frame": frame.hex()})

    a.send(request(1, body=b"count the words"))
    a.keep_alive(Keepalive(5_000_000, 0, 0, Load(0, 0, 2, 3)))
    carry("initiator")
    b.keep_alive(Keepalive(2**64 - 1, 5_000_000, 1_234, Load(65_535, 1, 256, 100)))
    b.send(Event("task.progress", Context(), b"half"))
    b.send(Response(1, b"42"))
    carry("responder")
    stream = a.open_stream()
    a.keep_alive(Keepalive(5_000_000, 2**64 - 1, 0, Load(0, 0, 2, 3)))
    a.acknowledge(1)
    a.send(request(2, stream=stream, body=b"with a file"))
    carry("initiator")
    a.write(stream, b"the file, first part; ")
    carry("initiator")
    a.write(stream, b"second part")
    a.end(stream)
    carry("initiator")
    back = b.open_stream()
    b.send(Request(1, ALICE_BOOT, "artifact.push", 60_000, back, Context(), b""))
    carry("responder")
    a.reset(back, "NO_AGENT")
    carry("initiator")
    carry("responder")
    for counter in range(3, 23):
        a.send(request(counter))
    a.send(Goodbye("UNAVAILABLE", "closing"))
    carry("initiator")
    return {**_identity(a.established), "steps": steps}


def _identity(established: Established) -> dict[str, object]:
    return {
        "initiator": ALICE.public.raw.hex(),
        "responder": BOB.public.raw.hex(),
        "session_id": established.session_id.hex(),
    }


def rejections() -> dict[str, object]:
    """First frames of the initiator that the responder refuses, each with its error."""
    a, _ = sessions()
    ours, theirs, session_id = ALICE.public.raw, BOB.public.raw, a.established.session_id
    one = encode(Cancel(1))

    def bundle(
        messages: bytes,
        *,
        source: bytes = ours,
        destination: bytes = theirs,
        session: bytes = session_id,
        lane: int = 0,
        sequence: int = 1,
        key: KeyPair = ALICE,
        domain: Domain = Domain.BUNDLE,
    ) -> str:
        body = (
            source + destination + session + lane.to_bytes(4, "big") + sequence.to_bytes(8, "big") + messages
        )
        return (bytes([Kind.BUNDLE]) + signature(key, domain, body) + body).hex()

    good = encode_array([one])
    data = bytes([Kind.DATA])
    alive = Keepalive(1, 0, 0, Load(0, 0, 1, 100)).frame()
    cases: list[tuple[str, Code, str]] = [
        ("an empty frame", Code.BAD_FRAME, ""),
        ("an unknown kind", Code.BAD_FRAME, "00"),
        ("a handshake frame in a session", Code.BAD_FRAME, (bytes([Kind.PROOF]) + bytes(64)).hex()),
        ("a bundle too short", Code.BAD_FRAME, bundle(good)[:200]),
        ("a bundle without messages", Code.BAD_FRAME, bundle(encode_array([]))),
        ("a bundle of 65 messages", Code.BAD_FRAME, bundle(encode_array([one] * 65))),
        ("bytes after the messages", Code.BAD_FRAME, bundle(good + b"\x00")),
        ("another lane", Code.BAD_FRAME, bundle(good, lane=1)),
        ("from another node", Code.NOT_RECIPIENT, bundle(good, source=MALLORY.public.raw)),
        ("for another node", Code.NOT_RECIPIENT, bundle(good, destination=MALLORY.public.raw)),
        ("of another session", Code.NOT_RECIPIENT, bundle(good, session=bytes(32))),
        ("signed by another key", Code.BAD_SIGNATURE, bundle(good, key=MALLORY)),
        ("signed for another domain", Code.BAD_SIGNATURE, bundle(good, domain=Domain.MEMBER)),
        ("a sequence that was", Code.REPLAY, bundle(good, sequence=0)),
        ("a sequence left out", Code.REPLAY, bundle(good, sequence=2)),
        ("an integer a byte too long", Code.NON_CANONICAL, bundle(b"\x91\x92\x05\xcc\x01")),
        ("an array header too long", Code.NON_CANONICAL, bundle(b"\xdc\x00\x01" + one)),
        ("an unknown message", Code.BAD_FRAME, bundle(b"\x91\x92\x63\x01")),
        ("a counter of 0", Code.BAD_FRAME, bundle(b"\x91\x92\x05\x00")),
        ("a negative counter", Code.BAD_FRAME, bundle(b"\x91\x92\x05\xff")),
        ("a floating-point counter", Code.BAD_FRAME, bundle(b"\x91\x92\x05\xcb" + bytes(8))),
        ("a field too many", Code.BAD_FRAME, bundle(b"\x91\x93\x05\x01\x01")),
        ("a field too few", Code.BAD_FRAME, bundle(b"\x91\x91\x05")),
        ("a map", Code.BAD_FRAME, bundle(b"\x91\x82\x05\x01\x02\x03")),
        ("text that is not UTF-8", Code.BAD_FRAME, bundle(b"\x91\x93\x0a\x01\xa1\xff")),
        ("a stream of the wrong side", Code.BAD_FRAME, bundle(encode_array([encode(request(1, stream=2))]))),
        ("credit for no stream", Code.BAD_FRAME, bundle(encode_array([encode(Credit(2, 1))]))),
        ("the end of no stream", Code.BAD_FRAME, bundle(encode_array([encode(StreamEnd(1, 0, bytes(32)))]))),
        ("data for no stream", Code.BAD_FRAME, (data + b"\x00\x00\x00\x01x").hex()),
        ("a keepalive a byte too short", Code.BAD_FRAME, alive[:-1].hex()),
        ("a keepalive a byte too long", Code.BAD_FRAME, (alive + b"\x00").hex()),
        ("a keepalive without its time", Code.BAD_FRAME, (alive[:1] + bytes(8) + alive[9:]).hex()),
        ("a processor at 101 %", Code.BAD_FRAME, (alive[:-1] + b"\x65").hex()),
        ("the echo of nothing that was sent", Code.BAD_FRAME, (alive[:16] + b"\x01" + alive[17:]).hex()),
        ("data without data", Code.BAD_FRAME, (data + b"\x00\x00\x00\x01").hex()),
    ]
    return {
        **_identity(a.established),
        "frames": [{"why": why, "code": code.value, "frame": frame} for why, code, frame in cases],
    }


def answers() -> dict[str, object]:
    """What a node remembers of requests, step by step; `now` in seconds."""
    memory = Answers(BOB_BOOT)
    other_boot, later_boot = bytes(15) + b"\x01", bytes(15) + b"\x02"
    source = ALICE.public.raw
    steps: list[dict[str, object]] = []

    def ask(counter: int, now: float, *, boot: bytes = ALICE_BOOT, destination: bytes = BOB_BOOT) -> None:
        asked = Request(counter, destination, "test", 1000, 0, Context(), b"")
        match memory.begin(source, boot, asked, now):
            case Fresh():
                verdict = "run"
            case Running():
                verdict = "running"
            case Answered(message):
                verdict = encode(message).hex()
            case Refused(code):
                verdict = code.value
        steps.append(
            {
                "do": "ask",
                "now": now,
                "boot": boot.hex(),
                "destination_boot": destination.hex(),
                "counter": counter,
                "ttl_ms": 1000,
                "verdict": verdict,
            }
        )

    def finish(counter: int, now: float) -> None:
        message = Response(counter, b"done")
        memory.finish(source, ALICE_BOOT, counter, message, now)
        steps.append({"do": "finish", "now": now, "counter": counter, "answer": encode(message).hex()})

    def acknowledge(counter: int, now: float) -> None:
        memory.acknowledge(source, ALICE_BOOT, (counter,))
        steps.append({"do": "acknowledge", "now": now, "counter": counter})

    ask(1, 0.0)
    ask(1, 0.25)
    ask(1, 0.25, boot=later_boot)
    ask(1, 0.25, destination=other_boot)
    finish(1, 0.5)
    ask(1, 0.75)
    acknowledge(1, 1.0)
    ask(1, 1.25)
    ask(5, 2.0)
    ask(3, 2.0)
    acknowledge(3, 2.25)
    ask(3, 2.5)
    finish(3, 2.75)
    ask(3, 3.0)
    finish(5, 3.0)
    memory.expire(62.75)
    ask(5, 62.75)
    memory.expire(63.0)
    ask(5, 63.0)
    ask(4096 + 4, 64.0)
    ask(4, 64.25)
    ask(6, 64.25)
    ask(2**64 - 1, 65.0)
    ask(4096 + 4, 65.25)
    ask(4096 + 5, 65.25)
    ask(2**64 - 2, 65.5)
    return {
        "source": source.hex(),
        "own_boot": BOB_BOOT.hex(),
        "source_boot": ALICE_BOOT.hex(),
        "steps": steps,
    }


def errors() -> dict[str, object]:
    return {
        "errors": [
            {"code": code.value, "meaning": m.text, "retryable": m.retryable, "exit_code": m.exit_code}
            for code, m in TABLE.items()
        ]
    }


FILES = {
    "keys": keys,
    "objects": objects,
    "messages": messages,
    "handshakes": handshakes,
    "session": session,
    "rejections": rejections,
    "answers": answers,
    "errors": errors,
    "roster": roster,
}


def text_of(name: str) -> str:
    """Return what the file `name`.json holds."""
    return json.dumps(FILES[name](), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    VECTORS.mkdir(exist_ok=True)
    for name in FILES:
        (VECTORS / f"{name}.json").write_text(text_of(name))
