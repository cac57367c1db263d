"""`kExecutor:text`: counts, searches and extracts, in time linear in the text.

It runs in the node's own process, so it takes no pattern from outside: what is searched is literal,
and what is extracted is found by the patterns below, none of which can backtrack. For the same reason
it reads a text piece by piece: as a list of lines or words it would take many times its size in memory.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Literal

import msgspec

MAX_MATCHES = 1000
MAX_LINE_CHARACTERS = 300
RESULT_MARGIN_BYTES = 1024
PIECE_BYTES = 64 * 1024

Needle = Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]


class Count(msgspec.Struct, frozen=True, tag_field="op", tag="count", forbid_unknown_fields=True):
    """How many lines, words, characters and bytes."""

    text: str | None = None


class Search(msgspec.Struct, frozen=True, tag_field="op", tag="search", forbid_unknown_fields=True):
    """The lines that hold `query`, literally."""

    query: Needle
    text: str | None = None
    ignore_case: bool = False


class Extract(msgspec.Struct, frozen=True, tag_field="op", tag="extract", forbid_unknown_fields=True):
    """All email addresses, URLs, numbers or Markdown headings, in order, each once a file."""

    kind: Literal["emails", "urls", "numbers", "headings"]
    text: str | None = None


Request = Count | Search | Extract
EXPECTED = (
    '{"op":"count"}, {"op":"search","query":…,"ignore_case":false} or '
    '{"op":"extract","kind":"emails|urls|numbers|headings"}, with "text":… or files'
)

_decoder: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)

# Every repetition is bounded and no two neighbours share a character, so the work for one starting
# point is constant.
_NUMBER = re.compile(r"(?<![\w.])[+-]?\d{1,40}+(?:\.\d{1,40}+)?(?:[eE][+-]?\d{1,4}+)?(?!\w|\.\d)")
_URL = re.compile(r"\bhttps?://[^\s<>\"'`\\^{|}\[\]]{1,2000}")
_LOCAL_PART = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.!#$%&'*+/=?^_`{|}~-")
_DOMAIN = re.compile(r"(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,63}")
_HEADING = re.compile(r" {0,3}#{1,6}+[ \t]+(\S.*)")


def parse_request(data: bytes) -> Request:
    """Return the request in `data`: JSON, or any other text, which is counted; nothing counts the files.

    Raises:
        ValueError: JSON that is an object and no request; the message says what is expected.
    """
    if not data:
        return Count()
    if not data.lstrip().startswith(b"{"):
        return Count(text=data.decode("utf-8", "replace"))
    try:
        return _decoder.decode(data)
    except msgspec.ValidationError as error:
        raise ValueError(f"{error}; expected {EXPECTED}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Count(text=data.decode("utf-8", "replace"))


def answer(request: Request, files: Mapping[str, bytes], limit_bytes: int) -> bytes:
    """Return the result as JSON with sorted keys.

    Args:
        files: name to content; not used when the request brings its text.
        limit_bytes: of the result; what does not fit is left out and `truncated` is true.
    """
    texts = {"text": request.text.encode("utf-8", "replace")} if request.text is not None else dict(files)
    match request:
        case Count():
            result = _count(texts, limit_bytes)
        case Search():
            result = _bounded("matches", _search(request, texts), limit_bytes)
        case Extract():
            result = _bounded("items", _extract(request, texts), limit_bytes)
    return msgspec.json.encode(result, order="deterministic")


def count_text(data: bytes) -> dict[str, int]:
    """Return the counts of one text. A last line without its end counts."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    characters, words, in_word = 0, 0, False
    for begin in range(0, len(data), PIECE_BYTES):
        end = begin + PIECE_BYTES
        if piece := decoder.decode(data[begin:end], final=end >= len(data)):
            characters += len(piece)
            # A word that the last piece began is counted already.
            words += len(piece.split()) - (in_word and not piece[0].isspace())
            in_word = not piece[-1].isspace()
    return {
        "bytes": len(data),
        "characters": characters,
        "lines": data.count(b"\n") + (data != b"" and not data.endswith(b"\n")),
        "words": words,
    }


def _count(texts: Mapping[str, bytes], limit_bytes: int) -> dict[str, object]:
    total = dict.fromkeys(("bytes", "characters", "lines", "words"), 0)
    rows: list[object] = []
    for name, data in texts.items():
        counts = count_text(data)
        for what, number in counts.items():
            total[what] += number
        rows.append({"name": name, **counts})
    return {**_bounded("files", iter(rows), limit_bytes), "total": total}


def _search(request: Search, texts: Mapping[str, bytes]) -> Iterator[object]:
    fold: Callable[[str], str] = str.casefold if request.ignore_case else str
    needle = fold(request.query)
    for name, data in texts.items():
        for number, line in enumerate(_lines(data), start=1):
            if needle in fold(line):
                yield {"file": name, "line": number, "text": line[:MAX_LINE_CHARACTERS]}


def _extract(request: Extract, texts: Mapping[str, bytes]) -> Iterator[object]:
    find = {"emails": find_emails, "urls": _find_urls, "numbers": _find_numbers, "headings": _find_headings}
    for name, data in texts.items():
        seen: set[str] = set()
        for number, line in enumerate(_lines(data), start=1):
            for item in find[request.kind](line):
                if item not in seen:
                    seen.add(item)
                    yield {"file": name, "line": number, "value": item}


def _lines(data: bytes) -> Iterator[str]:
    return (line.removesuffix(b"\n").decode("utf-8", "replace") for line in io.BytesIO(data))


def find_emails(line: str) -> Iterator[str]:
    """Yield the email addresses of a line: found from each `@`, outwards, at most 64 to its left."""
    end = 0
    at = line.find("@")
    while at >= 0:
        begin = at
        while begin > max(end, at - 64) and line[begin - 1] in _LOCAL_PART:
            begin -= 1
        domain = _DOMAIN.match(line, at + 1)
        local = line[begin:at].lstrip(".")
        if domain and local and not local.endswith("."):
            yield local + "@" + domain.group()
            end = domain.end()
        at = line.find("@", at + 1)


def _find_urls(line: str) -> Iterator[str]:
    return (match.group().rstrip(".,;:!?)") for match in _URL.finditer(line))


def _find_numbers(line: str) -> Iterator[str]:
    return (match.group() for match in _NUMBER.finditer(line))


def _find_headings(line: str) -> Iterator[str]:
    match = _HEADING.match(line)
    return iter([match.group(1).strip().rstrip("#").rstrip()[:MAX_LINE_CHARACTERS]] if match else [])


def _bounded(key: str, rows: Iterator[object], limit_bytes: int) -> dict[str, object]:
    kept: list[object] = []
    used = RESULT_MARGIN_BYTES
    for row in rows:
        used += len(msgspec.json.encode(row)) + 1
        if len(kept) == MAX_MATCHES or used > limit_bytes:
            return {key: kept, "truncated": True}
        kept.append(row)
    return {key: kept, "truncated": False}
