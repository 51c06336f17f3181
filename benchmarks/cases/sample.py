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


def make(setting: Setting, choice: str, batch: int) -> Arguments:
    """Logits with the spread of a language model's, one seed per row, the number of the step, the options."""
    logits = setting.randn(batch, VOCAB, scale=3.0)
    seeds = torch.arange(batch, device=setting.device)
    return logits, seeds, torch.zeros_like(seeds), *options_of(choice, batch, setting.device)


def options_of(choice: str, batch: int, device: torch.device | str) -> list[Tensor]:
    kinds = {int: torch.int64, float: torch.float64}
    return [
        torch.full((batch,), value, dtype=kinds[type(value)], device=device)
        for value in CHOICES[choice].values()
    ]


def token_of(sample: Callable[..., Any], choice: str) -> Callable[..., Tensor]:
    def token(logits: Tensor, seeds: Tensor, steps: Tensor, *options: Tensor) -> Tensor:
        return sample(logits, seeds, steps, **dict(zip(CHOICES[choice], options)))[0]

    return token


def highest(logits: Tensor, *_: Tensor) -> Tensor:
    return logits.argmax(-1)


def cases(setting: Setting) -> Iterator[Case]:
    for choice in CHOICES:
        for batch in setting.sizes([1, 8, 32], [1], [1]):
            plain = token_of(reference.sample, choice)
            greedy = [Impl("argmax", highest)] if choice == "greedy" else []
            yield Case(
                op="sample",
                shape={"batch": batch, "vocabulary": VOCAB, "choice": choice},
                dtype=setting.dtype,
                make=partial(make, setting, choice, batch),
                truth=plain,
                impls=(
                    Impl(OURS, token_of(ours.sample, choice)),
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
