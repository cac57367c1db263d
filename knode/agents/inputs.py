"""The inputs of the shipped agents that run what a task brings: Python source, or a command."""

from __future__ import annotations

import msgspec

from knode.errors import Code, KnodeError

MAX_ARGUMENT_BYTES = 100 * 1024
"""Of all arguments together; the kernel takes 128 KiB for one."""


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The input of `kExecutor:python`."""

    code: str
    stdin: str = ""


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The input of `kExecutor:command`."""

    argv: tuple[str, ...]
    stdin: str = ""


_source_decoder: msgspec.json.Decoder[Source] = msgspec.json.Decoder(Source)
_line_decoder: msgspec.json.Decoder[Line] = msgspec.json.Decoder(Line)


def parse_source(data: bytes) -> Source:
    """Return the program in `data`: JSON `{"code":…, "stdin":…}`, or Python source as it is.

    Raises:
        KnodeError: AGENT_FAILED when it is neither.
    """
    try:
        try:
            return _source_decoder.decode(data)
        except msgspec.DecodeError:
            return Source(code=data.decode())  # a dict display is Python source too
    except UnicodeDecodeError as error:
        raise KnodeError(
            Code.AGENT_FAILED, 'kExecutor:python takes UTF-8 source, or {"code":…, "stdin":…}'
        ) from error


def parse_line(data: bytes) -> Line:
    """Return the command in `data`: JSON `{"argv":[…], "stdin":…}`, or a line for the shell.

    Raises:
        KnodeError: AGENT_FAILED when it is neither, or longer than 100 KiB.
    """
    expected = 'kExecutor:command takes a shell line, or {"argv":[…], "stdin":…}'
    try:
        line = _line_decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        try:
            line = Line(argv=("/bin/sh", "-c", data.decode()))
        except UnicodeDecodeError as error:
            raise KnodeError(Code.AGENT_FAILED, f"{expected}, in UTF-8") from error
    if not line.argv or not line.argv[0]:
        raise KnodeError(Code.AGENT_FAILED, f"{expected}, and there is no program in it")
    if any("\0" in argument for argument in line.argv):
        raise KnodeError(Code.AGENT_FAILED, f"{expected}, without zero bytes")
    if sum(len(argument.encode("utf-8", "replace")) for argument in line.argv) > MAX_ARGUMENT_BYTES:
        raise KnodeError(Code.AGENT_FAILED, f"{expected}, of at most {MAX_ARGUMENT_BYTES} bytes")
    return line
