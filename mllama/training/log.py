"""The loss log: one JSON object per line, flushed as it is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mllama.checkpoints.durable import replace_file


class Log:
    """Appends to a file; every entry has its ``step``.

    Args:
        path: of the log.
        step: entries of later steps, and a line cut off by a kill, are dropped: those steps come again.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept = [entry for entry in read_log(path) if entry["step"] <= step] if step else []
        replace_file(path, lambda new: new.write_text("".join(map(_line, kept)), encoding="utf-8"))
        self._file = path.open("a", encoding="utf-8")

    def write(self, **entry: Any) -> None:
        self._file.write(_line(entry))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"
