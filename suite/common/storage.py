"""Writes files and folders so that a kill or a full disk cannot spoil them, and keeps other processes out.

A saved folder, such as a model or a state, holds `manifest.json`: the size and the SHA-256 sum of each of its files. It
is written last. `damage` compares the files with it and finds a single changed bit.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

from utils import UserError, process_rank, say

MANIFEST = "manifest.json"
CARD = "README.md"
THRESHOLD = "threshold.json"  # beside a model that --mode decide has given one
NOT_SUMMED = {MANIFEST, CARD, f".{CARD}.tmp"}  # the owner of a model may edit its model card at any time
PARTIAL, OLD = ".partial", ".old"  # endings of what lies beside a folder that is replaced
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the disk is full, the user's quota is, the file may not grow
MEGABYTE = 10**6

# ---------------------------------------------------------------------------------------------------------------------
# Whole files


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
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text)


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: str | Path) -> Any:
    """The content of a JSON file. Raises OSError if it cannot be read, and ValueError if it is not JSON."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------------------
# Folders with a list of sums


def seal(folder: Path) -> None:
    """Sync the folder's files to the disk, then write the manifest that lists them."""
    files = sorted(path for path in folder.rglob("*")
                   if path.is_file() and str(path.relative_to(folder)) not in NOT_SUMMED)
    sums = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_of(path, sync=True)}
            for path in files}
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
    write_json(folder / MANIFEST, sums)


def damage(folder: Path) -> str | None:
    """What is wrong with a saved folder, naming the file; None if every file is as it was saved."""
    try:
        sums = {name: (entry["bytes"], entry["sha256"]) for name, entry in read_json(folder / MANIFEST).items()}
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return f"{folder / MANIFEST} is missing or damaged"
    for name, (size, digest) in sums.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size or sha256_of(path) != digest:
            return f"{path} is damaged: it has changed since it was saved"
    return None


def refuse_damage(folder: Path) -> None:
    """Raises UserError if a model folder has changed since it was saved."""
    if problem := damage(folder):
        raise UserError(f"{problem}; put back a copy of {folder}, or train the run afresh with "
                        "train_config.resume=never (and train_config.overwrite=true if it is finished)")


def sha256_of(path: Path, sync: bool = False) -> str:
    """The sum of a file's content, in hex."""
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def sum_of_files(folder: Path, paths: Iterable[Path]) -> str:
    """The SHA-256 sum, in hex, of the names of files within `folder` and of what they hold."""
    result = hashlib.sha256()
    for path in sorted(paths):
        result.update(os.fsencode(path.relative_to(folder)) + sha256_of(path).encode())
    return result.hexdigest()


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Put what `write(path)` writes, and its sums, in the place of `folder`, completely or not at all. After a kill
    between the two renames, `restore` brings the old folder back."""
    partial, old = folder.with_name(folder.name + PARTIAL), folder.with_name(folder.name + OLD)
    remove(old)
    write_folder(partial, write)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    sync_folder(folder.parent)
    remove(old)


def new_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Give what `write(path)` writes, and its sums, the name `folder`, completely or not at all. Raises UserError if
    there is such a folder by then. A SIGKILL leaves a hidden one, whose name ends in the number of this process."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    write_folder(partial, write)
    refuse_existing(folder)
    os.rename(partial, folder)
    sync_folder(folder.parent)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """What `write(folder)` writes, and its sums, or nothing: half a folder is of no use and takes space."""
    remove(folder)
    folder.mkdir()
    try:
        write(folder)
        seal(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def restore(folder: Path) -> None:
    """Give the old folder its name back if a kill stopped `replace_folder` between its two renames."""
    old = folder.with_name(folder.name + OLD)
    if old.exists() and not folder.exists():
        os.replace(old, folder)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that it holds, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def refuse_existing(*names: str | Path) -> None:
    """Raises UserError if a file with one of these names exists."""
    for name in names:
        if os.path.lexists(name):
            raise UserError(f"--output: {name} exists already: choose another name, or remove it")


# ---------------------------------------------------------------------------------------------------------------------
# Space


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


def _no_room(folder: Path, needed: float, fix: str) -> UserError:
    size = f" {max(needed / MEGABYTE, 1):,.0f} MB" if needed else ""
    return UserError(f"{folder}: no room to write{size} ({_free(folder) / MEGABYTE:,.0f} MB are free; a quota or "
                     "ulimit -f may allow less). What was saved before is intact. Before you give the same command "
                     f"again, {fix}")


def _free(folder: Path) -> int:
    folder = folder.absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def _says_full(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL
    from_rust = re.search(r"\(os error (\d+)\)", str(error))  # tokenizers and safetensors only give it as text
    return from_rust is not None and int(from_rust[1]) in FULL


def chain(error: BaseException | None):
    """An exception, then the one that caused it, and so on to the first that was raised."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


# ---------------------------------------------------------------------------------------------------------------------
# One process at a time

_held: dict[Path, filelock.BaseFileLock] = {}  # {lock file: lock}


def lock(folder: Path, otherwise: str = "choose another run_name or set output_dir", inside: str | None = None) -> None:
    """Keep other processes from writing into this folder for as long as this process lives, though data loaders that it
    has forked live on: filelock closes the lock in them. The lock file lies beside the folder, or `inside` it.

    Raises UserError if another process has the lock; `otherwise` is what to do instead of waiting.
    """
    path = folder / inside if inside else _lock_file(folder)
    if process_rank() > 0 or path in _held:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()  # filelock takes a file that it may not write for one that another process has locked
        _held[path] = filelock.FileLock(path, timeout=0)
        _held[path].acquire()
    except filelock.Timeout:
        del _held[path]
        raise UserError(f"{folder} is in use by another process: wait until it ends, or {otherwise}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}): {otherwise}") from None
    except NotImplementedError:
        say(f"{path}: this file system has no locks: make sure that no other process uses this folder")


def is_locked(folder: Path) -> bool:
    """Whether another process is using this folder now."""
    path = _lock_file(folder)
    if path in _held or not path.exists():
        return False
    try:
        with filelock.FileLock(path, timeout=0):
            return False
    except filelock.Timeout:
        return True
    except (OSError, NotImplementedError):
        return False


def _lock_file(folder: Path) -> Path:
    real = Path(os.path.realpath(folder))
    return real.with_name(f".{real.name}.lock")
