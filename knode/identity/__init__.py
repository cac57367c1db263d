"""Who a node is: an Ed25519 key pair, written as a libp2p PeerId or a did:key.

Signatures are made and verified with libsodium alone: other back ends accept small-order keys, and
nodes with different back ends would disagree. This room must never print or log a private key.
"""

from knode.identity.keys import KeyPair, PublicKey
from knode.identity.names import NodeId, parse_node_id

__all__ = ["KeyPair", "NodeId", "PublicKey", "parse_node_id"]
