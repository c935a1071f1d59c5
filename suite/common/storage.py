"""Writes files so that a kill, a full disk or a second process cannot spoil them.

A folder is sealed by `manifest.json`, which is written last and holds the size and SHA-256 sum of every file. `damage`
compares the folder with it before anything is read, and finds one changed bit as well as one file too many.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from utils import UserError, process_rank, say

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MANIFEST = "manifest.json"
PARTIAL, OLD = ".partial", ".old"
NOT_SEALED = {MANIFEST, "README.md", ".README.md.tmp"}  # the owner of a model may edit its model card at any time
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the disk is full, the user's quota is, the file may not grow
MEGABYTE = 10**6
_locks = []  # open files: closing one would give its lock back

# ---------------------------------------------------------------------------------------------------------------------
# Sealed folders


def seal(folder: Path) -> None:
    """Sync the folder's files to the disk, then write the manifest that lists them."""
    files = sorted(path for path in folder.rglob("*")
                   if path.is_file() and str(path.relative_to(folder)) not in NOT_SEALED)
    sums = {str(path.relative_to(folder)): _sum(path, sync=True) for path in files}
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
    write_json(folder / MANIFEST, sums)


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, naming the file; None if every file is as it was saved."""
    try:
        manifest = read_json(folder / MANIFEST)
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return f"{folder / MANIFEST} is missing or damaged"
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size or _sum(path)["sha256"] != digest:
            return f"{path} is damaged: it has changed since it was saved"
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    foreign = found - set(expected) - NOT_SEALED
    return f"{folder / min(foreign)} was not saved by this run: remove it" if foreign else None


def refuse_damage(folder: Path) -> None:
    """Raises UserError if a model folder has changed since it was saved."""
    if problem := damage(folder):
        raise UserError(f"{problem}; or put back a copy of {folder}, or train the run afresh with "
                        "train_config.resume=never (and train_config.overwrite=true if it is finished)")


def _sum(path: Path, sync: bool = False) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if sync:
            os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": digest}


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Seal what `write(path)` writes and put it in the place of `folder`, completely or not at all.

    A kill between the two renames leaves only the old folder, under its temporary name: `restore` brings it back.
    """
    partial, old = folder.with_name(folder.name + PARTIAL), folder.with_name(folder.name + OLD)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
        seal(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # half a folder is of no use and takes space
        raise
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def restore(folder: Path) -> None:
    """Give the old folder its name back if a kill stopped `replace_folder` between its two renames."""
    old = folder.with_name(folder.name + OLD)
    if old.exists() and not folder.exists():
        os.replace(old, folder)


def refuse_existing(*names: str | Path) -> None:
    """Raises UserError if a file with one of these names exists."""
    for name in names:
        if os.path.lexists(name):
            raise UserError(f"--output: {name} exists already: choose another name, or remove it")


# ---------------------------------------------------------------------------------------------------------------------
# Space, and one process at a time


@contextmanager
def room_for(folder: Path, needed: float = MEGABYTE, fix: str = "make room or set output_dir to another disk"):
    """Surrounds code that writes `needed` bytes below `folder`.

    Raises UserError if they do not fit, before the code runs or when it fills the disk. Its message ends with `fix`.
    """
    if _free(folder) < needed:
        raise _no_room(folder, needed, fix)
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not any(map(_says_full, chain(error))):  # torch.save raises its own error because of the disk's
            raise
        raise _no_room(folder, needed, fix) from error


def _says_full(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL
    from_rust = re.search(r"\(os error (\d+)\)", str(error))  # tokenizers and safetensors only give it as text
    return from_rust is not None and int(from_rust[1]) in FULL


def _no_room(folder: Path, needed: float, fix: str) -> UserError:
    problem = "its disk is full, or a quota or ulimit -f is reached"
    if needed:
        problem = (f"no room to write {max(needed / MEGABYTE, 1):,.0f} MB ({_free(folder) / MEGABYTE:,.0f} MB are "
                   "free; a quota or ulimit -f may allow less)")
    return UserError(f"{folder}: {problem}. What was saved before is intact. Before you give the same command again, "
                     f"{fix}")


def _free(folder: Path) -> int:
    folder = folder.absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def chain(error: BaseException | None):
    """An exception, then the one that caused it, and so on to the first that was raised."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def lock(folder: Path, otherwise: str = "choose another run_name") -> None:
    """Keep other processes from writing this run folder for as long as this process lives.

    What is locked is a file beside the folder, so replacing the folder does not matter. `lockf` works on NFS too, and
    its locks belong to one process: the kernel frees them when that process dies, even if data loaders that it forked
    live on. Raises UserError if another process has the lock; `otherwise` is what to do then instead of waiting.
    """
    if process_rank() > 0 or fcntl is None:
        return
    path = folder.with_name(f".{folder.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise UserError(f"{path.parent} cannot be written ({error.strerror}): set output_dir") from None
    try:
        if _is_taken(file):
            raise UserError(f"{folder} is in use by another process: wait until it ends, or {otherwise}")
    except OSError as error:  # a file system without locks
        say(f"{path}: cannot be locked ({error.strerror}): make sure that no other process uses this run folder")
    _locks.append(file)


def is_locked(folder: Path) -> bool:
    """Whether another process is using this run folder now."""
    path = folder.with_name(f".{folder.name}.lock")
    try:
        with path.open("r+") as file:  # closing it gives the lock back
            return fcntl is not None and _is_taken(file)
    except OSError:  # no such file, or a file system without locks
        return False


def _is_taken(file: IO) -> bool:
    """Lock an open file; True if another process has locked it already."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    return False


@contextmanager
def atomic_write(path: str | Path, mode: str = "w"):
    """Open a temporary file beside `path` for writing; on success, sync it and rename it to `path`.

    Whenever the process dies, `path` is either the old file or the complete new one.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "")
    try:
        with open(temporary, mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make the renames in a folder survive a power cut. Does nothing on Windows, where a folder cannot be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, value: Any) -> None:
    with atomic_write(path) as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def read_json(path: str | Path) -> Any:
    """The content of a JSON file. Raises OSError if it cannot be read, and ValueError if it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError:  # thousands of brackets
        raise ValueError("its brackets are nested too deeply") from None
