"""sample: the kernel equals the reference bit for bit, and the reference keeps what transformers keeps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from numerics import FLOATS, assert_compiles, chi_square, grid, opcheck, simulated_share, strided
from torch import Tensor
from transformers.generation import logits_process as hf

import mllama_kernels
from mllama_kernels import reference
from mllama_kernels.reference_sampling import (
    INVALID_TOKEN,
    draw,
    kept_weights,
    levels_of,
    scale_logits,
    uniform,
    weights_of,
)

NO_IDS = torch.empty(0)
OPTIONS = [
    {},
    {"do_sample": False},
    {"temperature": 0.3},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 1 << 40},
    {"top_p": 0.0},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"temperature": 1.7, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 0.6, "top_k": 300, "top_p": 0.95},
]


def logits_of(kind: str, rows: int, vocab: int, dtype: torch.dtype) -> Tensor:
    logits = 3 * torch.randn(rows, vocab)
    if kind == "tied":
        logits = logits.round()
    elif kind == "equal":  # every token in one bin down to the last digit
        logits = torch.full((rows, vocab), 0.25)
    elif kind == "close":  # the cut is decided by the last digits of a level
        logits = 0.25 + 2.0**-26 * torch.randint(0, 300, (rows, vocab))
    elif kind == "hidden":
        logits = logits.masked_fill(torch.rand(rows, vocab) < 0.7, -math.inf)
        logits[:, -1] = 1.0
    elif kind == "far":  # most have no weight, some not even a bin
        logits = 12 * logits
    return logits.to(dtype)


def assert_same(logits: Tensor, seeds: Tensor, step: Tensor, **options: Any) -> Tensor:
    actual = mllama_kernels.sample(logits, seeds, step, **options)
    expected = reference.sample(logits, seeds, step, **options)
    assert actual.dtype == torch.int64 and actual.shape == seeds.shape
    assert torch.equal(actual, expected), (actual, expected)
    return actual


def draws(logits: Tensor, count: int, device: torch.device, **options: Any) -> Tensor:
    """(count,) tokens drawn from one row of logits, with `count` seeds at once."""
    batch = logits.expand(count, -1).to(device)
    seeds = torch.arange(count, device=device)
    return mllama_kernels.sample(batch, seeds, torch.tensor(3, device=device), **options)


@simulated_share(3)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["normal", "tied", "equal", "close", "hidden", "far"])
@pytest.mark.parametrize("vocab", [1, 7, 301, 4097])
def test_equals_reference(device, dtype, kind, vocab):
    logits = logits_of(kind, 3, vocab, dtype).to(device)
    seeds = torch.randint(-(2**63), 2**63 - 1, (3,), device=device)
    for index, options in enumerate(OPTIONS):
        assert_same(logits, seeds, torch.tensor(index, device=device), **options)


@pytest.mark.parametrize("penalty", [0.7, 1.3])
@pytest.mark.parametrize("dtype", FLOATS)
def test_penalty_equals_reference(device, dtype, penalty):
    logits = logits_of("normal", 4, 1003, dtype).to(device)
    seen = (torch.rand(4, 1003) < 0.3).to(device)
    seeds, step = torch.arange(4, device=device), torch.tensor(5, device=device)
    for options in OPTIONS:
        assert_same(logits, seeds, step, **options, seen=seen, repetition_penalty=penalty)
    assert_same(logits, seeds, step, do_sample=False, seen=seen)
    greedy = {"do_sample": False, "repetition_penalty": 1e6 if penalty > 1 else 1e-6}
    best = mllama_kernels.sample(logits, seeds, step, seen=seen, **greedy)
    expected = logits.float().masked_fill(seen == (penalty > 1), -math.inf).argmax(-1)
    assert torch.equal(best, expected), "a large penalty hides what was seen, or all the rest"


@pytest.mark.parametrize("rows", grid([0, 1, 2, 5], [9, 20, 150]))
def test_rows_are_independent_of_their_batch(device, rows):
    logits = logits_of("normal", rows, 3001, torch.bfloat16).to(device)
    seeds, step = torch.arange(rows, device=device), torch.tensor(11, device=device)
    options = {"temperature": 1.2, "top_k": 500, "top_p": 0.97}
    together = assert_same(logits, seeds, step, **options)
    for row in range(min(rows, 5)):
        alone = slice(row, row + 1)
        token = mllama_kernels.sample(logits[alone], seeds[alone], step, **options)
        assert torch.equal(token, together[alone])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("options", [OPTIONS[i] for i in (0, 1, 4, 7, 11)])
def test_checkpoint_vocabulary(device, dtype, options):
    logits = logits_of("normal", 2, 128256, dtype).to(device)
    assert_same(
        logits, torch.tensor([5, -6], device=device), torch.tensor(8, device=device), **options
    )


@pytest.mark.full
@pytest.mark.parametrize("kind", ["normal", "tied", "equal", "close"])
@pytest.mark.parametrize("vocab", [65535, 128257, 1000003])
def test_large_vocabularies(device, kind, vocab):
    logits = logits_of(kind, 1, vocab, torch.float32).to(device)
    for options in OPTIONS:
        assert_same(
            logits, torch.tensor([3], device=device), torch.tensor(1, device=device), **options
        )


def test_greedy_takes_the_first_of_equals(device):
    seeds, step = torch.zeros(1, dtype=torch.int64, device=device), torch.tensor(0, device=device)
    for vocab, first in ((9, 4), (5000, 3777), (5000, 0)):
        logits = torch.full((1, vocab), -1.0, device=device)
        logits[0, first] = -0.0
        logits[0, first + 1 :] = 0.0  # equal to -0
        for top in ({"do_sample": False}, {"do_sample": False, "top_k": 3, "temperature": 9.0}):
            assert mllama_kernels.sample(logits, seeds, step, **top).tolist() == [first]


@pytest.mark.parametrize("options", [{}, {"do_sample": False}, {"top_k": 3, "top_p": 0.5}])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("vocab", [9, 5003])
def test_rows_without_finite_maximum_are_marked(device, options, bad, vocab):
    logits = torch.zeros(4, vocab, device=device)
    logits[1, vocab // 2] = bad
    logits[2] = -math.inf
    seeds, step = torch.arange(4, device=device), torch.tensor(0, device=device)
    token = assert_same(logits, seeds, step, **options)
    assert token[1] == token[2] == INVALID_TOKEN and token[0] >= 0 and token[3] >= 0
    if options.get("do_sample", True):
        huge = torch.full((1, vocab), 1e30, device=device)
        token = mllama_kernels.sample(huge, seeds[:1], step, temperature=1e-30, **options)
        assert token.tolist() == [INVALID_TOKEN], "what counts is the largest logit, scaled"


def test_strided_logits(device):
    logits = logits_of("normal", 3, 640, torch.bfloat16).to(device)
    seeds, step = torch.arange(3, device=device), torch.tensor(2, device=device)
    seen = torch.rand(3, 640, device=device) < 0.5
    options = {"top_p": 0.9, "seen": seen, "repetition_penalty": 1.2}
    expected = mllama_kernels.sample(logits, seeds, step, **options)
    for view in (strided(logits), strided(logits, 3), logits.t().contiguous().t()):
        assert torch.equal(mllama_kernels.sample(view, seeds, step, **options), expected)
    options["seen"] = seen.t().contiguous().t()
    assert torch.equal(mllama_kernels.sample(logits, seeds, step, **options), expected)


def test_float64_is_rounded_to_float32():
    logits = torch.randn(2, 300, dtype=torch.float64)
    seeds, step = torch.arange(2), torch.tensor(2)
    if mllama_kernels._library.simulated:
        pytest.skip("float64 is for the CPU kernels")
    token = assert_same(logits, seeds, step, top_k=20)
    assert torch.equal(token, mllama_kernels.sample(logits.float(), seeds, step, top_k=20))


def kept(logits: Tensor, **options: Any) -> Tensor:
    neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    return kept_weights(logits, **(neutral | options)) > 0


def matters(logits: Tensor) -> Tensor:
    """Tokens that are likely enough to have a weight."""
    return logits > logits.amax(-1, keepdim=True) - 28


@pytest.mark.parametrize("tied", [False, True])
def test_top_k_and_min_p_keep_what_transformers_keeps(tied):
    logits = logits_of("tied" if tied else "normal", 5, 301, torch.float32)
    drawable = matters(logits)
    for top_k in (1, 2, 50, 300, 301, 1000):
        theirs = hf.TopKLogitsWarper(top_k)(NO_IDS, logits).isfinite()
        assert kept(logits, top_k=top_k).equal(theirs & drawable)
    for share in (0.01, 0.3, 0.9):
        theirs = hf.MinPLogitsWarper(share)(NO_IDS, logits).isfinite()
        assert kept(logits, min_p=share).equal(theirs & drawable)


@pytest.mark.parametrize("tied", [False, True])
def test_top_p_keeps_what_transformers_keeps(tied):
    """Up to the tokens at the cut: ties stay together, and float32 sums have roundings."""
    logits = logits_of("tied" if tied else "normal", 5, 301, torch.float32)
    likely = logits.double().softmax(-1)
    for share in (0.0, 0.01, 0.3, 0.9, 0.999):
        ours = kept(logits, top_p=share)
        theirs = hf.TopPLogitsWarper(share)(NO_IDS, logits).isfinite() & matters(logits)
        for z, p, mine, other in zip(logits, likely, ours, theirs):
            more_likely = torch.stack([p[z > value].sum() for value in z])
            near = (more_likely - share).abs() < 1e-6
            assert mine[~near].equal(((more_likely < share) | (z == z.max()))[~near])
            assert near[other & ~mine].all()
            assert (near | (z == z[other].min()))[mine & ~other].all()


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_scaling_equals_transformers(penalty):
    logits = 4 * torch.randn(5, 301)
    ids = torch.randint(0, 301, (5, 40))
    seen = torch.zeros(5, 301, dtype=torch.bool).scatter_(1, ids, True)
    processors = [hf.RepetitionPenaltyLogitsProcessor(penalty), hf.TemperatureLogitsWarper(0.6)]
    expected = hf.LogitsProcessorList(processors)(ids, logits.clone())
    assert scale_logits(logits, 0.6, penalty, seen).equal(expected)


def test_the_chain_equals_transformers():
    logits = 4 * torch.randn(5, 301)
    processors = [
        hf.TemperatureLogitsWarper(0.6),
        hf.TopKLogitsWarper(40),
        hf.TopPLogitsWarper(0.9),
        hf.MinPLogitsWarper(0.02),
    ]
    theirs = hf.LogitsProcessorList(processors)(NO_IDS, logits.clone())
    weights = kept_weights(scale_logits(logits, 0.6, 1.0, None), 40, 0.9, 0.02)
    assert (weights > 0).equal(theirs.isfinite())
    shares = weights.double() / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(shares, theirs.double().softmax(-1), rtol=1e-5, atol=0)
    assert 1 < theirs.isfinite().sum(-1).max() <= 40, "the filters must have had work to do"


def test_weights_are_exponentials():
    levels = torch.cat([torch.arange(5000), torch.arange(0, 29 * 2**26 + 1, 7919)])
    levels = torch.cat([levels, torch.tensor([29 * 2**26])]).sort().values
    weights = weights_of(levels)
    exact = (-levels.double() * 2.0**-26).exp() * 2.0**40
    assert ((weights - exact).abs() <= exact * 2.0**-29 + 0.501).all()
    assert weights[0] == 2**40 and weights[-1] == 0 and (weights.diff() <= 0).all()


def test_levels_are_distances():
    logits = torch.tensor([[3.0, 2.5, 3.0 - 2.0**-22, -25.9, -26.0, -1e30, -math.inf]])
    distances = torch.tensor([[0, 2**25, 16, 0, 29 * 2**26, 29 * 2**26, 29 * 2**26]])
    distances[0, 3] = int((3.0 - torch.tensor(-25.9)).item() * 2**26)
    assert levels_of(logits).equal(distances)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_frequencies_match_the_probabilities(device, top_p):
    logits = 4 * torch.randn(1, 60)
    count = 2000 if mllama_kernels._library.simulated else 50000
    scaled = hf.TemperatureLogitsWarper(1.5)(NO_IDS, logits)
    scaled = hf.TopPLogitsWarper(top_p)(NO_IDS, scaled) if top_p < 1 else scaled
    counts = draws(logits, count, device, temperature=1.5, top_p=top_p).cpu().bincount(minlength=60)
    statistic, limit = chi_square(counts, scaled.softmax(-1)[0])
    assert statistic < limit
    wrong, limit = chi_square(counts, (logits / 3).softmax(-1)[0])
    assert wrong > limit, "the test must be able to tell temperature 3 from 1.5"


def test_draw_inverts_the_distribution_function():
    weights = torch.tensor([[0, 1 << 38, 0, 3 << 38, 0]])
    largest = 1 - 2.0**-53
    for u, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.75, 3), (largest, 3)):
        assert draw(weights, torch.tensor([u], dtype=torch.float64)).tolist() == [token]
    for vocab in (1, 3, 128256):
        flat = torch.full((1, vocab), 1 << 40)
        assert draw(flat, torch.tensor([largest], dtype=torch.float64)).tolist() == [vocab - 1]
        assert draw(flat, torch.tensor([0.0], dtype=torch.float64)).tolist() == [0]


def test_uniform_numbers_are_uniform_and_independent():
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


def test_uniform_is_splitmix64():
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


def test_torch_machinery(device):
    logits = torch.randn(3, 40, device=device)
    seeds, step = torch.arange(3, device=device), torch.tensor(1, device=device)
    seen = torch.rand(3, 40, device=device) < 0.5
    opcheck("sample", (logits, seeds, step, True, 0.7, 20, 0.9, 0.01, 1.2, seen))
    options = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2, "seen": seen}
    assert_compiles(mllama_kernels.sample, logits, seeds, step, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a positive float32, got 0"),
        ({"temperature": 1e-60}, "temperature must be a positive float32, got 1e-60"),
        ({"repetition_penalty": -1.0}, "repetition_penalty must be a positive float32, got -1"),
        ({"top_k": -1}, "top_k must not be negative, got -1"),
        ({"top_p": 1.5}, "top_p must be from 0 to 1, got 1.5"),
        ({"min_p": math.nan}, "min_p must be from 0 to 1, got nan"),
        ({"seen": torch.zeros(2, 9)}, "seen must be bool, got float32"),
        (
            {"seen": torch.zeros(2, 8, dtype=torch.bool)},
            r"seen must have shape \(2, 9\), got \(2, 8\)",
        ),
    ],
)
def test_options_out_of_range_are_refused(device, options, message):
    options = {k: v.to(device) if torch.is_tensor(v) else v for k, v in options.items()}
    seeds, step = torch.arange(2, device=device), torch.tensor(0, device=device)
    with pytest.raises(RuntimeError, match=f"mllama_kernels.sample: {message}"):
        mllama_kernels.sample(torch.zeros(2, 9, device=device), seeds, step, **options)


def test_errors(device):
    logits, step = torch.zeros(2, 9, device=device), torch.tensor(0, device=device)
    seeds = torch.arange(2, device=device)
    with pytest.raises(RuntimeError, match=r"logits must be \(B, V\).*got shape \(9,\)"):
        mllama_kernels.sample(logits[0], seeds, step)
    with pytest.raises(RuntimeError, match=r"logits must be \(B, V\).*got shape \(2, 0\)"):
        mllama_kernels.sample(logits[:, :0], seeds, step)
    with pytest.raises(RuntimeError, match=r"seeds must have shape \(2,\), got \(3,\)"):
        mllama_kernels.sample(logits, torch.arange(3, device=device), step)
    with pytest.raises(RuntimeError, match="step must be int64, got float32"):
        mllama_kernels.sample(logits, seeds, step.float())
    with pytest.raises(RuntimeError, match="logits must be float32, float16 or bfloat16"):
        mllama_kernels.sample(logits.long(), seeds, step)
