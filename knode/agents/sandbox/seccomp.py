"""A filter on system calls, for the sandboxes that take one as a program (seccomp(2), bpf(4)).

Namespaces hide the machine; the kernel that they share stays one. The filter closes what a program
of an agent does not need and what has served to break out of namespaces, or holds memory that no
process owns and so no limit sees. The list follows Flatpak's (flatpak-run.c), with the calls of newer
kernels added. A refused call fails with EPERM, or with ENOSYS where libraries know an older way.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass

from knode.errors import Code, KnodeError

_LOAD_WORD = 0x20
_JUMP_EQUAL = 0x15
_JUMP_AT_LEAST = 0x35
_JUMP_ANY_BIT = 0x45
_RETURN = 0x06

_ALLOW = 0x7FFF0000
_KILL = 0x80000000
_ERRNO = 0x00050000

# struct seccomp_data: int nr; u32 arch; u64 instruction_pointer; u64 args[6], little-endian
_NUMBER_OFFSET = 0
_ARCHITECTURE_OFFSET = 4
_ARGUMENTS_OFFSET = 16

_NEW_NAMESPACES = 0x7E020000  # CLONE_NEW*: mount, cgroup, uts, ipc, user, pid, net
_TIOCSTI = 0x5412
_TIOCLINUX = 0x541C


@dataclass(frozen=True, slots=True)
class _Machine:
    audit_architecture: int
    clone: int
    ioctl: int
    refused: tuple[int, ...]
    not_there: tuple[int, ...]


# Numbers from the kernel's arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h;
# calls from 424 on have one number everywhere.
_REFUSED_EVERYWHERE = (425, 426, 427, 447, 450)  # io_uring_*, memfd_secret, set_mempolicy_home_node
_NOT_THERE_EVERYWHERE = (428, 429, 430, 431, 432, 433, 435, 438, 442)
# open_tree, move_mount, fsopen, fsconfig, fsmount, fspick, clone3, pidfd_getfd, mount_setattr

_MACHINES = {
    "x86_64": _Machine(
        audit_architecture=0xC000003E,
        clone=56,
        ioctl=16,
        refused=(
            *(101, 310, 311),  # ptrace, process_vm_readv, process_vm_writev
            *(155, 161, 165, 166, 272, 308),  # pivot_root, chroot, mount, umount2, unshare, setns
            *(248, 249, 250),  # add_key, request_key, keyctl
            *(298, 321, 323),  # perf_event_open, bpf, userfaultfd
            *(29, 68, 319),  # shmget, msgget, memfd_create
            *(237, 238, 256, 279),  # mbind, set_mempolicy, migrate_pages, move_pages
            *(103, 134, 163, 167, 168, 169, 179),  # syslog, uselib, acct, swapon, swapoff, reboot, quotactl
            *(172, 173, 175, 176, 246, 313, 320),  # iopl, ioperm, modules, kexec
            *(304, 312),  # open_by_handle_at, kcmp
        ),
        not_there=_NOT_THERE_EVERYWHERE,
    ),
    "aarch64": _Machine(
        audit_architecture=0xC00000B7,
        clone=220,
        ioctl=29,
        refused=(
            *(117, 270, 271),  # ptrace, process_vm_readv, process_vm_writev
            *(41, 51, 40, 39, 97, 268),  # pivot_root, chroot, mount, umount2, unshare, setns
            *(217, 218, 219),  # add_key, request_key, keyctl
            *(241, 280, 282),  # perf_event_open, bpf, userfaultfd
            *(194, 186, 279),  # shmget, msgget, memfd_create
            *(235, 237, 238, 239),  # mbind, set_mempolicy, migrate_pages, move_pages
            *(116, 89, 224, 225, 142, 60),  # syslog, acct, swapon, swapoff, reboot, quotactl
            *(104, 105, 106, 273, 294),  # kexec and modules
            *(265, 272),  # open_by_handle_at, kcmp
        ),
        not_there=_NOT_THERE_EVERYWHERE,
    ),
}


def filter_program(machine: str) -> bytes:
    """Return the filter as the bytes of a `struct sock_filter` array.

    Args:
        machine: as `uname -m` says.

    Raises:
        KnodeError: NO_SANDBOX for a machine whose system calls are not listed.
    """
    calls = _MACHINES.get(machine)
    if calls is None:
        raise KnodeError(Code.NO_SANDBOX, f"the filter on system calls does not know {machine} machines")
    refuse, absent = _ERRNO | errno.EPERM, _ERRNO | errno.ENOSYS
    program = [
        _statement(_LOAD_WORD, _ARCHITECTURE_OFFSET),
        _jump(_JUMP_EQUAL, calls.audit_architecture, 1, 0),
        _statement(_RETURN, _KILL),
        _statement(_LOAD_WORD, _NUMBER_OFFSET),
    ]
    if machine == "x86_64":  # its x32 numbers are the same calls under another number
        program += [_jump(_JUMP_AT_LEAST, 0x40000000, 0, 1), _statement(_RETURN, absent)]
    for number in (*calls.refused, *_REFUSED_EVERYWHERE):
        program += [_jump(_JUMP_EQUAL, number, 0, 1), _statement(_RETURN, refuse)]
    for number in calls.not_there:
        program += [_jump(_JUMP_EQUAL, number, 0, 1), _statement(_RETURN, absent)]
    program += [
        _jump(_JUMP_EQUAL, calls.clone, 0, 4),
        _statement(_LOAD_WORD, _ARGUMENTS_OFFSET),
        _jump(_JUMP_ANY_BIT, _NEW_NAMESPACES, 0, 1),
        _statement(_RETURN, refuse),
        _statement(_RETURN, _ALLOW),
        _jump(_JUMP_EQUAL, calls.ioctl, 0, 4),
        _statement(_LOAD_WORD, _ARGUMENTS_OFFSET + 8),
        _jump(_JUMP_EQUAL, _TIOCSTI, 1, 0),
        _jump(_JUMP_EQUAL, _TIOCLINUX, 0, 1),
        _statement(_RETURN, refuse),
        _statement(_RETURN, _ALLOW),
    ]
    return b"".join(program)


def _statement(code: int, value: int) -> bytes:
    return struct.pack("<HBBI", code, 0, 0, value)


def _jump(code: int, value: int, when_true: int, when_false: int) -> bytes:
    return struct.pack("<HBBI", code, when_true, when_false, value)
