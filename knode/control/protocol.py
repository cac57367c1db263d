"""What a line of the daemon's socket is: JSON-RPC 2.0, one message a line, in UTF-8.

The server speaks first, with the `hello` notification. A client sends requests, several at once if it
likes, each with its own id; the server answers each once, in any order, and may send `progress`
notifications before the answer. Batches and notifications from the client are not taken.
"""

from __future__ import annotations

PROTOCOL = 1
"""The version in the hello. Another version is refused by the client."""

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
"""The longest line, its newline included, either way."""

PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
KNODE_ERROR = -32000
"""An error of the table in `knode.errors`; `data` holds its code, message and next step."""
