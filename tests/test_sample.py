"""sample: the kernel equals the reference bit for bit, and the reference keeps what transformers keeps."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from numerics import FLOATS, assert_compiles, chi_square, grid, opcheck, simulated_share, strided
from op_calls import arguments_of
from torch import Tensor
from transformers.generation import logits_process as hf

import mllama_kernels
from mllama_kernels import reference, testing
from mllama_kernels.reference_sampling import (
    INVALID_TOKEN,
    draw,
    kept_weights,
    levels_of,
    penalized,
    uniform,
    weights_of,
)

NO_IDS = torch.empty(0)
OPTIONS: list[dict[str, float]] = [
    {},
    {"temperature": 0.0},
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


def each(rows: int, device: Any, **numbers: float) -> dict[str, Tensor]:
    """The same options for every row."""
    return {
        name: torch.full((rows,), value, dtype=number_type(name), device=device)
        for name, value in numbers.items()
    }


def number_type(name: str) -> torch.dtype:
    return torch.int64 if name in ("top_k", "num_likeliest") else torch.float64


def assert_same(logits: Tensor, seeds: Tensor, step: int | Tensor, **options: Any) -> Tensor:
    """Of kernel and reference; returns the tokens. Options are tensors, or one number for every row."""
    rows = len(logits)
    numbers = {name: value for name, value in options.items() if not torch.is_tensor(value)}
    options = {**options, **each(rows, logits.device, **numbers)}
    steps = step if torch.is_tensor(step) else torch.full_like(seeds, step)
    actual = mllama_kernels.sample(logits, seeds, steps, **options)
    expected = reference.sample(logits, seeds, steps, **options)
    assert actual[0].dtype == actual[1].dtype == torch.int64 and actual[2].dtype == torch.float32
    for a, e in zip(actual, expected, strict=True):
        assert a.is_contiguous() and a.shape == e.shape
    assert torch.equal(actual[0], expected[0]), (actual[0], expected[0])
    assert torch.equal(actual[1], expected[1]), (actual[1], expected[1])
    # The same arithmetic but for the last bit of a float64 logarithm.
    torch.testing.assert_close(actual[2], expected[2], rtol=2e-7, atol=0, equal_nan=True)
    return actual[0]


def tokens_of(logits: Tensor, seeds: Tensor, step: int, **options: float) -> Tensor:
    steps = torch.full_like(seeds, step)
    return mllama_kernels.sample(
        logits, seeds, steps, **each(len(logits), logits.device, **options)
    )[0]


def draws(logits: Tensor, count: int, device: torch.device, **options: float) -> Tensor:
    """(count,) tokens drawn from one row of logits, with `count` seeds at once."""
    batch = logits.expand(count, -1).to(device)
    seeds = torch.arange(count, device=device)
    return tokens_of(batch, seeds, 3, **options)


@simulated_share(3)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["normal", "tied", "equal", "close", "hidden", "far"])
@pytest.mark.parametrize("vocab", [1, 7, 301, 4097])
def test_equals_reference(device, dtype, kind, vocab):
    logits = logits_of(kind, 3, vocab, dtype).to(device)
    seeds = torch.randint(-(2**63), 2**63 - 1, (3,), device=device)
    for index, options in enumerate(OPTIONS):
        assert_same(logits, seeds, index, **options)


@pytest.mark.parametrize("penalty", [0.7, 1.3])
@pytest.mark.parametrize("dtype", FLOATS)
def test_penalty_equals_reference(device, dtype, penalty):
    logits = logits_of("normal", 4, 1003, dtype).to(device)
    seen = (torch.rand(4, 1003) < 0.3).to(device)
    seeds = torch.arange(4, device=device)
    for options in OPTIONS:
        assert_same(logits, seeds, 5, **options, seen=seen, repetition_penalty=penalty)
    greedy = {"temperature": 0.0, "repetition_penalty": 1e6 if penalty > 1 else 1e-6}
    best = assert_same(logits, seeds, 5, seen=seen, **greedy)
    expected = logits.float().masked_fill(seen == (penalty > 1), -math.inf).argmax(-1)
    assert torch.equal(best, expected), "a large penalty hides what was seen, or all the rest"


@pytest.mark.parametrize("rows", grid([0, 1, 2, 5], [9, 20, 150]))
def test_rows_are_independent_of_their_batch(device, rows):
    logits = logits_of("normal", rows, 3001, torch.bfloat16).to(device)
    seeds = torch.arange(rows, device=device)
    options = {"temperature": 1.2, "top_k": 500, "top_p": 0.97}
    together = assert_same(logits, seeds, 11, **options)
    for row in range(min(rows, 5)):
        alone = slice(row, row + 1)
        token = tokens_of(logits[alone], seeds[alone], 11, **options)
        assert torch.equal(token, together[alone])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("options", [OPTIONS[i] for i in (0, 1, 4, 7, 11)])
def test_checkpoint_vocabulary(device, dtype, options):
    logits = logits_of("normal", 2, 128256, dtype).to(device)
    assert_same(logits, torch.tensor([5, -6], device=device), 8, num_likeliest=20, **options)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["normal", "tied", "equal", "close"])
@pytest.mark.parametrize("vocab", [65535, 128257, 1000003])
def test_large_vocabularies(device, kind, vocab):
    logits = logits_of(kind, 1, vocab, torch.float32).to(device)
    for options in OPTIONS:
        assert_same(logits, torch.tensor([3], device=device), 1, num_likeliest=3, **options)


def test_greedy_takes_the_first_of_equals(device):
    seeds = torch.zeros(1, dtype=torch.int64, device=device)
    for vocab, first in ((9, 4), (5000, 3777), (5000, 0)):
        logits = torch.full((1, vocab), -1.0, device=device)
        logits[0, first] = -0.0
        logits[0, first + 1 :] = 0.0  # equal to -0
        for filters in ({}, {"top_k": 3, "top_p": 0.1, "min_p": 1.0}):
            assert assert_same(logits, seeds, 0, temperature=0.0, **filters).tolist() == [first]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 3, "top_p": 0.5}])
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("vocab", [9, 5003])
def test_rows_without_finite_maximum_are_marked(device, options, bad, vocab):
    logits = torch.zeros(4, vocab, device=device)
    logits[1, vocab // 2] = bad
    logits[2] = -math.inf
    seeds = torch.arange(4, device=device)
    token = assert_same(logits, seeds, 0, num_likeliest=3, **options)
    assert token[1] == token[2] == INVALID_TOKEN and token[0] >= 0 and token[3] >= 0
    if "temperature" not in options:
        huge = torch.full((1, vocab), 1e30, device=device)
        token = assert_same(huge, seeds[:1], 0, temperature=1e-30, **options)
        assert token.tolist() == [INVALID_TOKEN], "what counts is the largest logit, scaled"


def test_strided_logits(device):
    logits = logits_of("normal", 3, 640, torch.bfloat16).to(device)
    seeds, steps = torch.arange(3, device=device), torch.full((3,), 2, device=device)
    seen = torch.rand(3, 640, device=device) < 0.5
    options = {**each(3, device, top_p=0.9, repetition_penalty=1.2), "seen": seen}
    expected = mllama_kernels.sample(logits, seeds, steps, **options)[0]
    for view in (strided(logits), strided(logits, 3), logits.t().contiguous().t()):
        assert torch.equal(mllama_kernels.sample(view, seeds, steps, **options)[0], expected)
    options["seen"] = seen.t().contiguous().t()
    assert torch.equal(mllama_kernels.sample(logits, seeds, steps, **options)[0], expected)


def test_float64_is_rounded_to_float32():
    logits = torch.randn(2, 300, dtype=torch.float64)
    seeds = torch.arange(2)
    if mllama_kernels._library.simulated:
        pytest.skip("float64 is for the CPU kernels")
    token = assert_same(logits, seeds, 2, top_k=20, num_likeliest=4)
    assert torch.equal(token, tokens_of(logits.float(), seeds, 2, top_k=20))


def kept(logits: Tensor, **options: Any) -> Tensor:
    neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    columns = each(1, logits.device, **(neutral | options))
    return kept_weights(logits, *(columns[name][:, None] for name in neutral)) > 0


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
def test_the_penalty_equals_that_of_transformers(penalty):
    logits = 4 * torch.randn(5, 301)
    ids = torch.randint(0, 301, (5, 40))
    seen = torch.zeros(5, 301, dtype=torch.bool).scatter_(1, ids, True)
    expected = hf.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    assert penalized(logits, torch.tensor(penalty), seen).equal(expected)


def test_what_changes_logits_comes_in_the_order_of_transformers(device):
    """A bias is of the model's own logits: a penalty divides it with them."""
    logits = torch.rand(5, 301, device=device)
    ids = torch.randint(0, 300, (5, 40), device=device)
    tokens, bias = [ids[0, 0].item(), 300], [8.0, 6.0]
    processors = [
        hf.SequenceBiasLogitsProcessor([[[token], value] for token, value in zip(tokens, bias)]),
        hf.RepetitionPenaltyLogitsProcessor(1.7),
    ]
    theirs = hf.LogitsProcessorList(processors)(ids, logits.clone())
    options = {
        "repetition_penalty": 1.7,
        "seen": torch.zeros(5, 301, dtype=torch.bool, device=device).scatter_(1, ids, True),
        "bias_tokens": torch.tensor(tokens, device=device).expand(5, -1),
        "bias": torch.tensor(bias, device=device).expand(5, -1),
    }
    seeds = torch.arange(5, device=device)
    token = assert_same(logits, seeds, 4, temperature=0.0, **options)
    assert torch.equal(token, theirs.argmax(-1)) and token[0] == 300
    counts = torch.randint(0, 3, (5, 301), dtype=torch.int32, device=device)
    options |= {"presence_penalty": 0.25, "frequency_penalty": 1.5, "counts": counts}
    theirs = theirs - 1.5 * counts - 0.25 * (counts > 0)  # as OpenAI defines them
    assert torch.equal(assert_same(logits, seeds, 4, **options), tokens_of(theirs, seeds, 4))


def test_top_p_is_a_float64():
    """The likelier of two tokens has a share between 0.9 in float32 and in float64."""
    below = torch.tensor(0.9).item()
    distance = torch.tensor(math.log(9)).view(torch.int32) + torch.arange(-9, 9, dtype=torch.int32)
    logits = torch.stack([torch.zeros(18), -distance.view(torch.float32)], 1)
    share = logits.double().softmax(-1)[:, 0]
    between = logits[(share > below) & (share < 0.9)]
    assert len(between) and below < 0.9
    row, device = between[0], torch.device("cpu")
    assert set(draws(row, 200, device, top_p=0.9).tolist()) == {0, 1}
    assert set(draws(row, 200, device, top_p=below).tolist()) == {0}


def test_the_chain_equals_transformers():
    logits = 4 * torch.randn(5, 301)
    processors = [
        hf.TemperatureLogitsWarper(0.6),
        hf.TopKLogitsWarper(40),
        hf.TopPLogitsWarper(0.9),
        hf.MinPLogitsWarper(0.02),
    ]
    theirs = hf.LogitsProcessorList(processors)(NO_IDS, logits.clone())
    columns = (torch.tensor([[value]], dtype=torch.float64) for value in (0.9, 0.02))
    weights = kept_weights(logits / torch.tensor(0.6), torch.tensor([[40]]), *columns)
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


def test_every_row_has_its_own_options(device):
    """Rows of a batch say what they say alone, with all options in use by some and not by others."""
    rows, vocab = 24, 1500
    logits = logits_of("normal", rows, vocab, torch.bfloat16).to(device)
    numbers = {
        "temperature": (0.0, 0.5, 1.0, 1.7),
        "top_k": (0, 1, 50),
        "top_p": (1.0, 0.9, 0.2),
        "min_p": (0.0, 0.03),
        "repetition_penalty": (1.0, 1.4),
        "presence_penalty": (0.0, 0.8, -0.4),
        "frequency_penalty": (0.0, 0.3),
        "num_likeliest": (-1, 0, 7, 20),
    }
    options = {
        name: torch.tensor(values, dtype=number_type(name))[torch.randint(len(values), (rows,))]
        for name, values in numbers.items()
    }
    options["seen"] = torch.rand(rows, vocab) < 0.3
    options["counts"] = torch.randint(-1, 3, (rows, vocab), dtype=torch.int32)
    options["bias_tokens"], options["bias"] = biases(rows, vocab, 30)
    options["allowed"] = torch.randint(-(2**31), 2**31, (rows, 47), dtype=torch.int32)
    options["allowed"][::3] = -1
    options = {name: value.to(device) for name, value in options.items()}
    seeds, steps = torch.randint(0, 2**62, (2, rows), device=device)
    together = assert_same(logits, seeds, steps, **options)
    assert (together >= 0).all()
    for row in range(rows):
        alone = {name: value[row : row + 1] for name, value in options.items()}
        alone = {name: value.contiguous() for name, value in alone.items()}
        token = assert_same(
            logits[row : row + 1], seeds[row : row + 1], steps[row : row + 1], **alone
        )
        assert torch.equal(token, together[row : row + 1])
    off = torch.randint(-9, 9, (rows, vocab), device=device) > 0
    neutral = each(
        rows, device, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0
    )
    ignored = assert_same(logits, seeds, steps, **neutral, seen=off, counts=off.int())
    assert torch.equal(ignored, mllama_kernels.sample(logits, seeds, steps)[0])


def biases(rows: int, vocab: int, most: int) -> tuple[Tensor, Tensor]:
    """Of every row another number, among them of the first and of the last token."""
    tokens = torch.full((rows, most), -1)
    for row in range(rows):
        count = row * most // max(rows - 1, 1)
        tokens[row, :count] = torch.randperm(vocab)[:count].sort().values
    if rows > 1:
        tokens[-1, 0], tokens[-1, -1] = 0, vocab - 1
    bias = 5 * torch.randn(rows, most)
    bias[torch.rand(rows, most) < 0.2] = -math.inf
    bias[tokens < 0] = math.nan  # not looked at
    return tokens, bias


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vocab", [3, 301, 4097, 9000])
def test_biases_are_added_to_their_tokens(device, dtype, vocab):
    rows = 4
    logits = logits_of("normal", rows, vocab, dtype).to(device)
    tokens, bias = (t.to(device) for t in biases(rows, vocab, min(vocab, 300)))
    dense = torch.zeros(rows, vocab + 1, device=device)
    dense.scatter_(1, tokens.where(tokens >= 0, vocab), bias)
    seeds = torch.arange(rows, device=device)
    for options in ({}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.8, "temperature": 0.7}):
        token = assert_same(logits, seeds, 3, **options, bias_tokens=tokens, bias=bias)
        biased = logits.float() + dense[:, :-1]
        assert torch.equal(token, tokens_of(biased, seeds, 3, **options))
    nothing = {"bias_tokens": tokens[:, :0], "bias": bias[:, :0]}
    token = assert_same(logits, seeds, 3, **nothing)
    assert torch.equal(token, tokens_of(logits, seeds, 3))


def bits_of(mask: Tensor) -> Tensor:
    """(B, V) bool -> (B, ceil(V / 32)) int32, the lowest bit first; bits behind the last token are ones."""
    rows, vocab = mask.shape
    padded = torch.nn.functional.pad(mask, (0, -vocab % 32), value=True)
    words = (padded.view(rows, -1, 32).long() << torch.arange(32, device=mask.device)).sum(-1)
    return words.where(words < 2**31, words - 2**32).to(torch.int32)


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 301, 4097, 9000])
def test_only_allowed_tokens_are_chosen(device, vocab):
    logits = logits_of("normal", 5, vocab, torch.bfloat16).to(device)
    mask = torch.rand(5, vocab, device=device) < 0.2
    mask[0], mask[1], mask[2] = True, False, False
    mask[2, -1] = True
    mask[3:, 0] = True
    seeds = torch.arange(5, device=device)
    for options in ({}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.8, "temperature": 0.7}):
        token = assert_same(logits, seeds, 3, **options, allowed=bits_of(mask), num_likeliest=2)
        hidden = logits.float().masked_fill(~mask, -math.inf)
        assert torch.equal(token, tokens_of(hidden, seeds, 3, **options))
        assert token[1] == INVALID_TOKEN and token[2] == vocab - 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_cannot_be_hidden(device, bad):
    """A model that computes NaN is broken, whatever a grammar or a bias hides."""
    logits = torch.randn(3, 40, device=device)
    logits[1, 7] = bad
    logits[2, 7] = -math.inf
    seeds = torch.arange(3, device=device)
    mask = torch.ones(3, 40, dtype=torch.bool, device=device)
    mask[:, 7] = False
    bans = {
        "bias_tokens": torch.tensor([[7]] * 3, device=device),
        "bias": torch.full((3, 1), -math.inf, device=device),
    }
    for hiding in ({"allowed": bits_of(mask)}, bans):
        for temperature in (0.0, 1.0):
            token = assert_same(
                logits, seeds, 0, temperature=temperature, num_likeliest=1, **hiding
            )
            assert token[1] == INVALID_TOKEN and token[0] >= 0 and token[2] >= 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_overflows_marks_its_row(device, temperature):
    logits = torch.full((5, 70), -1.0, device=device)
    logits[:, 40] = 2e38
    logits[3, 41] = -math.inf
    # In the last two rows every token gets an infinity, or loses one.
    penalty = torch.tensor([0, 0, 0, -3e38, 3e38], dtype=torch.float64, device=device)
    options = {
        "temperature": temperature,
        "bias_tokens": torch.full((5, 1), 40, device=device),
        "bias": torch.tensor([[1e38], [2e38], [-3.4e38], [0.0], [0.0]], device=device),
        "frequency_penalty": penalty,
        "counts": torch.full((5, 70), 2, dtype=torch.int32, device=device),
        "num_likeliest": 2,
    }
    token = assert_same(logits, torch.arange(5, device=device), 0, **options)
    assert token[0] == 40 and token[2] not in (40, INVALID_TOKEN)
    assert token[[1, 3, 4]].tolist() == [INVALID_TOKEN] * 3


def test_penalties_by_counts_follow_the_definition(device):
    logits = torch.tensor([[3.0, 2.9, 2.0, -1.0]] * 4, device=device)
    counts = torch.tensor([[1, 0, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0], [1, 3, 0, -5]], device=device)
    seeds = torch.zeros(4, dtype=torch.int64, device=device)
    penalties = {
        "presence_penalty": [0.2, 0.0, 9.0, -1.0],
        "frequency_penalty": [0.0, 0.06, 9.0, 1.0],
    }
    options = {
        name: torch.tensor(values, dtype=torch.float64, device=device)
        for name, values in penalties.items()
    }
    token = assert_same(logits, seeds, 0, temperature=0.0, counts=counts.int(), **options)
    assert token.tolist() == [
        1,
        1,
        0,
        0,
    ]  # 3 - 0.2; 3 - 2 * 0.06; not seen; 3 - 1 + 1 over 2.9 - 3 + 1


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["normal", "tied", "equal", "hidden", "far"])
@pytest.mark.parametrize("vocab", [1, 7, 301, 4097, 20001])
def test_log_probabilities_are_those_of_the_logits_as_given(device, dtype, kind, vocab):
    rows = 3
    logits = logits_of(kind, rows, vocab, dtype).to(device)
    tokens, bias = (t.to(device) for t in biases(rows, vocab, min(vocab, 4)))
    bias = bias.nan_to_num(0.0, neginf=-3.0)
    options = {
        **each(rows, device, temperature=1.3, top_k=9, frequency_penalty=0.3, num_likeliest=20),
        "counts": torch.ones(rows, vocab, dtype=torch.int32, device=device),
        "bias_tokens": tokens,
        "bias": bias,
    }
    seeds = torch.arange(rows, device=device)
    assert_same(logits, seeds, 2, **options)
    chosen, likeliest, logprobs = mllama_kernels.sample(logits, seeds, seeds, **options)
    exact, plain = logits.double().log_softmax(-1), logits.float().log_softmax(-1)
    count = min(vocab, 20)
    order = logits.double().sort(dim=-1, descending=True, stable=True).indices[:, :count]
    assert torch.equal(likeliest[:, :count], order) and (likeliest[:, count:] == -1).all()
    assert logprobs[:, 1 + count :].isnan().all()
    columns = torch.cat([chosen[:, None], order], 1)
    exact, plain = exact.gather(1, columns), plain.gather(1, columns)
    testing.assert_close_to_exact(logprobs[:, : 1 + count], exact, plain)


def test_how_many_likeliest_is_each_rows_own(device):
    logits = torch.randn(5, 50, device=device)
    counts = torch.tensor([-1, 0, 1, 5, 20], device=device)
    seeds = torch.arange(5, device=device)
    assert_same(logits, seeds, 1, num_likeliest=counts)
    chosen, likeliest, logprobs = mllama_kernels.sample(logits, seeds, seeds, num_likeliest=counts)
    assert ((likeliest >= 0).sum(1) == counts.clamp_min(0)).all()
    assert (logprobs.isfinite().sum(1) == counts + 1).all()
    nothing = mllama_kernels.sample(logits, seeds, seeds)
    assert torch.equal(nothing[0], chosen)
    assert nothing[1].shape == nothing[2].shape == (5, 0)


def test_the_likeliest_take_the_lower_of_equal_tokens_first(device):
    """Also of zeros that differ in their sign."""
    for vocab in (40, 9000):
        logits = torch.full((2, vocab), -1.0, device=device)
        zeros = [3, 4, 31, 32, vocab - 2]
        logits[:, zeros] = 0.0
        logits[0, zeros[::2]] = -0.0
        logits[1, zeros[1::2]] = -0.0
        logits[:, 17] = 1.0
        seeds = torch.arange(2, device=device)
        assert_same(logits, seeds, 0, temperature=0.0, num_likeliest=8)
        wanted = each(2, device, num_likeliest=8)["num_likeliest"]
        likeliest = mllama_kernels.sample(logits, seeds, seeds, num_likeliest=wanted)[1]
        assert likeliest[:, :8].tolist() == [[17, *zeros, 0, 1]] * 2


def test_no_rows(device):
    arguments = {name: value[:0] for name, value in arguments_of("sample", device).items()}
    for module in (mllama_kernels, reference):
        tokens, likeliest, logprobs = module.sample(**arguments)
        assert (tokens.shape, likeliest.shape, logprobs.shape) == ((0,), (0, 20), (0, 21))


def test_torch_machinery(device):
    arguments = arguments_of("sample", device)
    opcheck("sample", tuple(arguments.values()))
    logits, seeds, steps = (arguments.pop(name) for name in ("logits", "seeds", "steps"))
    assert_compiles(mllama_kernels.sample, logits, seeds, steps, **arguments)
    opcheck("sample", (logits, seeds, steps, *[None] * len(arguments)))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", -0.5, "0 (greedy) or a positive float32, got -0.5"),
        ("temperature", 1e-60, "0 (greedy) or a positive float32, got 1e-60"),
        ("temperature", math.inf, "0 (greedy) or a positive float32, got inf"),
        ("repetition_penalty", 0.0, "a positive float32, got 0"),
        ("presence_penalty", math.nan, "a finite float32, got nan"),
        ("frequency_penalty", 1e300, "a finite float32, got 1e+300"),
        ("top_k", -1, "0 (off) or positive, got -1"),
        ("top_p", 1.5, "from 0 to 1, got 1.5"),
        ("min_p", math.nan, "from 0 to 1, got nan"),
        ("num_likeliest", 21, "from -1 to 20, got 21"),
        ("num_likeliest", -2, "from -1 to 20, got -2"),
    ],
)
@pytest.mark.parametrize("module", [mllama_kernels, reference], ids=["kernel", "reference"])
def test_numbers_out_of_range(device, module, name, value, expected):
    """Refused where the host can read them; on a GPU the row has no token, and the others have theirs."""
    arguments = arguments_of("sample", device)
    right = module.sample(**arguments)[0]
    arguments[name] = arguments[name].clone()
    arguments[name][1] = value
    if device.type != "cpu":
        tokens, likeliest, logprobs = module.sample(**arguments)
        assert tokens.tolist() == [right[0].item(), INVALID_TOKEN, right[2].item()]
        assert (likeliest[1] == INVALID_TOKEN).all() and logprobs[1].isnan().all()
        return
    message = re.escape(f"mllama_kernels.sample: {name} must be {expected}") + r"(\.0)? in row 1$"
    with pytest.raises(RuntimeError, match=message):
        module.sample(**arguments)


@pytest.mark.parametrize(
    "tokens", [[5, 5, 9], [9, 5, -1], [5, -1, 9], [-1, 5, 9], [-2, 5, 9], [5, 9, 100]]
)
@pytest.mark.parametrize("module", [mllama_kernels, reference], ids=["kernel", "reference"])
def test_bias_tokens_that_do_not_rise(device, module, tokens):
    arguments = arguments_of("sample", device)
    arguments["bias_tokens"] = arguments["bias_tokens"].clone()
    arguments["bias_tokens"][2] = torch.tensor(tokens)
    if device.type != "cpu":
        assert module.sample(**arguments)[0][2] == INVALID_TOKEN
        return
    message = r"bias_tokens must rise in a row from 0 to 99 at most, with -1 behind the last, got -?\d+ at"
    with pytest.raises(RuntimeError, match=message + r" \d of row 2$"):
        module.sample(**arguments)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("module", [mllama_kernels, reference], ids=["kernel", "reference"])
def test_biases_that_are_not_finite(device, module, value):
    arguments = arguments_of("sample", device)
    arguments["bias"] = arguments["bias"].clone()
    arguments["bias"][0, 1] = value
    arguments["bias"][1] = value  # which has no token
    if device.type != "cpu":
        assert module.sample(**arguments)[0][0] == INVALID_TOKEN
        return
    with pytest.raises(
        RuntimeError, match=f"bias must be finite or -inf, got {value} at 1 of row 0$"
    ):
        module.sample(**arguments)


@pytest.mark.parametrize("module", [mllama_kernels, reference], ids=["kernel", "reference"])
@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("seen", "give repetition_penalty and seen together, got only repetition_penalty"),
        ("repetition_penalty", "give repetition_penalty and seen together, got only seen"),
        (
            "counts",
            "give presence_penalty or frequency_penalty and counts together, got only presence",
        ),
        ("bias", "give bias_tokens and bias together, got only bias_tokens"),
        ("bias_tokens", "give bias_tokens and bias together, got only bias$"),
    ],
)
def test_what_belongs_together(device, module, missing, message):
    arguments = arguments_of("sample", device)
    del arguments[missing]
    with pytest.raises(RuntimeError, match=f"mllama_kernels.sample: {message}"):
        module.sample(**arguments)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("logits", lambda t: t[0], r"logits must be \(B, V\).*got shape \(100,\)"),
        ("logits", lambda t: t[:, :0], r"logits must be \(B, V\).*got shape \(3, 0\)"),
        ("logits", lambda t: t.long(), "logits must be float32, float16 or bfloat16"),
        ("seeds", lambda t: t[:2], r"seeds must have shape \(3,\), got \(2,\)"),
        ("steps", lambda t: t.float(), "steps must be int64, got float32"),
        ("steps", lambda t: t[0], r"steps must have shape \(3,\), got \(\)"),
        ("temperature", lambda t: t.float(), "temperature must be float64, got float32"),
        ("top_k", lambda t: t.int(), "top_k must be int64, got int32"),
        ("seen", lambda t: t.float(), "seen must be bool, got float32"),
        ("seen", lambda t: t[:, :99], r"seen must have shape \(3, 100\), got \(3, 99\)"),
        ("counts", lambda t: t.long(), "counts must be int32, got int64"),
        ("bias_tokens", lambda t: t[0], r"bias_tokens must be \(B, M\), got shape \(3,\)"),
        ("bias", lambda t: t[:, :2], r"bias must have shape \(3, 3\), got \(3, 2\)"),
        ("bias", lambda t: t.double(), "bias must be float32, got float64"),
        ("allowed", lambda t: t[:, :3], r"allowed must have shape \(3, 4\), got \(3, 3\)"),
        ("num_likeliest", lambda t: t[:, None], r"num_likeliest must have shape \(3,\), got"),
    ],
)
def test_errors(device, name, change, message):
    arguments = arguments_of("sample", device)
    with pytest.raises(RuntimeError, match=f"mllama_kernels.sample: {message}"):
        mllama_kernels.sample(**arguments | {name: change(arguments[name])})


@pytest.mark.parametrize("module", [mllama_kernels, reference], ids=["kernel", "reference"])
def test_log_probabilities_that_want_a_gradient_are_refused(device, module):
    arguments = arguments_of("sample", device)
    arguments["logits"].requires_grad_()
    with pytest.raises(RuntimeError, match="log-probabilities, which have no gradient here"):
        module.sample(**arguments)
    with torch.no_grad():
        module.sample(**arguments)
    del arguments["num_likeliest"]
    module.sample(**arguments)
