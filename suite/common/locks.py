"""One process at a time in a folder: the lock that a process holds on it, and the look at that lock before it writes.

The kernel frees a lock when its process dies. What is locked is a file, which somebody may remove. So whoever replaces
something in a folder calls `confirm` first, which notices that and locks a new file, or stops if another process has.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from utils import UserError, process_rank, say

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@dataclass
class _Lock:
    folder: Path  # what it protects, as the user named it
    otherwise: str
    file: IO  # closing it would give the lock back


_held: dict[Path, _Lock] = {}  # {lock file: lock}


def lock(folder: Path, otherwise: str = "choose another run_name or set output_dir", inside: str | None = None) -> None:
    """Keep other processes from writing into this folder for as long as this process lives.

    The lock file lies beside the folder, so that the folder can be replaced, or has the name `inside` within it. Links
    are followed first, so each name of the folder leads to the same lock. `lockf` works on NFS too, and its locks
    belong to one process: they end with it, even if data loaders that it forked live on. Raises UserError if another
    process has the lock; `otherwise` is what to do then instead of waiting.
    """
    if process_rank() > 0 or fcntl is None:
        return
    path = _path_of(folder, inside)
    file = _held[path].file if path in _held else None
    if file is None or not _is_on_disk(file, path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = _acquire(path)
        except OSError as error:
            raise UserError(f"{error.filename or path} cannot be written ({error.strerror or error}): {otherwise}"
                            ) from None
        if file is None:
            raise UserError(f"{folder} is in use by another process: wait until it ends, or {otherwise}")
    _held[path] = _Lock(folder, otherwise, file)


def confirm(path: Path) -> None:
    """Call this before something at `path` is replaced: look whether this process still has the folder to itself.

    Raises UserError if the lock file was removed and another process has locked a new one.
    """
    for lock_file, held in list(_held.items()):
        if Path(os.path.abspath(path)).is_relative_to(os.path.abspath(held.folder)) and not _is_on_disk(
                held.file, lock_file):
            try:
                file = _acquire(lock_file)
            except OSError as error:
                raise UserError(f"{lock_file} was removed and cannot be made again ({error.strerror or error}): "
                                f"{held.otherwise}") from None
            if file is None:
                raise UserError(f"{held.folder} is in use by another process, which began when {lock_file} had been "
                                "removed: this one stops and has left what is there as it was. Wait until the other "
                                f"one ends, or {held.otherwise}")
            held.file = file


def is_locked(folder: Path) -> bool:
    """Whether another process is using this run folder now."""
    path = _path_of(folder)
    if fcntl is None or path in _held:  # closing a second file would give this process's own lock back
        return False
    try:
        with path.open("r+") as file:  # closing it gives the lock back
            return _is_taken(file)
    except OSError:  # no such file, or a file system without locks
        return False


def _path_of(folder: Path, inside: str | None = None) -> Path:
    real = Path(os.path.realpath(folder))
    return real / inside if inside else real.with_name(f".{real.name}.lock")


def _acquire(path: Path) -> IO | None:
    """The file at `path`, locked if the file system has locks; None if another process has locked it."""
    for _ in range(10):
        file = path.open("a+")  # + so that opening a FIFO fails instead of waiting for its other end
        try:
            if _is_taken(file):
                file.close()
                return None
        except OSError as error:
            say(f"{path}: cannot be locked ({error.strerror}): make sure that no other process uses this folder")
        if _is_on_disk(file, path):
            return file
        file.close()  # it was removed between the two calls: nobody else would find this lock
    raise OSError(errno.EAGAIN, "the lock file is removed again and again", str(path))


def _is_on_disk(file: IO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _is_taken(file: IO) -> bool:
    """Lock an open file; True if another process has locked it already."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    return False
