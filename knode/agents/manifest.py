"""The manifest: what an agent is, what it asks for, and who says so.

A manifest is written in TOML (`agent.toml`). What a node keeps and shows to others is the signed
manifest: the fields, the hash of the agent's code and the publisher's key, under that key's signature.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated, NoReturn

import msgspec

from knode.agents.limits import Limits
from knode.errors import Code, KnodeError
from knode.identity import KeyPair, PublicKey
from knode.klp.codec import Decoder, encode
from knode.klp.objects import SIGNATURE_BYTES, Domain, open_signed, sign

MANIFEST_NAME = "agent.toml"
SIGNED_NAME = "agent.signed"
MAX_MANIFEST_BYTES = 16 * 1024
MAX_SIGNED_BYTES = 256 * 1024
CLASSES = ("kCore", "kPlanner", "kExecutor", "kReviewer", "kSentinel", "kMemory", "kPersona", "kBridge")

_ID = re.compile(rf"(?:{'|'.join(CLASSES)}):[a-z][a-z0-9-]{{0,47}}")
_VERSION = re.compile(r"\d{1,6}\.\d{1,6}\.\d{1,6}(?:-[0-9a-z.-]{1,32})?")


class Runtime(StrEnum):
    """How an agent's code is run."""

    BUILTIN = "builtin"
    """Part of knode, in its process."""
    PYTHON = "python"
    """A Python program, in the sandbox."""
    COMMAND = "command"
    """Any program, in the sandbox."""


class Capability(StrEnum):
    """What an agent may ask for. Closed: an unknown one makes the manifest invalid."""

    INPUT_FILES = "input-files"
    """Files that the task brings, in `input/`."""


Argument = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an agent says about itself."""

    id: str
    """`kClass:name`: one of the classes, then 1 to 48 of a-z, 0-9 and `-`, a letter first."""
    version: str
    """Three numbers, `1.2.3`, and a suffix if it must be: `1.2.3-rc.1`."""
    runtime: Runtime
    description: Annotated[str, msgspec.Meta(max_length=500)] = ""
    entry: Annotated[tuple[Argument, ...], msgspec.Meta(max_length=64)] = ()
    """For `builtin` its name; for `python` the program's file; for `command` program and arguments.

    Empty, in the agents that knode ships: the task's input says what to run.
    """
    capabilities: Annotated[tuple[Capability, ...], msgspec.Meta(max_length=16)] = ()
    limits: Limits = Limits()


class FileDigest(msgspec.Struct, frozen=True, array_like=True):
    """One file of an agent's code."""

    path: Annotated[str, msgspec.Meta(max_length=512)]
    """Relative, parts joined with `/`."""
    size: int
    sha256: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]


class SignedManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body that a publisher signs."""

    manifest: Manifest
    code_hash: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    publisher: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]


_signed_decoder: Decoder[SignedManifest] = Decoder(SignedManifest)


def parse_manifest(text: str) -> Manifest:
    """Return the manifest in `text` (TOML, at most 16 KiB).

    Raises:
        KnodeError: MANIFEST_INVALID, saying which key and why.
    """
    if len(text.encode()) > MAX_MANIFEST_BYTES:
        _refuse(f"it is larger than {MAX_MANIFEST_BYTES} bytes")
    try:
        fields = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise KnodeError(
            Code.MANIFEST_INVALID, f"{MANIFEST_NAME} is no TOML: {error}", "see docs/guides/agents.md"
        ) from error
    if isinstance(fields.get("entry"), str):
        fields["entry"] = [fields["entry"]]
    try:
        manifest = msgspec.convert(fields, Manifest)
    except (msgspec.ValidationError, RecursionError) as error:
        raise KnodeError(
            Code.MANIFEST_INVALID, f"{MANIFEST_NAME}: {error}", "docs/guides/agents.md lists the keys"
        ) from error
    check_manifest(manifest)
    return manifest


def check_manifest(manifest: Manifest) -> None:
    """Check what types alone do not say.

    Raises:
        KnodeError: MANIFEST_INVALID, saying which key and why.
    """
    if _ID.fullmatch(manifest.id) is None:
        _refuse(f"`id` must be kClass:name, with a class of {', '.join(CLASSES)}, not {manifest.id[:80]!r}")
    if _VERSION.fullmatch(manifest.version) is None:
        _refuse(f"`version` must be like 1.2.3, not {manifest.version[:80]!r}")
    if any(ord(character) < 0x20 for character in manifest.description):
        _refuse("`description` must be one line without control characters")
    if len(set(manifest.capabilities)) != len(manifest.capabilities):
        _refuse("`capabilities` names one twice")
    if any("\0" in argument for argument in manifest.entry):
        _refuse("`entry` must not contain a zero byte")
    if manifest.runtime is not Runtime.COMMAND and len(manifest.entry) > 1:
        _refuse(f"`entry` of a {manifest.runtime} agent is one name")
    if manifest.runtime is Runtime.PYTHON and manifest.entry:
        check_relative_path(manifest.entry[0])


def check_relative_path(path: str) -> None:
    """Check that `path` stays below the folder that it is relative to.

    Raises:
        KnodeError: MANIFEST_INVALID.
    """
    parts = path.split("/")
    if path.startswith("/") or "\0" in path or any(part in ("", ".", "..") for part in parts):
        _refuse(f"{path[:200]!r} is no path inside the agent's folder")


def hash_code(files: Iterable[FileDigest]) -> bytes:
    """Return SHA-256 over the files' paths, sizes and digests, in the order of their paths."""
    listing = sorted(files, key=lambda file: file.path.encode())
    return hashlib.sha256(encode(listing)).digest()


def sign_manifest(key: KeyPair, manifest: Manifest, code_hash: bytes) -> bytes:
    """Return the signed manifest, published by `key`."""
    body = SignedManifest(manifest=manifest, code_hash=code_hash, publisher=key.public.raw)
    return sign(key, Domain.MANIFEST, encode(body))


def open_manifest(data: bytes) -> SignedManifest:
    """Return what a signed manifest holds, once its publisher's signature is verified.

    Whether the publisher is to be trusted is for the caller to say.

    Raises:
        KnodeError: MANIFEST_INVALID for anything that is no manifest signed by the key it names.
    """
    if len(data) > MAX_SIGNED_BYTES:
        _refuse(f"the signed manifest is larger than {MAX_SIGNED_BYTES} bytes")
    try:
        claimed = _signed_decoder.decode(data[SIGNATURE_BYTES:])
        open_signed(PublicKey(claimed.publisher), Domain.MANIFEST, data)
    except KnodeError as error:
        raise KnodeError(Code.MANIFEST_INVALID, f"the signed manifest does not verify: {error}") from error
    check_manifest(claimed.manifest)
    return claimed


def _refuse(why: str) -> NoReturn:
    raise KnodeError(Code.MANIFEST_INVALID, f"{MANIFEST_NAME}: {why}", "docs/guides/agents.md lists the keys")
