from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from knode.agents.code import copy_code, list_code
from knode.agents.manifest import Runtime, hash_code, parse_manifest, sign_manifest
from knode.agents.registry import Registry, State
from knode.errors import Code, KnodeError
from knode.identity import KeyPair, PublicKey
from knode.world import World

MANIFEST = """
id = "kExecutor:echo"
version = "1.0.0"
runtime = "python"
entry = "main.py"
"""
KEY = KeyPair(bytes(32))
Open = Callable[..., Registry]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "echo"
    (folder / "lib").mkdir(parents=True)
    (folder / "agent.toml").write_text(MANIFEST)
    (folder / "main.py").write_text("print(input())")
    (folder / "lib" / "words.txt").write_text("a b c")
    return folder


@pytest.fixture
def open_registry(world: World, tmp_path: Path) -> Open:
    """A registry as a node that starts on this home finds it."""

    def open_it(trusts: Callable[[PublicKey], bool] = lambda key: False) -> Registry:
        registry = Registry(world, tmp_path / "state" / "agents", KEY, trusts)
        registry.load()
        return registry

    return open_it


def installed_code(registry: Registry) -> Path:
    code = registry.show("kExecutor:echo").code
    assert code is not None
    return code


def installed_code_after(open_registry: Open, source: Path) -> Path:
    registry = open_registry()
    registry.install(source)
    return installed_code(registry)


def sign_folder(world: World, folder: Path, key: KeyPair) -> None:
    files = copy_code(world.disk, folder, list_code(folder), None)
    manifest = parse_manifest((folder / "agent.toml").read_text())
    (folder / "agent.signed").write_bytes(sign_manifest(key, manifest, hash_code(files)))


def test_shipped_agents_are_there_and_run(open_registry: Open) -> None:
    entries = open_registry().list()
    assert [entry.manifest.id for entry in entries] == [
        "kExecutor:command",
        "kExecutor:python",
        "kExecutor:text",
    ]
    assert {entry.state for entry in entries} == {State.RUNNING}


def test_installed_agent_is_there_after_a_restart(open_registry: Open, source: Path) -> None:
    manifest = open_registry().install(source)
    shutil.rmtree(source)
    entry = open_registry().find("kExecutor:echo")
    assert entry.manifest == manifest
    assert entry.publisher == KEY.public
    assert entry.state is State.RUNNING
    assert entry.code is not None
    assert (entry.code / "lib" / "words.txt").read_text() == "a b c"


@pytest.mark.parametrize("agent_id", ["kExecutor:echo", "kExecutor:text"])
def test_stop_and_start_outlast_a_restart(open_registry: Open, source: Path, agent_id: str) -> None:
    registry = open_registry()
    registry.install(source)
    registry.stop(agent_id)
    with pytest.raises(KnodeError) as caught:
        open_registry().find(agent_id)
    assert caught.value.code is Code.NO_AGENT
    assert caught.value.next_step == f"run 'knode agent start {agent_id}'"
    open_registry().start(agent_id)
    assert open_registry().find(agent_id).state is State.RUNNING


def test_unknown_agent_is_named_with_the_next_command(open_registry: Open) -> None:
    with pytest.raises(KnodeError) as caught:
        open_registry().find("kExecutor:nothing")
    assert caught.value.code is Code.NO_AGENT
    assert "kExecutor:nothing" in caught.value.message
    assert "knode agent list" in caught.value.next_step


def test_another_version_replaces_the_first_and_its_code(open_registry: Open, source: Path) -> None:
    registry = open_registry()
    registry.install(source)
    before = installed_code(registry)
    (source / "agent.toml").write_text(MANIFEST.replace("1.0.0", "2.0.0"))
    (source / "main.py").write_text("print(2)")
    registry.install(source)
    assert registry.find("kExecutor:echo").manifest.version == "2.0.0"
    assert before.exists(), "an attempt may still run it"
    reopened = open_registry()
    assert reopened.find("kExecutor:echo").manifest.version == "2.0.0"
    assert not before.exists()


def test_installing_again_is_no_error_and_keeps_a_stopped_agent_stopped(
    open_registry: Open, source: Path
) -> None:
    registry = open_registry()
    registry.install(source)
    registry.stop("kExecutor:echo")
    registry.install(source)
    assert registry.show("kExecutor:echo").state is State.STOPPED


async def test_agents_can_be_installed_from_several_threads_at_once(
    open_registry: Open, source: Path, world: World, tmp_path: Path
) -> None:
    registry = open_registry()
    folders = []
    for number in range(8):
        folders.append(tmp_path / f"copy{number}")
        shutil.copytree(source, folders[-1])
        (folders[-1] / "agent.toml").write_text(MANIFEST.replace("1.0.0", f"1.0.{number % 2}"))
    async with trio.open_nursery() as nursery:
        for folder in folders:
            nursery.start_soon(world.blocking.run, partial(registry.install, folder))
    entry = registry.find("kExecutor:echo")
    registry.verify(entry)
    assert open_registry().find("kExecutor:echo") == entry


def change(code: Path) -> None:
    (code / "main.py").write_text("import os; os.abort()")


def change_keeping_the_size(code: Path) -> None:
    data = bytearray((code / "main.py").read_bytes())
    data[-1] ^= 1
    (code / "main.py").write_bytes(data)


def remove(code: Path) -> None:
    (code / "lib" / "words.txt").unlink()


def add(code: Path) -> None:
    (code / "lib" / "json.py").write_text("evil")


def add_beside_the_manifest(code: Path) -> None:
    (code / "sitecustomize.py").write_text("evil")


@pytest.mark.parametrize("tamper", [change, change_keeping_the_size, remove, add, add_beside_the_manifest])
def test_changed_code_is_refused_at_the_next_start_and_before_a_run(
    open_registry: Open, source: Path, tamper: Callable[[Path], None]
) -> None:
    registry = open_registry()
    registry.install(source)
    entry = registry.find("kExecutor:echo")
    tamper(installed_code(registry))
    with pytest.raises(KnodeError) as caught:
        registry.verify(entry)
    assert caught.value.code is Code.MANIFEST_INVALID
    for one in (registry, open_registry()):
        assert one.show("kExecutor:echo").state is State.REFUSED
        with pytest.raises(KnodeError) as caught:
            one.find("kExecutor:echo")
        assert caught.value.code is Code.MANIFEST_INVALID
        assert "knode agent install" in caught.value.next_step
    registry.install(source)
    assert open_registry().find("kExecutor:echo").state is State.RUNNING


def test_record_with_any_byte_changed_never_runs_other_code(
    open_registry: Open, source: Path, tmp_path: Path
) -> None:
    registry = open_registry()
    manifest = registry.install(source)
    path = tmp_path / "state" / "agents" / "kExecutor-echo.agent"
    record = path.read_bytes()
    code = tmp_path / "kept"
    shutil.copytree(tmp_path / "state" / "agents" / "code", code)
    for place in range(0, len(record), 7):
        changed = bytearray(record)
        changed[place] ^= 0x01
        path.write_bytes(changed)
        shutil.copytree(code, tmp_path / "state" / "agents" / "code", dirs_exist_ok=True)
        entry = open_registry().show("kExecutor:echo")
        assert entry.state is State.REFUSED or entry.manifest == manifest


def test_damaged_record_of_one_agent_leaves_the_others(
    open_registry: Open, source: Path, tmp_path: Path
) -> None:
    open_registry().install(source)
    folder = tmp_path / "state" / "agents"
    (folder / "kExecutor-other.agent").write_bytes(b"rubbish")
    (folder / "kExecutor-text.agent").write_bytes(b"rubbish")
    registry = open_registry()
    assert registry.show("kExecutor:other").state is State.REFUSED
    assert registry.show("kExecutor:text").state is State.REFUSED
    assert registry.find("kExecutor:echo").state is State.RUNNING
    registry.start("kExecutor:text")
    assert open_registry().find("kExecutor:text").state is State.RUNNING


@pytest.mark.parametrize("other", ["kExecutor-text", "kExecutor-other"])
def test_record_under_the_name_of_another_agent_is_refused(
    open_registry: Open, source: Path, tmp_path: Path, other: str
) -> None:
    open_registry().install(source)
    folder = tmp_path / "state" / "agents"
    (folder / "kExecutor-echo.agent").rename(folder / f"{other}.agent")
    registry = open_registry()
    agent_id = other.replace("-", ":")
    assert [entry.manifest.id for entry in registry.list()].count(agent_id) == 1
    assert registry.show(agent_id).code is None
    with pytest.raises(KnodeError):
        registry.find("kExecutor:echo")
    if agent_id == "kExecutor:text":
        assert registry.find(agent_id).manifest.runtime is Runtime.BUILTIN
    else:
        assert registry.show(agent_id).state is State.REFUSED


def test_code_of_a_record_that_cannot_be_read_now_is_kept(
    open_registry: Open, source: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = installed_code_after(open_registry, source)
    read = world.disk.read

    def unreadable(path: Path, *, limit_bytes: int) -> bytes:
        if path.suffix == ".agent":
            raise KnodeError(Code.DISK_READ_ONLY, f"{path} cannot be read")
        return read(path, limit_bytes=limit_bytes)

    with monkeypatch.context() as broken:
        broken.setattr(world.disk, "read", unreadable)
        assert open_registry().show("kExecutor:echo").state is State.REFUSED
    assert code.exists()
    assert open_registry().find("kExecutor:echo").code == code


def test_record_of_another_node_is_refused(
    open_registry: Open, source: Path, world: World, tmp_path: Path
) -> None:
    stranger = Registry(world, tmp_path / "state" / "agents", KeyPair(os.urandom(32)), lambda key: False)
    stranger.load()
    stranger.install(source)
    entry = open_registry().show("kExecutor:echo")
    assert entry.state is State.REFUSED
    assert "not trusted" in entry.problem


def test_signed_agent_of_a_trusted_publisher_is_installed_under_its_name(
    open_registry: Open, source: Path, world: World
) -> None:
    publisher = KeyPair(os.urandom(32))
    sign_folder(world, source, publisher)
    registry = open_registry(trusts=lambda key: key == publisher.public)
    registry.install(source)
    assert registry.find("kExecutor:echo").publisher == publisher.public


def test_publisher_that_is_no_longer_trusted_is_refused_at_the_next_start(
    open_registry: Open, source: Path, world: World
) -> None:
    sign_folder(world, source, KeyPair(os.urandom(32)))
    open_registry(trusts=lambda key: True).install(source)
    assert open_registry().show("kExecutor:echo").state is State.REFUSED


def link(folder: Path, world: World) -> None:
    (folder / "link").symlink_to("/etc/passwd")


def folder_link(folder: Path, world: World) -> None:
    (folder / "link").symlink_to("lib")


def pipe(folder: Path, world: World) -> None:
    os.mkfifo(folder / "pipe")


def too_many_files(folder: Path, world: World) -> None:
    for number in range(1001):
        (folder / str(number)).touch()


def too_many_bytes(folder: Path, world: World) -> None:
    with (folder / "big").open("wb") as file:
        file.truncate(64 * 1024 * 1024 + 1)


def too_deep(folder: Path, world: World) -> None:
    (folder / "/".join("d" * 20)).mkdir(parents=True)


def no_manifest(folder: Path, world: World) -> None:
    (folder / "agent.toml").unlink()


def no_entry_file(folder: Path, world: World) -> None:
    (folder / "main.py").unlink()


def no_entry(folder: Path, world: World) -> None:
    (folder / "agent.toml").write_text(MANIFEST.replace('entry = "main.py"', ""))


def builtin(folder: Path, world: World) -> None:
    (folder / "agent.toml").write_text(MANIFEST.replace('"python"', '"builtin"'))


def shipped_name(folder: Path, world: World) -> None:
    (folder / "agent.toml").write_text(MANIFEST.replace("kExecutor:echo", "kExecutor:text"))


def untrusted_publisher(folder: Path, world: World) -> None:
    sign_folder(world, folder, KeyPair(os.urandom(32)))


def changed_after_signing(folder: Path, world: World) -> None:
    sign_folder(world, folder, KEY)
    (folder / "main.py").write_text("changed")


def signature_of_another_manifest(folder: Path, world: World) -> None:
    files = copy_code(world.disk, folder, list_code(folder), None)
    manifest = parse_manifest(MANIFEST.replace("1.0.0", "9.9.9"))
    (folder / "agent.signed").write_bytes(sign_manifest(KEY, manifest, hash_code(files)))


def rubbish_signature(folder: Path, world: World) -> None:
    (folder / "agent.signed").write_bytes(os.urandom(300))


@pytest.mark.parametrize(
    "spoil",
    [
        *(link, folder_link, pipe, too_many_files, too_many_bytes, too_deep, no_manifest, no_entry_file),
        *(no_entry, builtin, shipped_name, untrusted_publisher, changed_after_signing),
        *(signature_of_another_manifest, rubbish_signature),
    ],
)
def test_bad_folder_is_refused_and_nothing_of_it_stays(
    open_registry: Open, source: Path, world: World, tmp_path: Path, spoil: Callable[[Path, World], None]
) -> None:
    registry = open_registry()
    spoil(source, world)
    with pytest.raises(KnodeError) as caught:
        registry.install(source)
    assert caught.value.code is Code.MANIFEST_INVALID
    assert len(registry.list()) == 3
    assert [path.name for path in (tmp_path / "state" / "agents").rglob("*")] == ["code"]


def test_disk_that_fills_up_leaves_the_old_agent(
    open_registry: Open, source: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = open_registry()
    registry.install(source)
    (source / "agent.toml").write_text(MANIFEST.replace("1.0.0", "2.0.0"))

    def full(path: Path, *, mode: int = 0o600) -> None:
        raise KnodeError(Code.DISK_FULL, f"no space left for {path}")

    monkeypatch.setattr(world.disk, "create", full)
    with pytest.raises(KnodeError) as caught:
        registry.install(source)
    assert caught.value.code is Code.DISK_FULL
    for one in (registry, open_registry()):
        assert one.find("kExecutor:echo").manifest.version == "1.0.0"
    assert len(os.listdir(installed_code(registry).parent)) == 1
