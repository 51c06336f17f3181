"""The loss log: one JSON object per line, flushed as it is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mllama.checkpoints.durable import replace_file
from mllama.files import FileRefused
from mllama.json_lines import read_lines
from mllama.strict_json import parse_json
from mllama.wording import shown

_MAX_LINE_BYTES = 2**16


class Log:
    """Appends to a file; every entry has its ``step``.

    Args:
        path: of the log.
        step: entries of later steps, and a line cut off by a kill, are dropped: those steps come again.
    Raises: ValueError as `read_log`.
    """

    def __init__(self, path: Path, step: int) -> None:
        kept = _until(step, read_log(path)) if step else []
        replace_file(path, lambda new: new.write_text("".join(map(_line, kept)), encoding="utf-8"))
        self._file = path.open("a", encoding="utf-8")

    def write(self, **entry: Any) -> None:
        self._file.write(_line(entry))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _until(step: int, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in entries if type(entry["step"]) is int and entry["step"] <= step]


def read_log(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; none where there is no log.

    Raises: ValueError naming the file and the line for one that is no entry.
    """
    if not path.exists():
        return []
    entries: list[dict[str, Any]] = []
    try:
        for number, line in enumerate(read_lines(path, _MAX_LINE_BYTES), start=1):
            if line is None:
                raise ValueError(f"line {number} has more than {_MAX_LINE_BYTES} bytes")
            if line.endswith(b"\n"):
                entries.append(_entry(line, number))
    except (FileRefused, ValueError) as error:
        raise ValueError(f"{shown(str(path))} is no log of a run: {error}") from None
    return entries


def _entry(line: bytes, number: int) -> dict[str, Any]:
    try:
        entry = parse_json(line.decode("utf-8"), constants=True)
    except UnicodeDecodeError:
        raise ValueError(f"line {number} is no UTF-8 text") from None
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from None
    if not isinstance(entry, dict) or type(entry.get("step")) not in (int, str):
        raise ValueError(f"line {number} has no step")
    return entry


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"
