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
        if not force and ranks is not None:
            require_rooms(ranks, device, choice.nbytes, _FORCE)
        elif not force:
            check_room(device, choice.nbytes)
        return
    tokens = _LEAST if context is None else context
    if isinstance(tokens, int):
        tokens = min(tokens, config.text_config.max_position_embeddings)
    encoding = str(name) if choice.quantization is None else choice.quantization.encoding
    is_cuda = device.type == "cuda"
    shared: dict[str, Any] = {
        "dtype": name or "float32",
        "device": device.type,
        "images": 1 if images is None else images,
    }
    made = plan(config, encoding, tokens, weights=choice.nbytes, **shared)
    if ranks is not None:
        if not force:
            needs = choice.nbytes if name is None else made.total
            require_rooms(ranks, device, needs, _FORCE)
        return
    free = free_bytes(device)
    if force or free is None:
        return
    if name is None:  # of float64 there are no plans
        check_room(device, choice.nbytes)
    elif made.total > free:
        quantization, stored = choice.quantization, choice.stored_nbytes
        text = refusal(
            made,
            config,
            free,
            str(device),
            is_stored=stored is not None,
            as_stored=stored if quantization is None else None,
            overrides=None if quantization is None else quantization.overrides,
            **shared,
        )
        raise ValueError(f"{text}; {_FORCE}" + (f"; {ONE_DEVICE}" if is_cuda else ""))
