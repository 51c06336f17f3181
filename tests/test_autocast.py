"""In an autocast region every op takes arguments of several dtypes, as plain PyTorch does there."""

from __future__ import annotations

import pytest
import torch

import mllama_kernels

LOWER, WIDE = torch.bfloat16, torch.float32


def test_elementwise_ops_run_in_the_widest_dtype(device):
    lower, wide = torch.randn(3, 16, device=device, dtype=LOWER), torch.randn(3, 16, device=device)
    weight, gate = torch.randn(16, device=device), torch.randn(1, device=device)
    with torch.autocast(device.type, LOWER):
        results = {
            "rms_norm": mllama_kernels.rms_norm(lower, weight),
            "add_rms_norm": mllama_kernels.add_rms_norm(lower, wide, weight)[0],
            "gated_residual": mllama_kernels.gated_residual(lower, wide, gate),
        }
        assert mllama_kernels.swiglu(lower).dtype == LOWER
        assert mllama_kernels.swiglu(wide).dtype == WIDE
    as_wide = lower.float()
    expected = {
        "rms_norm": mllama_kernels.rms_norm(as_wide, weight),
        "add_rms_norm": mllama_kernels.add_rms_norm(as_wide, wide, weight)[0],
        "gated_residual": mllama_kernels.gated_residual(as_wide, wide, gate),
    }
    for name, result in results.items():
        assert result.dtype == WIDE and result.equal(expected[name]), name


def test_attentions_run_in_the_dtype_of_the_region(device):
    q, k, v = (torch.randn(1, 5, 2, 64, device=device, dtype=d) for d in (WIDE, LOWER, WIDE))
    angle = torch.randn(1, 5, 32, device=device)
    calls = [
        (mllama_kernels.rotary_attention, (q, k, v, angle.cos(), angle.sin())),
        (mllama_kernels.vision_attention, (q, k, v)),
        (mllama_kernels.cross_attention, (q, k.unsqueeze(1), v.unsqueeze(1))),
    ]
    for function, args in calls:
        with torch.autocast(device.type, LOWER):
            out = function(*args)
        assert out.dtype == LOWER and out.equal(function(*(a.to(LOWER) for a in args)))


def test_float64_stays(device):
    x = torch.randn(2, 8, dtype=torch.float64)
    if device.type == "cpu" and not mllama_kernels._library.simulated:
        with torch.autocast("cpu", LOWER):
            assert mllama_kernels.swiglu(x).dtype == torch.float64


def test_gradients_have_the_dtypes_of_the_arguments(device):
    x = torch.randn(3, 16, device=device, dtype=LOWER, requires_grad=True)
    with torch.autocast(device.type, LOWER):
        out = torch.compile(mllama_kernels.swiglu, fullgraph=True, backend="aot_eager")(x.float())
    out.sum().backward()
    assert out.dtype == WIDE and x.grad.dtype == LOWER


@pytest.mark.parametrize("dtype", [LOWER, torch.float16])
def test_the_region_says_which_dtype(device, dtype):
    q = torch.randn(1, 5, 2, 64, device=device)
    with torch.autocast(device.type, dtype):
        assert mllama_kernels.vision_attention(q, q, q).dtype == dtype
