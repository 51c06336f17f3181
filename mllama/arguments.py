"""Arguments that `transformers` hands to any of its models and that mean nothing to these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mllama.wording import quoted

_BOUNDS = "texts packed into one row are told apart by position_ids that begin again, without mask or cache"
_MASK = "cross_attention_mask (batch, length, images, tiles) says it in every model here"
# Per name the value that asks for nothing, besides None, and why another is refused.
REFUSED: Mapping[str, tuple[Any, str]] = {
    "cache_position": (
        None,
        "the cache knows how many tokens it holds; position_ids set positions",
    ),
    "cu_seq_lens_k": (None, _BOUNDS),
    "cu_seq_lens_q": (None, _BOUNDS),
    "full_text_row_masked_out_mask": (None, _MASK),
    "is_causal": (True, "the attention of text is causal"),
    "max_length_k": (None, _BOUNDS),
    "max_length_q": (None, _BOUNDS),
    "output_attentions": (False, "no attention weights are formed"),
    "output_hidden_states": (
        False,
        "the states between the layers of the vision tower are not kept",
    ),
    "output_router_logits": (False, "there are no experts"),
    "seq_idx": (None, _BOUNDS),
}


def refuse(others: Mapping[str, Any]) -> None:
    """Check the arguments of a forward that it does not name itself.

    Raises: ValueError for one of REFUSED that asks for something; TypeError for an unknown name.
    """
    for name, value in others.items():
        if name not in REFUSED:
            raise TypeError(f"forward() got an unexpected keyword argument {quoted(name)}")
        neutral, reason = REFUSED[name]
        if value is not None and (torch.is_tensor(value) or value != neutral):
            shown = tuple(value.shape) if torch.is_tensor(value) else repr(value)
            raise ValueError(f"{name} is not supported, got {shown}: {reason}")
