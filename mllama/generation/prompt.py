"""The prompt of a generation call: checked, stripped of padding, reduced to what a cache lacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mllama.cache import MllamaCache
from mllama.generation.images import IMAGE_INPUTS, CachedImages, new_images
from mllama.wording import quoted

MODEL_INPUTS = (
    "attention_mask",
    "inputs_embeds",
    *IMAGE_INPUTS,
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
        input_ids: (B, L) int64; None where ``inputs`` has inputs_embeds, which then are all there is.
        inputs: those of MODEL_INPUTS that were given. A missing attention mask is made from
            ``pad_token_id`` as transformers does.
        image_token_id: None for a model without images.
        pad_token_id: fills the left of the new part; ``infer_padding`` says whether it marks
            padding in ``input_ids`` when there is no attention mask.

    Attributes:
        input_ids: as given; (B, 0) for None.
        length: L, the columns of the prompt.
        has_ids: whether the tokens are known.
        texts: the tokens of each row without padding; -1 for each that is not known.

    Raises: ValueError or TypeError naming the input, what was given and what is expected.
    """

    def __init__(
        self,
        input_ids: Tensor | None,
        inputs: Mapping[str, Any],
        *,
        image_token_id: int | None,
        pad_token_id: int | None,
        infer_padding: bool,
    ) -> None:
        self._inputs = {name: value for name, value in inputs.items() if value is not None}
        for name, value in self._inputs.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a tensor, got {quoted(value)}")
        self._embeds = self._inputs.pop("inputs_embeds", None)
        self.has_ids = input_ids is not None
        ids = _checked_ids(input_ids, self._embeds)
        mask = self._inputs.pop("attention_mask", None)
        if mask is None:
            padding = pad_token_id if infer_padding and self.has_ids else None
            mask = torch.ones_like(ids) if padding is None else ids != padding
        if mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids, {tuple(ids.shape)}, "
                f"got {tuple(mask.shape)}"
            )
        self.input_ids = ids if self.has_ids else ids[:, :0]
        self._ids, self.length = ids, ids.shape[1]
        self._pad = pad_token_id or 0
        self._image_token = image_token_id
        self._columns = [[i for i, real in enumerate(row) if real] for row in mask.tolist()]
        self.texts = [
            [row[i] for i in columns] for row, columns in zip(ids.tolist(), self._columns)
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

    @property
    def has_mask(self) -> bool:
        """Whether a cross_attention_mask says what each token sees."""
        return "cross_attention_mask" in self._inputs

    def image_tokens(self, row: int, begin: int = 0, end: int | None = None) -> int:
        """How many image tokens a part of a row's text has."""
        return self.texts[row][begin:end].count(self._image_token)

    def _check_cross_attention_mask(self) -> None:
        mask, shape = self._inputs.get("cross_attention_mask"), tuple(self._ids.shape)
        if mask is not None and (mask.dim() != 4 or tuple(mask.shape[:2]) != shape):
            raise ValueError(
                f"cross_attention_mask must be {shape} by images by tiles, one row for every column "
                f"of input_ids, got {tuple(mask.shape)}"
            )

    def reuse(self, cache: MllamaCache, answers_are_blind: bool) -> list[int]:
        """How many tokens of each row the cache holds already; at least one token stays new.

        Args:
            answers_are_blind: whether generated tokens see no image where the prompt had several. Read
                again as a part of the next prompt they may see one, and are computed again.
        Raises: ValueError if the cache is of another batch or of other images.
        """
        if cache.batch_size != self.batch_size:
            raise ValueError(
                f"past_key_values holds {cache.batch_size} sequences, input_ids has {self.batch_size}"
            )
        lengths = cache.lengths.tolist()
        cached, read = cache.texts, cache.prompt_lengths
        if not self.has_ids or cached is None or [len(text) for text in cached] != lengths:
            # Filled by a forward, or with embeddings: what it holds is taken for the same text.
            cached, read = [text[:length] for text, length in zip(self.texts, lengths)], None
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
            if same < limit and self._image_token in old[same:]:  # not only the beginning of it
                raise ValueError(
                    f"row {row} of input_ids leaves the text in past_key_values at token {same}, "
                    "before an image there: start without past_key_values, or truncate() it"
                )
            if read is not None and answers_are_blind and self.has_mask:
                if self.image_tokens(row, 0, same) > 1:
                    same = min(same, read[row])
            reused.append(same)
        return reused

    def cached_images(
        self, cache: MllamaCache, reused: list[int], tiles_per_image: int
    ) -> CachedImages:
        """Where the cache has the images of the first ``reused`` tokens of each row.

        Raises: ValueError if it does not have them.
        """
        return CachedImages.of(cache, tiles_per_image, *self._image_counts(reused))

    def _image_counts(self, reused: list[int]) -> tuple[list[int], list[int]]:
        """Image tokens of each row among the first ``reused`` tokens and after them."""
        old = [self.image_tokens(row, 0, count) for row, count in enumerate(reused)]
        new = [self.image_tokens(row, count) for row, count in enumerate(reused)]
        return old, new

    def new_inputs(self, reused: list[int], images: CachedImages | None) -> dict[str, Any]:
        """The arguments of a forward pass over the tokens after the first ``reused`` of each row.

        Args:
            reused: per row, from reuse().
            images: from cached_images(); None for a model without image tokens, which is given the image
                inputs as they are.
        """
        real, index = self._new_columns(reused)
        past = torch.tensor(reused, device=index.device)[:, None]
        if self._embeds is None:
            text = {"input_ids": self._ids.gather(1, index).masked_fill(~real, self._pad)}
        else:
            rows = torch.arange(self.batch_size, device=index.device)[:, None]
            text = {"inputs_embeds": self._embeds[rows, index]}
        return {
            **text,
            "attention_mask": real.long(),
            "position_ids": (past + real.cumsum(1) - 1).clamp_min(0),
            **new_images(self._inputs, images, *self._image_counts(reused), index, real),
        }

    def _new_columns(self, reused: list[int]) -> tuple[Tensor, Tensor]:
        """(B, width) which columns of a forward over the new part are real, and where they come from."""
        columns = [row[count:] for row, count in zip(self._columns, reused)]
        width = max(map(len, columns))
        index = torch.tensor([[-1] * (width - len(row)) + row for row in columns])
        index = index.to(self._ids.device)
        return index >= 0, index.clamp_min(0)

    def in_columns(self, x: Tensor, reused: list[int]) -> Tensor:
        """x (B, width, E) of that forward in the columns of the prompt, zero at padding; as it is where
        a part of the prompt was reused."""
        if any(reused) or x.shape[1] == self.length:
            return x
        real, index = self._new_columns(reused)
        rows = torch.arange(self.batch_size, device=x.device)[:, None].expand_as(index)
        out = x.new_zeros(self.batch_size, self.length, x.shape[2])
        out[rows[real], index[real]] = x[real]
        return out


def repeated(
    input_ids: Tensor | None, inputs: Mapping[str, Any], copies: int
) -> tuple[Tensor | None, dict[str, Any]]:
    """Every prompt ``copies`` times, one after the other."""

    def repeat(name: str, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if name == "cross_attention_states":  # all images of the batch in a row
            given = inputs.get("inputs_embeds") if input_ids is None else input_ids
            return x.unflatten(0, (len(given), -1)).repeat_interleave(copies, 0).flatten(0, 1)
        return x.repeat_interleave(copies, 0)

    return repeat("input_ids", input_ids), {name: repeat(name, x) for name, x in inputs.items()}


def _checked_ids(input_ids: Any, embeds: Any) -> Tensor:
    """(B, L) int64; -1 where there are only embeddings."""
    if embeds is not None:
        if not isinstance(embeds, Tensor) or embeds.dim() != 3 or not embeds.is_floating_point():
            got = tuple(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
            raise ValueError(f"inputs_embeds must be floating point (B, L, E), got {got}")
        if input_ids is None:
            input_ids = torch.full(embeds.shape[:2], -1, device=embeds.device)
    elif input_ids is None:
        raise TypeError("generate() needs input_ids, (B, L) int64, or inputs_embeds")
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids must be a tensor (B, L), got {type(input_ids).__name__}")
    if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"input_ids must be (B, L) int64, got {tuple(input_ids.shape)} {input_ids.dtype}"
        )
    if not input_ids.numel():
        raise ValueError(f"input_ids is empty: {tuple(input_ids.shape)}")
    if embeds is not None and embeds.shape[:2] != input_ids.shape:
        raise ValueError(
            f"inputs_embeds must be {tuple(input_ids.shape)} by width, one for each of input_ids, got "
            f"{tuple(embeds.shape)}"
        )
    return input_ids
