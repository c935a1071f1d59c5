"""The cache of the datasets library, with a sum for every file: what is damaged there is built again, never used."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from huggingface_hub.utils import WeakFileLock

from suite.common.hub import ANOTHER_DISK
from suite.common.storage import read_json, room_for, sha256_of, write_json
from utils import say

SUMS = "sums.json"  # beside the files of a table: {file name: SHA-256 sum}
Tables = TypeVar("Tables")  # a Dataset or a DatasetDict


def cached(name: str, build: Callable[[Path], Tables], shared: bool = False) -> Tables:
    """The tables of `build(folder)`, which takes them from `folder`, the part `name` of the cache, or puts them there.

    Files that have changed since they were written are removed first, so that `build` makes them again. So are files
    without sums, which a killed process has left, unless the folder is `shared` with other programs: then a table
    without sums is trusted and gets some.
    """
    import datasets  # here, because labelling does not need it

    cache = Path(datasets.config.HF_DATASETS_CACHE).expanduser()
    folder = cache / name
    with room_for(cache, needed=0, fix=ANOTHER_DISK):
        cache.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(f"{folder}.lock"):  # two commands at the same time build a table once
            for place in sorted({path.parent for path in folder.rglob(SUMS)}):
                if damaged := _damaged_file(place):
                    say(f"{damaged}: this file of the cache is damaged: its table is built again")
                    shutil.rmtree(place)
            if not shared and folder.exists() and not any(folder.rglob(SUMS)):
                shutil.rmtree(folder)
            tables = build(folder)
            for table in tables.values() if isinstance(tables, dict) else [tables]:
                for place in {Path(file["filename"]).parent for file in table.cache_files}:
                    _keep_sums(place)
    return tables


def digest_of(paths: Iterable[Path]) -> str:
    """A name for the content of files: the key under which what was made of them is cached."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(sha256_of(path).encode())
    return digest.hexdigest()


def _damaged_file(place: Path) -> Path | None:
    """A file in `place` that has changed since its sum was taken."""
    try:
        sums = dict(read_json(place / SUMS))
        return next((place / file for file, digest in sums.items() if sha256_of(place / file) != digest), None)
    except OSError as error:  # missing, or a pipe in its place
        return Path(error.filename)
    except (ValueError, TypeError):
        return place / SUMS


def _keep_sums(place: Path) -> None:
    if (place / SUMS).exists():
        return
    # cache-*.arrow are results of other programs, which may remove them at any time.
    files = [file for file in (*place.glob("*.arrow"), *place.glob("dataset_info.json"))
             if not file.name.startswith("cache-")]
    with suppress(PermissionError):  # somebody else's cache: its tables can be read, but no file be put beside them
        write_json(place / SUMS, {file.name: sha256_of(file) for file in sorted(files)})
