"""The searches of quantize beside llama.cpp's."""

from __future__ import annotations

import pytest
import torch
from ggml_library import ggml_blocks
from quantizer_weights import distributions, relative_error
from safetensors.torch import load_file

import mllama_kernels
from mllama.demo import checkpoint_path
from mllama_kernels import QuantizedTensor, _library

pytestmark = pytest.mark.skipif(
    _library.simulated, reason="hours on simulated CUDA kernels, which have the bits of the CPU"
)
# By how much the error must be below ggml's, in the mean over what is tried.
MEAN = {"q4_k": 0.995, "q6_k": 0.985}


def errors(weight, encoding: str, importance=None) -> tuple[float, float]:
    """Of quantize, and of ggml."""
    ours = mllama_kernels.quantize(weight, encoding, importance)
    theirs = QuantizedTensor.from_blocks(ggml_blocks(weight, encoding, importance), encoding)
    measured = (relative_error(weight, q.dequantize(), importance) for q in (ours, theirs))
    return tuple(measured)


@pytest.mark.parametrize("encoding", MEAN)
def test_the_error_is_below_ggmls(encoding):
    ratios = {}
    for name, weight in distributions(64, 2048).items():
        ours, theirs = errors(weight, encoding)
        ratios[name] = ours / theirs
    assert max(ratios.values()) <= 1, ratios
    assert sum(ratios.values()) / len(ratios) <= MEAN[encoding], ratios


@pytest.mark.parametrize("encoding", MEAN)
def test_so_it_is_on_the_demo_model(encoding):
    """Whose rows of 128 lie one after another, as rows of 256."""
    ratios = []
    for path in sorted(checkpoint_path().glob("*.safetensors")):
        for name, weight in load_file(path).items():
            if weight.dim() == 2 and weight.numel() >= 1 << 14 and weight.numel() % 256 == 0:
                ours, theirs = errors(weight.float().reshape(-1, 256), encoding)
                assert ours <= theirs, name
                ratios.append(ours / theirs)
    assert len(ratios) > 5 and sum(ratios) / len(ratios) <= MEAN[encoding]


@pytest.mark.parametrize("encoding", ["q4_0", "q4_k", "q6_k"])
def test_the_weighted_error_is_below_ggmls(encoding):
    importance = (1.5 * torch.randn(2048)).exp()
    for name, weight in distributions(32, 2048).items():
        ours, theirs = errors(weight, encoding, importance / importance.mean())
        assert ours <= theirs, name
