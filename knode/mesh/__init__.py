"""Who is here: the roster, invitations, and the peers that this node talks to.

The roster is a set of signed statements; what it means is a pure function of the set (`roster`). The
peers are kept by `peers`: dialling, handshakes, keepalives, and requests that survive the link that
carried them. This room must never let an unchecked message reach a handler: membership, then
signature, then sequence, then typed decoding, then the right of the asking role, then the handler.
"""
