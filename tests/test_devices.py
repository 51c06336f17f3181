"""What a device refuses or cannot hold: an error reaches one op, smaller clusters give the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mllama_kernels
from mllama_kernels import _library

HEAD_DIM = 64


def rows(*shape: int, device: Any = "cpu") -> list[torch.Tensor]:
    return [torch.randn(*shape, HEAD_DIM, device=device) for _ in range(3)]


def test_a_refused_launch_is_not_the_next_ones(device):
    """More tiles than shared memory has room for are one op's error; the next one runs as usual."""
    if device.type == "cpu" and not _library.simulated:
        pytest.skip("a launch is of a CUDA device")
    q, k, v = rows(1, 3, 1, device=device)
    tables = torch.randn(2, 1, 3, HEAD_DIM // 2, device=device).unbind()
    expected = mllama_kernels.rotary_attention(q, k, v, *tables)
    many = torch.zeros(1, 20000, 1, 1, HEAD_DIM, device=device)
    for after in (
        lambda: mllama_kernels.rotary_attention(q, k, v, *tables).equal(expected),
        lambda: mllama_kernels.vision_attention(q, k, v).isfinite().all(),
        lambda: mllama_kernels.cross_attention(q, k[:, None], v[:, None]).isfinite().all(),
    ):
        with pytest.raises(RuntimeError, match=r"cross_attention: .* bytes of shared memory"):
            mllama_kernels.cross_attention(q, many, many)
        assert after()


def surplus_calls(device: torch.device) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """A sequence of five rows and one of two, with room for three rows each or for one."""
    bounds = torch.tensor([0, 5, 7], dtype=torch.int32, device=device)
    q, k, v = rows(7, 1, device=device)
    tables = torch.randn(2, 7, HEAD_DIM // 2, device=device).unbind()
    packed = {"cu_seqlens": bounds, "max_seqlen": 3}
    pool = torch.randn(2, 20, 1, HEAD_DIM, device=device)
    slots = torch.tensor([[0], [1]], dtype=torch.int32, device=device)
    caches = torch.zeros(2, 2, 1, 16, HEAD_DIM, device=device).unbind()
    past = torch.tensor([4, 2], dtype=torch.int32, device=device)
    cached = (q, k, v, *tables, *caches, slots, bounds, past)
    return [
        ("rotary_attention", (q, k, v, *tables), packed),
        ("rotary_attention_cached", cached, {"max_seqlen": 3}),
        ("rotary_attention_cached", cached, {"max_seqlen": 1}),
        ("cross_attention", (q, pool, pool), {**packed, "tile_table": slots}),
        ("cross_attention", (q, pool, pool), {**packed, "tile_table": slots, "max_seqlen": 1}),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", range(5))
def test_rows_beyond_max_seqlen(case, dtype, device):
    """Refused where the host can look, else of no sequence: zeros, no gradient, nothing appended."""
    name, args, kwargs = surplus_calls(device)[case]
    args = tuple(a.to(dtype) if a.is_floating_point() else a for a in args)
    function = getattr(mllama_kernels, name)
    if device.type == "cpu":
        with pytest.raises(RuntimeError, match="sequence 0 has 5 rows; max_seqlen says 0 to"):
            function(*args, **kwargs)
        return
    surplus = torch.ones(7, dtype=torch.bool, device=device)
    for begin, end in ((0, 5), (5, 7)):
        surplus[begin : min(end, begin + kwargs["max_seqlen"])] = False
    junk = torch.full((1 << 20,), float("nan"), device=device)  # what fresh memory will hold
    del junk
    leaves = [a.detach().requires_grad_(a.is_floating_point()) for a in args[:3]]
    out = function(*leaves, *args[3:], **kwargs)
    assert out[surplus].eq(0).all() and out[~surplus].ne(0).any(-1).all()
    if name == "rotary_attention_cached":
        written = args[5].ne(0).any(-1).sum(dim=(1, 2))
        assert written.tolist() == [min(n, kwargs["max_seqlen"]) for n in (5, 2)]
        return
    if kwargs["max_seqlen"] == 1:
        return
    out.backward(torch.randn_like(out))
    for leaf in leaves:
        assert leaf.grad.isfinite().all()
        if leaf.shape[0] == 7:
            assert leaf.grad[surplus].eq(0).all()


CLUSTER_SCRIPT = """
import sys
import torch
import mllama_kernels as ops

torch.manual_seed(0)
def randn(*shape):
    return torch.randn(*shape).to(torch.bfloat16)
found = {}
for heads, group, head_dim in ((2, 4, 64), (1, 8, 128)):
    q, k = randn(1, heads * group, head_dim), randn(2, 1, heads, head_dim)
    cos, sin = randn(2, 1, head_dim // 2)
    caches = randn(2, 8, heads, 64, head_dim)
    table = torch.arange(8, dtype=torch.int32)[None]
    bounds, past = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([300], dtype=torch.int32)
    found[f"decode {group}"] = ops.rotary_attention_cached(
        q, *k, cos, sin, *caches, table, bounds, past, max_seqlen=1)
    tiles = randn(2, 1, 4, 40, heads, head_dim)
    found[f"cross decode {group}"] = ops.cross_attention(q[None], *tiles)
    found[f"cross {group}"] = ops.cross_attention(randn(1, 3, heads * group, head_dim), *tiles)
logits = torch.randn(1, 40000)
one, doubles = torch.tensor([1]), torch.ones(1, dtype=torch.float64)
found["sample"], found["likeliest"], found["logprobs"] = ops.sample(
    logits, 5 * one, one, temperature=2 * doubles, top_p=0.9 * doubles, num_likeliest=20 * one)
found["patch_embed"] = ops.patch_embed(
    randn(1, 1, 3, 4, 4), torch.tensor([1]), randn(1280, 3, 2, 2), randn(1280), randn(5, 1280),
    randn(1), randn(2, 5 * 1280), randn(2, 1280), randn(1), randn(1280), randn(1280))
torch.save(found, sys.argv[1])
"""


def outcomes(folder: Path, multiprocessors: int) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Results of the script on a simulated Hopper of so many multiprocessors, and its launches."""
    stats, results = folder / f"{multiprocessors}.jsonl", folder / f"{multiprocessors}.pt"
    device = {"CUDASIM_ARCH": "90", "CUDASIM_SMS": str(multiprocessors)}
    env = {**os.environ, **device, "CUDASIM_STATS": str(stats)}
    command = [sys.executable, "-c", CLUSTER_SCRIPT, str(results)]
    subprocess.run(command, env=env, check=True, cwd=folder)
    return torch.load(results), [json.loads(line) for line in stats.read_text().splitlines()]


@pytest.mark.skipif(
    not _library.simulated, reason="needs devices of a size to choose: a simulated build"
)
def test_clusters_are_no_larger_than_the_device(tmp_path):
    """What fits is launched, to the same bits; where none fits, another kernel comes to the same values."""
    expected, launches = outcomes(tmp_path, 132)
    assert max(launch["cluster"][0] for launch in launches) == 16
    for multiprocessors in (1, 2, 3):
        actual, launches = outcomes(tmp_path, multiprocessors)
        for launch in launches:
            held = launch["blocks_per_sm_limit"] * multiprocessors
            assert launch["cluster"][0] <= held, launch["kernel"]
        other_kernels = {"patch_embed"}
        if multiprocessors == 1:  # one block cannot keep the results of eight heads of 128
            other_kernels |= {"decode 8", "cross decode 8"}
        for name, result in actual.items():
            if name in other_kernels:
                torch.testing.assert_close(result, expected[name], rtol=0.02, atol=0.02)
            else:
                assert result.equal(expected[name]), name
