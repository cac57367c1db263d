"""How much an attempt has put on the disk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

MAX_COUNTED = 20_000
"""More files than any attempt may have: counting ends there."""
_BLOCK_BYTES = 512


@dataclass(frozen=True, slots=True)
class FolderUsage:
    """What a folder holds, all the way down."""

    files: int = 0
    """Files, folders and links."""
    stored_bytes: int = 0
    """Bytes on the disk; a hole in a file takes none."""


def measure_folder(folder: Path) -> FolderUsage:
    """Return what `folder` holds. Links are counted, never followed; what vanishes meanwhile is not."""
    files, stored = 0, 0
    waiting = [os.fspath(folder)]
    while waiting and files <= MAX_COUNTED:
        try:
            entries = list(os.scandir(waiting.pop()))
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        for entry in entries:
            try:
                stored += entry.stat(follow_symlinks=False).st_blocks * _BLOCK_BYTES
            except FileNotFoundError:
                continue
            files += 1
            if entry.is_dir(follow_symlinks=False):
                waiting.append(entry.path)
    return FolderUsage(files=files, stored_bytes=stored)
