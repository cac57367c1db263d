"""The bounds of KLP 1.0. Every frame that keeps them fits a link's frame of 1 MiB."""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB

MAX_BODY_BYTES = 256 * KIB
"""The body of a request, response or event."""
MAX_BUNDLE_MESSAGES = 64
MAX_BUNDLE_BYTES = 512 * KIB
"""The encoded messages of one bundle; one message with the largest body always fits."""

MAX_TTL_MS = 300_000
ANSWER_GRACE_MS = 60_000
"""How much longer than its request's ttl an answer is kept."""
MAX_ACKNOWLEDGED = 256
"""Counters in one `Acknowledge`."""

DATA_BYTES = 64 * KIB
"""The data of one DATA frame."""
FIRST_CREDIT_BYTES = 1 * MIB
"""What a stream's sender may send before the first `Credit`; also the window that is kept open."""
UNSENT_BYTES = 256 * KIB
"""What one stream buffers before it is sent."""
MAX_STREAMS = 64
"""Streams that one side sends at once, in one session."""

OUTBOX_MESSAGES = 1024
OUTBOX_BYTES = 8 * MIB

ANSWERS = 4096
"""Answers kept, for all sources together; also how many counters back a source's requests are remembered."""
ANSWERS_BYTES = 16 * MIB
SOURCE_SHARE = 4
"""One source may use up to the fourth part of `ANSWERS` and `ANSWERS_BYTES`."""
MAX_HISTORIES = 4096
"""Processes (source and boot) whose counters are remembered at once."""
MAX_BOOTS = 32
"""Boots of one source among them."""

MAX_VERSIONS = 16
"""Versions in one hello."""
MAX_HANDSHAKE_BYTES = 1 * KIB
"""A HELLO, WELCOME or PROOF frame."""
MAX_REFUSE_BYTES = 8 * KIB

MAX_NAME = 64
"""Characters of a method or topic."""
MAX_CODE = 32
MAX_ERROR_MESSAGE = 1024
MAX_NEXT_STEP = 512
