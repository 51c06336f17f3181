"""Imports the installed library under this Python and torch and compares every op with its reference."""

from __future__ import annotations

import sys

import torch

import mllama_kernels
from mllama_kernels import _library, reference

assert _library.missing is None, _library.missing
torch.manual_seed(0)
x, residual, weight, gate = torch.randn(3, 64), torch.randn(3, 64), torch.randn(64), torch.randn(1)
q, kv = torch.randn(1, 5, 4, 64), torch.randn(1, 5, 2, 2, 64)
cos, sin = torch.randn(1, 5, 32), torch.randn(1, 5, 32)
tiles = torch.randn(1, 2, 9, 2, 2, 64)
padding = torch.tensor([[False, False, True, False, True]])
calls = {
    "rms_norm": (x, weight),
    "add_rms_norm": (x, residual, weight),
    "gated_residual": (x, residual, gate),
    "swiglu": (x,),
    "rotary_attention": (q, kv[:, :, 0], kv[:, :, 1], cos, sin),
    "cross_attention": (q, tiles[..., 0, :, :], tiles[..., 1, :, :]),
    "vision_attention": (q, q + 1, q - 1, padding),
}
for name, args in calls.items():
    got, want = getattr(mllama_kernels, name)(*args), getattr(reference, name)(*args)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}: {len(calls)} ops agree")
