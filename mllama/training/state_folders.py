"""The folders of a run's states by their names: whole ones, and those half written or half removed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

_NAME, _HALF = re.compile(r"state-(\d{1,15})"), ".partial"


def half_written(state: Path) -> Path:
    """Where a state is until it is whole."""
    return state.with_name(state.name + _HALF)


def newest(folder: Path) -> Path | None:
    """The whole state of the most steps."""
    found = [path for path in folder.glob("state-*") if _NAME.fullmatch(path.name)]
    return max(found, key=lambda path: int(path.name.partition("-")[2]), default=None)


def remove_others(folder: Path, kept: Path | None) -> None:
    """Remove all states but one, and what a kill has left of one that was being written."""
    for path in folder.glob("state-*"):
        if path == kept or not _NAME.fullmatch(path.name.removesuffix(_HALF)) or not path.is_dir():
            continue
        if not path.name.endswith(_HALF):  # or a kill would leave one that passes for whole
            path = path.rename(half_written(path))
        shutil.rmtree(path)
