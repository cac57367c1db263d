from __future__ import annotations

import textwrap

import base58
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mesh_cell import key_of

from knode.errors import Code, KnodeError
from knode.klp.codec import encode
from knode.klp.handshake import ticket_key
from knode.mesh.contact import Contact, open_contact, sign_contact
from knode.mesh.ticket import MAX_ADDRESSES, PREFIX, SECRET_BYTES, Ticket, parse_ticket
from knode.mesh.words import four_words

A = key_of("a")
TICKET = Ticket(1, A.public.raw, bytes(range(32)), bytes(range(16)), ("192.168.1.7:4747", "[fd00::7]:4747"))
hosts = st.from_regex(r"[a-z0-9.:\[\]-]{1,255}:4747", fullmatch=True)


@given(
    st.binary(min_size=32, max_size=32),
    st.binary(min_size=SECRET_BYTES, max_size=SECRET_BYTES),
    st.lists(hosts, min_size=1, max_size=MAX_ADDRESSES).map(tuple),
)
def test_a_ticket_goes_through_its_text_unchanged(cell, secret, addresses) -> None:
    ticket = Ticket(1, A.public.raw, cell, secret, addresses)
    assert parse_ticket(ticket.text()) == ticket


@settings(max_examples=30)
@given(st.integers(10, 100), st.sampled_from(["\n", "\r\n  ", "\n> "[:1]]))
def test_a_wrapped_line_is_still_a_ticket(width, end) -> None:
    assert (
        parse_ticket("  " + end.join(textwrap.wrap(TICKET.text(), width, break_on_hyphens=False)) + "\n")
        == TICKET
    )


def test_every_damaged_character_is_refused() -> None:
    text = TICKET.text()
    for position, character in enumerate(text):
        for other in ("1", "z", "O", "é", "\x00"):
            if other != character:
                with pytest.raises(KnodeError) as caught:
                    parse_ticket(text[:position] + other + text[position + 1 :])
                assert caught.value.code is Code.INVALID_ARGUMENT
                assert caught.value.next_step


@pytest.mark.parametrize("text", ["", "knode-", "knode-1111", "hello", PREFIX + "1" * 4000, "KNODE-abc"])
def test_what_is_no_ticket_is_refused(text: str) -> None:
    with pytest.raises(KnodeError) as caught:
        parse_ticket(text)
    assert caught.value.code is Code.INVALID_ARGUMENT


def test_a_ticket_without_its_end_is_refused() -> None:
    text = TICKET.text()
    for length in range(len(text)):
        with pytest.raises(KnodeError):
            parse_ticket(text[:length])


def test_a_ticket_of_a_newer_knode_says_so() -> None:
    newer = PREFIX + base58.b58encode_check(encode(msgspec.structs.replace(TICKET, version=2))).decode()
    with pytest.raises(KnodeError) as caught:
        parse_ticket(newer)
    assert caught.value.code is Code.UNSUPPORTED_VERSION


def test_a_ticket_of_a_newer_knode_with_another_layout_says_so_too() -> None:
    newer = PREFIX + base58.b58encode_check(msgspec.msgpack.encode([2, {"a": 1}, "more"])).decode()
    with pytest.raises(KnodeError) as caught:
        parse_ticket(newer)
    assert caught.value.code is Code.UNSUPPORTED_VERSION


def test_a_ticket_whose_inviter_is_no_key_is_refused() -> None:
    with pytest.raises(KnodeError) as caught:
        parse_ticket(msgspec.structs.replace(TICKET, inviter=bytes(32)).text())
    assert caught.value.code is Code.INVALID_ARGUMENT


def test_a_ticket_shows_its_secret_only_in_its_text() -> None:
    assert TICKET.secret.hex() not in repr(TICKET)
    assert repr(TICKET.secret) not in repr(TICKET)


def test_both_ends_derive_the_key_that_the_specification_says() -> None:
    assert TICKET.key.public == ticket_key(TICKET.secret).public


def test_equal_sessions_have_equal_words_and_others_have_others() -> None:
    words = four_words(bytes(32))
    assert len(words) == 4
    assert words == four_words(bytes(32))
    assert len({four_words(n.to_bytes(32, "big")) for n in range(1000)}) == 1000
    assert words == ("nominee", "weird", "glow", "lend") or all(word.isalpha() for word in words)


def test_a_contact_goes_through_its_bytes_and_a_damaged_one_does_not() -> None:
    contact = sign_contact(A, Contact(A.public.raw, ("shed:4747",), "0.1.0", 7))
    assert open_contact(contact.data) == contact
    for position in range(len(contact.data)):
        with pytest.raises(KnodeError):
            open_contact(
                contact.data[:position] + bytes([contact.data[position] ^ 1]) + contact.data[position + 1 :]
            )


def test_a_contact_that_others_would_refuse_is_not_signed() -> None:
    with pytest.raises(KnodeError):
        sign_contact(A, Contact(A.public.raw, ("h:1",) * 17, "0.1.0", 7))


def test_nobody_signs_a_contact_for_another() -> None:
    data = sign_contact(A, Contact(A.public.raw, ("shed:4747",), "0.1.0", 7)).data
    other = encode(Contact(key_of("b").public.raw, ("shed:4747",), "0.1.0", 7))
    with pytest.raises(KnodeError) as caught:
        open_contact(data[:64] + other)
    assert caught.value.code is Code.BAD_SIGNATURE
