"""The errors that knode names: one table for the wire, the daemon's socket and the command line.

An error says what happened, why, and the next command. Its code is stable: programs match on the
code, people read the message. What is not in the table cannot be raised as a `KnodeError`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NOT_RUNNING = 3
EXIT_NOT_ALLOWED = 4
EXIT_NOT_FOUND = 5
EXIT_NO_NODE = 6
EXIT_INTERRUPTED = 130


class Code(StrEnum):
    """The stable name of an error, as it stands on the wire and in JSON."""

    AGENT_FAILED = "AGENT_FAILED"
    BAD_FRAME = "BAD_FRAME"
    BAD_SIGNATURE = "BAD_SIGNATURE"
    CANCELLED = "CANCELLED"
    CHANNEL_MISMATCH = "CHANNEL_MISMATCH"
    CONFIG_INVALID = "CONFIG_INVALID"
    DISK_FULL = "DISK_FULL"
    DISK_READ_ONLY = "DISK_READ_ONLY"
    DOWNGRADE = "DOWNGRADE"
    EXPIRED = "EXPIRED"
    HOME_EXISTS = "HOME_EXISTS"
    HOME_MISSING = "HOME_MISSING"
    HOME_DAMAGED = "HOME_DAMAGED"
    HOME_TOO_NEW = "HOME_TOO_NEW"
    INTERNAL = "INTERNAL"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    KEY_CONFLICT = "KEY_CONFLICT"
    KEY_REVOKED = "KEY_REVOKED"
    LOCKED = "LOCKED"
    MANIFEST_INVALID = "MANIFEST_INVALID"
    NON_CANONICAL = "NON_CANONICAL"
    NOT_ALLOWED = "NOT_ALLOWED"
    NOT_FOUND = "NOT_FOUND"
    NOT_RECIPIENT = "NOT_RECIPIENT"
    NOT_RUNNING = "NOT_RUNNING"
    NO_AGENT = "NO_AGENT"
    NO_CREDIT = "NO_CREDIT"
    NO_ELIGIBLE_NODE = "NO_ELIGIBLE_NODE"
    NO_SANDBOX = "NO_SANDBOX"
    PORT_IN_USE = "PORT_IN_USE"
    RATE_LIMITED = "RATE_LIMITED"
    REPLAY = "REPLAY"
    STALE_FENCE = "STALE_FENCE"
    TICKET_EXPIRED = "TICKET_EXPIRED"
    TICKET_INVALID = "TICKET_INVALID"
    TICKET_USED = "TICKET_USED"
    TIMEOUT = "TIMEOUT"
    TOO_LARGE = "TOO_LARGE"
    UNAVAILABLE = "UNAVAILABLE"
    UNKNOWN = "UNKNOWN"
    UNKNOWN_PEER = "UNKNOWN_PEER"
    UNSUPPORTED_VERSION = "UNSUPPORTED_VERSION"
    WRONG_NETWORK = "WRONG_NETWORK"


UNANSWERED = frozenset({Code.UNAVAILABLE, Code.UNKNOWN, Code.TIMEOUT})
"""What a question ends with that nobody could be asked, or that nobody has answered."""
NO_MEMBER = frozenset({Code.KEY_REVOKED, Code.UNKNOWN_PEER})
"""What who asks is told by those that do not take it for a member (any more)."""


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a code says, whether asking again can help, and how the command line exits."""

    text: str
    retryable: bool
    exit_code: int


# docs/klp.md prints this table; a test holds the two together.
TABLE: dict[Code, Meaning] = {
    Code.AGENT_FAILED: Meaning("the agent ran and failed; the mesh did its part", False, EXIT_FAILED),
    Code.BAD_FRAME: Meaning("bytes that are no frame of this protocol", False, EXIT_FAILED),
    Code.BAD_SIGNATURE: Meaning("a signature does not verify", False, EXIT_NOT_ALLOWED),
    Code.CANCELLED: Meaning("cancelled by someone who may", False, EXIT_FAILED),
    Code.CHANNEL_MISMATCH: Meaning(
        "the two ends see different TLS certificates: someone sits between them", False, EXIT_NOT_ALLOWED
    ),
    Code.CONFIG_INVALID: Meaning("a configuration value or file cannot be used", False, EXIT_USAGE),
    Code.DISK_FULL: Meaning("no space left; nothing was half-written", True, EXIT_FAILED),
    Code.DISK_READ_ONLY: Meaning("the disk or folder cannot be written", False, EXIT_FAILED),
    Code.DOWNGRADE: Meaning("a lower version was chosen than both ends speak", False, EXIT_NOT_ALLOWED),
    Code.EXPIRED: Meaning("its time was over before it could be done", False, EXIT_FAILED),
    Code.HOME_EXISTS: Meaning("this folder already holds a node", False, EXIT_FAILED),
    Code.HOME_MISSING: Meaning("this folder holds no node", False, EXIT_NOT_FOUND),
    Code.HOME_DAMAGED: Meaning("a file of the home folder is missing or damaged", False, EXIT_FAILED),
    Code.HOME_TOO_NEW: Meaning("the home folder was written by a newer knode", False, EXIT_FAILED),
    Code.INTERNAL: Meaning("a fault of knode itself; its log has the details", False, EXIT_FAILED),
    Code.INVALID_ARGUMENT: Meaning("a value that this call does not take", False, EXIT_USAGE),
    Code.KEY_CONFLICT: Meaning("this key stands for a task with other input", False, EXIT_FAILED),
    Code.KEY_REVOKED: Meaning("the key was a member's and is revoked", False, EXIT_NOT_ALLOWED),
    Code.LOCKED: Meaning("another process holds it", True, EXIT_NOT_ALLOWED),
    Code.MANIFEST_INVALID: Meaning(
        "an agent's manifest, code or publisher is not acceptable", False, EXIT_FAILED
    ),
    Code.NON_CANONICAL: Meaning("an encoding that is not the shortest and only one", False, EXIT_FAILED),
    Code.NOT_ALLOWED: Meaning("the asking key may not do this", False, EXIT_NOT_ALLOWED),
    Code.NOT_FOUND: Meaning("no such thing", False, EXIT_NOT_FOUND),
    Code.NOT_RECIPIENT: Meaning(
        "addressed to another node or session, or another node answers there", False, EXIT_FAILED
    ),
    Code.NOT_RUNNING: Meaning("no daemon answers for this home", False, EXIT_NOT_RUNNING),
    Code.NO_AGENT: Meaning("the node does not have this agent, or has it stopped", False, EXIT_NOT_FOUND),
    Code.NO_CREDIT: Meaning("more bulk data than the receiver allowed", False, EXIT_FAILED),
    Code.NO_ELIGIBLE_NODE: Meaning("no reachable node can and may run this", True, EXIT_NO_NODE),
    Code.NO_SANDBOX: Meaning(
        "no sandbox holds on this machine, so untrusted code is refused", False, EXIT_FAILED
    ),
    Code.PORT_IN_USE: Meaning("another program listens on the port", True, EXIT_FAILED),
    Code.RATE_LIMITED: Meaning("a limit is reached; ask again later", True, EXIT_FAILED),
    Code.REPLAY: Meaning("a sequence number that is not the next", False, EXIT_FAILED),
    Code.STALE_FENCE: Meaning("the task has another attempt by now, or has ended", False, EXIT_FAILED),
    Code.TICKET_EXPIRED: Meaning("the invitation's time is over", False, EXIT_NOT_ALLOWED),
    Code.TICKET_INVALID: Meaning("not an invitation of this node", False, EXIT_NOT_ALLOWED),
    Code.TICKET_USED: Meaning("the invitation was used", False, EXIT_NOT_ALLOWED),
    Code.TIMEOUT: Meaning("no answer in time", True, EXIT_FAILED),
    Code.TOO_LARGE: Meaning("over a size limit", False, EXIT_FAILED),
    Code.UNAVAILABLE: Meaning("cannot be reached or done now", True, EXIT_FAILED),
    Code.UNKNOWN: Meaning("nobody can say whether it was done", False, EXIT_FAILED),
    Code.UNKNOWN_PEER: Meaning("not a member of this cell", False, EXIT_NOT_ALLOWED),
    Code.UNSUPPORTED_VERSION: Meaning("no version of the protocol in common", False, EXIT_FAILED),
    Code.WRONG_NETWORK: Meaning("a member of another cell", False, EXIT_NOT_ALLOWED),
}


class KnodeError(Exception):
    """An error of the table, with what happened and the next command.

    Args:
        code: its stable name.
        message: what happened and why, one sentence, no secrets.
        next_step: the command to run next, or what to do; may be empty.
    """

    def __init__(self, code: Code, message: str, next_step: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.next_step = next_step

    def __str__(self) -> str:
        return f"{self.message}: {self.next_step}" if self.next_step else self.message

    def bare(self) -> KnodeError:
        """Return the error without the frames that it came through, fit to be kept.

        An error that was raised holds each frame on its way with all that it had in hand, a dead
        link and its buffers among it; and what keeps it is often in one of them, so that only the
        collector of cycles would let all that go.
        """
        return type(self)(self.code, self.message, self.next_step)

    @property
    def exit_code(self) -> int:
        """How the command line exits on this error."""
        return TABLE[self.code].exit_code

    @property
    def retryable(self) -> bool:
        """Whether asking again, unchanged, can help."""
        return TABLE[self.code].retryable


class LocalError(KnodeError):
    """An error whose words are for this machine alone, for they name its files.

    Another node is told the code and what the table says of it.
    """
