"""How bytes travel: authenticated-later carriers of frames between two nodes.

A link carries frames in order, whole or not at all, and names the channel it runs over; it knows
nothing of keys, members or messages. This room must never decide who may speak.
"""

from knode.transport.link import (
    MAX_FRAME_BYTES,
    Carrier,
    Link,
    LinkClosed,
    LinkFault,
    LinkStatistics,
    Listener,
)

__all__ = ["MAX_FRAME_BYTES", "Carrier", "Link", "LinkClosed", "LinkFault", "LinkStatistics", "Listener"]
