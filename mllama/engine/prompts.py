"""From messages and images to what the engine reads: tokens, and pictures that are known by their pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mllama.engine.sequence import Picture, Request
from mllama.limits import Limits
from mllama.processing.paths import AllowPaths
from mllama.semantics import Semantics
from mllama.wording import quoted


@dataclass(frozen=True, eq=False)
class PreparedPicture:
    """A picture as the vision tower reads it.

    Attributes:
        key: the SHA-256 of its pixels and aspect ratio.
        pixels: (T, C, t, t).
        aspect_ratio_id: from 1 on.
        tile_mask: (T,) int64, 1 for its tiles, 0 for padding.
    """

    key: bytes
    pixels: Tensor
    aspect_ratio_id: int
    tile_mask: Tensor

    @classmethod
    def of(cls, pixels: Tensor, aspect_ratio_id: int, tile_mask: Tensor) -> PreparedPicture:
        pixels = pixels.contiguous()
        state = hashlib.sha256(f"{aspect_ratio_id} {tuple(pixels.shape)} {pixels.dtype}".encode())
        state.update(pixels.view(torch.uint8).numpy())
        return cls(state.digest(), pixels, aspect_ratio_id, tile_mask)

    def num_slots(self, semantics: Semantics) -> int:
        """The tiles whose keys and values are kept: all where rows that see no image attend to padding."""
        if semantics.imageless_rows == "leak":
            return len(self.tile_mask)
        return int((self.tile_mask != 0).sum())


@dataclass(frozen=True)
class Prompt:
    """Tokens, and the picture of each image token among them."""

    tokens: tuple[int, ...]
    pictures: tuple[PreparedPicture, ...] = ()

    def request(self, semantics: Semantics, image_token: int | None, **options: Any) -> Request:
        """What the scheduler is asked for. Raises: ValueError for other image tokens than pictures."""
        places = [i for i, token in enumerate(self.tokens) if token == image_token]
        if len(places) != len(self.pictures):
            raise ValueError(
                f"the prompt has {len(places)} image tokens and {len(self.pictures)} pictures"
            )
        pictures = tuple(
            Picture(picture.key, place, picture.num_slots(semantics))
            for picture, place in zip(self.pictures, places)
        )
        return Request(self.tokens, pictures=pictures, **options)


def prepare_chat(
    processor: Any,
    messages: Sequence[Mapping[str, Any]],
    images: Sequence[Any] = (),
    *,
    limits: Limits | None = None,
    allow_paths: AllowPaths = True,
    **variables: Any,
) -> Prompt:
    """The prompt of a conversation, whose words are plain text, whatever special tokens they spell.

    Args:
        images: for the image parts that name none, in their order.
        limits, allow_paths: see :class:`mllama.MllamaProcessor`.
        variables: of the template, tools among them.
    Raises: as the processor's ``apply_chat_template``; ValueError for another number of images than parts.
    """
    batch = processor.apply_chat_template(
        _with_images(messages, images),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        escape_special_tokens=True,
        limits=limits,
        allow_paths=allow_paths,
        **variables,
    )
    return _prompt(batch)


def prepare_chat_with(
    processor: Any,
    messages: Sequence[Mapping[str, Any]],
    pictures: Sequence[PreparedPicture],
    *,
    limits: Limits | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Prompt:
    """As prepare_chat(), with pictures that are prepared, one for each image part.

    Raises: as the processor's ``chat_ids``.
    """
    return Prompt(tuple(processor.chat_ids(messages, tools=tools, limits=limits)), tuple(pictures))


def prepare_picture(processor: Any, image: Any, *, limits: Limits | None = None) -> PreparedPicture:
    """An opened image. Raises: as the processor."""
    (picture,) = _pictures(processor(images=[image], return_tensors="pt", limits=limits))
    return picture


def prepare_text(
    processor: Any, prompt: str | Sequence[int], *, limits: Limits | None = None
) -> Prompt:
    """The prompt that is this text, whose special tokens are plain text, or these tokens."""
    if not isinstance(prompt, str):
        return Prompt(tuple(prompt))
    batch = processor(text=prompt, return_tensors="pt", escape_special_tokens=True, limits=limits)
    return _prompt(batch)


def _prompt(batch: Mapping[str, Any]) -> Prompt:
    return Prompt(tuple(batch["input_ids"][0].tolist()), _pictures(batch))


def _pictures(batch: Mapping[str, Any]) -> tuple[PreparedPicture, ...]:
    if "pixel_values" not in batch:
        return ()
    inputs = (batch["pixel_values"], batch["aspect_ratio_ids"], batch["aspect_ratio_mask"])
    return tuple(
        PreparedPicture.of(pixels, int(ratio), mask)
        for pixels, ratio, mask in zip(*(tensor[0] for tensor in inputs))
    )


def _with_images(
    messages: Sequence[Mapping[str, Any]], images: Sequence[Any]
) -> list[dict[str, Any]]:
    """The messages, with an image in every image part."""
    if isinstance(messages, (str, Mapping)) or not all(isinstance(m, Mapping) for m in messages):
        raise TypeError(
            f"messages must be a list of dictionaries with role and content, got {quoted(messages)}"
        )
    if isinstance(images, (str, bytes)) or not isinstance(images, Iterable):
        raise TypeError(f"images must be a list of images, got {quoted(images)}")
    rest, written = list(images), []
    for message in messages:
        entry = dict(message)
        if isinstance(entry.get("content"), (list, tuple)):
            entry["content"] = [_part(part, rest) for part in entry["content"]]
        written.append(entry)
    if rest:
        raise ValueError(
            f"{len(images)} images were given, {len(rest)} more than the messages have image parts"
        )
    return written


def _part(part: Any, rest: list[Any]) -> Any:
    if part != {"type": "image"}:
        return part
    if not rest:
        raise ValueError(f"an image part has no image: {quoted(part)}")
    return {"type": "image", "image": rest.pop(0)}
