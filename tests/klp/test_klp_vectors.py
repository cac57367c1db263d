"""The vectors: knode still makes them, and a reader made from the document alone agrees."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import klp_checker
import make_vectors
import pytest
from klp_pair import sessions

from knode.errors import TABLE, KnodeError
from knode.klp import limits
from knode.mesh.statements import open_statement

DOCUMENT = (Path(__file__).parent.parent.parent / "docs" / "klp.md").read_text()


@pytest.mark.parametrize("name", list(make_vectors.FILES))
def test_knode_makes_the_same_vectors_as_before(name: str) -> None:
    """A difference is a change of the protocol: bump its version, or find the mistake."""
    assert make_vectors.text_of(name) == (make_vectors.VECTORS / f"{name}.json").read_text()


def test_a_reader_that_does_not_know_knode_agrees_with_every_vector() -> None:
    source = Path(klp_checker.__file__)
    assert "import knode" not in source.read_text()
    assert "from knode" not in source.read_text()
    done = subprocess.run(
        [sys.executable, str(source)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": agrees") == len(make_vectors.FILES)


def test_the_checker_notices_a_changed_vector() -> None:
    vector = json.loads(make_vectors.text_of("session"))
    bundle = next(step for step in vector["steps"] if step["frame"].startswith("05"))
    frame = bundle["frame"]
    bundle["frame"] = frame[:-1] + ("0" if frame[-1] != "0" else "1")
    with pytest.raises(klp_checker.Refused):
        klp_checker.check_session(vector)


def test_knode_refuses_every_rejection_with_its_code() -> None:
    for item in json.loads(make_vectors.text_of("rejections"))["frames"]:
        _, b = sessions()
        with pytest.raises(KnodeError) as caught:
            b.receive(bytes.fromhex(item["frame"]))
        assert caught.value.code == item["code"], item["why"]


def test_knode_refuses_what_is_no_statement_with_its_code() -> None:
    for item in json.loads(make_vectors.text_of("roster"))["refused"]:
        with pytest.raises(KnodeError) as caught:
            open_statement(bytes.fromhex(item["statement"]))
        assert caught.value.code == item["code"], item["why"]


def test_the_document_has_the_error_table() -> None:
    for code, meaning in TABLE.items():
        again = "yes" if meaning.retryable else "no"
        assert f"| {code} | {meaning.text} | {again} | {meaning.exit_code} |\n" in DOCUMENT
    rows = DOCUMENT.split("## 8.")[1].split("## 9.")[0].count("\n| ") - 1
    assert rows == len(TABLE)


def test_the_document_has_the_limits() -> None:
    section = DOCUMENT.split("## 9.")[1].split("## 10.")[0]
    for row in (
        f"| body of a message | {limits.MAX_BODY_BYTES // 1024} KiB |",
        f"| messages in a bundle | {limits.MAX_BUNDLE_MESSAGES}, {limits.MAX_BUNDLE_BYTES // 1024} KiB |",
        f"| counters in an Acknowledge | {limits.MAX_ACKNOWLEDGED} |",
        f"| data of a DATA frame | {limits.DATA_BYTES // 1024} KiB |",
        f"| first credit of a stream | {limits.FIRST_CREDIT_BYTES // 1024**2} MiB |",
        f"| streams that one side sends at once | {limits.MAX_STREAMS} |",
        f"| ttl of a request | {limits.MAX_TTL_MS:,} ms |",
        f"| {limits.OUTBOX_MESSAGES:,} messages, {limits.OUTBOX_BYTES // 1024**2} MiB; then RATE_LIMITED |",
        f"| answers kept | {limits.ANSWERS:,}, {limits.ANSWERS_BYTES // 1024**2} MiB; a quarter",
        f"| the last {limits.ANSWERS:,} |",
        f"| {limits.MAX_BOOTS}; {limits.MAX_HISTORIES:,} of all sources |",
        f"| {limits.ANSWER_GRACE_MS // 1000} s |",
    ):
        assert row in section, row
    assert limits.SOURCE_SHARE == 4
