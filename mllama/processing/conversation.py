"""Messages in the form templates read, and the images inside them.

An image part names its image under one of four keys. "url" (and what OpenAI's parts call image_url) takes
a data URI and nothing else: never a network address or a file. "image" and "path" may name a file where the
caller allows that, "image" may hold the image itself, "base64" holds a file's bytes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from mllama.limits import Limits
from mllama.processing.bounds import check_count
from mllama.processing.images import ImageSource, is_image
from mllama.processing.paths import FILES_REFUSED, AllowPaths
from mllama.processing.sources import (
    ImageOpenError,
    check_bytes,
    decode_base64,
    is_data_uri,
    names_file,
    refuse_url,
)
from mllama.wording import quoted

# Whose words a message can be. A template may write a role into a header: no other text is to get there.
ROLES = ("system", "developer", "user", "assistant", "tool", "ipython", "function")
# Their content may be any data; templates write it as JSON.
_RESULT_ROLES = ("tool", "ipython", "function")
_IMAGE_KEYS = ("image", "path", "url", "base64")
_LINKED = ("image_url", "input_image")  # parts of OpenAI's Chat Completions and Responses
_IMAGES = ("image", *_LINKED)
_TEXTS = ("text", "input_text", "output_text")
_LONGEST_HEADER = 256  # characters of a data URI, or of blanks, that are no base64


def normalized(conversation: Sequence[Any]) -> list[dict[str, Any]]:
    """A copy of the messages in the form templates read: parts of OpenAI's forms become image and text.

    Raises: TypeError or ValueError naming the message that is not one.
    """
    if not isinstance(conversation, Sequence) or isinstance(conversation, (str, bytes)):
        raise TypeError(f"a conversation is a list of messages, got {type(conversation).__name__}")
    messages = []
    for i, message in enumerate(conversation):
        where = f"message {i}"
        if not isinstance(message, Mapping):
            raise TypeError(f"{where} must be a dict, got {type(message).__name__}")
        if not all(isinstance(key, str) for key in message):
            raise TypeError(f"{where} has a key that is no string")
        if "role" not in message:
            raise ValueError(f"{where} has no role; it has {quoted(list(message))}")
        role = message["role"]
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(
                f"{where} has the role {quoted(role)}; a role is one of {', '.join(ROLES)}"
            )
        copied = dict(message)
        if "content" in message:
            copied["content"] = _normalized_content(message["content"], role, where)
        messages.append(copied)
    return messages


def conversation_images(
    conversations: Sequence[Sequence[Mapping[str, Any]]], limits: Limits, allow_paths: AllowPaths
) -> list[list[ImageSource]]:
    """The images of each of some normalised conversations, in order; a part without one gives none.

    Args:
        limits: max_images counts those of all conversations, max_bytes is for each that is base64.
        allow_paths: whether files may be named, see `mllama.processing.paths`.
    Raises: ValueError, ImageOpenError or TypeError naming the message or the bound, before any is opened.
    """
    found = [_named_images(conversation) for conversation in conversations]
    count = sum(map(len, found))
    check_count("the conversation", count, "images", "max_images", limits.max_images)
    for images in found:
        for where, key, value in images:
            _check_image(where, key, value, limits, allow_paths)
    return [[_source(key, value) for _, key, value in images] for images in found]


def _normalized_content(content: Any, role: str, where: str) -> Any:
    if content is None or isinstance(content, str):
        return content
    is_result = role in _RESULT_ROLES
    if isinstance(content, (list, tuple)):
        if is_result and not any(_is_part(entry) for entry in content):
            return list(content)
        return [_normalized_part(part, where, j) for j, part in enumerate(content)]
    if is_result:
        return content
    raise TypeError(
        f"{where} has content that is a {type(content).__name__}; expected a string or a list of parts"
    )


def _is_part(entry: Any) -> bool:
    kind = entry.get("type") if isinstance(entry, Mapping) else None
    if not isinstance(kind, str):
        return False
    return kind in _IMAGES or (kind in _TEXTS and isinstance(entry.get("text"), str))


def _normalized_part(part: Any, where: str, index: int) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        raise TypeError(f"{where}, part {index} must be a dict, got {type(part).__name__}")
    if not all(isinstance(key, str) for key in part):
        raise TypeError(f"{where}, part {index} has a key that is no string")
    if "type" not in part:
        raise ValueError(f"{where} has a part without a type: it has {quoted(list(part))}")
    kind = part["type"]
    if not isinstance(kind, str) or kind not in (*_IMAGES, *_TEXTS):
        # Templates leave out what they do not know, and the model would answer without it.
        raise ValueError(f"{where} has a part {quoted(kind)}; the model takes text and images")
    if kind in _TEXTS:
        text = part.get("text")
        if not isinstance(text, str):
            raise TypeError(f"{where}, part {index} needs a string under text, got {quoted(text)}")
        return {**part, "type": "text"}
    if kind not in _LINKED:
        return dict(part)
    link = part.get("image_url")
    link = link.get("url") if isinstance(link, Mapping) else link
    if link is None:
        raise ValueError(
            f"{where} has a part {kind!r} without image_url: it has {quoted(list(part))}"
        )
    return {"type": "image", "url": link}


def _named_images(conversation: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, Any]]:
    """(where, key, value) of the image parts that have one."""
    found = []
    for i, message in enumerate(conversation):
        content = message.get("content")
        for j, part in enumerate(content if isinstance(content, list) else ()):
            if isinstance(part, Mapping) and part.get("type") == "image":
                keys = [key for key in _IMAGE_KEYS if part.get(key) is not None]
                found += [(f"message {i}, part {j}", key, part[key]) for key in keys[:1]]
    return found


def _check_image(where: str, key: str, value: Any, limits: Limits, allow_paths: AllowPaths) -> None:
    wanted, fits = {
        "image": ("an image, its bytes, an open file or a name of one", is_image(value)),
        "path": ("the name of a file", isinstance(value, (str, os.PathLike))),
        "url": ("a data URI", isinstance(value, str)),
        "base64": ("base64", isinstance(value, (str, bytes, bytearray))),
    }[key]
    if not fits:
        raise TypeError(f"{where}: {key} must be {wanted}, got {quoted(value)}")
    if isinstance(value, (str, bytes, bytearray)) and not value:
        raise ImageOpenError(f"{where}: {key} is empty; expected {wanted}")
    if key == "url" and not is_data_uri(value):
        refuse_url(value)
        raise ImageOpenError(
            f"{where}: url takes data:image/...;base64,... and got {quoted(value)}; nothing is fetched and "
            'no file is opened by it: name a file under "path"'
        )
    if isinstance(value, (str, bytes, bytearray)):
        is_encoded = key == "base64" or isinstance(value, str)
        size = max(len(value) - _LONGEST_HEADER, 0) * 3 // 4 if is_encoded else len(value)
        check_bytes(size, f"{where}: {key}", limits)
    if key in ("image", "path") and allow_paths is False and names_file(value):
        raise ImageOpenError(f"{where}: {key} {FILES_REFUSED}")


def _source(key: str, value: Any) -> ImageSource:
    if key != "base64":
        return value
    if _is_uri(value):
        return value if isinstance(value, str) else bytes(value).decode("latin-1")
    return decode_base64(value, "the base64 image of a message")


def _is_uri(value: str | bytes | bytearray) -> bool:
    beginning = value[:64]
    return is_data_uri(beginning if isinstance(beginning, str) else beginning.decode("latin-1"))
