"""Sampling over the steps of a generation: the state between them, and what comes out of many."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from numerics import chi_square
from torch import Tensor
from transformers.generation import logits_process as hf

import mllama_kernels
from mllama.generation.sampling import INVALID_TOKEN, Sampler, SamplingConfig
from mllama_kernels import reference

NO_IDS = torch.empty(0)


@pytest.fixture(params=["kernels", "reference"])
def ops(request: pytest.FixtureRequest) -> Any:
    return mllama_kernels if request.param == "kernels" else reference


def test_greedy_ignores_filters_but_not_the_penalty(ops: Any) -> None:
    logits = torch.tensor([[3.0, 2.9, -1.0]])
    greedy = Sampler(SamplingConfig(), torch.tensor([[0]]), 3, [0], ops)
    assert greedy(logits).tolist() == [0]
    penalized = Sampler(SamplingConfig(repetition_penalty=2.0), torch.tensor([[0]]), 3, [0], ops)
    assert [penalized(logits).item() for _ in range(3)] == [1, 0, 0]  # 1 counts as seen after it


def test_penalty_ignores_ids_outside_the_vocabulary(ops: Any) -> None:
    ids = torch.tensor([[3, 0, 7]])  # the image token has an embedding but no logit
    sampler = Sampler(SamplingConfig(repetition_penalty=2.0), ids, 3, [0], ops)
    assert sampler(torch.tensor([[3.0, 2.9, 2.8]])).tolist() == [1]


def test_the_penalty_grows_with_what_was_drawn() -> None:
    """The tokens of a loop over the processors of transformers, which see the whole text."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(12, 4, 50, generator=generator)
    ids = torch.randint(0, 50, (4, 6), generator=generator)
    sampler = Sampler(SamplingConfig(repetition_penalty=1.7), ids, 50, [0] * 4)
    processor = hf.RepetitionPenaltyLogitsProcessor(1.7)
    for step in logits:
        expected = processor(ids, step.clone()).argmax(-1)
        assert sampler(step).equal(expected)
        ids = torch.cat([ids, expected[:, None]], 1)


def test_kernels_and_reference_say_the_same() -> None:
    config = SamplingConfig(
        do_sample=True, temperature=0.8, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.2
    )
    generator = torch.Generator().manual_seed(4)
    logits = 3 * torch.randn(30, 5, 301, generator=generator)
    ids = torch.randint(0, 301, (5, 40), generator=generator)

    def run(ops: Any) -> Tensor:
        sampler = Sampler(config, ids, 301, [7, 7, -1, 2**64 - 1, 2**70], ops)
        return torch.stack([sampler(step) for step in logits], 1)

    tokens = run(mllama_kernels)
    assert tokens.equal(run(reference))
    equal_logits = Sampler(config, ids[:1].expand(2, -1), 301, [-1, 2**64 - 1])
    assert equal_logits(logits[0, :1].expand(2, -1)).unique().numel() == 1, "seeds wrap at 2**64"


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_frequencies_match_the_probabilities(top_p: float) -> None:
    """Over many steps, so that the streams of random numbers are judged as well."""
    logits = 4 * torch.randn(1, 200)
    config = SamplingConfig(do_sample=True, temperature=1.5, top_p=top_p)
    scaled = hf.TemperatureLogitsWarper(1.5)(NO_IDS, logits)
    scaled = hf.TopPLogitsWarper(top_p)(NO_IDS, scaled) if top_p < 1 else scaled
    assert scaled.isinf().any() == (top_p < 1)
    rows, steps = 500, 100
    sampler = Sampler(config, torch.zeros(rows, 1, dtype=torch.int64), 200, list(range(rows)))
    batch = logits.expand(rows, -1)
    counts = torch.zeros(200, dtype=torch.int64)
    for _ in range(steps):
        counts += sampler(batch).bincount(minlength=200)
    statistic, limit = chi_square(counts, scaled.softmax(-1)[0])
    assert statistic < limit
    wrong, limit = chi_square(counts, (logits[0] / 1.3).softmax(-1))
    assert wrong > limit, "the test must be able to tell temperature 1.3 from 1.5"


def test_rows_depend_only_on_their_own_seed() -> None:
    config = SamplingConfig(do_sample=True, repetition_penalty=1.1)
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(20, 4, 50, generator=generator)
    ids = torch.randint(0, 50, (4, 6), generator=generator)

    def run(rows: list[int], seeds: list[int]) -> Tensor:
        sampler = Sampler(config, ids[rows], 50, seeds)
        return torch.stack([sampler(step[rows]) for step in logits], 1)

    together = run([0, 1, 2, 3], [11, 12, 13, 14])
    assert together.equal(run([0, 1, 2, 3], [11, 12, 13, 14]))
    for row in range(4):
        assert run([row], [11 + row]).equal(together[row : row + 1])
    assert not together.equal(run([0, 1, 2, 3], [21, 22, 23, 24]))


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_without_finite_maximum_are_marked(do_sample: bool, value: float) -> None:
    logits = torch.zeros(2, 9)
    logits[1, 4] = value
    sampler = Sampler(SamplingConfig(do_sample=do_sample), torch.zeros(2, 1).long(), 9, [0, 1])
    token = sampler(logits)
    assert 0 <= token[0] < 9 and token[1] == INVALID_TOKEN


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("temperature", 0.0, "pass do_sample=False"),
        ("temperature", -1.0, "a number > 0"),
        ("temperature", "hot", "a number > 0"),
        ("temperature", math.nan, "a number > 0"),
        ("top_k", -1, "an integer >= 0"),
        ("top_k", 1.5, "an integer >= 0"),
        ("top_k", True, "an integer >= 0"),
        ("top_p", 1.01, "from 0 to 1"),
        ("min_p", -0.1, "from 0 to 1"),
        ("repetition_penalty", 0.0, "a number > 0"),
    ],
)
def test_values_out_of_range_are_refused(field: str, value: object, expected: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be .*{expected}.*, got {value!r}"):
        SamplingConfig(**{field: value})
