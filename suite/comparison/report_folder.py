"""Which folder a report may be written into. Nothing here imports torch, so an experiment asks before its first run."""

from __future__ import annotations

import os
from pathlib import Path

from suite.common.storage import read_json
from utils import UserError

SUMMARY = "comparison.json"  # written first: it tells that the folder holds a report
LOGS = "logs"  # an experiment writes them before there is a report


def refuse_foreign_report(folder: Path) -> None:
    """Raises UserError unless the folder is missing or empty, or holds an earlier report and nothing else's files."""
    fix = "name another folder for the report: --output of compare.py, or name in the experiment's file"
    if not folder.is_dir():
        if os.path.lexists(folder):
            raise UserError(f"{folder} is no folder: {fix}")
        return
    found = sorted(path.name for path in folder.iterdir() if path.name != LOGS and not path.name.startswith("."))
    if found and not _is_summary(folder / SUMMARY):
        raise UserError(f"{folder} holds other files than a report's, such as {found[0]}: {fix}")


def _is_summary(path: Path) -> bool:
    try:
        return {"title", "settings", "pairs"} <= read_json(path).keys()
    except (OSError, ValueError, AttributeError):
        return False
