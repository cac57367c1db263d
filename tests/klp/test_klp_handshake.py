"""The handshake: who is let in, who is refused, and with which word."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from klp_pair import (
    ALICE,
    ALICE_SAYS,
    BOB,
    BOB_SAYS,
    CHANNEL,
    MALLORY,
    initiator,
    responder,
    seed,
    shake,
)

from knode.errors import Code, KnodeError
from knode.klp import Hello, Introduction, refusal, ticket_key
from knode.klp.codec import Decoder, encode
from knode.klp.frames import Kind
from knode.klp.handshake import INITIATOR, RESPONDER, State, WelcomeBody

TICKET = ticket_key(bytes(range(16)))


def edited_hello(frame: bytes, **changes: object) -> bytes:
    hello = Decoder[Hello](Hello).decode(frame[1:])
    fields = {name: getattr(hello, name) for name in Hello.__struct_fields__} | changes
    return frame[:1] + encode(list(fields.values()))  # a Hello of our own would check itself


def edited_welcome(frame: bytes, *, version: int | None = None, **changes: object) -> bytes:
    welcome = Decoder[WelcomeBody](WelcomeBody).decode(frame[65:])
    fields = {name: getattr(welcome.hello, name) for name in Hello.__struct_fields__} | changes
    return frame[:65] + encode(WelcomeBody(Hello(**fields), version or welcome.version))


def refuses(code: Code, action: Callable[[], object]) -> None:
    with pytest.raises(KnodeError) as caught:
        action()
    assert caught.value.code is code


def speaking(introduction: Introduction, *versions: int) -> Introduction:
    return Introduction(introduction.cell_id, introduction.boot, introduction.roster_digest, versions)


def test_both_ends_know_each_other_and_the_same_session() -> None:
    of_a, of_b = shake(initiator(), responder())
    assert of_a.session_id == of_b.session_id
    assert (of_a.peer, of_b.peer) == (BOB.public, ALICE.public)
    assert (of_a.peer_boot, of_b.peer_boot) == (BOB_SAYS.boot, ALICE_SAYS.boot)
    assert (of_a.initiator, of_b.initiator) == (True, False)
    assert of_a.ticket == of_b.ticket == b""


def test_a_ticket_holder_proves_the_ticket_without_showing_its_secret() -> None:
    seen: list[bytes] = []
    joining, inviting = initiator(ticket=TICKET), responder(admit=lambda hello: seen.append(hello.ticket))
    hello = joining.hello()
    proof, _ = joining.receive(inviting.receive_hello(hello))
    assert inviting.receive_auth(proof).ticket == TICKET.public.raw
    assert seen == [TICKET.public.raw]
    assert bytes(range(16)) not in hello + proof


def test_a_ticket_that_is_known_but_not_held_is_refused() -> None:
    joining, inviting = initiator(ticket=TICKET), responder()
    proof, _ = joining.receive(inviting.receive_hello(joining.hello()))
    member_signature, ticket_signature = proof[1:65], proof[65:]
    assert member_signature != ticket_signature
    refuses(Code.BAD_SIGNATURE, lambda: inviting.receive_auth(proof[:65] + member_signature))


def test_a_joining_node_that_leaves_out_the_ticket_signature_is_refused() -> None:
    joining, inviting = initiator(ticket=TICKET), responder()
    proof, _ = joining.receive(inviting.receive_hello(joining.hello()))
    refuses(Code.BAD_FRAME, lambda: inviting.receive_auth(proof[:65]))


@pytest.mark.parametrize(
    "code", [Code.UNKNOWN_PEER, Code.KEY_REVOKED, Code.TICKET_EXPIRED, Code.TICKET_USED, Code.TICKET_INVALID]
)
def test_who_is_not_admitted_is_refused_before_anything_is_signed(code: Code) -> None:
    def admit(hello: Hello) -> None:
        raise KnodeError(code, "not you")

    refusing = responder(admit=admit)
    hello = initiator().hello()
    refuses(code, lambda: refusing.receive_hello(hello))


def test_another_cell_is_refused() -> None:
    other = Introduction(seed("another cell"), ALICE_SAYS.boot, ALICE_SAYS.roster_digest)
    refuses(Code.WRONG_NETWORK, lambda: shake(initiator(says=other), responder()))
    a, b = initiator(says=other), responder()
    hello = a.hello()
    refuses(Code.WRONG_NETWORK, lambda: b.receive_hello(hello))
    welcome = responder().receive_hello(initiator().hello())
    refuses(Code.WRONG_NETWORK, lambda: a.receive(welcome))


def test_a_responder_with_a_ticket_is_refused() -> None:
    a, b = initiator(), responder()
    welcome = edited_welcome(b.receive_hello(a.hello()), ticket=TICKET.public.raw)
    refuses(Code.BAD_FRAME, lambda: a.receive(welcome))


@pytest.mark.parametrize("versions", [(), (2, 1), (1, 1), (0,), (65_536,), tuple(range(1, 18))])
def test_versions_out_of_order_or_bounds_are_a_bad_frame(versions: tuple[int, ...]) -> None:
    hello = edited_hello(initiator().hello(), versions=versions)
    refuses(Code.BAD_FRAME, lambda: responder().receive_hello(hello))


def test_another_node_at_the_address_is_refused() -> None:
    refuses(Code.NOT_RECIPIENT, lambda: shake(initiator(), responder(MALLORY)))


def test_a_node_does_not_shake_hands_with_itself() -> None:
    refuses(Code.NOT_RECIPIENT, lambda: shake(initiator(BOB), responder(BOB)))


def test_an_honest_proxy_that_ends_tls_is_a_channel_mismatch_on_both_sides() -> None:
    seen_elsewhere = seed("the proxy's certificate")
    refuses(Code.CHANNEL_MISMATCH, lambda: shake(initiator(channel=seen_elsewhere), responder()))
    a, b = initiator(channel=seen_elsewhere), responder()
    welcome = b.receive_hello(edited_hello(a.hello(), channel_binding=CHANNEL))
    refuses(Code.CHANNEL_MISMATCH, lambda: a.receive(welcome))


def test_a_man_in_the_middle_who_edits_both_channel_bindings_breaks_the_signature() -> None:
    seen_by_alice = seed("mallory's certificate")
    a, b = initiator(channel=seen_by_alice), responder()
    welcome = b.receive_hello(edited_hello(a.hello(), channel_binding=CHANNEL))
    refuses(Code.BAD_SIGNATURE, lambda: a.receive(edited_welcome(welcome, channel_binding=seen_by_alice)))


def test_the_highest_common_version_is_chosen() -> None:
    of_a, of_b = shake(
        initiator(says=speaking(ALICE_SAYS, 1, 2, 4)), responder(says=speaking(BOB_SAYS, 1, 2, 3))
    )
    assert of_a.version == of_b.version == 2


def test_no_common_version_is_unsupported() -> None:
    a, b = initiator(says=speaking(ALICE_SAYS, 2)), responder()
    refuses(Code.UNSUPPORTED_VERSION, lambda: shake(a, b))


def test_a_version_stripped_from_the_hello_is_a_downgrade() -> None:
    a, b = initiator(says=speaking(ALICE_SAYS, 1, 2)), responder(says=speaking(BOB_SAYS, 1, 2))
    welcome = b.receive_hello(edited_hello(a.hello(), versions=(1,)))
    refuses(Code.DOWNGRADE, lambda: a.receive(welcome))


def test_a_version_stripped_from_both_hellos_breaks_the_signature() -> None:
    a, b = initiator(says=speaking(ALICE_SAYS, 1, 2)), responder(says=speaking(BOB_SAYS, 1, 2))
    welcome = b.receive_hello(edited_hello(a.hello(), versions=(1,)))
    refuses(Code.BAD_SIGNATURE, lambda: a.receive(edited_welcome(welcome, versions=(1,))))


def test_a_lower_version_chosen_by_the_responder_is_a_downgrade() -> None:
    a, b = initiator(says=speaking(ALICE_SAYS, 1, 2)), responder(says=speaking(BOB_SAYS, 1, 2))
    welcome = b.receive_hello(a.hello())
    refuses(Code.DOWNGRADE, lambda: a.receive(edited_welcome(welcome, version=1)))


@pytest.mark.parametrize("field", ["nonce", "roster_digest", "boot"])
def test_an_edited_hello_breaks_the_signature(field: str) -> None:
    changed = seed("other")[: 16 if field == "boot" else 32]
    a, b = initiator(), responder()
    welcome = b.receive_hello(edited_hello(a.hello(), **{field: changed}))
    refuses(Code.BAD_SIGNATURE, lambda: a.receive(welcome))


def test_a_proof_of_one_handshake_does_not_fit_another() -> None:
    a, b = initiator(), responder()
    proof, _ = a.receive(b.receive_hello(a.hello()))
    other = initiator(says=Introduction(ALICE_SAYS.cell_id, seed("later")[:16], ALICE_SAYS.roster_digest))
    again = responder()
    again.receive_hello(other.hello())
    refuses(Code.BAD_SIGNATURE, lambda: again.receive_auth(proof))


def test_a_signature_of_one_role_does_not_stand_for_the_other() -> None:
    a, b = initiator(), responder()
    welcome = b.receive_hello(a.hello())
    reflected = bytes([Kind.PROOF]) + welcome[1:65]
    refuses(Code.BAD_SIGNATURE, lambda: b.receive_auth(reflected))


def test_a_refusal_raises_the_error_that_it_tells() -> None:
    frame = refusal(KnodeError(Code.TICKET_USED, "the ticket was used", "ask for a new one"))
    a = initiator()
    a.hello()
    with pytest.raises(KnodeError) as caught:
        a.receive(frame)
    assert (caught.value.code, caught.value.next_step) == (Code.TICKET_USED, "ask for a new one")


def test_a_refusal_of_an_unknown_code_is_internal_and_cannot_write_to_a_terminal() -> None:
    frame = bytes([Kind.REFUSE]) + encode(("FROM_THE_FUTURE", "red \x1b[31m text", ""))
    a = initiator()
    a.hello()
    with pytest.raises(KnodeError) as caught:
        a.receive(frame)
    assert caught.value.code is Code.INTERNAL
    assert caught.value.message == "red �[31m text"


@pytest.mark.parametrize("kind", list(Kind))
def test_a_frame_that_is_not_due_is_refused_and_closes_the_handshake(kind: Kind) -> None:
    """Walks every pair of state and frame that the tables leave out."""
    for table, role, state in itertools.product(
        (INITIATOR, RESPONDER), ("a", "b"), (State.START, State.WAITING)
    ):
        if (table is INITIATOR) != (role == "a") or (state, kind) in table:
            continue
        a, b = initiator(), responder()
        hello = a.hello() if table is RESPONDER or state is State.WAITING else b""
        frame = bytes([kind]) + bytes(64)
        if role == "a":
            refuses(Code.BAD_FRAME, lambda a=a, frame=frame: a.receive(frame))
            refuses(Code.BAD_FRAME, lambda a=a: a.hello())
        elif state is State.START:
            refuses(Code.BAD_FRAME, lambda b=b, frame=frame: b.receive_hello(frame))
            refuses(Code.BAD_FRAME, lambda b=b, hello=hello: b.receive_hello(hello))
        else:
            b.receive_hello(hello)
            refuses(Code.BAD_FRAME, lambda b=b, frame=frame: b.receive_auth(frame))


def test_every_flipped_byte_of_every_handshake_frame_is_refused() -> None:
    a, b = initiator(ticket=TICKET), responder()
    hello = a.hello()
    welcome = b.receive_hello(hello)
    proof, _ = a.receive(welcome)
    for index in range(len(hello)):
        flipped = flip(hello, index)
        a, b = initiator(ticket=TICKET), responder()
        a.hello()
        with pytest.raises(KnodeError):
            a.receive(b.receive_hello(flipped))
    for index in range(len(welcome)):
        a = initiator(ticket=TICKET)
        a.hello()
        with pytest.raises(KnodeError):
            a.receive(flip(welcome, index))
    for index in range(len(proof)):
        b = responder()
        b.receive_hello(hello)
        with pytest.raises(KnodeError):
            b.receive_auth(flip(proof, index))


def flip(frame: bytes, index: int) -> bytes:
    return frame[:index] + bytes([frame[index] ^ 0x01]) + frame[index + 1 :]


def test_an_introduction_of_the_wrong_size_is_refused_at_home() -> None:
    refuses(
        Code.BAD_FRAME,
        lambda: initiator(says=Introduction(b"short", ALICE_SAYS.boot, ALICE_SAYS.roster_digest)),
    )
