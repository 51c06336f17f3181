"""The prompt of a generation call: checked, stripped of padding, reduced to what a cache lacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mllama.cache import MllamaCache

_IMAGE_INPUTS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
MODEL_INPUTS = (
    "attention_mask",
    *_IMAGE_INPUTS,
    "cross_attention_mask",
    "cross_attention_states",
)


class Prompt:
    """A batch of prompts and the inputs of the forward pass that reads what a cache lacks.

    The text of a row is its tokens that are not padding, wherever the padding is. A forward pass
    gets the new part of every row, padded on the left, so that its last column is the last token of
    every row. What a cache holds is reused as far as it agrees with the text; a row whose answer is
    tokenised differently in the next turn is recomputed from there on. Images follow the text: those
    whose token is in the reused part are not computed again, whether passed again or not.

    Args:
        input_ids: (B, L) int64.
        inputs: those of MODEL_INPUTS that were given. A missing attention mask is made from
            ``pad_token_id`` as transformers does.
        image_token_id: None for a model without images.
        pad_token_id: fills the left of the new part; ``infer_padding`` says whether it marks
            padding in ``input_ids`` when there is no attention mask.

    Attributes:
        input_ids: as given.
        texts: the tokens of each row without padding.

    Raises: ValueError or TypeError naming the input, what was given and what is expected.
    """

    def __init__(
        self,
        input_ids: Tensor,
        inputs: Mapping[str, Any],
        *,
        image_token_id: int | None,
        pad_token_id: int | None,
        infer_padding: bool,
    ) -> None:
        _check_ids(input_ids)
        self._inputs = {name: value for name, value in inputs.items() if value is not None}
        mask = self._inputs.pop("attention_mask", None)
        if mask is None:
            padding = pad_token_id if infer_padding else None
            mask = torch.ones_like(input_ids) if padding is None else input_ids != padding
        if mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}, "
                f"got {tuple(mask.shape)}"
            )
        self.input_ids = input_ids
        self._pad = pad_token_id or 0
        self._image_token = image_token_id
        self._columns = [[i for i, real in enumerate(row) if real] for row in mask.tolist()]
        self.texts = [
            [row[i] for i in columns] for row, columns in zip(input_ids.tolist(), self._columns)
        ]
        empty = [row for row, text in enumerate(self.texts) if not text]
        if empty:
            raise ValueError(f"rows {empty} of input_ids have no token: attention_mask is all zero")
        self._check_cross_attention_mask()

    @property
    def batch_size(self) -> int:
        return len(self.texts)

    @property
    def text_length(self) -> int:
        """Tokens of the longest row."""
        return max(map(len, self.texts))

    def _check_cross_attention_mask(self) -> None:
        mask, shape = self._inputs.get("cross_attention_mask"), tuple(self.input_ids.shape)
        if mask is not None and (mask.dim() != 4 or tuple(mask.shape[:2]) != shape):
            raise ValueError(
                f"cross_attention_mask must be {shape} by images by tiles, one row for every column "
                f"of input_ids, got {tuple(mask.shape)}"
            )

    def reuse(self, cache: MllamaCache) -> list[int]:
        """How many tokens of each row the cache holds already; at least one token stays new.

        Raises: ValueError if the cache is of another batch or of other images.
        """
        if cache.batch_size != self.batch_size:
            raise ValueError(
                f"past_key_values holds {cache.batch_size} sequences, input_ids has {self.batch_size}"
            )
        lengths = cache.lengths.tolist()
        cached = cache.texts
        if cached is None or [len(text) for text in cached] != lengths:  # filled by a forward
            cached = [text[:length] for text, length in zip(self.texts, lengths)]
            short = [row for row, length in enumerate(lengths) if length > len(self.texts[row])]
            if short:
                raise ValueError(
                    f"past_key_values holds more tokens than rows {short} of input_ids have: "
                    "pass the whole text, not only its new part"
                )
        reused = []
        for row, (old, new) in enumerate(zip(cached, self.texts)):
            limit = min(len(old), len(new) - 1)
            same = next((i for i in range(limit) if old[i] != new[i]), limit)
            if self._image_token in old[same:]:
                raise ValueError(
                    f"row {row} of input_ids leaves the text in past_key_values at token {same}, "
                    "before an image there: start without past_key_values"
                )
            reused.append(same)
        return reused

    def new_inputs(self, reused: list[int], cached_images: int) -> dict[str, Any]:
        """The arguments of a forward pass over the tokens after the first ``reused`` of each row.

        Args:
            reused: per row, from reuse().
            cached_images: image places per row in the cache, used or not.
        """
        columns = [row[count:] for row, count in zip(self._columns, reused)]
        width = max(map(len, columns))
        index = torch.tensor([[-1] * (width - len(row)) + row for row in columns])
        index = index.to(self.input_ids.device)
        real, index = index >= 0, index.clamp_min(0)
        past = torch.tensor(reused, device=index.device)[:, None]
        return {
            "input_ids": self.input_ids.gather(1, index).masked_fill(~real, self._pad),
            "attention_mask": real.long(),
            "position_ids": (past + real.cumsum(1) - 1).clamp_min(0),
            **self._new_images(reused, cached_images, index, real),
        }

    def _images_in(self, begin: list[int], end: list[int | None]) -> list[int]:
        token = self._image_token
        return [text[b:e].count(token) for text, b, e in zip(self.texts, begin, end)]

    def _new_images(
        self, reused: list[int], cached_images: int, index: Tensor, real: Tensor
    ) -> dict[str, Any]:
        inputs = dict(self._inputs)
        old = self._images_in([0] * self.batch_size, reused)
        new = self._images_in(reused, [None] * self.batch_size)
        if cached_images and "aspect_ratio_ids" in inputs:
            given = (inputs["aspect_ratio_ids"] > 0).sum(1).tolist()
            if given == [a + b for a, b in zip(old, new)] and any(old):
                for name in _IMAGE_INPUTS:
                    if name in inputs:
                        inputs[name] = _shift_left(inputs[name], old, max(new))
            elif given != new:
                raise ValueError(
                    f"the rows have {given} images in pixel_values; expected the {new} that are new "
                    f"in input_ids, or those and the {old} in past_key_values"
                )
        if cached_images and not any(new):
            inputs = {k: v for k, v in inputs.items() if k == "cross_attention_mask"}
        mask = inputs.get("cross_attention_mask")
        if mask is not None:
            rows = index[:, :, None, None].expand(-1, -1, *mask.shape[2:])
            mask = mask.gather(1, rows) * real[:, :, None, None]
            most = max(a + b for a, b in zip(old, new))
            if mask.shape[2] < most:
                raise ValueError(
                    f"cross_attention_mask covers {mask.shape[2]} images, input_ids has {most}"
                )
            if cached_images:
                # Image j of a row is the j-th it ever had; in the cache each turn has its places.
                seen_now = _shift_left(mask.transpose(1, 2), old, max(new)).transpose(1, 2)
                places = mask.new_zeros(*mask.shape[:2], cached_images, mask.shape[3])
                for row, count in enumerate(old):
                    places[row, :, :count] = mask[row, :, :count]
                mask = torch.cat([places, seen_now], dim=2)
            inputs["cross_attention_mask"] = mask
        return inputs


def _shift_left(x: Tensor, by: list[int], keep: int) -> Tensor:
    """x (B, M, ...) to (B, keep, ...): each row without its first by[b] entries, zeros after."""
    out = x.new_zeros(x.shape[0], keep, *x.shape[2:])
    for row, count in enumerate(by):
        part = x[row, count : count + keep]
        out[row, : len(part)] = part
    return out


def _check_ids(input_ids: Any) -> None:
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids must be a tensor (B, L), got {type(input_ids).__name__}")
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"input_ids must be (B, L) int64, got {tuple(input_ids.shape)} {input_ids.dtype}"
        )
    if not input_ids.numel():
        raise ValueError(f"input_ids is empty: {tuple(input_ids.shape)}")
