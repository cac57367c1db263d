from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from knode.agents.effects import FollowUp
from knode.agents.registry import Registry
from knode.agents.runtime import Attempt, Progress, Runner, TryAgain
from knode.agents.sandbox import Sandbox
from knode.errors import Code, KnodeError
from knode.identity import KeyPair
from knode.world import Monotonic, World

Attempts = Callable[..., Attempt]


@pytest.fixture
def registry(world: World, tmp_path: Path) -> Registry:
    registry = Registry(world, tmp_path / "state" / "agents", KeyPair(bytes(32)), lambda key: False)
    registry.load()
    return registry


@pytest.fixture
def runner(world: World, registry: Registry, sandbox: Sandbox, tmp_path: Path) -> Runner:
    return Runner(world, registry, sandbox, tmp_path / "attempts")


@pytest.fixture
def begin(tmp_path: Path) -> Attempts:
    """Make the folder of an attempt, with its files, as the tasks room does."""

    def make(data: bytes, *, remaining_seconds: float = 60, **files: str) -> Attempt:
        folder = tmp_path / "attempts" / "t1" / "input"
        folder.mkdir(parents=True)
        for name, text in files.items():
            (folder / name).write_text(text)
        paths = tuple(folder / name for name in files)
        deadline = Monotonic(trio.current_time() + remaining_seconds)
        return Attempt("t1", data, "token-1", 3, deadline, paths)

    return make


def ignore(progress: Progress) -> None:
    pass


def install(registry: Registry, folder: Path, manifest: str, **files: str) -> None:
    folder.mkdir()
    (folder / "agent.toml").write_text('id = "kExecutor:mine"\nversion = "1.0.0"\n' + manifest)
    for name, text in files.items():
        (folder / name).write_text(text)
    registry.install(folder)


async def test_python_source_runs_with_files_and_token(runner: Runner, begin: Attempts) -> None:
    source = (
        b"import os; print(open('input/a').read(), "
        b"os.environ['KNODE_TASK_TOKEN'], os.environ['KNODE_TASK_ATTEMPT'])"
    )
    result = await runner.run("kExecutor:python", begin(source, a="given"), ignore)
    assert result.output == b"given token-1 3\n"


async def test_python_source_in_json_gets_its_standard_input(runner: Runner, begin: Attempts) -> None:
    request = json.dumps({"code": "print(input()[::-1])", "stdin": "abc"}).encode()
    assert (await runner.run("kExecutor:python", begin(request), ignore)).output == b"cba\n"


async def test_shell_line_and_argument_list_run(runner: Runner, begin: Attempts) -> None:
    result = await runner.run("kExecutor:command", begin(b"cat input/*", a="x", b="y"), ignore)
    assert result.output == b"xy"


async def test_argument_list_is_not_read_by_a_shell(runner: Runner, begin: Attempts) -> None:
    request = json.dumps({"argv": ["printf", "%s", "$HOME; ls"], "stdin": ""}).encode()
    assert (await runner.run("kExecutor:command", begin(request), ignore)).output == b"$HOME; ls"


async def test_installed_python_agent_reads_its_input_and_its_own_files(
    runner: Runner, registry: Registry, begin: Attempts, tmp_path: Path
) -> None:
    source = """
import pathlib, sys
folder = pathlib.Path(__file__).parent
print("knode:progress 0.25 begun", file=sys.stderr)
print((folder / "greeting").read_text() + sys.stdin.read())
try:
    (folder / "greeting").write_text("changed")
except OSError:
    print("kept")
"""
    manifest = 'runtime = "python"\nentry = "main.py"'
    install(registry, tmp_path / "mine", manifest, greeting="hello ", **{"main.py": source})
    reports: list[Progress] = []
    result = await runner.run("kExecutor:mine", begin(b"world"), reports.append)
    assert result.output == b"hello world\nkept\n"
    assert reports == [Progress(0.25, "begun")]


async def test_installed_command_runs_a_program_of_its_folder(
    runner: Runner, registry: Registry, begin: Attempts, tmp_path: Path
) -> None:
    manifest = 'runtime = "command"\nentry = ["./run", "an argument"]'
    install(registry, tmp_path / "mine", manifest, run='#!/bin/sh\necho "$1: $(cat)"\n')
    assert (await runner.run("kExecutor:mine", begin(b"in"), ignore)).output == b"an argument: in\n"


async def test_failure_carries_exit_code_and_last_words_without_control_characters(
    runner: Runner, begin: Attempts
) -> None:
    source = b"import sys; sys.stderr.write('x' * 100_000 + '\\x1b[31mred\\x07\\n'); sys.exit(7)"
    with pytest.raises(KnodeError) as caught:
        await runner.run("kExecutor:python", begin(source), ignore)
    assert caught.value.code is Code.AGENT_FAILED
    assert "exited with 7" in caught.value.message
    assert caught.value.message.endswith("[31mred")
    assert "\x1b" not in caught.value.message
    assert len(caught.value.message) < 2200


async def test_passed_limit_is_named(
    runner: Runner, registry: Registry, begin: Attempts, tmp_path: Path
) -> None:
    manifest = 'runtime = "command"\nentry = ["sleep", "60"]\nlimits.wall_seconds = 1'
    install(registry, tmp_path / "mine", manifest)
    with pytest.raises(KnodeError) as caught:
        await runner.run("kExecutor:mine", begin(b""), ignore)
    assert caught.value.code is Code.AGENT_FAILED
    assert "ran longer than its 1 s" in caught.value.message


async def test_deadline_of_the_task_is_told_from_the_limit_of_the_agent(
    runner: Runner, begin: Attempts
) -> None:
    with pytest.raises(KnodeError) as caught:
        await runner.run("kExecutor:command", begin(b"sleep 60", remaining_seconds=0.3), ignore)
    assert caught.value.code is Code.TIMEOUT


async def test_tampered_agent_is_not_run(
    runner: Runner, registry: Registry, begin: Attempts, tmp_path: Path
) -> None:
    install(registry, tmp_path / "mine", 'runtime = "command"\nentry = ["./run"]', run="#!/bin/sh\necho good")
    code = registry.show("kExecutor:mine").code
    assert code is not None
    (code / "run").write_text("#!/bin/sh\necho evil")
    with pytest.raises(KnodeError) as caught:
        await runner.run("kExecutor:mine", begin(b""), ignore)
    assert caught.value.code is Code.MANIFEST_INVALID
    assert not runner.can_run("kExecutor:mine")


async def test_cancelled_attempt_ends_soon(runner: Runner, begin: Attempts) -> None:
    with trio.fail_after(20), trio.move_on_after(0.2) as scope:
        await runner.run("kExecutor:command", begin(b"sleep 600"), ignore)
    assert scope.cancelled_caught


async def test_without_a_sandbox_untrusted_code_is_refused(
    world: World, registry: Registry, begin: Attempts, tmp_path: Path
) -> None:
    runner = Runner(world, registry, None, tmp_path / "attempts")
    attempt = begin(b"touch ran")
    for agent_id in ("kExecutor:command", "kExecutor:python"):
        with pytest.raises(KnodeError) as caught:
            await runner.run(agent_id, attempt, ignore)
        assert caught.value.code is Code.NO_SANDBOX
        assert not runner.can_run(agent_id)
    assert runner.can_run("kExecutor:text")
    assert not (tmp_path / "attempts" / "t1" / "ran").exists()


@pytest.fixture
def bare_runner(world: World, registry: Registry, tmp_path: Path) -> Runner:
    return Runner(world, registry, None, tmp_path / "attempts")


async def test_builtin_agent_works_without_a_sandbox(bare_runner: Runner, begin: Attempts) -> None:
    attempt = begin(b'{"op":"search","query":"needle"}', hay="straw\nneedle")
    result = json.loads((await bare_runner.run("kExecutor:text", attempt, ignore)).output)
    assert result["matches"] == [{"file": "hay", "line": 2, "text": "needle"}]


async def test_builtin_agent_says_what_it_expects(bare_runner: Runner, begin: Attempts) -> None:
    with pytest.raises(KnodeError) as caught:
        await bare_runner.run("kExecutor:text", begin(b'{"op":"sing"}'), ignore)
    assert caught.value.code is Code.AGENT_FAILED
    assert "expected" in caught.value.message


async def test_agent_that_asks_for_no_files_gets_none(
    bare_runner: Runner, registry: Registry, begin: Attempts, tmp_path: Path
) -> None:
    install(registry, tmp_path / "mine", 'runtime = "command"\nentry = ["true"]')
    with pytest.raises(KnodeError) as caught:
        await bare_runner.run("kExecutor:mine", begin(b"", a="file"), ignore)
    assert caught.value.code is Code.AGENT_FAILED
    assert "input-files" in caught.value.message


async def test_stopped_agent_takes_no_attempts(
    bare_runner: Runner, registry: Registry, begin: Attempts
) -> None:
    registry.stop("kExecutor:text")
    with pytest.raises(KnodeError) as caught:
        await bare_runner.run("kExecutor:text", begin(b"text"), ignore)
    assert caught.value.code is Code.NO_AGENT


LEAVE = """
import json, os
token = os.environ["KNODE_TASK_TOKEN"]
with open("effects.jsonl", "w") as file:
    for number in range(3):
        print(json.dumps({"operation": {"number": number, "token": token}}), file=file)
    print(json.dumps({"task": {"agent": "kExecutor:text", "input": "next"}}), file=file)
print("done")
"""


async def test_an_agent_leaves_operations_and_tasks_in_a_file(runner: Runner, begin: Attempts) -> None:
    result = await runner.run("kExecutor:python", begin(LEAVE.encode()), ignore)
    assert result.output == b"done\n"
    assert [json.loads(operation)["number"] for operation in result.effects.operations] == [0, 1, 2]
    assert json.loads(result.effects.operations[0])["token"] == "token-1"
    assert result.effects.follow_ups == (FollowUp("kExecutor:text", b"next"),)


async def test_an_agent_that_fails_leaves_nothing(runner: Runner, begin: Attempts) -> None:
    with pytest.raises(KnodeError) as caught:
        await runner.run("kExecutor:python", begin(LEAVE.encode() + b"\nraise SystemExit(1)"), ignore)
    assert caught.value.code is Code.AGENT_FAILED


async def test_an_agent_that_exits_with_75_may_be_tried_again(runner: Runner, begin: Attempts) -> None:
    with pytest.raises(TryAgain) as caught:
        await runner.run("kExecutor:command", begin(b"exit 75"), ignore)
    assert caught.value.code is Code.AGENT_FAILED


@pytest.mark.parametrize(
    ("trick", "code"),
    [
        ("os.symlink('/etc/localtime', 'effects.jsonl')", Code.AGENT_FAILED),
        ("os.symlink('nothing', 'effects.jsonl')", Code.AGENT_FAILED),
        ("os.mkfifo('effects.jsonl')", Code.AGENT_FAILED),
        ("os.mkdir('effects.jsonl')", Code.AGENT_FAILED),
        ("open('a', 'w').close(); os.link('a', 'effects.jsonl')", Code.AGENT_FAILED),
        ("import socket; socket.socket(socket.AF_UNIX).bind('effects.jsonl')", Code.AGENT_FAILED),
        ("open('effects.jsonl', 'w').write('{} ' * 400_000)", Code.TOO_LARGE),
        ("open('effects.jsonl', 'w').write('no line of effects')", Code.AGENT_FAILED),
    ],
    ids=["link", "dangling link", "pipe", "folder", "second name", "socket", "too large", "text"],
)
async def test_what_is_no_plain_file_of_effects_fails_the_attempt(
    runner: Runner, begin: Attempts, trick: str, code: Code
) -> None:
    with pytest.raises(KnodeError) as caught:
        await runner.run("kExecutor:python", begin(f"import os; {trick}".encode()), ignore)
    assert caught.value.code is code
