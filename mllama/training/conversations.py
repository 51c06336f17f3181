"""Conversations to learn from: a JSON Lines file, one conversation per line.

    {"messages": [
      {"role": "user", "content": [{"type": "image", "path": "photos/1.jpg"},
                                   {"type": "text", "text": "What is this?"}]},
      {"role": "assistant", "content": "A harbour at dawn."}]}

Content is a string or a list of parts. A path is relative to the folder of the file, and inside it unless
another folder is named: data come from others, and must not choose what is read here. Roles are "system",
"user" and "assistant"; what the assistant says is learned, every turn of it, and a conversation ends with it.
Other keys of a line are ignored; blank lines too. A line ends with a line feed, whatever else is in it. It is
JSON as its standard has it: a key given twice, NaN, and half of a surrogate pair are faults.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mllama.files import FileRefused
from mllama.json_lines import read_lines
from mllama.processing.images import ImageOpenError, check_image
from mllama.processing.paths import checked_path
from mllama.strict_json import parse_json
from mllama.wording import shown

ROLES = ("system", "user", "assistant")
MAX_LINE_BYTES = 4 * 2**20  # 131,072 tokens, more than which no model takes, are some 0.6 MB
_LISTED = 20  # faults in one message; more are counted
_KEPT = 1000  # faults of one file
_LONGEST_FAULT = 1000  # characters

_Result = TypeVar("_Result")


class DataError(ValueError):
    """A data file that cannot be learned from. `problems` holds one line per fault, with its line number.

    Args:
        count: of the faults, where `problems` has only the first ones.
    """

    def __init__(self, path: Path, problems: list[str], count: int | None = None) -> None:
        self.problems = list(problems)
        lines = self.problems[:_LISTED]
        if (more := (count or len(problems)) - len(lines)) > 0:
            lines.append(f"and {more} more")
        listed = "".join(f"\n  - {line}" for line in lines)
        super().__init__(f"{shown(str(path))} cannot be trained on:{listed}")


@dataclass(frozen=True)
class Conversation:
    """One line of a data file.

    Attributes:
        line: its number, from 1.
        messages: as a chat template reads them.
        images: in the order of the messages.
        folder: what those are in, links resolved.
    """

    line: int
    messages: list[dict[str, Any]]
    images: list[Path]
    folder: Path


def read_conversations(path: Path, folder: Path | None = None) -> list[Conversation]:
    """All conversations of a file. Arguments and errors: as `read_each`."""
    return read_each(path, lambda conversation: conversation, folder)


def read_each(
    path: Path, make: Callable[[Conversation], _Result], folder: Path | None = None
) -> list[_Result]:
    """``make(conversation)`` of every line of a file; the images are looked at, but not decoded.

    Args:
        folder: that images have to be inside of; None: that of the file.
    Raises: DataError with the faults found, ``make``'s ValueErrors too, and where the file cannot be read.
    """
    folder = path.parent if folder is None else folder
    seen: dict[Path, str | None] = {}
    made, problems, count, is_empty = [], [], 0, True
    try:
        for number, line in enumerate(read_lines(path, MAX_LINE_BYTES), start=1):
            if line is not None and not line.strip():
                continue
            is_empty, faults = False, []
            try:
                messages, images = _parsed(line, path.parent)
                for image in dict.fromkeys(images):
                    if image not in seen:
                        seen[image] = _fault(image, folder)
                    faults += [seen[image]] if seen[image] else []
                result = make(Conversation(number, messages, images, folder))
                if not count:  # else nobody will have it
                    made.append(result)
            except ValueError as error:
                faults.append(shown(str(error), _LONGEST_FAULT))
            count += len(faults)
            problems += [f"line {number}: {fault}" for fault in faults[: _KEPT - len(problems)]]
    except FileRefused as error:
        raise DataError(path, [str(error)]) from None
    if is_empty:
        raise DataError(path, ["it is empty: one conversation per line is expected"])
    if problems:
        raise DataError(path, problems, count)
    return made


def _parsed(line: bytes | None, folder: Path) -> tuple[list[dict[str, Any]], list[Path]]:
    if line is None:
        raise ValueError(f"longer than {MAX_LINE_BYTES:,} bytes")
    try:
        text = line.decode("utf-8").rstrip("\r\n")  # so that positions are within the line
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    try:
        entry = parse_json(text)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    messages = entry.get("messages") if isinstance(entry, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError('expected {"messages": [...]} with at least one message')
    images: list[Path] = []
    checked = [_message(i, message, folder, images) for i, message in enumerate(messages)]
    if checked[-1]["role"] != "assistant":
        raise ValueError(
            f"the last message is the {checked[-1]['role']}'s; it has to be the assistant's"
        )
    return checked, images


def _message(index: int, message: Any, folder: Path, images: list[Path]) -> dict[str, Any]:
    """The message with plain parts; its images are added to ``images``."""
    where = f"message {index}"
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise ValueError(f"{where} needs a role, one of {', '.join(ROLES)}")
    role, content = message["role"], message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise ValueError(f"{where} needs content, a string or a list of parts")
    parts: list[dict[str, str]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind == "image" and isinstance(part.get("path"), str) and role != "assistant":
            parts.append({"type": "image"})
            images.append(folder / part["path"])
        elif kind == "image" and role == "assistant":
            raise ValueError(f"{where}: the assistant cannot show an image")
        else:
            raise ValueError(
                f'{where} has a part that is neither {{"type": "text", "text": ...}} nor '
                f'{{"type": "image", "path": ...}}'
            )
    if role == "assistant" and not "".join(part["text"] for part in parts).strip():
        raise ValueError(f"{where}: the assistant says nothing")
    if all(part["type"] == "text" for part in parts):
        return {"role": role, "content": "".join(part["text"] for part in parts)}
    return {"role": role, "content": parts}


def _fault(image: Path, folder: Path) -> str | None:
    try:
        checked_path(image, folder)
        check_image(image, allow_paths=folder)
    except FileRefused:
        return f"{shown(str(image))} is not inside {shown(str(folder))}, where images have to be"
    except ImageOpenError as error:
        return str(error)
    return None
