from __future__ import annotations

import os

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knode.agents.limits import MAX_RESULT_BYTES, Limits
from knode.agents.manifest import (
    CLASSES,
    Capability,
    FileDigest,
    Manifest,
    Runtime,
    hash_code,
    open_manifest,
    parse_manifest,
    sign_manifest,
)
from knode.errors import Code, KnodeError
from knode.identity import KeyPair

GOOD = """
id = "kExecutor:word-count"
version = "1.2.3"
description = "Counts words"
runtime = "python"
entry = "main.py"
capabilities = ["input-files"]

[limits]
memory_bytes = 134217728
wall_seconds = 10
"""


def test_manifest_is_read_with_its_defaults() -> None:
    manifest = parse_manifest(GOOD)
    assert manifest == Manifest(
        id="kExecutor:word-count",
        version="1.2.3",
        description="Counts words",
        runtime=Runtime.PYTHON,
        entry=("main.py",),
        capabilities=(Capability.INPUT_FILES,),
        limits=Limits(memory_bytes=128 << 20, wall_seconds=10),
    )
    assert manifest.limits.output_bytes == MAX_RESULT_BYTES


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_of_agents_is_known(name: str) -> None:
    assert parse_manifest(GOOD.replace("kExecutor", name)).id == f"{name}:word-count"


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ('id = "kExecutor:word-count"', "", "id"),
        ("kExecutor:word-count", "kOther:word-count", "id"),
        ("kExecutor:word-count", "kExecutor:Word", "id"),
        ("kExecutor:word-count", "kExecutor:../x", "id"),
        ("kExecutor:word-count", "kExecutor:" + "a" * 49, "id"),
        ("kExecutor:word-count", "kExecutor:a\\n", "id"),
        ("1.2.3", "1.2", "version"),
        ("1.2.3", "1.2.3\\n", "version"),
        ("Counts words", "x" * 501, "description"),
        ("Counts words", "red \\u001b[31m", "description"),
        ('"python"', '"docker"', "runtime"),
        ('"main.py"', '"../main.py"', "path"),
        ('"main.py"', '"/etc/passwd"', "path"),
        ('"main.py"', '"a//b"', "path"),
        ('"main.py"', '["main.py", "more"]', "entry"),
        ('"main.py"', '[""]', "entry"),
        ('"main.py"', "7", "entry"),
        ('"input-files"', '"network"', "capabilities"),
        ('"input-files"', '"input-files", "input-files"', "capabilities"),
        ("134217728", "1", "memory_bytes"),
        ("134217728", "99999999999999", "memory_bytes"),
        ("134217728", '"128M"', "memory_bytes"),
        ("wall_seconds = 10", "wall_seconds = 3601", "wall_seconds"),
        ("wall_seconds = 10", "wall_seconds = 0", "wall_seconds"),
        ("wall_seconds = 10", "output_bytes = 196609", "output_bytes"),
        ("wall_seconds = 10", "processes = 257", "processes"),
        ("wall_seconds = 10", "wal_seconds = 10", "wal_seconds"),
        ("description", "describtion", "describtion"),
    ],
)
def test_wrong_key_is_named(old: str, new: str, key: str) -> None:
    assert old in GOOD
    with pytest.raises(KnodeError) as caught:
        parse_manifest(GOOD.replace(old, new))
    assert caught.value.code is Code.MANIFEST_INVALID
    assert key in caught.value.message


@pytest.mark.parametrize(
    "text",
    ["", "id = ", "x" * 70_000, "a = " + "[" * 20_000, "a" + ".a" * 3_000 + " = 1", "a = " + "9" * 5000],
)
def test_what_is_no_manifest_is_refused_in_bounded_time(text: str) -> None:
    with pytest.raises(KnodeError) as caught:
        parse_manifest(text)
    assert caught.value.code is Code.MANIFEST_INVALID


@given(st.text(max_size=300))
def test_any_text_is_a_manifest_or_refused_by_name(text: str) -> None:
    try:
        parse_manifest(text)
    except KnodeError as error:
        assert error.code is Code.MANIFEST_INVALID  # noqa: PT017


@pytest.fixture(scope="module")
def signed() -> bytes:
    return sign_manifest(KeyPair(bytes(32)), parse_manifest(GOOD), hash_code([]))


def test_signed_manifest_opens_to_what_was_signed(signed: bytes) -> None:
    opened = open_manifest(signed)
    assert opened.manifest == parse_manifest(GOOD)
    assert opened.code_hash == hash_code([])
    assert opened.publisher == KeyPair(bytes(32)).public.raw


def test_signed_manifest_with_any_byte_changed_is_refused(signed: bytes) -> None:
    for place in range(len(signed)):
        changed = bytearray(signed)
        changed[place] ^= 1
        with pytest.raises(KnodeError) as caught:
            open_manifest(bytes(changed))
        assert caught.value.code is Code.MANIFEST_INVALID


def test_signed_manifest_with_another_publisher_is_refused(signed: bytes) -> None:
    other = KeyPair(os.urandom(32)).public.raw
    forged = signed.replace(KeyPair(bytes(32)).public.raw, other)
    with pytest.raises(KnodeError) as caught:
        open_manifest(forged)
    assert caught.value.code is Code.MANIFEST_INVALID


def test_signed_manifest_in_a_longer_encoding_is_refused() -> None:
    key = KeyPair(bytes(32))
    signed = sign_manifest(key, parse_manifest(GOOD), hash_code([]))
    fields = msgspec.msgpack.decode(signed[64:])
    reordered = msgspec.msgpack.encode(dict(reversed(fields.items())))
    from knode.klp.objects import Domain, sign

    with pytest.raises(KnodeError) as caught:
        open_manifest(sign(key, Domain.MANIFEST, reordered))
    assert caught.value.code is Code.MANIFEST_INVALID


digests = st.builds(
    FileDigest,
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.integers(0, 1 << 40),
    st.binary(min_size=32, max_size=32),
)


@given(st.lists(digests, unique_by=lambda file: file.path), st.randoms())
def test_hash_of_code_does_not_depend_on_the_order_of_files(files: list[FileDigest], random: object) -> None:
    shuffled = sorted(files, key=lambda _: random.random())  # type: ignore[attr-defined]
    assert hash_code(shuffled) == hash_code(files)


@given(st.lists(digests, min_size=1, unique_by=lambda file: file.path))
def test_hash_of_code_depends_on_every_file(files: list[FileDigest]) -> None:
    first = files[0]
    grown = FileDigest(first.path, first.size + 1, first.sha256)
    assert hash_code(files) != hash_code(files[1:])
    assert hash_code(files) != hash_code([grown, *files[1:]])
