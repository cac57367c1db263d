"""Filters on system calls, as programs for the kernel (seccomp(2), bpf(4)).

Namespaces and Landlock hide the machine; the kernel that they share stays one. A filter closes what a
program of an agent does not need and what has served to break out, or what holds memory that no
process owns, so that no limit would see it. A refused call fails with EPERM, or with ENOSYS where
libraries know an older way.

The list for bubblewrap follows Flatpak's (flatpak-run.c), with the calls of newer kernels added.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence
from socket import AF_INET, AF_INET6, AF_UNIX

from knode.errors import Code, KnodeError

_LOAD_WORD = 0x20
_JUMP_EQUAL = 0x15
_JUMP_AT_LEAST = 0x35
_JUMP_ANY_BIT = 0x45
_RETURN = 0x06

_ALLOW = 0x7FFF0000
_KILL = 0x80000000
_REFUSE = 0x00050000 | errno.EPERM
_ABSENT = 0x00050000 | errno.ENOSYS

# struct seccomp_data: int nr; u32 arch; u64 instruction_pointer; u64 args[6], little-endian
_NUMBER_OFFSET = 0
_ARCHITECTURE_OFFSET = 4
_ARGUMENTS_OFFSET = 16
_ARGUMENT_BYTES = 8

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32_NUMBERS = 0x40000000
_NEW_NAMESPACES = 0x7E020000  # CLONE_NEW*: mount, cgroup, uts, ipc, user, pid, net
_TERMINAL_INPUT = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX

# Name: number on x86_64, on aarch64; 0 where the machine has no such call. From the kernel's
# arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.
_TRACING = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
}
_MOUNTING = {
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "mount": (165, 40),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "setns": (308, 268),
}
_ADMINISTRATION = {
    "syslog": (103, 116),
    "uselib": (134, 0),
    "acct": (163, 89),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "iopl": (172, 0),
    "ioperm": (173, 0),
    "init_module": (175, 105),
    "delete_module": (176, 106),
    "quotactl": (179, 60),
    "kexec_load": (246, 104),
    "finit_module": (313, 273),
    "kexec_file_load": (320, 294),
    "open_by_handle_at": (304, 265),
    "quotactl_fd": (443, 443),
}
_KERNEL_SURFACE = {
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "perf_event_open": (298, 241),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "set_mempolicy_home_node": (450, 450),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
}
_UNOWNED_MEMORY = {
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
}
_KNOWN_AS_ABSENT = {
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "clone3": (435, 435),
    "pidfd_getfd": (438, 438),
    "mount_setattr": (442, 442),
}
_CLONE = (56, 220)
_IOCTL = (16, 29)
_SOCKET = (41, 198)
_PRLIMIT64 = (302, 261)

Calls = dict[str, tuple[int, int]]


def bubblewrap_filter(machine: str) -> bytes:
    """Return the filter for programs in namespaces of their own, as a `struct sock_filter` array.

    Args:
        machine: as `uname -m` says.

    Raises:
        KnodeError: NO_SANDBOX for a machine whose system calls are not listed.
    """
    column = _column(machine)
    refused = (_TRACING, _MOUNTING, _ADMINISTRATION, _KERNEL_SURFACE, _UNOWNED_MEMORY)
    return b"".join(
        [
            *_opening(machine),
            *_answer(refused, column, _REFUSE),
            *_answer((_KNOWN_AS_ABSENT,), column, _ABSENT),
            # Other families, such as the host's of a virtual machine, are in no namespace.
            *_allow_values(_SOCKET[column], 0, (AF_UNIX, AF_INET, AF_INET6)),
            *_refuse_any_bit(_CLONE[column], 0, _NEW_NAMESPACES),
            *_refuse_values(_IOCTL[column], 1, _TERMINAL_INPUT),
            _statement(_RETURN, _ALLOW),
        ]
    )


def sandlock_filter(machine: str) -> bytes:
    """Return the filter that stands before sandlock's own, as a `struct sock_filter` array.

    It judges arguments, which sandlock's list of names cannot: sockets are of the machine's own kind
    alone, and limits are one's own. It holds for sandlock's supervisor too, which needs no more.

    Args:
        machine: as `uname -m` says.

    Raises:
        KnodeError: NO_SANDBOX for a machine whose system calls are not listed.
    """
    column = _column(machine)
    return b"".join(
        [
            *_opening(machine),
            *_allow_values(_SOCKET[column], 0, (AF_UNIX,)),
            *_allow_values(_PRLIMIT64[column], 0, (0,)),
            *_refuse_values(_IOCTL[column], 1, _TERMINAL_INPUT),
            _statement(_RETURN, _ALLOW),
        ]
    )


def _column(machine: str) -> int:
    if machine not in _ARCHITECTURES:
        raise KnodeError(Code.NO_SANDBOX, f"the filter on system calls does not know {machine} machines")
    return list(_ARCHITECTURES).index(machine)


def _opening(machine: str) -> list[bytes]:
    """Kill a program of another architecture, whose numbers mean other calls; load the number."""
    opening = [
        _statement(_LOAD_WORD, _ARCHITECTURE_OFFSET),
        _jump(_JUMP_EQUAL, _ARCHITECTURES[machine], 1, 0),
        _statement(_RETURN, _KILL),
        _statement(_LOAD_WORD, _NUMBER_OFFSET),
    ]
    if machine == "x86_64":
        opening += [_jump(_JUMP_AT_LEAST, _X32_NUMBERS, 0, 1), _statement(_RETURN, _ABSENT)]
    return opening


def _answer(groups: Sequence[Calls], column: int, answer: int) -> list[bytes]:
    program = []
    for group in groups:
        for numbers in group.values():
            if numbers[column]:
                program += [_jump(_JUMP_EQUAL, numbers[column], 0, 1), _statement(_RETURN, answer)]
    return program


def _allow_values(call: int, argument: int, values: Sequence[int]) -> list[bytes]:
    """Refuse `call` unless its argument (the low word of it) is one of `values`."""
    checks = [
        _jump(_JUMP_EQUAL, value, len(values) - place, 0) for place, value in enumerate(values)
    ]  # each jumps over the other checks and the refusal
    return _about(call, argument, [*checks, _statement(_RETURN, _REFUSE), _statement(_RETURN, _ALLOW)])


def _refuse_values(call: int, argument: int, values: Sequence[int]) -> list[bytes]:
    """Refuse `call` when its argument is one of `values`."""
    checks = [_jump(_JUMP_EQUAL, value, len(values) - place, 0) for place, value in enumerate(values)]
    return _about(call, argument, [*checks, _statement(_RETURN, _ALLOW), _statement(_RETURN, _REFUSE)])


def _refuse_any_bit(call: int, argument: int, bits: int) -> list[bytes]:
    """Refuse `call` when its argument has one of `bits`."""
    check = _jump(_JUMP_ANY_BIT, bits, 1, 0)
    return _about(call, argument, [check, _statement(_RETURN, _ALLOW), _statement(_RETURN, _REFUSE)])


def _about(call: int, argument: int, body: list[bytes]) -> list[bytes]:
    """Run `body` on an argument of `call`; go past it for another call. The body always returns."""
    load = _statement(_LOAD_WORD, _ARGUMENTS_OFFSET + _ARGUMENT_BYTES * argument)
    return [_jump(_JUMP_EQUAL, call, 0, len(body) + 1), load, *body]


def _statement(code: int, value: int) -> bytes:
    return struct.pack("<HBBI", code, 0, 0, value)


def _jump(code: int, value: int, when_true: int, when_false: int) -> bytes:
    return struct.pack("<HBBI", code, when_true, when_false, value)
