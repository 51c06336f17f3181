"""Sampling: the filters against transformers, the drawn frequencies against the probabilities."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from mllama.generation.sampling import (
    INVALID_TOKEN,
    Sampler,
    SamplingConfig,
    draw,
    filter_logits,
    filter_min_p,
    filter_top_k,
    filter_top_p,
    penalize_repetition,
    uniform,
)

NO_IDS = torch.empty(0)


def random_logits(seed: int, rows: int = 5, vocab: int = 301, tied: bool = False) -> Tensor:
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(rows, vocab, generator=generator)
    return logits.round() if tied else logits


def chi_square_limit(degrees: int) -> float:
    """The chi-square quantile at one false alarm in ten million (Wilson, Hilferty 1931)."""
    z = 5.2
    return degrees * (1 - 2 / (9 * degrees) + z * math.sqrt(2 / (9 * degrees))) ** 3


def chi_square(counts: Tensor, probabilities: Tensor) -> tuple[float, float]:
    """Statistic and limit, with cells of fewer than ten expected draws pooled."""
    expected = probabilities.double() * counts.sum()
    rare = expected < 10
    observed = torch.cat([counts[~rare].double(), counts[rare].sum()[None].double()])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    keep = expected > 0
    assert observed[~keep].sum() == 0, "drew a token of probability zero"
    statistic = ((observed - expected)[keep] ** 2 / expected[keep]).sum().item()
    return statistic, chi_square_limit(max(int(keep.sum()) - 1, 1))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_filters_equal_transformers(seed: int, tied: bool) -> None:
    logits = random_logits(seed, tied=tied)
    for top_k in (1, 2, 50, 300, 301, 1000):
        assert filter_top_k(logits, top_k).equal(hf.TopKLogitsWarper(top_k)(NO_IDS, logits))
    for share in (0.0, 0.01, 0.3, 0.9, 0.999, 1.0):
        assert filter_top_p(logits, share).equal(hf.TopPLogitsWarper(share)(NO_IDS, logits))
        assert filter_min_p(logits, share).equal(hf.MinPLogitsWarper(share)(NO_IDS, logits))


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    logits = random_logits(0)
    ids = torch.randint(0, 301, (5, 40), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(5, 301, dtype=torch.bool).scatter_(1, ids, True)
    expected = hf.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    assert penalize_repetition(logits, seen, penalty).equal(expected)


@pytest.mark.parametrize("seed", range(4))
def test_chain_equals_transformers(seed: int) -> None:
    logits = random_logits(seed)
    ids = torch.randint(0, 301, (5, 40), generator=torch.Generator().manual_seed(seed))
    seen = torch.zeros(5, 301, dtype=torch.bool).scatter_(1, ids, True)
    expected = hf.LogitsProcessorList(
        [
            hf.RepetitionPenaltyLogitsProcessor(1.2),
            hf.TemperatureLogitsWarper(0.6),
            hf.TopKLogitsWarper(40),
            hf.TopPLogitsWarper(0.9),
            hf.MinPLogitsWarper(0.02),
        ]
    )(ids, logits.clone())
    config = SamplingConfig(
        do_sample=True, temperature=0.6, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.2
    )
    assert filter_logits(logits, config, seen).equal(expected)
    assert 1 < expected.isfinite().sum(-1).max() <= 40, "the filters must have had work to do"


def test_greedy_ignores_filters_but_not_the_penalty() -> None:
    logits = torch.tensor([[3.0, 2.9, -1.0]])
    greedy = Sampler(SamplingConfig(), torch.tensor([[0]]), 3, [0])
    assert greedy(logits).tolist() == [0]
    penalized = Sampler(SamplingConfig(repetition_penalty=2.0), torch.tensor([[0]]), 3, [0])
    assert [penalized(logits).item() for _ in range(3)] == [1, 0, 0]  # 1 counts as seen after it


def test_penalty_ignores_ids_outside_the_vocabulary() -> None:
    ids = torch.tensor([[3, 0, 7]])  # the image token has an embedding but no logit
    sampler = Sampler(SamplingConfig(repetition_penalty=2.0), ids, 3, [0])
    assert sampler(torch.tensor([[3.0, 2.9, 2.8]])).tolist() == [1]


@pytest.mark.parametrize("filtered", [False, True])
def test_frequencies_match_the_probabilities(filtered: bool) -> None:
    logits = random_logits(7, rows=1, vocab=200)
    config = SamplingConfig(do_sample=True, temperature=1.5, top_p=0.9 if filtered else 1.0)
    probabilities = filter_logits(logits, config).softmax(-1)[0]
    assert (probabilities == 0).any() == filtered
    rows, steps = 500, 100
    sampler = Sampler(config, torch.zeros(rows, 1, dtype=torch.int64), 200, list(range(rows)))
    batch = logits.expand(rows, -1)
    counts = torch.zeros(200, dtype=torch.int64)
    for _ in range(steps):
        counts += sampler(batch).bincount(minlength=200)
    statistic, limit = chi_square(counts, probabilities)
    assert statistic < limit
    wrong, limit = chi_square(counts, (logits[0] / 1.4).softmax(-1))
    assert wrong > limit, "the test must be able to tell temperature 1.4 from 1.5"


def test_uniform_numbers_are_uniform_and_independent() -> None:
    rows, steps, cells = 1000, 40, 16
    seeds = torch.arange(rows)
    u = torch.stack([uniform(seeds, torch.tensor(step)) for step in range(steps)])  # (steps, rows)
    assert ((u >= 0) & (u < 1)).all()
    cell = (u * cells).long()
    even = torch.full((cells,), 1 / cells)
    pairs = torch.full((cells * cells,), 1 / cells**2)
    for counts, expected in (
        (cell.flatten().bincount(minlength=cells), even),
        ((cell[1:] * cells + cell[:-1]).flatten().bincount(minlength=cells**2), pairs),
        ((cell[:, 1:] * cells + cell[:, :-1]).flatten().bincount(minlength=cells**2), pairs),
    ):
        statistic, limit = chi_square(counts, expected)
        assert statistic < limit


def test_uniform_is_splitmix64() -> None:
    """Against the definition in Python integers, so that no wrap-around depends on a device."""
    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    for seed in (0, 1, 2**63 - 1, -(2**63), -5):
        for step in (0, 1, 1000):
            word = mix((mix(seed & mask) + (step + 1) * 0x9E3779B97F4A7C15) & mask)
            actual = uniform(torch.tensor([seed]), torch.tensor(step)).item()
            assert actual == (word >> 11) / 2**53


def test_draw_inverts_the_distribution_function() -> None:
    logits = torch.tensor([[-math.inf, math.log(1.0), -math.inf, math.log(3.0), -math.inf]])
    largest = 1 - 2.0**-53
    for u, token in ((0.0, 1), (0.2499, 1), (0.2501, 3), (0.75, 3), (largest, 3)):
        assert draw(logits, torch.tensor([u], dtype=torch.float64)).tolist() == [token]
    for vocab in (1, 3, 128256):
        flat = torch.zeros(1, vocab)
        assert draw(flat, torch.tensor([largest], dtype=torch.float64)).tolist() == [vocab - 1]
        assert draw(flat, torch.tensor([0.0], dtype=torch.float64)).tolist() == [0]


def test_rows_depend_on_their_own_seed_alone() -> None:
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
