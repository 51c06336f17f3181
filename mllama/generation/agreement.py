"""What ranks that share a model have to have in common before they generate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from mllama.cache import MllamaCache
from mllama.generation.config import GenerationPlan
from mllama.parallel.ranks import Ranks
from mllama.parallel.sameness import digest, require_same

# Of a plan what may be another object on each rank, if only it is there on all.
_OBJECTS = ("tokenizer", "prefix_allowed_tokens_fn", "logits_processor", "stopping_criteria")


class Run(Protocol):
    """A call that has been checked, and has run nothing yet.

    Attributes:
        plan: what it will do.
        given: what the caller gave besides what is in the plan, by name.
    """

    plan: GenerationPlan
    given: Mapping[str, Any]


_Run = TypeVar("_Run", bound=Run)


def agreed_run(ranks: Ranks, make: Callable[[], _Run]) -> _Run:
    """The run that each rank makes, with the first one's seeds, which were drawn on each by itself.

    Raises: on all ranks, before any waits for another, what ``make`` has raised, a ValueError where that was
        on another rank, as for want of memory; a ValueError if they were given different prompts, images,
        options or caches.
    """
    run, failure = None, None
    try:
        run = make()
        said: Any = _digests(run), run.plan.seeds
    except Exception as error:
        failure, said = error, f"{type(error).__name__}: {error}"
    every = ranks.gathered(said)
    if run is None or failure is not None:
        raise failure
    for rank, one in enumerate(every):
        if isinstance(one, str):
            raise ValueError(f"on rank {rank} {one}")
    require_same([digests for digests, _ in every])
    run.plan = replace(run.plan, seeds=every[0][1])
    return run


def _digests(run: Run) -> dict[str, Any]:
    """What is equal where prompts, images, options and caches are, by name."""
    options = {f.name: getattr(run.plan, f.name) for f in fields(run.plan) if f.name != "seeds"}
    for name in _OBJECTS:
        given = options[name]
        options[name] = len(given) if isinstance(given, tuple) else given is not None
    return {**{name: _digest(value) for name, value in run.given.items()}, **options}


def _digest(value: Any) -> Any:
    """Of a tensor its digest; of a cache what decides how much of a prompt is read with it."""
    if isinstance(value, MllamaCache):
        texts = value.texts and torch.tensor([token for text in value.texts for token in text])
        held = (value.lengths, value.next_position, value.tile_table, texts)
        return value.columns, *map(_digest, held)
    return digest(value) if isinstance(value, Tensor) else value
