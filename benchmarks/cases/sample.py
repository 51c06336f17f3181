"""From logits to tokens: temperature, top-k, top-p, min-p, and one draw."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mllama_kernels as ours
from benchmarks.case import OURS, PLAIN, Arguments, Case, Impl, Setting, absent
from benchmarks.shapes import VOCAB
from mllama_kernels import reference

# The same for every row.
CHOICES: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "all filters": {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
    "top-p": {"temperature": 0.7, "top_p": 0.9},
}


def make(setting: Setting, batch: int) -> Arguments:
    """Logits with the spread of a language model's, one seed per row, the number of the step."""
    logits = setting.randn(batch, VOCAB, scale=3.0)
    seeds = torch.arange(batch, device=setting.device)
    return logits, seeds, torch.zeros_like(seeds)


def options_of(choice: str, batch: int, device: torch.device | str) -> dict[str, Tensor]:
    return {
        name: torch.full(
            (batch,),
            value,
            dtype=torch.int64 if isinstance(value, int) else torch.float64,
            device=device,
        )
        for name, value in CHOICES[choice].items()
    }


def token_of(sample: Callable[..., Any], options: dict[str, Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments: sample(*arguments, **options)[0]


def highest(logits: Tensor, seeds: Tensor, steps: Tensor) -> Tensor:
    return logits.argmax(-1)


def cases(setting: Setting) -> Iterator[Case]:
    for choice in CHOICES:
        for batch in setting.sizes([1, 8, 32], [1], [1]):
            options = options_of(choice, batch, setting.device)
            plain = token_of(reference.sample, options)
            greedy = [Impl("argmax", highest)] if choice == "greedy" else []
            yield Case(
                op="sample",
                shape={"batch": batch, "vocabulary": VOCAB, "choice": choice},
                dtype=setting.dtype,
                make=partial(make, setting, batch),
                truth=plain,
                impls=(
                    Impl(OURS, token_of(ours.sample, options)),
                    Impl(PLAIN, plain),
                    *greedy,
                    absent(
                        "flashinfer", "draws from random numbers of its own: no token to compare"
                    ),
                ),
                bytes=batch * VOCAB * setting.element,
                bound="read",
                exact_match=True,
            )
