"""Pictures inside the messages of a conversation."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

from mllama.processing.images import ImageSource

_PICTURE_KEYS = ("image", "path", "url", "base64")


def normalized(conversation: Sequence[Any]) -> list[dict[str, Any]]:
    """A copy of the messages in the form templates read: image_url parts become image parts.

    Raises: TypeError or ValueError naming the message that is not one.
    """
    messages = []
    for i, message in enumerate(conversation):
        if not isinstance(message, Mapping):
            raise TypeError(f"message {i} must be a dict, got {type(message).__name__}")
        if "role" not in message:
            raise ValueError(f"message {i} has no role; it has {sorted(message)}")
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            content = [_normalized_part(part, i) for part in content]
        messages.append({**message, "content": content} if "content" in message else {**message})
    return messages


def conversation_images(conversation: Sequence[Mapping[str, Any]]) -> list[ImageSource]:
    """The pictures of normalised messages, in order; an image part without one gives none."""
    return [
        _picture(part)
        for message in conversation
        if isinstance(message.get("content"), list)
        for part in message["content"]
        if isinstance(part, Mapping)
        and part.get("type") == "image"
        and any(part.get(key) is not None for key in _PICTURE_KEYS)
    ]


def _normalized_part(part: Any, message: int) -> Any:
    if not isinstance(part, Mapping):
        return part
    if part.get("type") == "image_url" and "image_url" in part:
        link = part["image_url"]
        return {"type": "image", "url": link.get("url") if isinstance(link, Mapping) else link}
    if "type" not in part:
        raise ValueError(f"message {message} has a part without a type: it has {sorted(part)}")
    return part


def _picture(part: Mapping[str, Any]) -> ImageSource:
    key = next(key for key in _PICTURE_KEYS if part.get(key) is not None)
    value = part[key]
    if key != "base64" or str(value).startswith("data:"):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise ValueError(f"the base64 picture of a message cannot be decoded: {error}") from None
