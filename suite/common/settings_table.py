"""Prints the table in docs/settings.md, which is made from the dataclasses in utils.py:

    python -m suite.common.settings_table
"""

import json
from dataclasses import MISSING

from utils import config_fields


def settings_table() -> str:
    """A Markdown table with one row for each key of the configuration."""
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    for key, entry in config_fields():
        default = entry.default_factory() if entry.default is MISSING else entry.default
        default = default if isinstance(default, str) else json.dumps(default)
        choices = ", ".join(entry.metadata.get("choices", ()))
        rows.append(f"| `{key}` | `{default}` | {entry.metadata['meaning']}{choices and f' ({choices})'} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(settings_table())
