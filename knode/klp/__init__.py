"""What two nodes say to each other: the Kind Link Protocol 1.0, specified in docs/klp.md.

Pure: values in, values out. This room must never open a link, read a clock, draw a random number, or
decide who is a member; `knode.mesh` does that and drives these cores.
"""

from knode.klp.answers import Answered, Answers, Fresh, Refused, Running, Verdict
from knode.klp.codec import Decoder, encode
from knode.klp.frames import refusal
from knode.klp.handshake import Admit, Established, Hello, Initiator, Introduction, Responder, ticket_key
from knode.klp.keepalive import Keepalive, Load
from knode.klp.messages import (
    Acknowledge,
    Answer,
    Cancel,
    Context,
    Credit,
    Event,
    Failure,
    Goodbye,
    Message,
    Request,
    Response,
    StreamEnd,
    StreamReset,
)
from knode.klp.objects import Domain, object_id, open_signed, sign
from knode.klp.session import Session, StreamData

__all__ = [
    "Acknowledge",
    "Admit",
    "Answer",
    "Answered",
    "Answers",
    "Cancel",
    "Context",
    "Credit",
    "Decoder",
    "Domain",
    "Established",
    "Event",
    "Failure",
    "Fresh",
    "Goodbye",
    "Hello",
    "Initiator",
    "Introduction",
    "Keepalive",
    "Load",
    "Message",
    "Refused",
    "Request",
    "Responder",
    "Response",
    "Running",
    "Session",
    "StreamData",
    "StreamEnd",
    "StreamReset",
    "Verdict",
    "encode",
    "object_id",
    "open_signed",
    "refusal",
    "sign",
    "ticket_key",
]
