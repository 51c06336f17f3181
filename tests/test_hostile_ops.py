"""Hostile arguments of the ops: an error that names the argument or a right result, never a crash or a hang.

Every case is a process of its own. On a simulated build the kernels are those of CUDA, behind tensors whose
tables the host can read.
"""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest
import torch
from confinement import confined_cases
from hostile_tensors import parameters, recorded_calls

from mllama_kernels import _library

SIMULATED = _library.simulated
SECONDS = 240 if SIMULATED else 20  # of one case: the simulation takes its time

# What the cases below are written in. An op that is refused leaves what it would have written.
SETUP = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import re
import torch
import mllama_kernels as m
from mllama_kernels import reference
from hostile_tensors import call, parameters, recorded_calls, try_number, try_tensor

SIMULATED = {SIMULATED}
LEAST, MOST = -(2**31), 2**31 - 1
torch.manual_seed(0)
op = torch.ops.mllama_kernels
randn = torch.randn
calls = recorded_calls()

def ints(*values):
    return torch.tensor(values, dtype=torch.int32)

def doubles(value, rows=2):
    return torch.full((rows,), value, dtype=torch.float64)

def refused(pattern, function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except (RuntimeError, ValueError) as error:
        assert re.search(pattern, str(error)), str(error)[:500]
        assert len(str(error)) < 500
    else:
        raise AssertionError("taken")

def changed(name, **arguments):
    "The recorded call of an op, with other arguments."
    known = dict(zip(parameters(name), calls[name]))
    assert arguments.keys() <= known.keys()
    copies = {{k: v.clone() if torch.is_tensor(v) else v for k, v in (known | arguments).items()}}
    return [arguments.get(k, v) for k, v in copies.items()]

def refused_with(name, pattern, **arguments):
    refused(pattern, call, name, changed(name, **arguments))

def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
"""


def run(cases: dict[str, str]) -> None:
    """All of the cases end well."""
    ended = confined_cases(SETUP, cases, seconds=SECONDS, mebibytes=16384 if SIMULATED else 6144)
    failed = {name: e for name, e in ended.items() if e.kind != "ok"}
    texts = [
        f"{name}: {e.kind} after {e.seconds:.0f} s\n{e.out[-1500:]}" for name, e in failed.items()
    ]
    assert not failed, f"{len(failed)} of {len(cases)} cases:\n" + "\n".join(texts[:5])


def test_every_argument_of_every_op() -> None:
    """Freed, shrunk and foreign tensors, other shapes, numbers at the ends of their range, one at a time."""
    cases = {}
    for name, args in recorded_calls().items():
        for place, (argument, value) in enumerate(zip(parameters(name), args, strict=True)):
            if isinstance(value, torch.Tensor):
                cases[f"{name}, {argument}"] = f"try_tensor(calls, {name!r}, {place})"
            elif type(value) in (int, float):
                cases[f"{name}, {argument}"] = f"try_number(calls, {name!r}, {place})"
    assert len(cases) > 150
    run(cases)


PACKED = (
    "rotary_attention",
    "rotary_attention_backward",
    "rotary_attention_cached",
    "cross_attention",
    "cross_attention_backward",
)
BOUNDS = {
    "wraps": "ints(0, LEAST, 7)",
    "wraps back": "ints(0, MOST, 7)",
    "falls": "ints(0, 8, 7)",
    "starts below 0": "ints(-1, 3, 7)",
    "starts late": "ints(1, 3, 7)",
    "starts at the end": "ints(7, 3, 7)",
    "ends late": "ints(0, 3, 8)",
    "ends early": "ints(0, 3, 6)",
    "ends far": "ints(0, 3, MOST)",
    "ends below 0": "ints(0, 3, LEAST)",
    "is longer than max_seqlen": "ints(0, 0, 7)",
    "has no bounds": "ints()",
    "has one bound": "ints(0)",
    "has dimensions": "ints(0, 3, 7)[None]",
    "has no dimension": "ints(7)[0]",
    "has strides": "ints(0, 0, 3, 3, 7, 7)[::2]",
    "is expanded": "ints(0).expand(3)",
    "is int64": "torch.tensor([0, 3, 7])",
}


def test_bounds() -> None:
    run(
        {
            f"{name} {what}": f"refused_with({name!r}, 'cu_seqlens', cu_seqlens={bounds})"
            for name in PACKED
            for what, bounds in BOUNDS.items()
        }
    )


def test_more_rows_than_there_are() -> None:
    """max_seqlen is a bound: a larger one changes neither the result nor the time."""
    cases = {}
    for name in PACKED:
        cases[f"{name} negative"] = f"refused_with({name!r}, 'max_seqlen', max_seqlen=-1)"
        for value in (5, 2**31, 2**40, 2**62, 2**63 - 1):
            cases[f"{name} {value}"] = f"""
                given, plain = (call({name!r}, changed({name!r}, **options))[0]
                                for options in ({{"max_seqlen": {value}}}, {{}}))
                for a, b in zip(given, plain, strict=True):
                    same(a, b)
            """
    run(cases)


CACHED = """
def cached(pattern, **arguments):
    args = changed("rotary_attention_cached", **arguments)
    caches = [args[5].clone(), args[6].clone()]
    refused(pattern, call, "rotary_attention_cached", args)
    assert torch.equal(args[5], caches[0]) and torch.equal(args[6], caches[1])
"""


def test_lengths_and_pages() -> None:
    """The recorded call has sequences of 3 and 4 new rows, lengths 0 and 5, two pages of 16 each, of 4."""
    lengths = (
        "-1, 5",
        "LEAST, 5",
        "0, LEAST",
        "MOST, 5",
        "0, MOST",
        "0, MOST - 2",
        "30, 5",
        "0, 29",
    )
    pages = (
        *("-1, 1, 3, 2", "4, 1, 3, 2", "0, 1, LEAST, 2", "0, 1, MOST, 2", "0, 1, 2**20, 2"),
        *("-5, 1, 3, 2", "0, 1, 4, 2"),
    )
    cases = {f"lengths {x}": f"cached('cache_lens', cache_lens=ints({x}))" for x in lengths}
    for x in pages:
        cases[f"pages {x}"] = f"cached('page_table', page_table=ints({x}).view(2, 2))"
    cases |= {
        "a page that is read": """
            for page in (-1, 4, LEAST, MOST):
                table = ints(0, 1, page, 2).view(2, 2)
                cached("page_table", page_table=table, cache_lens=ints(0, 20))
        """,
        "a page that is written": """
            for page in (-1, 4, LEAST, MOST):
                table = ints(0, 1, 3, page).view(2, 2)
                cached("page_table", page_table=table, cache_lens=ints(0, 20))
        """,
        "pages of nothing may be anything": """
            plain, other = changed("rotary_attention_cached"), changed(
                "rotary_attention_cached", page_table=ints(0, LEAST, 3, MOST).view(2, 2))
            same(call("rotary_attention_cached", other)[0], call("rotary_attention_cached", plain)[0])
            same(other[5], plain[5])
        """,
        "no pages": "cached('page_table|cache_lens', page_table=ints().view(2, 0))",
        "an empty cache": """
            none = torch.empty(0, 2, 16, 64)
            cached("k_cache", k_cache=none, v_cache=none.clone())
        """,
        "pages of great size": """
            none = torch.empty(0, 2, 2**40, 64)
            cached("k_cache", k_cache=none, v_cache=none.clone())
        """,
        "table of other batch": "cached('page_table', page_table=ints(0, 1, 2, 3, 0, 1).view(3, 2))",
        "table with strides": "cached('page_table', page_table=ints(0, 3, 1, 2).view(2, 2).t())",
        "lengths with strides": "cached('cache_lens', cache_lens=ints(0, 0, 5, 5)[::2])",
        "no query heads": "cached('q must', q=randn(7, 0, 64))",
        "nobody": """
            none = dict(q=randn(0, 4, 64), k=randn(0, 2, 64), v=randn(0, 2, 64), cos=randn(0, 32),
                        sin=randn(0, 32), page_table=ints().view(0, 2), cu_seqlens=ints(0),
                        cache_lens=ints())
            out, _ = call("rotary_attention_cached", changed("rotary_attention_cached", **none))
            assert out.shape == (0, 4, 64)
        """,
    }
    run({name: CACHED + "\n" + dedent(code) for name, code in cases.items()})


def test_what_is_written_is_no_other_argument() -> None:
    run(
        {
            name: CACHED + "\n" + dedent(code)
            for name, code in {
                "expanded pages": "cached('k_cache', k_cache=randn(1, 2, 16, 64).expand(4, 2, 16, 64))",
                "expanded heads": "cached('v_cache', v_cache=randn(4, 1, 16, 64).expand(4, 2, 16, 64))",
                "one cache for both": """
                    cache = randn(4, 2, 16, 64)
                    cached("k_cache and v_cache", k_cache=cache, v_cache=cache)
                """,
                "caches that meet": """
                    both = randn(5, 2, 16, 64)
                    cached("k_cache and v_cache", k_cache=both[:4], v_cache=both[1:])
                """,
                "caches side by side": """
                    both = randn(2, 4, 2, 16, 64)
                    args = changed("rotary_attention_cached", k_cache=both[0], v_cache=both[1])
                    call("rotary_attention_cached", args)
                """,
                "a table in the cache": """
                    cache = torch.zeros(4, 2, 16, 64)
                    table = cache.view(torch.int32).flatten()[:4].view(2, 2)
                    cached("page_table", k_cache=cache, page_table=table)
                """,
                "lengths in the cache": """
                    cache = torch.zeros(4, 2, 16, 64)
                    lengths = cache.view(torch.int32).flatten()[-2:]
                    cached("cache_lens", v_cache=cache, cache_lens=lengths)
                """,
                "bounds in the cache": """
                    cache = torch.zeros(4, 2, 16, 64)
                    bounds = cache.view(torch.int32).flatten()[8:11]
                    bounds.copy_(ints(0, 3, 7))
                    cached("cu_seqlens", v_cache=cache, cu_seqlens=bounds)
                """,
                "rows in the cache": """
                    cache = randn(4, 2, 16, 64)
                    cached("v must", k_cache=cache, v=cache.flatten()[: 7 * 128].view(7, 2, 64))
                """,
            }.items()
        }
    )


def test_slots() -> None:
    run(slots_of("cross_attention") | slots_of("cross_attention_backward"))


def slots_of(name: str) -> dict[str, str]:
    """Cases: the recorded call has two sequences of two tiles, of three slots."""
    tables = ("3, 2, 1, -1", "0, -2, 1, -1", "0, LEAST, 1, -1", "0, 2, MOST, -1", "0, 2, 1, 2**20")
    cases = {
        f"{name} {x}": f"refused_with({name!r}, 'tile_table', tile_table=ints({x}).view(2, 2))"
        for x in tables
    }
    return cases | {
        f"{name} tile masks that are no bools": f"""
            mask = torch.full((7, 2), 2, dtype=torch.uint8).view(torch.bool)
            refused_with({name!r}, "tile_mask", tile_mask=mask)
        """,
        f"{name} no slot at all": f"""
            none = dict(k=randn(0, 5, 2, 64), v=randn(0, 5, 2, 64))
            refused_with({name!r}, "tile_table", **none)
            out, _ = call({name!r}, changed({name!r}, **none, tile_table=ints(-1, -1, -1, -1).view(2, 2)))
            assert (out[0] == 0).all()
        """,
    }


@pytest.mark.skipif(SIMULATED, reason="the simulation takes minutes for as many tiles")
def test_costs_grow_only_with_tiles_and_sequences() -> None:
    """Not with their square, nor with what a sequence of other rows would take."""
    setup = """
        def tiles(count):
            q, k = randn(1, 1, 8), randn(2, 5, 1, 8)
            table = torch.zeros(1, count, dtype=torch.int32)
            options = (None, None, 1e-5, 0.125, table, ints(0, 1), 1)
            return q, k, options, op.cross_attention(q, k, k, *options, True)
    """
    cases = {
        "a million tiles": """
            torch.manual_seed(1)
            out = tiles(10**6)[3][0]
            torch.manual_seed(1)
            torch.testing.assert_close(out, tiles(1)[3][0], rtol=0, atol=0.05)
        """,
        "the gradients of many tiles of one slot": """
            q, k, options, results = tiles(10**5)
            grads = op.cross_attention_backward(torch.ones_like(q), q, k, k, *results, *options)
            assert all(g.isfinite().all() for g in grads) and (grads[2][1] == 0).all()
        """,
        "a million sequences, one of them with rows": """
            many = 10**6
            bounds = torch.zeros(many + 1, dtype=torch.int32)
            bounds[many // 2:] = 3
            table = torch.full((many, 8), -1, dtype=torch.int32)
            table[:, 0] = 0
            q, k = randn(3, 4, 64), randn(3, 5, 2, 64)
            out, alone = (m.cross_attention(q, k, k, tile_table=t, cu_seqlens=c, max_seqlen=3)
                          for t, c in ((table, bounds), (table[:1], ints(0, 3))))
            assert torch.equal(out, alone)
        """,
    }
    run({name: dedent(setup) + dedent(code) for name, code in cases.items()})


def test_ids_and_labels() -> None:
    cases = {}
    for name in ("patch_embed", "patch_embed_backward"):
        for ids in ("-1, 0", "0, 3", "0, 2**62", "-(2**63), 0"):
            cases[f"{name} {ids}"] = (
                f"refused_with({name!r}, 'aspect_ratio_ids', aspect_ratio_ids=torch.tensor([{ids}]))"
            )
    for label in ("-2", "24", "2**62", "-(2**63)", "2**63 - 1"):
        labels = f"labels = torch.tensor([3, 7, -1, {label}, 9])"
        if SIMULATED:  # as on a GPU, where nobody looks: NaN
            cases[f"label {label}"] = f"""
                {labels}
                loss = call("linear_cross_entropy", changed("linear_cross_entropy", labels=labels))[0][0]
                assert loss.isnan().tolist() == [False, False, False, True, False]
            """
        else:
            for name in ("linear_cross_entropy", "linear_cross_entropy_backward"):
                cases[f"{name} {label}"] = (
                    f"{labels}\nrefused_with({name!r}, 'labels', labels=labels)"
                )
    run(cases)


def test_sizes_beyond_63_bits() -> None:
    run(
        {
            "vocabulary": """
                for vocab in (2**31, 2**62, 2**63 - 1):
                    refused("weight", op.linear_cross_entropy, randn(2, 0), torch.empty(vocab, 0),
                            torch.zeros(2, dtype=torch.int64), -100, -1, 0.0, 0.0, True, False, 1 << 28)
            """,
            "padding": """
                for pad_to in (0, -1, 2**31, 2**62, 2**63 - 1):
                    refused_with("patch_embed", "pad_to", pad_to=pad_to)
            """,
            "sides": """
                for side in (2**21, 2**30):
                    refused_with("patch_embed", "pixel_values", pixel_values=torch.empty(0, 2, 3, side, side),
                                 aspect_ratio_ids=torch.empty(0, dtype=torch.int64))
            """,
            "no channels": """
                refused_with("patch_embed", "pixel_values", pixel_values=torch.empty(2, 2, 0, 28, 28),
                             patch_weight=torch.empty(64, 0, 14, 14))
            """,
            "tiles of no image": """
                tiles = 2**40
                grads, _ = call("patch_embed_backward", changed(
                    "patch_embed_backward", grad_out=torch.empty(0, tiles, 16, 64),
                    tokens=torch.empty(0, tiles, 5, 64),
                    aspect_ratio_ids=torch.empty(0, dtype=torch.int64),
                    tile_position_embedding=torch.empty(0, tiles * 5 * 64),
                    pre_tile_embedding=torch.empty(0, tiles * 64)))
                assert all((g == 0).all() for g in grads)
            """,
            "dimensions of nothing": """
                for shape in ((2, 0, 3, 8), (0, 2**20, 2**30, 8), (2**20, 2**30, 0, 2**10, 8), (0, 2**60)):
                    x = torch.empty(shape)
                    assert op.swiglu(x).shape == (*shape[:-1], shape[-1] // 2)
                    assert op.gated_residual(x, x, randn(1), None).shape == shape
                    if shape[-1] == 8:
                        assert op.rms_norm(x, randn(8), 1e-5).shape == shape
                        grads = op.rms_norm_backward(x, x, randn(8), 1e-5)
                        assert (grads[1] == 0).all()
            """,
        }
    )


def test_seeds_steps_and_logits() -> None:
    """What is drawn is a token of the row or -1, and the reference's."""
    run(
        {
            "seeds and steps": """
                ends = torch.tensor([-(2**63), -1, 0, 2**63 - 1])
                logits = randn(4, 40)
                options = {"temperature": doubles(0.7, 4), "top_k": torch.full((4,), 5),
                           "top_p": doubles(0.9, 4), "min_p": doubles(0.01, 4)}
                for steps in (ends, ends.flip(0)):
                    found = m.sample(logits, ends, steps, **options)[0]
                    assert torch.equal(found, reference.sample(logits, ends, steps, **options)[0])
                    assert ((found >= 0) & (found < 40)).all()
            """,
            "logits": """
                for value in (float("nan"), float("inf"), float("-inf"), 3e38, -3e38):
                    one = randn(2, 40)
                    one[:, 7] = value
                    for spread in (torch.full((2, 40), value), one):
                        for temperature in (1.0, 1e-30, 1e-45, 3e38):
                            args = spread, torch.tensor([1, 2]), torch.tensor([3, 3])
                            found, likeliest, logprobs = m.sample(
                                *args, temperature=doubles(temperature), top_k=torch.tensor([5, 5]),
                                top_p=doubles(0.5), min_p=doubles(0.1), repetition_penalty=doubles(1.3),
                                seen=spread > 0, frequency_penalty=doubles(3e38),
                                counts=torch.full((2, 40), 2**31 - 1, dtype=torch.int32),
                                num_likeliest=torch.tensor([20, 0]))
                            assert ((found >= -1) & (found < 40)).all(), found
                            assert ((likeliest >= -1) & (likeliest < 40)).all(), likeliest
                            assert logprobs[found < 0].isnan().all()
            """,
            "options of the reference": """
                args = randn(2, 9), torch.tensor([1, 2]), torch.tensor([3, 3])
                for name, value in (("temperature", -1.0), ("temperature", float("nan")),
                                    ("temperature", 1e-60), ("top_p", 1.5), ("min_p", float("nan"))):
                    for sample in (m.sample, reference.sample):
                        refused(name, sample, *args, **{name: doubles(value)})
            """,
        }
    )


def test_sequences_without_rows_cost_nothing() -> None:
    """A million of them, and max_seqlen at its default, the number of rows."""
    if SIMULATED:
        pytest.skip("blocks of empty sequences are what the simulation takes its time for")
    run(
        {
            "rotary": """
                lengths = torch.zeros(10**6, dtype=torch.int32)
                lengths[::100] = 2
                bounds = torch.cat((ints(0), lengths.cumsum(0, dtype=torch.int32)))
                q = randn(20000, 1, 8, requires_grad=True)
                k, v = q.detach().clone(), q.detach().clone()
                angles = torch.zeros(20000, 4)
                out = m.rotary_attention(q, k, v, angles + 1, angles, cu_seqlens=bounds)
                out.sum().backward()
                same(out[::2], v[::2])
                assert (q.grad[::2].abs() < 1e-4).all()
            """
        }
    )


# What the reference takes: the layout is all one to it, and rows after the last bound are zeros as on CUDA.
TAKEN = ("has strides", "is int64", "ends early", "is expanded", "has one bound")


def test_the_reference_refuses_the_same_tables() -> None:
    setup = """
        def plainly(name, pattern, **arguments):
            from op_calls import arguments_of
            refused(pattern, getattr(reference, name), **{**arguments_of(name), **arguments})
    """
    cases = {
        f"{name} {what}": f"plainly({name!r}, 'cu_seqlens', cu_seqlens={bounds})"
        for name in ("rotary_attention", "cross_attention", "rotary_attention_cached")
        for what, bounds in BOUNDS.items()
        if what not in TAKEN
    }
    for lengths in ("-1, 5", "LEAST, 5", "MOST, 5", "0, MOST", "0, 29", "0"):
        cases[f"lengths {lengths}"] = (
            f"plainly('rotary_attention_cached', 'cache_lens', cache_lens=ints({lengths}))"
        )
    for pages in ("-1, 1, 3, 2", "4, 1, 3, 2", "0, 1, LEAST, 2", "0, 1, MOST, 2"):
        cases[f"pages {pages}"] = (
            f"plainly('rotary_attention_cached', 'page_table', page_table=ints({pages}).view(2, 2))"
        )
    cases["an expanded cache"] = (
        "plainly('rotary_attention_cached', 'k_cache', k_cache=randn(1, 2, 16, 64).expand(4, 2, 16, 64))"
    )
    for slots in ("3, 2, 1, -1", "0, -2, 1, -1", "0, LEAST, 1, -1", "0, 2, MOST, -1"):
        cases[f"slots {slots}"] = (
            f"plainly('cross_attention', 'tile_table', tile_table=ints({slots}).view(2, 2))"
        )
    for ids in ("-1, 0", "0, 3", "0, 2**62"):
        cases[f"ids {ids}"] = (
            f"plainly('patch_embed', 'aspect_ratio_ids', aspect_ratio_ids=torch.tensor([{ids}]))"
        )
    run({name: dedent(setup) + "\n" + code for name, code in cases.items()})


def test_tensors_without_dimensions_by_the_public_names() -> None:
    run(
        {
            name: f"""
            one = torch.tensor(1.0)
            for shape in ((), (8,), (2, 8), (2, 2, 0), (1, 2, 2, 0)):
                x = torch.zeros(shape)
                refused("q must be|head_dim", m.{name}, x, *[x] * {count}, **dict({options}))
            """
            for name, count, options in (
                ("rotary_attention", 4, ""),
                ("cross_attention", 2, ""),
                ("vision_attention", 2, ""),
                ("rotary_attention_cached", 9, "max_seqlen=1"),
            )
        }
        | {
            "loss": "refused('x must', m.linear_cross_entropy, *[torch.tensor(1.0)] * 2, torch.tensor(1))"
        }
    )
