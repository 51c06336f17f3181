"""Checks of what a forward is given, made before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mllama.cache import MllamaCache
from mllama.config import MllamaConfig, MllamaTextConfig, MllamaVisionConfig
from mllama.varlen import VarlenBatch
from mllama.vocabulary import embedding_rows


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


@dataclass(frozen=True)
class TextInputs:
    """The text of one forward: B sequences of L columns, checked.

    Attributes:
        input_ids: (B, L) or None; then ``inputs_embeds`` is (B, L, E).
        attention_mask: (B, L), the new columns only, or None when all are real.
        position_ids: (B, L) or (1, L), or None for the default.
    """

    batch: int
    length: int
    device: torch.device
    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    attention_mask: Tensor | None
    position_ids: Tensor | None

    def varlen(self, cache: MllamaCache | None) -> VarlenBatch:
        """Where the real tokens lie; as in `transformers`, positions that begin again mean several texts in
        a row only where neither a mask nor a cache says otherwise."""
        if self.attention_mask is not None:
            return VarlenBatch.from_mask(self.attention_mask)
        if self.position_ids is not None and cache is None:
            return VarlenBatch.from_positions(self.position_ids.expand(self.batch, -1))
        return VarlenBatch.dense(self.batch, self.length, self.device)

    def parts(self, tokens: int) -> Iterator[tuple[int, TextInputs]]:
        """Its columns in parts of at most so many tokens of all sequences, but one column at least, each with
        the first of its columns."""
        columns = max(tokens // self.batch, 1)
        if self.length <= columns:
            yield 0, self
            return
        whole = (self.input_ids, self.inputs_embeds, self.attention_mask, self.position_ids)
        for begin in range(0, self.length, columns):
            end = min(begin + columns, self.length)
            given = (None if t is None else t[:, begin:end] for t in whole)
            yield begin, TextInputs(self.batch, end - begin, self.device, *given)

    def positions(self, cache: MllamaCache | None) -> Tensor:
        """(B, L) or (1, L) int64: as given, or one per column after those in the cache."""
        if self.position_ids is not None:
            return self.position_ids
        columns = torch.arange(self.length, device=self.device).unsqueeze(0)
        return columns if cache is None else columns + cache.next_position

    def advance(self, cache: MllamaCache, varlen: VarlenBatch, positions: Tensor) -> None:
        """Count the tokens of this forward into the cache, on the device."""
        if varlen.rows is None:
            cache.lengths.add_(self.length)
        else:
            cache.lengths.add_(varlen.cu_seqlens.diff())
        if self.position_ids is None:
            cache.next_position.add_(self.length)
        else:
            if self.attention_mask is not None:
                positions = positions.masked_fill(self.attention_mask == 0, -1)
            following = positions.amax(1, keepdim=True) + 1
            cache.next_position.copy_(torch.maximum(cache.next_position, following))
        cache.columns += self.length


def check_text(
    config: MllamaTextConfig,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: MllamaCache | None,
    embedding: nn.Module,
) -> TextInputs:
    """Check the text inputs of a forward. Raises: ValueError."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    given = inputs_embeds if input_ids is None else input_ids
    assert given is not None
    if input_ids is not None:
        _require(
            input_ids.dim() == 2 and input_ids.dtype in (torch.int64, torch.int32),
            f"input_ids must be (batch, length) integers, got {_shape(input_ids)} {input_ids.dtype}",
        )
    else:
        _require(
            given.dim() == 3 and given.shape[2] == config.hidden_size,
            f"inputs_embeds must be (batch, length, {config.hidden_size}), got {_shape(given)}",
        )
    batch, length = given.shape[:2]
    _require(
        batch > 0 and length > 0,
        f"the batch and the text must not be empty, got shape {_shape(given)}",
    )
    past = 0
    if cache is not None:
        _require(
            isinstance(cache, MllamaCache),
            f"past_key_values must be a mllama.MllamaCache, got {type(cache).__name__}",
        )
        _require(
            cache.batch_size == batch,
            f"the cache holds {cache.batch_size} sequences, the batch has {batch}",
        )
        past = cache.columns
    limit = config.max_position_embeddings
    _require(
        past + length <= limit,
        f"the context is too long: {past + length} tokens, the model takes at most {limit}",
    )
    if attention_mask is not None:
        _require(
            attention_mask.dim() == 2
            and attention_mask.shape[0] == batch
            and attention_mask.shape[1] in (length, past + length),
            f"attention_mask must be ({batch}, {past + length}), one column per token"
            f"{f', or ({batch}, {length}) without those in the cache' if past else ''}"
            f", got {_shape(attention_mask)}",
        )
        attention_mask = attention_mask[:, -length:]
    if position_ids is not None:
        _require(
            position_ids.dim() == 2
            and position_ids.shape[0] in (1, batch)
            and position_ids.shape[1] == length,
            f"position_ids must be ({batch}, {length}) or (1, {length}), got {_shape(position_ids)}",
        )
    # A decode step takes ids that the model itself has chosen, and must not wait for the device.
    if input_ids is not None and not (past and length == 1):
        highest = embedding_rows(embedding, config) - 1
        rows = f"input_ids must lie within 0..{highest} (the embedding's rows)"
        _check_range(input_ids, highest, rows, "ids from ")
    return TextInputs(
        batch, length, given.device, input_ids, inputs_embeds, attention_mask, position_ids
    )


def require_value(condition: Tensor, message: Callable[[], str], expected: str) -> None:
    """Check a bool tensor (), which is on the device. Raises: ValueError with the message.

    An exported program has no values yet: there the check becomes a part of it, which says what is expected.
    """
    if torch.compiler.is_exporting():
        torch._assert_async(condition, expected)
    elif not bool(condition):
        raise ValueError(message())


def _check_range(values: Tensor, highest: int, expected: str, got: str = "") -> None:
    low, high = values.aminmax()
    require_value(
        (low >= 0) & (high <= highest), lambda: f"{expected}, got {got}{low} to {high}", expected
    )


def check_images(
    config: MllamaVisionConfig,
    pixel_values: Tensor,
    aspect_ratio_ids: Tensor | None,
    aspect_ratio_mask: Tensor | None,
) -> None:
    """Check the images of a forward. Raises: ValueError."""
    side, tiles = config.image_size, config.max_num_tiles
    _require(
        pixel_values.dim() == 6 and pixel_values.is_floating_point(),
        "pixel_values must be floating point (batch, images, tiles, channels, height, width), "
        f"got {_shape(pixel_values)} {pixel_values.dtype}",
    )
    batch, images = pixel_values.shape[:2]
    _require(
        pixel_values.shape[2] == tiles,
        f"pixel_values has {pixel_values.shape[2]} tile slots per image, "
        f"the config has max_num_tiles {tiles}",
    )
    _require(
        _shape(pixel_values)[3:] == (config.num_channels, side, side),
        f"a tile must be {(config.num_channels, side, side)}, got {_shape(pixel_values)[3:]}",
    )
    if aspect_ratio_ids is None or aspect_ratio_mask is None:
        raise ValueError("pixel_values need aspect_ratio_ids and aspect_ratio_mask")
    _require(
        _shape(aspect_ratio_ids) == (batch, images) and not aspect_ratio_ids.is_floating_point(),
        f"aspect_ratio_ids must be integers {(batch, images)}, "
        f"got {_shape(aspect_ratio_ids)} {aspect_ratio_ids.dtype}",
    )
    _require(
        _shape(aspect_ratio_mask) == (batch, images, tiles),
        f"aspect_ratio_mask must be {(batch, images, tiles)}, got {_shape(aspect_ratio_mask)}",
    )
    highest = config.max_aspect_ratio_id
    _check_range(aspect_ratio_ids, highest, f"aspect_ratio_ids must lie within 0..{highest}")


def check_states(config: MllamaTextConfig, states: Tensor, batch: int) -> None:
    """Check precomputed vision states. Raises: ValueError."""
    _require(
        states.dim() == 3
        and states.shape[0] % batch == 0
        and states.shape[2] == config.hidden_size,
        f"cross_attention_states must be (batch * images * tiles, tokens per tile, {config.hidden_size}) "
        f"with a batch of {batch}, got {_shape(states)}",
    )


def check_cross_attention_mask(
    mask: Tensor | None, text: TextInputs, new_tiles: int, cache: MllamaCache | None
) -> None:
    """Check a (B, L', M, tiles) mask against the text and all tiles there are. Raises: ValueError."""
    if mask is None:
        return
    past, tiles = (cache.columns, cache.num_tiles) if cache is not None else (0, 0)
    tiles += new_tiles
    if not tiles:
        return
    _require(
        mask.dim() == 4 and mask.shape[0] == text.batch and mask.shape[2] * mask.shape[3] == tiles,
        f"cross_attention_mask must be ({text.batch}, length, images, tiles) over {tiles} tiles in all "
        f"(those in the cache first), got {_shape(mask)}",
    )
    _require(
        mask.shape[1] == text.length or mask.shape[1] >= past + text.length,
        f"cross_attention_mask has {mask.shape[1]} text positions, expected {text.length} (the new tokens)"
        f"{f' or {past + text.length} (with the {past} in the cache)' if past else ''}",
    )


def check_image_tokens(
    config: MllamaConfig,
    text: TextInputs,
    aspect_ratio_ids: Tensor | None,
    cross_attention_mask: Tensor | None,
    cache: MllamaCache | None,
) -> None:
    """Compare the image tokens of each sequence with its images. Raises: ValueError.

    Args:
        aspect_ratio_ids: (B, M) of the images that are new in this forward, 0 for padding; None if
            there is none.
    """
    past = cache.columns if cache is not None else 0
    if text.input_ids is None or (aspect_ratio_ids is None and past):
        return
    tokens = (text.input_ids == config.image_token_index).sum(1)
    if aspect_ratio_ids is None:
        require_value(
            ~tokens.any(),
            lambda: (
                f"the text has {tokens.tolist()} image tokens per sequence, but no images were given"
            ),
            "the text may have no image tokens where no images are given",
        )
        return
    images = (aspect_ratio_ids > 0).sum(1)
    # A mask that reaches beyond the text says that the rest of the prompt, and its images, follow.
    more_follows = (
        cross_attention_mask is not None and cross_attention_mask.shape[1] > past + text.length
    )
    fits = (tokens <= images) if more_follows else (tokens == images)
    require_value(
        fits.all(),
        lambda: (
            f"the text has {tokens.tolist()} image tokens per sequence, "
            f"but {images.tolist()} images were given"
        ),
        "each sequence must have an image token per image",
    )
