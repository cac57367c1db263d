from __future__ import annotations

from pathlib import Path

import pytest

from knode.errors import Code, KnodeError
from knode.identity.keystore import create_key, load_key
from knode.world.real import real_world


def test_a_key_is_kept_in_one_private_line_and_loaded_again(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    key = create_key(real_world(), path)
    assert load_key(real_world(), path).node_id == key.node_id
    assert path.read_text() == f"knode-ed25519 {key.seed.hex()}\n"
    assert path.stat().st_mode & 0o777 == 0o600


def test_two_keys_differ(tmp_path: Path) -> None:
    first, second = (create_key(real_world(), tmp_path / name) for name in ("a", "b"))
    assert first.node_id != second.node_id


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    key = create_key(real_world(), path)
    with pytest.raises(KnodeError) as error:
        create_key(real_world(), path)
    assert error.value.code is Code.HOME_EXISTS
    assert load_key(real_world(), path).node_id == key.node_id


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(KnodeError, match=r"node\.key is missing") as error:
        load_key(real_world(), tmp_path / "node.key")
    assert error.value.code is Code.HOME_DAMAGED
    assert error.value.next_step


SEED = "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        f"knode-ed25519 {SEED}",
        f"knode-ed25519 {SEED}\n\n",
        f"knode-ed25519  {SEED}\n",
        f"knode-ed25519 {SEED[:-2]}\n",
        f"knode-ed25519 {SEED[:-1]}\n",
        f"knode-ed25519 {SEED.upper()}\n",
        f"knode-ed25519 {SEED[:-2]}zz\n",
        f"knode-x25519 {SEED}\n",
        "knode-ed25519 ä\n",
        "x" * 2000,
    ],
)
def test_a_damaged_key_is_named_and_not_quoted(tmp_path: Path, text: str) -> None:
    path = tmp_path / "node.key"
    path.write_text(text)
    with pytest.raises(KnodeError, match=r"node\.key is damaged") as error:
        load_key(real_world(), path)
    assert error.value.code is Code.HOME_DAMAGED
    assert SEED[:16] not in str(error.value)
    assert error.value.__cause__ is None or SEED[:16] not in str(error.value.__cause__)


def test_the_published_key_is_read_as_its_node_id(tmp_path: Path) -> None:
    # RFC 8032, section 7.1, test 1
    path = tmp_path / "node.key"
    path.write_text(f"knode-ed25519 {SEED}\n")
    public = "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"
    assert load_key(real_world(), path).public.raw.hex() == public
