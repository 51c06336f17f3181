"""Whether a model that is to be loaded fits, asked before anything is allocated."""

from __future__ import annotations

from typing import Any

import torch

from mllama.checkpoints.matching import MatchedCheckpoint
from mllama.checkpoints.placement import ONE_DEVICE, check_room
from mllama.checkpoints.quantizing import Choice
from mllama.config import MllamaConfig
from mllama.memory import free_bytes
from mllama.parallel.ranks import Ranks
from mllama.parallel.room import require_rooms
from mllama.quantization.plan import plan, refusal
from mllama.wording import size

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_FORCE = "force=True (--force) loads it all the same"
_LEAST = 64  # tokens: of a call that does not say for how many


def require_fit(
    matched: MatchedCheckpoint,
    choice: Choice,
    dtype: torch.dtype,
    device: torch.device,
    *,
    context: int | None,
    images: int | None,
    force: bool,
    ranks: Ranks | None = None,
) -> None:
    """Refuse a model for which a device has not the room.

    Args:
        context: tokens of a prompt and its answer, at most as many as the model takes; None: the fewest.
        images: of the prompt; None: one.
        force: only check the arguments.
        ranks: that the model is split over, all of which ask; the matched model is the part of this one.
    Raises: ValueError with what is missing and the nearest choice that fits; for a context or images that
        cannot be, and for those of a model without images, of which no plan is made.
    """
    config, name = matched.model.config, _DTYPES.get(dtype)
    given = {n: v for n, v in (("context", context), ("images", images)) if v is not None}
    if not isinstance(config, MllamaConfig):
        if given:
            raise ValueError(
                f"{' and '.join(given)} are planned for the whole model, MllamaForConditionalGeneration, not "
                f"for {type(matched.model).__name__}"
            )
        if not force:
            _check_weights(device, choice.nbytes, ranks)
        return
    tokens = _LEAST if context is None else context
    if isinstance(tokens, int):
        tokens = min(tokens, config.text_config.max_position_embeddings)
    encoding = str(name) if choice.quantization is None else choice.quantization.encoding
    shared: dict[str, Any] = {
        "dtype": name or "float32",
        "device": device.type,
        "images": 1 if images is None else images,
    }
    made = plan(config, encoding, tokens, weights=choice.nbytes, **shared)
    if force:
        return
    if name is None:  # of float64 there are no plans
        _check_weights(device, choice.nbytes, ranks)
        return
    quantization, stored = choice.quantization, choice.stored_nbytes

    def refused(free: int, where: str) -> str:
        text = refusal(
            made,
            config,
            free,
            where,
            is_stored=stored is not None,
            as_stored=stored if quantization is None else None,
            overrides=None if quantization is None else quantization.overrides,
            **shared,
        )
        return f"{text}; {_FORCE}"

    if ranks is not None:
        require_rooms(ranks, device, made.total, refused)
    elif (free := free_bytes(device)) is not None and made.total > free:
        is_cuda = device.type == "cuda"
        raise ValueError(refused(free, str(device)) + (f"; {ONE_DEVICE}" if is_cuda else ""))


def _check_weights(device: torch.device, nbytes: int, ranks: Ranks | None) -> None:
    """Raises: ValueError for a device without the room for weights, of which there is no plan."""
    if ranks is None:
        check_room(device, nbytes)
        return

    def refused(free: int, where: str) -> str:
        return (
            f"the part of the model takes {size(nbytes)}, {where} has {size(free)} free; {_FORCE}"
        )

    require_rooms(ranks, device, nbytes, refused)
