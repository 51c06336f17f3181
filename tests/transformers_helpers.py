"""Tiny random models of `transformers` for the drop-in tests, in the words of its releases 4 and 5."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import model_helpers
import pytest
import torch
import transformers
from model_helpers import Shape
from torch import Tensor, nn

import mllama_kernels
import mllama_kernels._library as library
from mllama_kernels import _dispatch

V4 = transformers.__version__.startswith("4.")

_DIFFERENTIATED = (
    "rms_norm",
    "add_rms_norm",
    "gated_residual",
    "swiglu",
    "rotary_attention",
    "cross_attention",
    "vision_attention",
    "patch_embed",
)
_without = [op for op in _DIFFERENTIATED if not hasattr(torch.ops.mllama_kernels, f"{op}_backward")]
needs_backward = pytest.mark.skipif(
    bool(_without) and _dispatch.BACKEND != "reference",
    reason=f"no backward kernels of {', '.join(_without)}; MLLAMA_KERNELS_BACKEND=reference has them",
)


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """A text configuration as the installed release spells it."""
    if V4:
        rope = dict(config.pop("rope_parameters"))
        config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    return config


def mllama_config(shape: Shape, attention: str = "sdpa") -> transformers.MllamaConfig:
    configs = shape.configs()
    configs["text_config"] = _rope(configs["text_config"])
    return transformers.MllamaConfig(**configs, attn_implementation=attention)


def build(cls: type[nn.Module], config: Any) -> nn.Module:
    model = cls(config).eval()
    model_helpers.randomise(model)
    return model


def llama_config(attention: str = "sdpa", **changes: Any) -> transformers.LlamaConfig:
    sizes = {
        "vocab_size": 96,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    return transformers.LlamaConfig(**_rope(sizes | changes), attn_implementation=attention)


def llava_config(attention: str = "sdpa") -> transformers.LlavaConfig:
    """Images of 9 patches; image tokens are number 95."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=192,
        num_attention_heads=2,
        num_hidden_layers=3,
        image_size=42,
        patch_size=14,
    )
    return transformers.LlavaConfig(
        vision_config=vision,
        text_config=llama_config(attention),
        image_token_index=95,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        attn_implementation=attention,
    )


def count_ops(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each public op is called from now on."""
    calls: Counter[str] = Counter()

    def counting(name: str) -> Any:
        op = getattr(mllama_kernels, name)

        @functools.wraps(op)
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return op(*args, **kwargs)

        return counted

    for name in library.OPS:
        monkeypatch.setattr(mllama_kernels, name, counting(name))
    return calls


def assert_same(actual: Tensor, expected: Tensor, mask: Tensor | None = None) -> None:
    """Equal but for the order of float32 sums: some ten layers, each with sums over a few hundred
    products that round by 6e-8 and add up at random, differ by less than 1e-5 of the largest value."""
    model_helpers.assert_close(actual, expected, mask, rtol=1e-5)


def text_batch(rows: int = 2, length: int = 20, padding: str = "none") -> dict[str, Tensor]:
    """Random tokens below 95, with padding "left", "right", "around", "between" them or "none"."""
    ids = torch.randint(3, 95, (rows, length))
    mask = torch.ones_like(ids)
    before, after = (padding in kinds for kinds in (("left", "around"), ("right", "around")))
    if before:
        mask[0, :5] = 0
    if after:
        mask[0, -3:] = 0
    if padding == "between":
        mask[0, 7:9] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Within 1e-4 of each gradient's largest value; where terms cancel, of the largest of all, 1e-6."""
    assert actual.keys() == expected.keys()
    largest = max(g.abs().max() for g in expected.values())
    for name, gradient in expected.items():
        error = (actual[name] - gradient).abs().max()
        assert error <= 1e-4 * gradient.abs().max() + 1e-6 * largest, (name, float(error))


cast = model_helpers.cast_hf
