"""Ed25519 keys (RFC 8032) by libsodium."""

from __future__ import annotations

from functools import cached_property, lru_cache

from nacl.bindings import (
    crypto_core_ed25519_is_valid_point,
    crypto_sign,
    crypto_sign_open,
    crypto_sign_seed_keypair,
)
from nacl.exceptions import CryptoError

from knode.errors import Code, KnodeError
from knode.identity.names import NodeId, did_of, node_id_of

KEY_BYTES = 32
SIGNATURE_BYTES = 64
_POINTS_REMEMBERED = 4096


@lru_cache(maxsize=_POINTS_REMEMBERED)
def _is_valid_point(raw: bytes) -> bool:
    # As slow as a signature, and asked for each member each time that a roster changes.
    return crypto_core_ed25519_is_valid_point(raw)


class PublicKey:
    """An Ed25519 public key that is a valid point of the main subgroup.

    Raises:
        KnodeError: INVALID_ARGUMENT for other than 32 bytes, a small-order or a non-canonical point.
    """

    def __init__(self, raw: bytes) -> None:
        self.raw = bytes(raw)
        if len(raw) != KEY_BYTES or not _is_valid_point(self.raw):
            raise KnodeError(Code.INVALID_ARGUMENT, "not a valid Ed25519 public key")

    @cached_property
    def node_id(self) -> NodeId:
        """The key as a PeerId."""
        return node_id_of(self.raw)

    @cached_property
    def did(self) -> str:
        """The key as a did:key."""
        return did_of(self.raw)

    def verifies(self, signature: bytes, data: bytes) -> bool:
        """Tell whether `signature` (64 bytes) over `data` was made by this key."""
        if len(signature) != SIGNATURE_BYTES:
            return False
        try:
            crypto_sign_open(signature + data, self.raw)
        except CryptoError:
            return False
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PublicKey) and other.raw == self.raw

    def __hash__(self) -> int:
        return hash(self.raw)

    def __repr__(self) -> str:
        return f"PublicKey({self.node_id})"


class KeyPair:
    """A private key and its public key. Its representation shows the public one alone."""

    def __init__(self, seed: bytes) -> None:
        if len(seed) != KEY_BYTES:
            raise KnodeError(Code.INVALID_ARGUMENT, "a key seed has 32 bytes")
        public, self._secret = crypto_sign_seed_keypair(seed)
        self.seed = seed
        self.public = PublicKey(public)

    @property
    def node_id(self) -> NodeId:
        """The public key as a PeerId."""
        return self.public.node_id

    def sign(self, data: bytes) -> bytes:
        """Return the 64-byte signature over `data`."""
        return crypto_sign(data, self._secret)[:SIGNATURE_BYTES]

    def __repr__(self) -> str:
        return f"KeyPair({self.node_id})"
