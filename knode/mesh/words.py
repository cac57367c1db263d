"""Four words that both people see: equal words, the same handshake."""

from __future__ import annotations

from functools import cache
from hashlib import sha256

WORDS = 4


@cache
def _list() -> list[str]:
    from mnemonic import Mnemonic  # the 2,048 words of BIP 39; imported by the few who join

    words: list[str] = Mnemonic("english").wordlist
    return words


def four_words(session_id: bytes) -> tuple[str, ...]:
    """Return the words of a session: 11 bits each of a hash of the transcript, 44 in all."""
    number = int.from_bytes(sha256(b"KLP/1/words\0" + session_id).digest()[:6], "big")
    return tuple(_list()[(number >> (11 * i)) % 2048] for i in range(WORDS))
