"""The configuration: a typed schema, and where each value came from.

Layers, each over the one before: defaults, the name in `home.json`, `system_config.json`,
`user_config.json`, the environment (`KNODE_NODE_PORT` sets `node.port`), flags. A list is replaced
as a whole. docs/guides/configuration.md lists the keys; a test holds the two together.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from knode.errors import Code, KnodeError
from knode.home.folder import NodeName
from knode.home.layout import Home
from knode.world import World

FILE_LIMIT_BYTES = 1024 * 1024

_PEER = r"/(ip4|ip6|dns|dns4|dns6)/[^/\s]+/tcp/[0-9]{1,5}/p2p/[1-9A-HJ-NP-Za-km-z]+"
_HOST_PORT = r"(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):[0-9]{1,5}"
Address = Annotated[
    str, Meta(pattern=rf"^({_HOST_PORT}|{_PEER}(/p2p-circuit/p2p/[1-9A-HJ-NP-Za-km-z]+)?)\Z", max_length=261)
]
PeerAddress = Annotated[str, Meta(pattern=rf"^{_PEER}\Z", max_length=190)]
"""The multiaddr of a libp2p peer over TCP; short enough that an address behind it fits, too."""
NodeId = Annotated[str, Meta(pattern=r"^[1-9A-HJ-NP-Za-km-z]+\Z", max_length=64)]


class NodeSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """`node.*`: the node's name and where it listens."""

    name: NodeName = "node"
    host: Annotated[str, Meta(min_length=1, max_length=255)] = "0.0.0.0"
    port: Annotated[int, Meta(ge=0, le=65535)] = 4747
    advertise: Annotated[tuple[Address, ...], Meta(max_length=16)] = ()


class LogSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """`log.*`: what is logged and how much of it is kept."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    max_bytes: Annotated[int, Meta(ge=64 * 1024, le=1024**3)] = 8 * 1024 * 1024
    keep: Annotated[int, Meta(ge=1, le=100)] = 4


class TaskSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """`tasks.*`: how much work a node takes at once."""

    running: Annotated[int, Meta(ge=0, le=1024)] = 0
    queued: Annotated[int, Meta(ge=0, le=65535)] = 64
    artifact_bytes: Annotated[int, Meta(ge=0, le=1024**3)] = 64 * 1024 * 1024


class SandboxSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """`sandbox.*`: what holds untrusted agents."""

    prefer: Literal["auto", "bubblewrap", "sandlock", "none"] = "auto"


class MeshSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """`mesh.*`: how a dead peer is found, in seconds."""

    keepalive_s: Annotated[float, Meta(ge=0.1, le=60.0)] = 1.0
    dead_after_s: Annotated[float, Meta(ge=0.2, le=600.0)] = 3.0


class DiscoverySettings(Struct, frozen=True, forbid_unknown_fields=True):
    """`discovery.*`: how nodes find each other where no address of theirs is known."""

    mdns: bool = True
    libp2p: bool = True
    libp2p_port: Annotated[int, Meta(ge=0, le=65535)] = 4748
    relays: Annotated[tuple[PeerAddress, ...], Meta(max_length=4)] = ()
    relay_server: bool = False
    relay_guests: Annotated[tuple[NodeId, ...], Meta(max_length=64)] = ()
    bootstrap: Annotated[tuple[PeerAddress, ...], Meta(max_length=16)] = ()


class TestnetSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """`testnet.*`: what `knode testnet` writes into the homes that it makes."""

    faults: bool = False
    cut_off_from: Annotated[tuple[NodeId, ...], Meta(max_length=32)] = ()


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    """Every value that can be configured."""

    node: NodeSettings = NodeSettings()
    log: LogSettings = LogSettings()
    tasks: TaskSettings = TaskSettings()
    sandbox: SandboxSettings = SandboxSettings()
    mesh: MeshSettings = MeshSettings()
    discovery: DiscoverySettings = DiscoverySettings()
    testnet: TestnetSettings = TestnetSettings()


class Row(NamedTuple):
    """One value and where it came from: `default`, a file, a variable of the environment, or `flag`."""

    key: str
    value: object
    source: str


def _schema() -> dict[str, Any]:
    sections = get_type_hints(Settings)
    return {
        f"{section}.{key}": kind
        for section, struct in sections.items()
        for key, kind in get_type_hints(struct, include_extras=True).items()
    }


SCHEMA: Mapping[str, Any] = _schema()
"""The type of every key, `section.name`, in the order of the guide."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """The values in force, and the source of each."""

    values: Settings
    sources: Mapping[str, str]

    def rows(self) -> list[Row]:
        """Return every key with its value and source, in the schema's order."""
        tree = msgspec.to_builtins(self.values)
        return [Row(key, tree[key.split(".")[0]][key.split(".")[1]], self.sources[key]) for key in SCHEMA]


def load_configuration(
    world: World, home: Home, environment: Mapping[str, str], flags: Mapping[str, str]
) -> Configuration:
    """Read and merge all layers. Needs no daemon, and no whole home.

    Args:
        world: its disk is used.
        home: its configuration files may be absent.
        environment: `KNODE_<SECTION>_<KEY>` sets a value; `KNODE_HOME` is none of ours.
        flags: values as text by their full key, `node.port`.

    Raises:
        KnodeError: CONFIG_INVALID, naming the file or variable, the key, why, and what to do.
    """
    return _merge(
        [
            *_rows_of_home(world, home),
            *_rows_of_file(world, home.config_system),
            *_rows_of_file(world, home.config_user),
            *_rows_of_environment(environment),
            *(_row_of_text(key, text, "flag") for key, text in flags.items()),
        ]
    )


def set_value(world: World, home: Home, key: str, text: str) -> None:
    """Write one value to the user's configuration file, atomically, after checking the whole.

    Args:
        world: its disk is used.
        home: its folder is there; `home.json` need not be whole.
        key: `node.port`.
        text: as on the command line; a list is separated by commas, and empty text is the empty list.

    Raises:
        KnodeError: CONFIG_INVALID, HOME_MISSING, DISK_FULL, DISK_READ_ONLY; the file is as it was.
    """
    if not world.disk.exists(home.path):
        raise KnodeError(
            Code.HOME_MISSING, f"there is no folder {home.path}", "make it with 'knode init' or 'knode join'"
        )
    # A wrong value of this very key is what the user is about to mend.
    user = [*_rows_of_file(world, home.config_user, except_for=key), _row_of_text(key, text, "command line")]
    _merge([*_rows_of_home(world, home), *_rows_of_file(world, home.config_system), *user])
    tree: dict[str, dict[str, object]] = {}
    for row in sorted(user):
        section, name = row.key.split(".")
        tree.setdefault(section, {})[name] = row.value
    world.disk.make_folder(home.config)
    world.disk.write(home.config_user, (json.dumps(tree, indent=2) + "\n").encode())


def _merge(rows: Iterable[Row]) -> Configuration:
    """Lay each row over those before it, and check what no single value shows."""
    sources = dict.fromkeys(SCHEMA, "default")
    tree: dict[str, dict[str, object]] = {section: {} for section in Settings.__struct_fields__}
    for key, value, source in rows:
        section, name = key.split(".")
        tree[section][name] = value
        sources[key] = source
    settings = msgspec.convert(tree, Settings)
    mesh = settings.mesh
    if mesh.dead_after_s < 2 * mesh.keepalive_s:
        raise _invalid(
            sources["mesh.dead_after_s"],
            f"mesh.dead_after_s ({mesh.dead_after_s:g}) is less than twice mesh.keepalive_s "
            f"({mesh.keepalive_s:g}, {sources['mesh.keepalive_s']}), so living peers would be taken for dead",
        )
    return Configuration(settings, sources)


def _rows_of_home(world: World, home: Home) -> list[Row]:
    """Take the node's name from `home.json`; a damaged one is for `open_home` to report."""
    try:
        content = json.loads(world.disk.read(home.format_file, limit_bytes=FILE_LIMIT_BYTES))
        return [Row("node.name", msgspec.convert(content["node"], NodeName), str(home.format_file))]
    except (KnodeError, ValueError, KeyError, TypeError):
        return []


def _rows_of_file(world: World, path: Path, *, except_for: str = "") -> list[Row]:
    source = str(path)
    try:
        text = world.disk.read(path, limit_bytes=FILE_LIMIT_BYTES).decode("utf-8")
        tree = json.loads(text, object_pairs_hook=_without_twins)
    except KnodeError as error:
        if error.code is Code.NOT_FOUND:
            return []
        raise
    except json.JSONDecodeError as error:
        raise _unreadable(
            source, f"line {error.lineno}, column {error.colno}: not JSON ({error.msg.lower()})"
        ) from error
    except (ValueError, RecursionError) as error:
        raise _unreadable(source, f"not a configuration ({error})") from error
    if not isinstance(tree, dict):
        raise _unreadable(source, "the outermost value must be an object of sections")
    rows = []
    for section, content in tree.items():
        if section not in Settings.__struct_fields__:
            raise _unknown(source, section, Settings.__struct_fields__)
        if not isinstance(content, dict):
            raise _invalid(source, f"{section} must be an object")
        for name, value in content.items():
            key = f"{section}.{name}"
            if key != except_for:
                rows.append(Row(key, _checked(key, value, source, strict=True), source))
    return rows


def _without_twins(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands there twice")
    return content


def _rows_of_environment(environment: Mapping[str, str]) -> list[Row]:
    variables = {"KNODE_" + key.replace(".", "_").upper(): key for key in SCHEMA}
    sections = tuple(f"KNODE_{section.upper()}_" for section in Settings.__struct_fields__)
    rows = []
    for variable in sorted(environment):
        if variable in variables:
            rows.append(_row_of_text(variables[variable], environment[variable], variable))
        elif variable.startswith(sections):
            raise _unknown("the environment", variable, variables)
    return rows


def _row_of_text(key: str, text: str, source: str) -> Row:
    value: object = text
    if _is_list(SCHEMA.get(key)):
        value = [part.strip() for part in text.split(",")] if text.strip() else []
    return Row(key, _checked(key, value, source, strict=False), source)


def _is_list(kind: Any) -> bool:
    return get_origin(getattr(kind, "__origin__", kind)) is tuple  # it may be annotated with bounds


def _checked(key: str, value: object, source: str, *, strict: bool) -> object:
    if key not in SCHEMA:
        raise _unknown(source, key, SCHEMA)
    try:
        return msgspec.to_builtins(msgspec.convert(value, SCHEMA[key], strict=strict))
    except msgspec.ValidationError as error:
        shown = json.dumps(value)[:80]
        reason = str(error).split(" - at ")[0]
        raise _invalid(source, f"{key} cannot be {shown} ({reason[0].lower()}{reason[1:]})") from error


def _unknown(source: str, name: str, known: Iterable[str]) -> KnodeError:
    close = difflib.get_close_matches(name, list(known), n=1)
    hint = f"did you mean {close[0]!r}?" if close else "see every key with 'knode config list'"
    return KnodeError(Code.CONFIG_INVALID, f"{source}: unknown key {name!r}", hint)


def _invalid(source: str, reason: str) -> KnodeError:
    """Return the error for a value; `knode config set` mends one that stands in the user's own file."""
    return KnodeError(
        Code.CONFIG_INVALID, f"{source}: {reason}", "correct it there, or set it with 'knode config set'"
    )


def _unreadable(source: str, reason: str) -> KnodeError:
    """Return the error for a whole file, which only an editor mends."""
    return KnodeError(Code.CONFIG_INVALID, f"{source}: {reason}", "correct the file, or move it aside")
