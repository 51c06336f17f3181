"""What ranks that share a model have to have in common before they generate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from mllama.cache import MllamaCache
from mllama.generation.config import GenerationPlan
from mllama.parallel.ranks import Ranks

# Of a plan what may be another object on each rank.
_OBJECTS = (
    "seeds",
    "tokenizer",
    "prefix_allowed_tokens_fn",
    "logits_processor",
    "stopping_criteria",
)


def agreed_plan(
    ranks: Ranks, plan: GenerationPlan, given: Mapping[str, Any], cache: MllamaCache | None
) -> GenerationPlan:
    """The plan with the first rank's seeds, which were drawn on each by itself.

    Args:
        given: what the caller gave besides what is in the plan: inputs, and the seed.
        cache: that was given.
    Raises: ValueError on all ranks if they were given different prompts, images, options or caches.
    """
    own = {field.name: getattr(plan, field.name) for field in fields(plan)}
    options = {name: repr(value) for name, value in own.items() if name not in _OBJECTS}
    ranks.require_same({**given, **options, "past_key_values": _held(cache)})
    return replace(plan, seeds=ranks.agreed(plan.seeds))


def _held(cache: MllamaCache | None) -> Any:
    """What decides how much of a prompt is read with a cache."""
    if cache is None:
        return None
    texts = cache.texts and torch.tensor([token for text in cache.texts for token in text])
    return cache.columns, cache.lengths, cache.next_position, cache.tile_table, texts
