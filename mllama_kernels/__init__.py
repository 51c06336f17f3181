"""Kernels for Llama 3.2 Vision on CPU and CUDA, as ordinary torch functions.

:mod:`mllama_kernels.reference` has the same functions in plain PyTorch.
"""

from mllama_kernels import _dispatch, reference
from mllama_kernels.cross_attention import cross_attention
from mllama_kernels.gated_residual import gated_residual
from mllama_kernels.linear import linear
from mllama_kernels.linear_cross_entropy import linear_cross_entropy
from mllama_kernels.patch_embed import patch_embed
from mllama_kernels.quantize import quantize
from mllama_kernels.quantized_linear import quantized_linear, quantized_rows
from mllama_kernels.quantized_tensor import QuantizedTensor
from mllama_kernels.rms_norm import add_rms_norm, rms_norm
from mllama_kernels.rotary_attention import rotary_attention, rotary_attention_cached
from mllama_kernels.sample import sample
from mllama_kernels.skinny_linear import skinny_linear
from mllama_kernels.swiglu import swiglu
from mllama_kernels.vision_attention import vision_attention

__all__ = [
    "QuantizedTensor",
    "add_rms_norm",
    "cross_attention",
    "gated_residual",
    "linear",
    "linear_cross_entropy",
    "patch_embed",
    "quantize",
    "quantized_linear",
    "quantized_rows",
    "reference",
    "rms_norm",
    "rotary_attention",
    "rotary_attention_cached",
    "sample",
    "skinny_linear",
    "swiglu",
    "vision_attention",
]

_dispatch.check_disabled()
