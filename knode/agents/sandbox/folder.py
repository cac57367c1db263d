"""The attempt's folder: how much is in it while a program works there, and its state afterwards."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from knode.agents.sandbox.tree import BLOCK_BYTES

MAX_COUNTED = 20_000
"""More files than any attempt may have: counting ends there."""
MAX_DEPTH = 12
"""Folders inside folders. With names of 255 bytes this is the longest path that the kernel takes."""


@dataclass(frozen=True, slots=True)
class FolderUsage:
    """What a folder holds, all the way down."""

    files: int = 0
    """Files, folders and links."""
    stored_bytes: int = 0
    """Bytes on the disk; a hole in a file takes none."""
    is_countable: bool = True
    """False when some of it is too deep, or closed to its owner, and so was not counted."""


def measure_folder(folder: Path) -> FolderUsage:
    """Return what `folder` holds. Links are counted, never followed; what vanishes meanwhile is not."""
    files, stored, countable = 0, 0, True
    waiting = [(os.fspath(folder), 0)]
    while waiting and files <= MAX_COUNTED:
        path, depth = waiting.pop()
        try:
            entries = list(os.scandir(path))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            countable = False
            continue
        for entry in entries:
            try:
                stored += entry.stat(follow_symlinks=False).st_blocks * BLOCK_BYTES
            except FileNotFoundError:
                continue
            except OSError:
                countable = False
                continue
            files += 1
            if entry.is_dir(follow_symlinks=False):
                if depth < MAX_DEPTH:
                    waiting.append((entry.path, depth + 1))
                else:
                    countable = False
    return FolderUsage(files=files, stored_bytes=stored, is_countable=countable)


def make_removable(folder: Path) -> None:
    """Open every folder below `folder` to its owner and bring what lies too deep nearer.

    After it the usual ways of removing a folder work, whatever a program left there. Call it when
    nothing runs in the folder any more.
    """
    waiting = [(folder, 0)]
    while waiting:
        path, depth = waiting.pop()
        path.chmod(0o700)
        inner = [Path(entry.path) for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False)]
        for one in inner:
            if depth < MAX_DEPTH:
                waiting.append((one, depth + 1))
            else:
                one.chmod(0o700)
                nearer = Path(tempfile.mkdtemp(dir=folder)) / "deep"
                one.rename(nearer)
                waiting.append((nearer, 2))
