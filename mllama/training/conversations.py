"""Conversations to learn from: a JSON Lines file, one conversation per line.

    {"messages": [
      {"role": "user", "content": [{"type": "image", "path": "photos/1.jpg"},
                                   {"type": "text", "text": "What is this?"}]},
      {"role": "assistant", "content": "A harbour at dawn."}]}

Content is a string or a list of parts. A path is relative to the folder of the file. Roles are "system",
"user" and "assistant"; what the assistant says is learnt, every turn of it, and a conversation ends with it.
Other keys of a line are ignored; blank lines too.
"""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mllama.processing.images import ImageOpenError, check_image

ROLES = ("system", "user", "assistant")
_SHOWN = 20  # faults in one message; more are counted

_Result = TypeVar("_Result")


class DataError(ValueError):
    """A data file cannot be learnt from. `problems` holds one line per fault, with its line number."""

    def __init__(self, path: Path, problems: list[str]) -> None:
        self.problems = list(problems)
        shown = [*problems[:_SHOWN]]
        if len(problems) > _SHOWN:
            shown.append(f"and {len(problems) - _SHOWN} more")
        super().__init__(f"{path} cannot be learnt from:" + "".join(f"\n  - {p}" for p in shown))


@dataclass(frozen=True)
class Conversation:
    """One line of a data file.

    Attributes:
        line: its number, from 1.
        messages: as a chat template reads them.
        images: the pictures in their order.
    """

    line: int
    messages: list[dict[str, Any]]
    images: list[Path]


def read_conversations(path: Path) -> list[Conversation]:
    """All conversations of a file. Raises: as `read_each`."""
    return read_each(path, lambda conversation: conversation)


def read_each(path: Path, make: Callable[[Conversation], _Result]) -> list[_Result]:
    """``make(conversation)`` of every line of a file; the pictures are looked at, but not decoded.

    Raises: DataError with every fault found, ``make``'s ValueErrors too; FileNotFoundError and other
        OSErrors for the file itself.
    """
    lines = enumerate(path.read_bytes().removeprefix(BOM_UTF8).splitlines(), start=1)
    numbered = [(number, line) for number, line in lines if line.strip()]
    if not numbered:
        raise DataError(path, ["it is empty: one conversation per line is expected"])
    seen: dict[Path, str | None] = {}
    made, problems = [], []
    for number, line in numbered:
        faults = []
        try:
            messages, images = _parsed(line, path.parent)
            for image in dict.fromkeys(images):
                if image not in seen:
                    seen[image] = _fault(image)
                faults += [seen[image]] if seen[image] else []
            made.append(make(Conversation(number, messages, images)))
        except ValueError as error:
            faults.append(str(error))
        problems += [f"line {number}: {fault}" for fault in faults]
    if problems:
        raise DataError(path, problems)
    return made


def _parsed(line: bytes, folder: Path) -> tuple[list[dict[str, Any]], list[Path]]:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    messages = entry.get("messages") if isinstance(entry, dict) else None
    if not isinstance(messages, list) or not messages:
        raise ValueError('expected {"messages": [...]} with at least one message')
    images: list[Path] = []
    checked = [_message(i, message, folder, images) for i, message in enumerate(messages)]
    if checked[-1]["role"] != "assistant":
        raise ValueError(
            f"the last message is the {checked[-1]['role']}'s; the assistant's is learnt"
        )
    return checked, images


def _message(index: int, message: Any, folder: Path, images: list[Path]) -> dict[str, Any]:
    """The message with plain parts; its pictures are added to ``images``."""
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
            raise ValueError(f"{where}: the assistant cannot show a picture")
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


def _fault(image: Path) -> str | None:
    try:
        check_image(image)
    except ImageOpenError as error:
        return str(error)
    return None
