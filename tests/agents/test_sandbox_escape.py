"""The escape suite: what a hostile program tries, in every sandbox of this machine."""

from __future__ import annotations

import os
import resource
import socket
from pathlib import Path

import pytest
import trio
from sandbox_helpers import RunPython, processes_with

from knode.agents.sandbox import Ended, Sandbox

# Runs each named attempt of a dictionary `attempts`; prints the names of those that succeeded.
REPORT = """
for name, attempt in attempts.items():
    try:
        attempt()
    except Exception:
        continue
    print(name)
"""


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of the node's owner with a secret in it."""
    path = tmp_path / "home" / "identity"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    (path / "key").write_text("secret")
    (path / "key").chmod(0o600)
    return path


def state_of(path: Path) -> tuple[str, int, int, float, list[str]]:
    status = path.stat()
    return path.read_text(), status.st_mode, status.st_uid, status.st_mtime, os.listxattr(path)


async def test_files_of_the_owner_and_of_the_node_cannot_be_read(
    run_python: RunPython, outside: Path
) -> None:
    home = Path.home()
    outcome = await run_python(
        """
import os, sys
outside, home, ssh, shadow = sys.argv[1:]
attempts = {
    "read key": lambda: open(outside + "/key").read(),
    "list identity": lambda: os.listdir(outside),
    "list node's home": lambda: os.listdir(os.path.dirname(outside)).index("identity"),
    "by a link": lambda: (os.symlink(outside + "/key", "link"), open("link").read()),
    "by a hard link": lambda: (os.link(outside + "/key", "hard"), open("hard").read()),
    "by dots": lambda: open("../../identity/key").read(),
    "by /proc/self/root": lambda: open("/proc/self/root" + outside + "/key").read(),
    "by /proc/1/root": lambda: open("/proc/1/root" + outside + "/key").read(),
    "by the parent's folder": lambda: open(f"/proc/{os.getppid()}/cwd/../../identity/key").read(),
    "read .ssh": lambda: os.listdir(ssh),
    "read shadow": lambda: open(shadow).read(),
    "read mounts of the machine": lambda: open("/proc/1/environ").read().index("KNODE"),
    "open the disk": lambda: os.open("/dev/vda", os.O_RDONLY),
    "make the disk": lambda: os.mknod("disk", 0o60600, os.makedev(254, 0)) or open("disk"),
    "read kernel memory": lambda: open("/proc/kcore", "rb").read(1),
    "list home": lambda: [name for name in os.listdir(home) if name != ".pyenv"][0],
}
"""
        + REPORT,
        outside,
        home,
        home / ".ssh",
        "/etc/shadow",
    )
    assert outcome.stderr == b""
    assert outcome.stdout == b""


async def test_nothing_outside_can_be_written_or_changed(run_python: RunPython, outside: Path) -> None:
    before = state_of(outside / "key")
    outcome = await run_python(
        """
import os, sys
outside = sys.argv[1]
key = outside + "/key"
attempts = {
    "write": lambda: open(key, "w"),
    "append": lambda: open(key, "a"),
    "truncate": lambda: os.truncate(key, 0),
    "create": lambda: open(outside + "/new", "w"),
    "folder": lambda: os.mkdir(outside + "/new"),
    "remove": lambda: os.unlink(key),
    "rename away": lambda: os.rename(key, "key"),
    "rename over": lambda: (open("mine", "w"), os.rename("mine", key)),
    "mode": lambda: os.chmod(key, 0o777),
    "mode of the folder": lambda: os.chmod(outside, 0o777),
    "owner": lambda: os.chown(key, 1, 1),
    "times": lambda: os.utime(key, (1, 1)),
    "attribute": lambda: os.setxattr(key, "user.knode", b"1"),
    "write by a link": lambda: (os.symlink(key, "link"), open("link", "w")),
    "mode by a link": lambda: (os.symlink(key, "link2"), os.chmod("link2", 0o777)),
    "system": lambda: open("/usr/bin/knode-was-here", "w"),
    "system's modes": lambda: os.chmod("/usr/bin/env", 0o777),
    "python's modes": lambda: os.chmod(sys.executable, 0o777),
    "python's times": lambda: os.utime(sys.executable, (1, 1)),
    "python's mode by descriptor": lambda: os.fchmod(os.open(sys.executable, os.O_RDONLY), 0o700),
    "kernel setting": lambda: open("/proc/sys/kernel/core_pattern", "w"),
    "kernel trigger": lambda: open("/proc/sysrq-trigger", "w"),
    "cgroup": lambda: os.mkdir("/sys/fs/cgroup/knode"),
    "temporary folder of the machine": lambda: open("/var/tmp/knode-was-here", "w"),
}
"""
        + REPORT,
        outside,
    )
    assert outcome.stderr == b""
    assert outcome.stdout == b""
    assert state_of(outside / "key") == before
    assert os.listdir(outside) == ["key"]


async def test_links_that_a_program_leaves_lead_nowhere_for_the_program(
    run_python: RunPython, outside: Path, folder: Path
) -> None:
    (folder / "input").symlink_to(outside)
    outcome = await run_python("print(open('input/key').read())")
    assert outcome.exit_code != 0
    assert outcome.stdout == b""


async def test_network_and_sockets_of_the_machine_cannot_be_reached(
    run_python: RunPython, tmp_path: Path
) -> None:
    path = tmp_path / "home" / "knode.sock"
    abstract = f"\0knode-{os.getpid()}"
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX) as unix,
        socket.socket(socket.AF_UNIX) as hidden,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams,
    ):
        udp.bind(("127.0.0.1", 0))
        unix.bind(os.fspath(path))
        unix.listen()
        hidden.bind(abstract)
        hidden.listen()
        datagrams.bind(abstract + "-datagrams")
        for server in (tcp, udp, unix, hidden, datagrams):
            server.setblocking(False)
        await run_python(
            """
import socket, sys
tcp, udp = int(sys.argv[1]), int(sys.argv[2])
path, abstract = sys.argv[3], "\\0" + sys.argv[4]
def connect(family, kind, address):
    with socket.socket(family, kind) as one:
        one.settimeout(2)
        one.connect(address)
        one.send(b"out")
for attempt in (
    lambda: connect(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", tcp)),
    lambda: connect(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", udp)),
    lambda: connect(socket.AF_INET6, socket.SOCK_STREAM, ("::ffff:127.0.0.1", tcp)),
    lambda: connect(socket.AF_UNIX, socket.SOCK_STREAM, path),
    lambda: connect(socket.AF_UNIX, socket.SOCK_STREAM, abstract),
    lambda: connect(socket.AF_UNIX, socket.SOCK_DGRAM, abstract + "-datagrams"),
    lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"out", abstract + "-datagrams"),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"out", ("127.0.0.1", udp)),
    lambda: socket.create_connection(("192.0.2.1", 80), 0.2),
):
    try:
        attempt()
    except OSError:
        pass
""",
            tcp.getsockname()[1],
            udp.getsockname()[1],
            path,
            abstract[1:],
        )
        for server in (tcp, unix, hidden):
            with pytest.raises(BlockingIOError):
                server.accept()
        for server in (udp, datagrams):
            with pytest.raises(BlockingIOError):
                server.recv(16)


async def test_kinds_of_sockets_that_no_namespace_holds_are_refused(run_python: RunPython) -> None:
    outcome = await run_python(
        """
import socket
attempts = {
    "host of a virtual machine": lambda: socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM),
    "raw packets": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW),
    "raw address": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
    "kernel's tables": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0),
    "kernel's ciphers": lambda: socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET),
    "bluetooth": lambda: socket.socket(31, socket.SOCK_RAW, 1),
}
"""
        + REPORT
    )
    assert outcome.stderr == b""
    assert outcome.stdout == b""


async def test_node_and_its_processes_cannot_be_touched(run_python: RunPython) -> None:
    before = resource.getrlimit(resource.RLIMIT_CORE), os.getpriority(os.PRIO_PROCESS, 0)
    outcome = await run_python(
        """
import ctypes, os, resource, signal, sys
node = int(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno())
attempts = {
    "signal": lambda: os.kill(node, 0),
    "kill": lambda: os.kill(node, signal.SIGKILL),
    "kill the parent": lambda: os.getppid() > 1 and os.kill(os.getppid(), signal.SIGKILL) or 1 / 0,
    "trace": lambda: call("ptrace", 16, node, 0, 0),
    "trace the parent": lambda: call("ptrace", 16, os.getppid(), 0, 0),
    "read memory": lambda: open(f"/proc/{node}/mem", "rb").read(1),
    "read environment": lambda: open(f"/proc/{node}/environ").read(),
    "read command line": lambda: open(f"/proc/{node}/cmdline").read().index("pytest"),
    "take descriptors": lambda: os.listdir(f"/proc/{node}/fd"),
    "limit": lambda: resource.prlimit(node, resource.RLIMIT_CORE, (0, 0)),
    "priority": lambda: os.setpriority(os.PRIO_PROCESS, node, 19),
    "processors": lambda: os.sched_setaffinity(node, {0}),
    "policy": lambda: os.sched_setscheduler(node, os.SCHED_IDLE, os.sched_param(0)),
    "group": lambda: os.killpg(os.getpgid(node), 0),
}
"""
        + REPORT,
        os.getpid(),
    )
    assert outcome.stdout == b""
    after = resource.getrlimit(resource.RLIMIT_CORE), os.getpriority(os.PRIO_PROCESS, 0)
    assert after == before


async def test_signal_to_everyone_reaches_no_one_outside(run_python: RunPython, marker: str) -> None:
    async with trio.open_nursery() as nursery:
        process = await trio.lowlevel.open_process(["sleep", "600"])
        try:
            await run_python("import os, signal; os.kill(-1, signal.SIGKILL)")
            assert process.poll() is None
        finally:
            process.kill()
            await process.wait()
        nursery.cancel_scope.cancel()


async def test_no_way_to_more_rights(run_python: RunPython) -> None:
    outcome = await run_python(
        """
import ctypes, os, subprocess
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno())
attempts = {
    "another user": lambda: os.setuid(12345),
    "another group": lambda: os.setgroups([0]),
    "new user namespace": lambda: call("unshare", 0x10000000),
    "new mounts": lambda: call("unshare", 0x00020000),
    "mount": lambda: call("mount", b"none", b".", b"tmpfs", 0, 0),
    "remount": lambda: call("mount", b"none", b"/usr", None, 0x1020, 0),
    "unmount": lambda: call("umount2", b"/usr", 2),
    "change root": lambda: os.chroot("."),
    "host name": lambda: call("sethostname", b"knode", 5),
    "clock": lambda: __import__("time").clock_settime(0, __import__("time").time()),
    "kernel log": lambda: call("klogctl", 3, ctypes.create_string_buffer(16), 16),
    "module": lambda: call("syscall", 175, 0, 0, 0),
    "bpf": lambda: call("syscall", 321, 0, 0, 0),
    "performance events": lambda: call("syscall", 298, ctypes.create_string_buffer(128), 0, -1, -1, 0),
    "ring": lambda: call("syscall", 425, 1, ctypes.create_string_buffer(256)),
    "keys": lambda: call("syscall", 250, 0, -4, 1),
    "own terminal input": lambda: __import__("fcntl").ioctl(0, 0x5412, b"x"),
    "by a set-user-id program": lambda: subprocess.run(
        ["su", "-c", "true"], check=True, stdin=subprocess.DEVNULL, capture_output=True),
}
"""
        + REPORT
    )
    assert outcome.stderr == b""
    assert outcome.stdout == b""


async def test_memory_that_no_process_owns_is_refused(run_python: RunPython) -> None:
    outcome = await run_python(
        """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno())
def fill(path):
    with open(path, "wb") as file:
        file.write(bytes(1 << 20))
attempts = {
    "memory file": lambda: os.memfd_create("x"),
    "shared segment": lambda: call("shmget", 0, 4096, 0o1600),
    "message queue": lambda: call("msgget", 0, 0o1600),
    "root": lambda: fill("/filled"),
    "devices": lambda: fill("/dev/filled"),
    "run": lambda: fill("/run/filled"),
}
"""
        + REPORT
    )
    assert outcome.stderr == b""
    assert outcome.stdout == b""


async def test_hog_of_memory_is_stopped(run_python: RunPython) -> None:
    outcome = await run_python("hog = bytearray(1 << 30); print('got it')", memory_bytes=128 << 20)
    assert outcome.stdout == b""
    assert outcome.ended is Ended.MEMORY or outcome.exit_code != 0


async def test_hog_of_many_processes_is_stopped_by_their_sum(run_python: RunPython) -> None:
    outcome = await run_python(
        """
import os, time
for _ in range(3):
    os.fork()
hog = [bytearray(os.urandom(1 << 20)) for _ in range(60)]
time.sleep(20)
""",
        memory_bytes=160 << 20,
    )
    assert outcome.ended is Ended.MEMORY


async def test_pages_that_processes_share_count_once(run_python: RunPython) -> None:
    outcome = await run_python(
        """
import os, time
shared = os.urandom(60 << 20)
children = []
for _ in range(3):
    child = os.fork()
    if child == 0:
        time.sleep(0.3)
        os._exit(0)
    children.append(child)
for child in children:
    os.waitpid(child, 0)
print("done")
""",
        memory_bytes=160 << 20,
    )
    assert outcome.ended is Ended.EXITED
    assert outcome.stdout == b"done\n"


async def test_fork_bomb_is_stopped(run_python: RunPython, marker: str) -> None:
    outcome = await run_python("import os\nwhile True:\n    os.fork()", marker, processes=16, wall_seconds=5)
    assert outcome.ended is not Ended.EXITED or outcome.exit_code != 0
    assert processes_with(marker) == []


async def test_thread_bomb_is_stopped(run_python: RunPython, sandbox: Sandbox) -> None:
    outcome = await run_python(
        """
import threading, time
for _ in range(200):
    threading.Thread(target=time.sleep, args=(20,), daemon=True).start()
time.sleep(20)
""",
        processes=16,
        wall_seconds=5,
    )
    assert outcome.ended is Ended.PROCESSES or b"can't start new thread" in outcome.stderr


async def test_endless_loop_is_stopped_by_processor_time(run_python: RunPython) -> None:
    outcome = await run_python("while True: pass", cpu_seconds=1, wall_seconds=30)
    assert outcome.ended is Ended.CPU


async def test_processor_time_of_all_processes_counts(run_python: RunPython) -> None:
    outcome = await run_python(
        """
import os
for _ in range(12):
    if os.fork() == 0:
        n = 0
        for _ in range(6_000_000):
            n += 1
        os._exit(0)
    os.wait()
""",
        cpu_seconds=1,
        wall_seconds=30,
    )
    assert outcome.ended is Ended.CPU


async def test_sleeper_that_ignores_signals_is_stopped_by_the_clock(
    run_python: RunPython, marker: str
) -> None:
    outcome = await run_python(
        """
import signal, time
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
while True:
    time.sleep(600)
""",
        marker,
        wall_seconds=1,
    )
    assert outcome.ended is Ended.WALL
    assert processes_with(marker) == []


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
async def test_endless_output_is_stopped_and_bounded(run_python: RunPython, stream: str) -> None:
    source = f"import sys\nwhile True: sys.{stream}.write('x' * 65536)"
    outcome = await run_python(source, output_bytes=1000, wall_seconds=20)
    assert outcome.ended is Ended.OUTPUT
    assert outcome.stdout == (b"x" * 1000 if stream == "stdout" else b"")
    assert len(outcome.stderr) <= 8 * 1024


async def test_file_over_the_limit_is_stopped(run_python: RunPython, folder: Path) -> None:
    outcome = await run_python(
        "import os\nwith open('big', 'wb') as file:\n    while True: file.write(bytes(1 << 20))",
        file_bytes=8 << 20,
        wall_seconds=20,
    )
    assert outcome.ended is Ended.FILES or outcome.exit_code != 0
    assert (folder / "big").stat().st_size <= 8 << 20


async def test_many_files_are_stopped(run_python: RunPython) -> None:
    outcome = await run_python(
        "number = 0\nwhile True:\n    open(str(number), 'w').close()\n    number += 1",
        files=50,
        wall_seconds=20,
    )
    assert outcome.ended is Ended.FILES


async def test_files_together_over_the_limit_are_stopped(run_python: RunPython) -> None:
    outcome = await run_python(
        "import time\nfor n in range(5):\n    open(str(n), 'wb').write(bytes(4 << 20))\ntime.sleep(20)",
        file_bytes=8 << 20,
        wall_seconds=20,
    )
    assert outcome.ended is Ended.FILES


async def test_files_that_are_removed_while_open_count(run_python: RunPython) -> None:
    outcome = await run_python(
        """
import os, time
files = []
for number in range(5):
    files.append(open(str(number), "wb"))
    os.unlink(str(number))
    files[-1].write(bytes(4 << 20))
time.sleep(20)
""",
        file_bytes=8 << 20,
        wall_seconds=20,
    )
    assert outcome.ended is Ended.FILES


async def test_files_too_deep_to_be_counted_are_stopped(run_python: RunPython) -> None:
    outcome = await run_python(
        "import os, time\nfor _ in range(20):\n    os.mkdir('d')\n    os.chdir('d')\ntime.sleep(20)",
        wall_seconds=20,
    )
    assert outcome.ended is Ended.FILES


async def test_open_files_are_limited(run_python: RunPython) -> None:
    outcome = await run_python("import os\nwhile True: os.dup(0)", open_files=32)
    assert outcome.exit_code != 0
    assert b"Too many open files" in outcome.stderr
