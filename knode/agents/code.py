"""An agent's folder: what is read from it, and whether a kept copy is still what was signed."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from knode.agents.manifest import SIGNED_NAME, FileDigest, check_relative_path
from knode.errors import Code, KnodeError, LocalError
from knode.world import Disk

MAX_FILES = 1000
MAX_CODE_BYTES = 64 * 1024 * 1024
MAX_DEPTH = 16


def list_code(folder: Path) -> list[str]:
    """Return the relative paths of the files in `folder`, sorted; the publisher's signature is left out.

    Raises:
        KnodeError: MANIFEST_INVALID for a link or anything else that is no plain file or folder, and
            for more than 1,000 files or 16 folders deep; NOT_FOUND when there is no such folder.
    """
    if not folder.is_dir():
        raise KnodeError(Code.NOT_FOUND, f"there is no folder {folder}", "give the folder with agent.toml")
    found: list[str] = []
    waiting = [folder]
    while waiting:
        for entry in os.scandir(waiting.pop()):
            path = Path(entry.path)
            relative = path.relative_to(folder).as_posix()
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                if relative.count("/") >= MAX_DEPTH:
                    _refuse(f"{relative!r} is more than {MAX_DEPTH} folders deep")
                waiting.append(path)
            elif stat.S_ISREG(mode):
                found.append(relative)
            else:
                _refuse(f"{relative!r} is neither a file nor a folder (links are not followed)")
            if len(found) + len(waiting) > MAX_FILES:
                _refuse(f"the folder holds more than {MAX_FILES} files")
    return sorted(path for path in found if path != SIGNED_NAME)


def copy_code(disk: Disk, source: Path, paths: Sequence[str], target: Path | None) -> tuple[FileDigest, ...]:
    """Read the files `paths` of `source`, write them below `target`, and return what they are.

    Without a target they are read alone. Each file is synced before the next, and nothing refers to
    `target` yet, so a crash leaves an orphan at worst.

    Raises:
        KnodeError: MANIFEST_INVALID for more than 64 MiB together; the disk's own errors.
    """
    digests, total = [], 0
    for path in paths:
        check_relative_path(path)
        try:
            data = disk.read(source / path, limit_bytes=MAX_CODE_BYTES - total)
        except KnodeError as error:
            if error.code is not Code.TOO_LARGE:
                raise
            _refuse(f"the folder holds more than {MAX_CODE_BYTES} bytes")
        total += len(data)
        digests.append(FileDigest(path, len(data), hashlib.sha256(data).digest()))
        if target is not None:
            disk.make_folder((target / path).parent)
            # Executable for its owner alone: a command's own programs must start.
            with disk.create(target / path, mode=0o700) as file:
                file.write(data)
                file.sync()
    return tuple(digests)


def verify_code(disk: Disk, folder: Path, files: Sequence[FileDigest]) -> None:
    """Check that `folder` holds exactly `files`.

    Raises:
        KnodeError: MANIFEST_INVALID, naming the first file that was changed, added or removed.
    """
    expected: dict[str, set[str]] = {"": set()}
    for file in files:
        parts = file.path.split("/")
        for depth, name in enumerate(parts):
            expected.setdefault("/".join(parts[:depth]), set()).add(name)
    for relative, names in expected.items():
        for name in sorted(set(disk.list_folder(folder / relative)) ^ names):
            _refuse(f"{relative + '/' if relative else ''}{name} was added to its code or removed from it")
    for file in files:
        try:
            data = disk.read(folder / file.path, limit_bytes=file.size)
        except KnodeError as error:
            raise LocalError(
                Code.MANIFEST_INVALID,
                f"{file.path} of its code cannot be read or has grown: {error.message}",
                "install the agent again with 'knode agent install FOLDER'",
            ) from error
        if len(data) != file.size or hashlib.sha256(data).digest() != file.sha256:
            _refuse(f"{file.path} of its code was changed since it was installed")


def _refuse(why: str) -> NoReturn:
    raise KnodeError(
        Code.MANIFEST_INVALID, why, "check the folder, then run 'knode agent install FOLDER' again"
    )
