"""What every sandbox does for the program in it and for the node, whichever it is."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from sandbox_helpers import RunPython, processes_with, until

from knode.agents.limits import Limits
from knode.agents.sandbox import SANDBOXES, Command, Ended, OnProgress, Outcome, Sandbox, choose_sandbox
from knode.errors import Code, KnodeError
from knode.world import World

DAEMON = """
import os, sys, signal, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        for descriptor in range(3):
            os.close(descriptor)
        open("daemon", "w").close()
        time.sleep(600)
    os._exit(0)
while not os.path.exists("daemon"):
    time.sleep(0.005)
"""


async def test_input_output_errors_and_exit_code_pass_through(run_python: RunPython) -> None:
    outcome = await run_python(
        "import sys; print(sys.stdin.read().upper()); print('why', file=sys.stderr); sys.exit(3)",
        stdin=b"text",
    )
    assert outcome.ended is Ended.EXITED
    assert outcome.exit_code == 3
    assert outcome.stdout == b"TEXT\n"
    assert outcome.stderr == b"why\n"


async def test_death_by_a_signal_is_reported_as_a_shell_does(run_python: RunPython) -> None:
    outcome = await run_python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert outcome.ended is Ended.EXITED
    assert outcome.exit_code == 128 + signal.SIGSEGV


async def test_signals_mean_what_they_mean_everywhere(run_python: RunPython) -> None:
    outcome = await run_python(
        """
import signal, subprocess
print(signal.pthread_sigmask(signal.SIG_BLOCK, []))
child = subprocess.Popen(["sleep", "600"])
child.terminate()
print(child.wait())
"""
    )
    assert outcome.stdout.decode().split("\n") == ["set()", "-15", ""]


async def test_program_works_in_its_own_folder_and_leaves_files_there(
    run_python: RunPython, folder: Path
) -> None:
    (folder / "input").mkdir()
    (folder / "input" / "a.txt").write_text("given")
    outcome = await run_python(
        """
import os, subprocess, sys, tempfile, threading
text = open("input/a.txt").read()
os.makedirs("made/deep")
open("made/deep/b.txt", "w").write(text)
os.rename("made/deep/b.txt", "made/c.txt")
with tempfile.TemporaryFile() as file:
    file.write(b"x")
thread = threading.Thread(target=print, args=("thread",))
thread.start()
thread.join()
open("/dev/null", "w").write("x")
assert len(open("/dev/urandom", "rb").read(8)) == 8
sys.stdout.flush()
subprocess.run(["sh", "-c", "echo child"], check=True)
print(os.getcwd())
"""
    )
    assert outcome.stderr == b""
    assert outcome.stdout.decode().split() == ["thread", "child", os.fspath(folder)]
    assert (folder / "made" / "c.txt").read_text() == "given"


async def test_other_folders_can_be_given_read_only(sandbox: Sandbox, folder: Path, tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "run.sh").write_text("echo from the code; echo x > $1/new; echo y > $1/run.sh")
    argv = ["sh", os.fspath(code / "run.sh"), os.fspath(code)]
    outcome = await sandbox.run(
        Command(argv=argv, folder=folder, read_only=[code]), Limits(), lambda fraction, text: None
    )
    assert outcome.stdout == b"from the code\n"
    assert [path.name for path in code.iterdir()] == ["run.sh"]
    assert (code / "run.sh").read_text().startswith("echo from")


async def test_lines_of_progress_are_reported_and_the_rest_kept(sandbox: Sandbox, folder: Path) -> None:
    script = "echo knode:progress 0.5 half done >&2; echo note >&2; sleep 0.3; echo knode:progress later >&2"
    reports: list[tuple[float | None, str]] = []
    outcome = await sandbox.run(
        Command(argv=["sh", "-c", script], folder=folder),
        Limits(),
        lambda fraction, text: reports.append((fraction, text)),
    )
    assert reports == [(0.5, "half done"), (None, "later")]
    assert outcome.stderr == b"note\n"


async def test_endless_progress_is_reported_seldom(sandbox: Sandbox, folder: Path) -> None:
    reports: list[tuple[float | None, str]] = []
    script = "for n in $(seq 20000); do echo knode:progress 0.5 $n; done >&2"
    await sandbox.run(
        Command(argv=["sh", "-c", script], folder=folder),
        Limits(),
        lambda fraction, text: reports.append((fraction, text)),
    )
    assert reports[-1] == (0.5, "20000")
    assert len(reports) < 200


@pytest.mark.parametrize(
    "source",
    [
        "import os; os.mkdir('closed'); open('closed/file', 'w'); os.umask(0o777); os.mkdir('shut')",
        "import os\nfor _ in range(3000):\n    os.mkdir('d')\n    os.chdir('d')",
        "import os\nfor _ in range(40):\n    os.mkdir('d' * 255, 0o700)\n    os.chdir('d' * 255)",
    ],
)
async def test_whatever_a_program_leaves_can_be_removed(
    run_python: RunPython, world: World, folder: Path, source: str
) -> None:
    await run_python(source, files=10_000)
    assert len(os.listdir(folder)) >= 2
    world.disk.remove(folder)
    assert not world.disk.exists(folder)


async def test_environment_and_descriptors_of_the_node_do_not_reach_inside(
    run_python: RunPython, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KNODE_HOME", "/secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    (tmp_path / "open").write_text("secret")
    with (tmp_path / "open").open() as file:
        os.set_inheritable(file.fileno(), True)
        outcome = await run_python(
            """
import fcntl, os
print(sorted(os.environ))
for descriptor in range(3, 256):
    try:
        fcntl.fcntl(descriptor, fcntl.F_GETFD)
        print("open:", descriptor)
    except OSError:
        pass
"""
        )
    names = outcome.stdout.decode().strip()
    assert names in ("['HOME', 'LANG', 'PATH', 'PWD', 'TMPDIR']", "['HOME', 'LANG', 'PATH', 'TMPDIR']")


async def test_daemons_that_a_program_leaves_behind_are_killed(run_python: RunPython, marker: str) -> None:
    outcome = await run_python(DAEMON, marker)
    assert outcome.ended is Ended.EXITED
    assert outcome.exit_code == 0
    assert processes_with(marker) == []


async def test_cancelling_leaves_nothing_running(run_python: RunPython, folder: Path, marker: str) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_python, DAEMON + "\ntime.sleep(600)", marker)
        await until((folder / "daemon").exists)
        assert processes_with(marker) != []
        nursery.cancel_scope.cancel()
    assert processes_with(marker) == []


async def test_attempts_leave_no_descriptors_open_in_the_node(run_python: RunPython) -> None:
    await run_python("pass")
    before = len(os.listdir("/proc/self/fd"))
    for delay in (60.0, 0.05, 0.001):
        with trio.move_on_after(delay):
            await run_python("pass")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("delay", [0.0, 0.005, 0.02, 0.05, 0.1])
async def test_cancelling_at_any_moment_of_the_start_leaves_nothing_running(
    run_python: RunPython, marker: str, delay: float
) -> None:
    with trio.move_on_after(delay):
        await run_python("import time; time.sleep(600)", marker)
    assert processes_with(marker) == []


async def test_attempt_dies_with_the_node(sandbox: Sandbox, folder: Path, marker: str) -> None:
    source = """
import sys, trio
from pathlib import Path
from knode.agents.limits import Limits
from knode.agents.sandbox import SANDBOXES, Command
from knode.agents.sandbox.surroundings import python_program
name, folder, script, marker = sys.argv[1:]
argv = [str(python_program()), "-I", "-c", script, marker]
command = Command(argv=argv, folder=Path(folder))
trio.run(SANDBOXES[name]().run, command, Limits(), lambda fraction, text: None)
"""
    script = DAEMON + "\ntime.sleep(600)"
    arguments = [sys.executable, "-c", source, sandbox.name, os.fspath(folder), script, marker]
    node = await trio.to_thread.run_sync(subprocess.Popen, arguments)
    with trio.fail_after(60):
        await until((folder / "daemon").exists)
        node.kill()
        await until(lambda: not processes_with(marker))
    node.wait()


async def test_attempt_outlives_the_threads_of_the_node(
    sandbox: Sandbox, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The kernel sends the parent's-death signal when the thread ends that started the process.
    monkeypatch.setattr("trio._core._thread_cache.IDLE_TIMEOUT", 0.01)
    outcome = await sandbox.run(
        Command(argv=["sh", "-c", "sleep 0.5; echo alive"], folder=folder),
        Limits(),
        lambda fraction, text: None,
    )
    assert outcome.stdout == b"alive\n"


async def test_many_attempts_at_once_do_not_mix(sandbox: Sandbox, tmp_path: Path) -> None:
    outputs = {}

    async def one(name: str) -> None:
        own = tmp_path / name
        own.mkdir()
        (own / "file").write_bytes(b" in " + name.encode())
        command = Command(argv=["cat", "-", "file"], folder=own, stdin=name.encode())
        outputs[name] = (await sandbox.run(command, Limits(), lambda fraction, text: None)).stdout

    async with trio.open_nursery() as nursery:
        for number in range(6):
            nursery.start_soon(one, f"attempt{number}")
    names = [f"attempt{number}" for number in range(6)]
    assert outputs == {name: f"{name} in {name}".encode() for name in names}


async def test_self_test_chooses_a_sandbox_and_leaves_nothing(world: World, tmp_path: Path) -> None:
    choice = await choose_sandbox(world, tmp_path / "probe")
    assert choice.sandbox is not None, choice.problems
    assert os.listdir(tmp_path) == []


class Leaking:
    """A sandbox that gives its program the folder above the attempt's."""

    name = "leaking"

    def __init__(self, inner: Sandbox) -> None:
        self._inner = inner

    async def run(self, command: Command, limits: Limits, on_progress: OnProgress) -> Outcome:
        return await self._inner.run(replace(command, folder=command.folder.parent), limits, on_progress)


async def test_self_test_names_what_a_leaking_sandbox_lets_through(
    sandbox: Sandbox, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SANDBOXES, "leaking", lambda: Leaking(sandbox))
    choice = await choose_sandbox(world, tmp_path / "probe", ["leaking", sandbox.name])
    assert choice.sandbox is not None
    assert choice.sandbox.name == sandbox.name
    (problem,) = choice.problems
    assert problem.startswith("leaking: a program in it could")
    assert "read a file of the node's home" in problem
    assert "write into the node's home" in problem


async def test_self_test_passes_over_what_is_not_there(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    choice = await choose_sandbox(world, tmp_path / "probe", ["firejail", "bubblewrap", "sandlock"])
    assert choice.sandbox is None
    assert [problem.partition(":")[0] for problem in choice.problems] == [
        "firejail",
        "bubblewrap",
        "sandlock",
    ]


async def test_what_cannot_be_watched_does_not_run(
    run_python: RunPython, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = f"knode-unwatched-{os.getpid()}"

    def none_left(pid: int, flags: int = 0) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patched:
        patched.setattr(os, "pidfd_open", none_left)
        with pytest.raises(KnodeError, match="cannot be watched") as refused:
            await run_python(f"import time; time.sleep(600)  # {marker}")
    assert refused.value.code is Code.NO_SANDBOX
    await until(lambda: not processes_with(marker))
    assert (await run_python("print(1)")).stdout == b"1\n"
