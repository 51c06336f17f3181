"""One small call of every op, with every argument it takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mllama_kernels import QuantizedTensor


def arguments_of(name: str, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Every argument of an op by name, in its order; none has its default value."""
    return {key: _on(value, device) for key, value in _CALLS[name]().items()}


def _on(value: Any, device: torch.device | str) -> Any:
    return value.to(device) if isinstance(value, Tensor | QuantizedTensor) else value


def _norm() -> dict[str, Any]:
    return {"x": torch.randn(3, 64), "weight": torch.randn(64), "eps": 0.25}


def _add_norm() -> dict[str, Any]:
    mask = torch.tensor([True, False, True])
    return {
        "x": torch.randn(3, 64),
        "residual": torch.randn(3, 64),
        "weight": torch.randn(64),
        "eps": 0.25,
        "gate": torch.randn(1),
        "row_mask": mask,
    }


def _gated_residual() -> dict[str, Any]:
    call = _add_norm()
    return {name: call[name] for name in ("x", "residual", "gate", "row_mask")}


def _skinny_linear() -> dict[str, Any]:
    return {
        "x": torch.randn(3, 64),
        "weight": torch.randn(32, 64),
        "norm_weight": torch.randn(64),
        "eps": 0.25,
        "residual": torch.randn(3, 16),
        "gate": torch.randn(1),
        "row_mask": torch.tensor([True, False, True]),
        "swiglu": True,
        "weight_is_constant": True,
    }


def _quantized(rows: int) -> QuantizedTensor:
    data = torch.randint(-127, 128, (rows, 64), dtype=torch.int8)
    return QuantizedTensor.from_parts("int8", {"data": data, "scale": torch.rand(rows) / 1000})


def _quantized_linear() -> dict[str, Any]:
    call = _skinny_linear()
    del call["weight"]
    call = {"x": call.pop("x"), "weight": _quantized(32), "bias": torch.randn(32), **call}
    return {**call, "activations": None}  # others have no gradient, and none on CUDA


def _heads(rows: int, heads: int) -> Tensor:
    return torch.randn(rows, heads, 64)


def _rotary(rows: int = 7) -> dict[str, Any]:
    angle = torch.randn(rows, 32)
    return {
        "q": _heads(rows, 4),
        "k": _heads(rows, 2),
        "v": _heads(rows, 2),
        "cos": angle.cos(),
        "sin": angle.sin(),
    }


def _bounds() -> Tensor:
    return torch.tensor([0, 3, 7], dtype=torch.int32)


def _rotary_attention() -> dict[str, Any]:
    options = {"softmax_scale": 0.2, "interleaved": True, "cu_seqlens": _bounds(), "max_seqlen": 4}
    return {**_rotary(), **options}


def _rotary_cached() -> dict[str, Any]:
    return {
        **_rotary(),
        "k_cache": torch.randn(4, 2, 16, 64),
        "v_cache": torch.randn(4, 2, 16, 64),
        "page_table": torch.tensor([[0, 1], [3, 2]], dtype=torch.int32),
        "cu_seqlens": _bounds(),
        "cache_lens": torch.tensor([0, 5], dtype=torch.int32),
        "max_seqlen": 4,
        "softmax_scale": 0.2,
        "interleaved": True,
    }


def _cross_attention() -> dict[str, Any]:
    return {
        "q": _heads(7, 4),
        "k": torch.randn(3, 5, 2, 64),
        "v": torch.randn(3, 5, 2, 64),
        "tile_mask": torch.rand(7, 2) < 0.7,
        "q_norm_weight": torch.randn(64),
        "eps": 0.25,
        "softmax_scale": 0.2,
        "tile_table": torch.tensor([[0, 2], [1, -1]], dtype=torch.int32),
        "cu_seqlens": _bounds(),
        "max_seqlen": 4,
    }


def _vision_attention() -> dict[str, Any]:
    q, k, v = torch.randn(3, 2, 9, 2, 64)
    return {
        "q": q,
        "k": k,
        "v": v,
        "padding": torch.rand(2, 9) < 0.3,
        "softmax_scale": 0.2,
    }


def _patch_embed() -> dict[str, Any]:
    images, tiles, size, patch, width, ratios = 2, 2, 28, 14, 64, 3
    tokens = (size // patch) ** 2 + 1
    return {
        "pixel_values": torch.randn(images, tiles, 3, size, size),
        "aspect_ratio_ids": torch.tensor([1, 2]),
        "patch_weight": torch.randn(width, 3, patch, patch) / 24,
        "class_embedding": torch.randn(width),
        "position_embedding": torch.randn(tokens, width),
        "position_gate": torch.randn(1),
        "tile_position_embedding": torch.randn(ratios, tiles * tokens * width),
        "pre_tile_embedding": torch.randn(ratios, tiles * width),
        "pre_tile_gate": torch.randn(1),
        "norm_weight": torch.randn(width),
        "norm_bias": torch.randn(width),
        "eps": 0.25,
        "pad_to": 16,
    }


def _linear_cross_entropy() -> dict[str, Any]:
    return {
        "x": torch.randn(5, 64),
        "weight": torch.randn(24, 64) / 8,
        "labels": torch.tensor([3, 7, -1, 22, 9]),
        "ignore_index": -1,
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "reduction": "sum",
        "masked_token": 22,
    }


def _sample() -> dict[str, Any]:
    def doubles(*numbers: float) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64)

    return {
        "logits": torch.randn(3, 100),
        "seeds": torch.tensor([3, 5, 8]),
        "steps": torch.tensor([2, 0, 7]),
        "temperature": doubles(0.7, 0, 1.5),
        "top_k": torch.tensor([40, 0, 90]),
        "top_p": doubles(0.9, 0.8, 1),
        "min_p": doubles(0.01, 0, 0.02),
        "repetition_penalty": doubles(1.2, 0.8, 1),
        "seen": torch.rand(3, 100) < 0.5,
        "presence_penalty": doubles(0.5, -0.5, 0),
        "frequency_penalty": doubles(0, 0.3, -0.1),
        "counts": torch.randint(0, 3, (3, 100), dtype=torch.int32),
        "bias_tokens": torch.tensor([[3, 50, 99], [-1, -1, -1], [40, 41, -1]]),
        "bias": torch.randn(3, 3),
        "allowed": torch.randint(-(2**31), 2**31, (3, 4), dtype=torch.int32),
        "num_likeliest": torch.tensor([20, 20, 20]),
    }


_CALLS = {
    "rms_norm": _norm,
    "add_rms_norm": _add_norm,
    "gated_residual": _gated_residual,
    "swiglu": lambda: {"gate_up": torch.randn(3, 64)},
    "skinny_linear": _skinny_linear,
    "quantized_linear": _quantized_linear,
    "quantized_rows": lambda: {
        "ids": torch.tensor([4, 0, 9]),
        "weight": _quantized(10),
        "dtype": torch.bfloat16,
    },
    "rotary_attention": _rotary_attention,
    "rotary_attention_cached": _rotary_cached,
    "cross_attention": _cross_attention,
    "vision_attention": _vision_attention,
    "patch_embed": _patch_embed,
    "linear_cross_entropy": _linear_cross_entropy,
    "sample": _sample,
}
