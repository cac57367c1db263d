"""The values that direct and durable tasks share, with their bounds."""

from __future__ import annotations

from typing import Annotated

import msgspec

MAX_FILES = 256
MAX_INPUT_BYTES = 192 * 1024

TaskId = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
# A plain name: no folder, no control character, not `.` or `..`.
FileName = Annotated[str, msgspec.Meta(pattern=r"^(?!\.{1,2}\Z)[^/\x00-\x1f\x7f]+\Z", max_length=200)]
Size = Annotated[int, msgspec.Meta(ge=0, lt=2**40)]
AgentId = Annotated[str, msgspec.Meta(pattern=r"^k[A-Z][a-z]+:[a-z][a-z0-9-]*\Z", max_length=64)]
