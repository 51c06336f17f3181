"""Pictures inside the messages of a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mllama.processing.images import ImageSource
from mllama.processing.sources import decode_base64

_PICTURE_KEYS = ("image", "path", "url", "base64")
_LINKED = ("image_url", "input_image")  # parts of OpenAI's Chat Completions and Responses
_TEXTS = ("input_text", "output_text")
# Templates leave out what they do not know, and the model would answer without it.
_OTHER_MEDIA = ("audio", "input_audio", "video", "video_url", "file", "input_file", "document")


def normalized(conversation: Sequence[Any]) -> list[dict[str, Any]]:
    """A copy of the messages in the form templates read: parts of OpenAI's forms become image and text.

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
    if "type" not in part:
        raise ValueError(f"message {message} has a part without a type: it has {sorted(part)}")
    kind = part["type"]
    if kind in _LINKED:
        link = part.get("image_url")
        link = link.get("url") if isinstance(link, Mapping) else link
        if link is None:
            raise ValueError(
                f"message {message} has a part {kind!r} without image_url: it has {sorted(part)}"
            )
        return {"type": "image", "url": link}
    if kind in _TEXTS:
        return {**part, "type": "text"}
    if kind in _OTHER_MEDIA:
        raise ValueError(f"message {message} has a part {kind!r}; the model takes text and images")
    return part


def _picture(part: Mapping[str, Any]) -> ImageSource:
    key = next(key for key in _PICTURE_KEYS if part.get(key) is not None)
    value = part[key]
    if key != "base64" or not isinstance(value, (str, bytes)) or value[:5] in ("data:", b"data:"):
        return value
    return decode_base64(value, "the base64 picture of a message")
