"""What ranks that share a model have to have in common before they generate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

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


def agreed_plan(ranks: Ranks, plan: GenerationPlan, inputs: Mapping[str, Any]) -> GenerationPlan:
    """The plan with the first rank's seeds, which were drawn on each by itself.

    Raises: ValueError on all ranks if they were given different prompts, images or options.
    """
    own = {field.name: getattr(plan, field.name) for field in fields(plan)}
    options = {name: repr(value) for name, value in own.items() if name not in _OBJECTS}
    ranks.require_same({**inputs, **options})
    return replace(plan, seeds=ranks.agreed(plan.seeds))
