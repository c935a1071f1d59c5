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
import stat
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from suite.common.locks import confirm
from utils import UserError

MANIFEST = "manifest.json"
PARTIAL, OLD, RECORD = ".partial", ".old", ".sha256"  # endings of what lies beside a folder that is replaced


def temporary_name(name: str) -> str:
    """What a file is called while it is written. Its length does not depend on `name`, which may be the longest."""
    return f".{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}.tmp"


CARD = "README.md"
NOT_SEALED = {MANIFEST, CARD, temporary_name(CARD)}  # the owner of a model may edit its model card at any time
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the disk is full, the user's quota is, the file may not grow
MEGABYTE = 10**6
LONGEST_NAME = 255  # bytes of a file's name, on nearly every file system

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
        lost = [name for name in expected if not (folder / name).is_file()]
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return f"{folder / MANIFEST} is missing or damaged"
    if lost:
        return f"{folder / lost[0]} is missing"
    for name, (size, digest) in expected.items():
        path = folder / name
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
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path, sync)}


def sha256_of(path: Path, sync: bool = False) -> str:
    """The sum of a file's content, in hex. Raises OSError for what is no regular file."""
    with open(regular(path), "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_folder(folder: Path, write: Callable[[Path], None], recorded: bool = False) -> None:
    """Seal what `write(path)` writes and put it in the place of `folder`, completely or not at all.

    A kill between the two renames leaves only the old folder, under its temporary name: `restore` brings it back.
    `recorded`: keep the sum of the folder's manifest beside it, so that `refuse_foreign` knows the folder. During the
    renames the record holds the sums of the old folder and of the new one, since a kill may leave either.
    """
    partial, old, record = (folder.with_name(folder.name + ending) for ending in (PARTIAL, OLD, RECORD))
    confirm(folder)
    for leftover in (partial, old):
        remove(leftover)
    partial.mkdir()
    try:
        write(partial)
        seal(partial)
        confirm(folder)
        if recorded:
            refuse_foreign(folder)
            new = _record_line(partial, folder.name)
            write_text(record, _record_line(folder, folder.name) + new)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # half a folder is of no use and takes space
        raise
    if os.path.lexists(folder):
        os.replace(folder, old)
    os.replace(partial, folder)
    sync_folder(folder.parent)
    remove(old)
    if recorded:
        write_text(record, new)


def new_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Seal what `write(path)` writes and give it the name `folder`, completely or not at all.

    Raises UserError if there is such a folder by then. Nothing else in its parent is touched; a SIGKILL leaves a hidden
    folder there, whose name ends in the number of this process.
    """
    partial = folder.with_name(f"{temporary_name(folder.name)}.{os.getpid()}")
    remove(partial)
    partial.mkdir()
    try:
        write(partial)
        seal(partial)
        refuse_existing(folder)
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync_folder(folder.parent)


def _record_line(folder: Path, name: str) -> str:
    """A line that `sha256sum -c` understands; an empty text if there is no such folder yet."""
    manifest = folder / MANIFEST
    return f"{sha256_of(manifest)}  {name}/{MANIFEST}\n" if manifest.is_file() else ""


def refuse_foreign(folder: Path) -> None:
    """Raises UserError if there is a folder that is not the one that `replace_folder` has recorded.

    Without a record, it is that of an earlier version of this project, which kept none.
    """
    record, manifest = folder.with_name(folder.name + RECORD), folder / MANIFEST
    if not os.path.lexists(record) or not os.path.lexists(folder):
        return
    if not manifest.is_file() or sha256_of(manifest).encode() not in regular(record).read_bytes().split():
        raise UserError(f"{folder} is not the model that this run has saved ({record.name} has another sum): put back "
                        "this run's own, or train the run afresh with train_config.resume=never (and "
                        "train_config.overwrite=true if it is finished); if this model is meant, name it with --model "
                        f"{folder}")


def restore(folder: Path) -> None:
    """Give the old folder its name back if a kill stopped `replace_folder` between its two renames."""
    old = folder.with_name(folder.name + OLD)
    if old.exists() and not folder.exists():
        os.replace(old, folder)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that it holds; what is missing is passed by."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def refuse_existing(*names: str | Path) -> None:
    """Raises UserError if a file with one of these names exists, or cannot because the name is too long."""
    for name in names:
        refuse_long(name)
        if os.path.lexists(name):
            raise UserError(f"--output: {name} exists already: choose another name, or remove it")


def refuse_long(path: str | Path) -> None:
    """Raises UserError if a file of this name cannot be."""
    if (length := len(os.fsencode(Path(path).name))) > LONGEST_NAME:
        raise UserError(f"--output: the file name in {path} has {length} bytes, but file systems take only "
                        f"{LONGEST_NAME}: choose a shorter name")


# ---------------------------------------------------------------------------------------------------------------------
# Space, and whole files


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
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


@contextmanager
def atomic_write(path: str | Path, mode: str = "w"):
    """Open a temporary file beside `path` for writing; on success, sync it and rename it to `path`.

    Whenever the process dies, `path` is either the old file or the complete new one. Raises UserError if another
    process has taken over the folder, see `confirm`.
    """
    path = Path(path)
    temporary = path.with_name(temporary_name(path.name))
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "")
    confirm(path)
    temporary.unlink(missing_ok=True)  # what a killed process has left, or a link that leads elsewhere
    try:
        with open(temporary, mode.replace("w", "x"), encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        confirm(path)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(temporary):
            error.filename = str(path)  # the name that its reader knows
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


def write_text(path: str | Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text)


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def regular(path: str | Path) -> Path:
    """The path of a file that can be read to its end. Raises OSError for others: a FIFO would be waited for forever."""
    path = Path(path)
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path


def read_json(path: str | Path) -> Any:
    """The content of a JSON file. Raises OSError if it cannot be read, and ValueError if it is not JSON."""
    try:
        return json.loads(regular(path).read_text(encoding="utf-8"))
    except RecursionError:  # thousands of brackets
        raise ValueError("its brackets are nested too deeply") from None
