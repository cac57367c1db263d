from __future__ import annotations

import errno
import os
import re
import struct
from pathlib import Path

import pytest

from knode.agents.sandbox import seccomp
from knode.agents.sandbox.seccomp import bubblewrap_filter, sandlock_filter
from knode.errors import Code, KnodeError

ALLOW, KILL, REFUSE, ABSENT = 0x7FFF0000, 0x80000000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
TABLES = (
    "_TRACING",
    "_MOUNTING",
    "_ADMINISTRATION",
    "_KERNEL_SURFACE",
    "_UNOWNED_MEMORY",
    "_KNOWN_AS_ABSENT",
)
ARGUMENT_CALLS = {"clone": "_CLONE", "ioctl": "_IOCTL", "socket": "_SOCKET", "prlimit64": "_PRLIMIT64"}
NAMED = {
    **{name: numbers for table in TABLES for name, numbers in getattr(seccomp, table).items()},
    **{name: getattr(seccomp, constant) for name, constant in ARGUMENT_CALLS.items()},
}


def judge(program: bytes, machine: str, number: int, *arguments: int, architecture: int | None = None) -> int:
    """Run a filter as the kernel does (the instructions that it uses) and return its answer."""
    padded = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("<IIQ6Q", number, architecture or ARCHITECTURES[machine], 0, *padded)
    instructions = list(struct.iter_unpack("<HBBI", program))
    place, accumulator = 0, 0
    while True:
        code, when_true, when_false, value = instructions[place]
        place += 1
        match code:
            case 0x20:
                (accumulator,) = struct.unpack_from("<I", data, value)
            case 0x15:
                place += when_true if accumulator == value else when_false
            case 0x35:
                place += when_true if accumulator >= value else when_false
            case 0x45:
                place += when_true if accumulator & value else when_false
            case 0x06:
                return int(value)
            case _:
                raise AssertionError(f"instruction {code:#x}")


@pytest.mark.parametrize("machine", ARCHITECTURES)
@pytest.mark.parametrize("make", [bubblewrap_filter, sandlock_filter])
def test_ordinary_calls_pass_and_foreign_architectures_die(machine: str, make: object) -> None:
    program = make(machine)  # type: ignore[operator]
    named = {numbers[list(ARCHITECTURES).index(machine)] for numbers in NAMED.values()}
    for number in set(range(470)) - named:
        assert judge(program, machine, number) == ALLOW
    for other in set(ARCHITECTURES.values()) - {ARCHITECTURES[machine]} | {0x40000003}:
        assert judge(program, machine, 0, architecture=other) == KILL


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_listed_calls_are_refused_whatever_their_arguments(machine: str) -> None:
    program, column = bubblewrap_filter(machine), list(ARCHITECTURES).index(machine)
    for table in TABLES:
        answer = ABSENT if table == "_KNOWN_AS_ABSENT" else REFUSE
        for numbers in getattr(seccomp, table).values():
            if numbers[column]:
                assert judge(program, machine, numbers[column]) == answer
                assert judge(program, machine, numbers[column], *[2**64 - 1] * 6) == answer


@pytest.mark.parametrize("machine", ARCHITECTURES)
def test_arguments_decide_where_they_must(machine: str) -> None:
    column = list(ARCHITECTURES).index(machine)
    clone, ioctl, socket, prlimit = (NAMED[name][column] for name in ARGUMENT_CALLS)
    own = bubblewrap_filter(machine)
    assert judge(own, machine, clone, 17) == ALLOW
    assert judge(own, machine, clone, 0x3D0F00) == ALLOW  # a thread, as glibc makes it
    for flag in (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
        assert judge(own, machine, clone, flag | 17) == REFUSE
    for program in (bubblewrap_filter(machine), sandlock_filter(machine)):
        assert judge(program, machine, ioctl, 0, 0x5413) == ALLOW
        assert judge(program, machine, ioctl, 0, 0x5412) == REFUSE
        assert judge(program, machine, ioctl, 0, 0x541C) == REFUSE
        assert judge(program, machine, ioctl, 0, 0x5412 | 1 << 32) == REFUSE  # the kernel takes 32 bits
        assert judge(program, machine, socket, 1, 1) == ALLOW
        assert judge(program, machine, socket, 40, 1) == REFUSE
    assert judge(bubblewrap_filter(machine), machine, socket, 2, 1) == ALLOW
    assert judge(sandlock_filter(machine), machine, socket, 2, 1) == REFUSE
    assert judge(sandlock_filter(machine), machine, prlimit, 0) == ALLOW
    assert judge(sandlock_filter(machine), machine, prlimit, 4711) == REFUSE


def test_second_numbering_of_x86_is_closed() -> None:
    for number in (0x40000000, 0x40000000 | 165, 0xFFFFFFFF):
        assert judge(bubblewrap_filter("x86_64"), "x86_64", number) == ABSENT


def test_unknown_machine_gets_no_filter() -> None:
    with pytest.raises(KnodeError) as caught:
        bubblewrap_filter("riscv64")
    assert caught.value.code is Code.NO_SANDBOX


@pytest.mark.parametrize(
    ("column", "header"),
    [
        (0, Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")),
        (1, Path("/usr/include/asm-generic/unistd.h")),
    ],
)
def test_numbers_are_the_kernels(column: int, header: Path) -> None:
    if not header.exists():
        pytest.skip(f"the kernel's headers are not installed: {header}")
    pattern = re.compile(r"#define __NR(?:3264)?_(\w+)\s+(\d+)")
    kernel = {name: int(number) for name, number in pattern.findall(header.read_text())}
    assert len(kernel) > 200
    for name, numbers in NAMED.items():
        # a header that is older than a call does not have it; numbers of new calls are the same everywhere
        if numbers[column] < 440 and name != "memfd_secret":
            assert kernel.get(name, 0) == numbers[column], name


@pytest.mark.skipif(
    os.uname().machine != "x86_64", reason="sandlock resolves names for its own machine alone"
)
def test_numbers_agree_with_sandlocks() -> None:
    sdk = pytest.importorskip("sandlock._sdk")
    for name, numbers in NAMED.items():
        resolved = sdk._lib.sandlock_syscall_nr(name.encode())
        assert resolved in (-1, numbers[0]), name
