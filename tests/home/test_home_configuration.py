from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knode.errors import Code, KnodeError
from knode.home.configuration import SCHEMA, Settings, load_configuration, set_value
from knode.home.folder import create_home
from knode.home.layout import Home
from knode.world.real import real_world

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "configuration.md"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home", None)
    create_home(real_world(), home, name="attic")
    return home


def refused(
    home: Home, environment: dict[str, str] | None = None, flags: dict[str, str] | None = None
) -> KnodeError:
    with pytest.raises(KnodeError) as error:
        load_configuration(real_world(), home, environment or {}, flags or {})
    assert error.value.code is Code.CONFIG_INVALID
    assert error.value.next_step
    return error.value


def test_each_layer_lies_over_the_one_before_and_each_value_says_where_it_came_from(home: Home) -> None:
    home.config_system.write_text('{"node": {"port": 1, "host": "10.0.0.1"}, "log": {"level": "debug"}}')
    home.config_user.write_text('{"node": {"port": 2, "advertise": ["a:1"]}, "tasks": {"queued": 7}}')
    loaded = load_configuration(
        real_world(), home, {"KNODE_NODE_PORT": "3", "KNODE_TASKS_QUEUED": "8"}, {"node.port": "4"}
    )
    assert loaded.values.node.port == 4
    assert loaded.values.tasks.queued == 8
    rows = {row.key: (row.value, row.source) for row in loaded.rows()}
    assert rows["node.port"] == (4, "flag")
    assert rows["tasks.queued"] == (8, "KNODE_TASKS_QUEUED")
    assert rows["node.advertise"] == (("a:1",), str(home.config_user))
    assert rows["node.host"] == ("10.0.0.1", str(home.config_system))
    assert rows["log.level"] == ("debug", str(home.config_system))
    assert rows["node.name"] == ("attic", str(home.format_file))
    assert rows["mesh.keepalive_s"] == (1.0, "default")
    assert list(rows) == list(SCHEMA)


def test_without_files_and_even_without_a_home_the_defaults_hold(tmp_path: Path) -> None:
    loaded = load_configuration(real_world(), Home(tmp_path / "none", None), {}, {})
    assert loaded.values == Settings()
    assert {row.source for row in loaded.rows()} == {"default"}


def test_a_damaged_home_file_does_not_keep_the_configuration_from_being_read(home: Home) -> None:
    home.format_file.write_text("{")
    assert load_configuration(real_world(), home, {}, {}).values.node.name == "node"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"node": {\n  "port": 1\n  "host": "x"}}', "line 3"),
        ('{"node": {"prt": 1}}', "node.prt"),
        ('{"nod": {}}', "nod"),
        ('{"node": {"port": "1"}}', "node.port"),
        ('{"node": {"port": 70000}}', "node.port"),
        ('{"node": {"port": true}}', "node.port"),
        ('{"node": {"port": 1, "port": 2}}', "twice"),
        ('{"node": {"name": "A B"}}', "node.name"),
        ('{"node": {"advertise": ["nowhere"]}}', "node.advertise"),
        ('{"node": {"advertise": ["/ip4/1.2.3.4/udp/4748/p2p/12D3KooW"]}}', "node.advertise"),
        ('{"discovery": {"relays": ["relay.example:4748"]}}', "discovery.relays"),
        ('{"discovery": {"relays": ["/dns/a/tcp/1/p2p/12D3/p2p-circuit/p2p/12D3"]}}', "discovery.relays"),
        ('{"node": 1}', "node must be an object"),
        ('{"mesh": {"keepalive_s": NaN}}', "mesh.keepalive_s"),
        ('{"mesh": {"dead_after_s": Infinity}}', "mesh.dead_after_s"),
        ('{"mesh": {"keepalive_s": 2.0}}', "dead_after_s"),
        ('{"log": {"level": "loud"}}', "log.level"),
        ("[]", "object"),
        ("", "line 1"),
        ("[" * 100_000, "not"),
    ],
)
def test_a_broken_file_is_refused_with_its_name_the_place_and_the_reason(
    home: Home, text: str, expected: str
) -> None:
    home.config_user.write_text(text)
    error = refused(home)
    assert expected in error.message
    assert "config" in error.message


def test_multiaddrs_are_advertised_and_name_relays(home: Home) -> None:
    relay = "/dns/relay.example/tcp/4748/p2p/12D3KooWReay"
    through = f"{relay}/p2p-circuit/p2p/12D3KooWSame"
    set_value(
        real_world(), home, "node.advertise", f"a.example:1, /ip6/::1/tcp/2/p2p/12D3KooWSame, {through}"
    )
    set_value(real_world(), home, "discovery.relays", relay)
    values = load_configuration(real_world(), home, {}, {}).values
    assert values.node.advertise == ("a.example:1", "/ip6/::1/tcp/2/p2p/12D3KooWSame", through)
    assert values.discovery.relays == (relay,)


def test_a_file_that_is_not_text_is_refused(home: Home) -> None:
    home.config_user.write_bytes(b"\xff\xfe\x00")
    assert "user_config.json" in refused(home).message


def test_a_mistyped_key_gets_a_suggestion(home: Home) -> None:
    assert "node.port" in refused(home, flags={"node.prot": "1"}).next_step
    assert "KNODE_NODE_PORT" in refused(home, {"KNODE_NODE_PROT": "1"}).next_step
    home.config_user.write_text('{"mehs": {}}')
    assert "mesh" in refused(home).next_step


def test_other_programs_variables_and_the_home_are_no_configuration(home: Home) -> None:
    load_configuration(real_world(), home, {"KNODE_HOME": "/x", "PATH": "/bin", "KNODE": "1"}, {})


def test_a_set_value_is_read_back_and_the_others_stay(home: Home) -> None:
    set_value(real_world(), home, "node.advertise", "a.example:1, [::1]:2")
    set_value(real_world(), home, "mesh.dead_after_s", "5")
    set_value(real_world(), home, "node.port", "0")
    values = load_configuration(real_world(), home, {}, {}).values
    assert values.node.advertise == ("a.example:1", "[::1]:2")
    assert (values.mesh.dead_after_s, values.node.port) == (5.0, 0)
    set_value(real_world(), home, "node.advertise", "")
    assert load_configuration(real_world(), home, {}, {}).values.node.advertise == ()


def test_a_refused_value_leaves_the_file_as_it_was(home: Home) -> None:
    set_value(real_world(), home, "node.port", "5000")
    before = home.config_user.read_bytes()
    for key, text in (("node.port", "x"), ("node.port", "-1"), ("no.such", "1"), ("mesh.keepalive_s", "9")):
        with pytest.raises(KnodeError) as error:
            set_value(real_world(), home, key, text)
        assert error.value.code is Code.CONFIG_INVALID
    assert home.config_user.read_bytes() == before
    assert [path.name for path in home.config.iterdir()] == ["user_config.json"]


def test_a_wrong_value_is_mended_by_setting_it(home: Home) -> None:
    home.config_user.write_text('{"node": {"port": "broken", "host": "127.0.0.1"}}')
    set_value(real_world(), home, "node.port", "5000")
    assert json.loads(home.config_user.read_text()) == {"node": {"host": "127.0.0.1", "port": 5000}}


def test_setting_a_value_without_a_home_says_so(tmp_path: Path) -> None:
    with pytest.raises(KnodeError) as error:
        set_value(real_world(), Home(tmp_path / "none", None), "node.port", "1")
    assert error.value.code is Code.HOME_MISSING


VALUES = {
    "node.port": st.integers(0, 65535),
    "log.level": st.sampled_from(["debug", "info", "warning", "error"]),
    "tasks.queued": st.integers(0, 65535),
    "mesh.dead_after_s": st.floats(2.0, 600.0),
}


@given(st.fixed_dictionaries({}, optional=VALUES), st.fixed_dictionaries({}, optional=VALUES))
def test_the_merge_is_the_last_layer_that_names_a_key(
    tmp_path_factory: pytest.TempPathFactory, system: dict[str, object], user: dict[str, object]
) -> None:
    home = Home(tmp_path_factory.mktemp("home", numbered=True), None)
    home.config.mkdir()
    for path, layer in ((home.config_system, system), (home.config_user, user)):
        tree: dict[str, dict[str, object]] = {}
        for key, value in layer.items():
            tree.setdefault(key.split(".")[0], {})[key.split(".")[1]] = value
        path.write_text(json.dumps(tree))
    rows = {row.key: row.value for row in load_configuration(real_world(), home, {}, {}).rows()}
    defaults = msgspec.to_builtins(Settings())
    for key, value in rows.items():
        section, name = key.split(".")
        assert value == (system | user).get(key, defaults[section][name])


def test_the_guide_lists_every_key_with_its_default() -> None:
    listed = dict(re.findall(r"^\| `([a-z_]+\.[a-z0-9_]+)` \| `([^`]*)` \|", GUIDE.read_text(), re.MULTILINE))
    defaults = msgspec.to_builtins(Settings())
    expected = {}
    for key in SCHEMA:
        section, name = key.split(".")
        value = defaults[section][name]
        expected[key] = value if isinstance(value, str) else json.dumps(value)
    assert listed == expected
