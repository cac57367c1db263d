"""The two written forms of a key: libp2p PeerId and did:key. Both name the same 32 bytes."""

from __future__ import annotations

from typing import NewType

import base58

from knode.errors import Code, KnodeError

NodeId = NewType("NodeId", str)
"""A node's PeerId, `12D3KooW…` (libp2p specification, peer-ids: identity multihash of the protobuf key)."""

# identity multihash, 36 bytes: field 1 (type) = Ed25519, field 2 (data) = 32 bytes
_PEER_ID_PREFIX = bytes.fromhex("0024080112 20".replace(" ", ""))
# multicodec ed25519-pub as an unsigned varint (W3C did:key)
_DID_PREFIX = bytes.fromhex("ed01")


def node_id_of(raw_key: bytes) -> NodeId:
    """Return the PeerId of a raw Ed25519 public key of 32 bytes."""
    return NodeId(base58.b58encode(_PEER_ID_PREFIX + raw_key).decode())


def did_of(raw_key: bytes) -> str:
    """Return the did:key of a raw Ed25519 public key of 32 bytes."""
    return "did:key:z" + base58.b58encode(_DID_PREFIX + raw_key).decode()


def parse_node_id(text: str) -> bytes:
    """Return the raw public key of a PeerId or a did:key.

    Raises:
        KnodeError: INVALID_ARGUMENT when `text` is neither.
    """
    try:
        if text.startswith("did:key:z"):
            decoded, prefix = base58.b58decode(text.removeprefix("did:key:z")), _DID_PREFIX
        else:
            decoded, prefix = base58.b58decode(text), _PEER_ID_PREFIX
    except ValueError:
        decoded, prefix = b"", _PEER_ID_PREFIX
    if not decoded.startswith(prefix) or len(decoded) != len(prefix) + 32:
        raise KnodeError(Code.INVALID_ARGUMENT, f"{text[:80]!r} is no node id")
    return decoded[len(prefix) :]
