"""Random Mllama models and inputs, and `transformers`' model with the same weights."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

import mllama
import mllama_kernels._library as library

RATIOS = mllama.MllamaVisionConfig().supported_aspect_ratios
# One tile side per number of zero tokens that can occur: 7, 6 and 3 (grids of 4, 3 and 2 patches).
TILE_SIDES = (56, 42, 28)
PAD_TOKEN, FIRST_TEXT_TOKEN = 0, 3

_why_not = f"the compiled ops are not there: {library.missing}" if library.missing else ""
if library.simulated:
    _why_not = "this build simulates the CUDA kernels, too slowly for whole models"
_needs_library = pytest.mark.skipif(bool(_why_not), reason=_why_not)
_needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device on this machine"
)
BACKENDS = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("kernels", "cpu"), id="kernels", marks=_needs_library),
    pytest.param(
        ("kernels", "cuda"), id="kernels-cuda", marks=[_needs_library, _needs_gpu, pytest.mark.gpu]
    ),
]


@dataclass
class Shape:
    """The sizes of a random model."""

    tile_side: int = 56
    vision_heads: int = 2
    vision_head_dim: int = 64
    local_layers: int = 4
    global_layers: int = 2
    taps: tuple[int, ...] = (0, 2, 3)
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    intermediate: int = 160
    layers: int = 4
    cross: tuple[int, ...] = (1, 3)
    vocab: int = 96
    rope_factor: float | None = 8.0

    @classmethod
    def draw(cls, rng: random.Random) -> Shape:
        layers, local_layers = rng.randint(3, 5), rng.randint(2, 5)
        kv_heads = rng.choice([1, 2, 3])
        return cls(
            tile_side=rng.choice(TILE_SIDES),
            vision_heads=rng.choice([1, 2, 3]),
            vision_head_dim=rng.choice([64, 80, 128]),
            local_layers=local_layers,
            global_layers=rng.randint(1, 2),
            taps=tuple(
                sorted(rng.sample(range(local_layers), rng.randint(1, min(3, local_layers))))
            ),
            heads=kv_heads * rng.choice([1, 2, 4, 8] if kv_heads == 1 else [1, 2]),
            kv_heads=kv_heads,
            head_dim=rng.choice([64, 80, 128]),
            intermediate=rng.choice([96, 168, 256]),
            layers=layers,
            cross=tuple(sorted(rng.sample(range(1, layers), rng.randint(1, layers - 2)))),
            rope_factor=rng.choice([None, 8.0]),
        )

    def configs(self) -> dict[str, Any]:
        """Keyword arguments of `MllamaConfig`, ours or that of `transformers`."""
        width = self.vision_heads * self.vision_head_dim
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
        if self.rope_factor:
            rope |= {"rope_type": "llama3", "factor": self.rope_factor, "low_freq_factor": 1.0}
            rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 128}
        vision = {
            "hidden_size": width,
            "attention_heads": self.vision_heads,
            "num_hidden_layers": self.local_layers,
            "num_global_layers": self.global_layers,
            "intermediate_size": 2 * width,
            "image_size": self.tile_side,
            "intermediate_layers_indices": list(self.taps),
            "vision_output_dim": width * (1 + len(self.taps)),
        }
        text = {
            "vocab_size": self.vocab,
            "hidden_size": self.heads * self.head_dim,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "cross_attention_layers": list(self.cross),
            "max_position_embeddings": 1024,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": PAD_TOKEN,
            "rope_parameters": rope,
        }
        return {"vision_config": vision, "text_config": text, "image_token_index": self.vocab}


def randomise(model: nn.Module) -> None:
    """Weights that keep activations near one, and open gates: with closed ones no image matters."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            last = name.rsplit(".", 1)[-1]
            if "gate" in last:
                parameter.normal_()
            elif "norm" in name:
                parameter.normal_(1.0 if last == "weight" else 0.0, 0.2)
            elif parameter.dim() > 1 and "embed" not in name:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(0.0, 0.5)


def hf_model(shape: Shape, attention: str = "eager") -> transformers.MllamaForConditionalGeneration:
    config = transformers.MllamaConfig(**shape.configs())
    config._attn_implementation = attention
    model = transformers.MllamaForConditionalGeneration(config).eval()
    randomise(model)
    return model


def cast_hf(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast like `from_pretrained(dtype=...)`: the rotary frequencies stay float32."""
    frequencies = {n: b.clone() for n, b in model.named_buffers() if "inv_freq" in n}
    model.to(dtype)
    for name, buffer in frequencies.items():
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, buffer)
    return model


def our_model(
    shape: Shape,
    hf: nn.Module,
    backend: tuple[str, str] = ("reference", "cpu"),
    semantics: Any = "transformers",
    dtype: torch.dtype = torch.float32,
) -> mllama.MllamaForConditionalGeneration:
    config = mllama.MllamaConfig(**shape.configs())
    model = mllama.MllamaForConditionalGeneration(config, backend=backend[0], semantics=semantics)
    model.load_state_dict(hf.state_dict())
    return model.to(backend[1], dtype).eval()


class Counting:
    """The ops of a module, counted by name."""

    def __init__(self, ops: Any, counts: Counter[str]) -> None:
        self._ops, self._counts = ops, counts

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._ops, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._counts[name] += 1
            return function(*args, **kwargs)

        return counted


@dataclass
class Prompt:
    """One sequence: how many tokens, where its image tokens are, and the ratio id of each image."""

    length: int
    image_positions: tuple[int, ...] = ()
    ratio_ids: tuple[int, ...] = ()

    @classmethod
    def draw(cls, rng: random.Random, longest: int, images: int) -> Prompt:
        length = rng.randint(max(1, images), longest)
        positions = tuple(sorted(rng.sample(range(length), images)))
        return cls(length, positions, tuple(rng.randint(1, len(RATIOS)) for _ in positions))


def batch_of(shape: Shape, prompts: list[Prompt], padding: str = "left") -> dict[str, Tensor]:
    """Inputs as the processor of `transformers` makes them, with random pixels and text.

    padding: "left", "right", or "holes" (padding columns among the tokens).
    """
    longest = max(p.length for p in prompts)
    images = max(len(p.ratio_ids) for p in prompts)
    ids = torch.full((len(prompts), longest), PAD_TOKEN)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        text = torch.randint(FIRST_TEXT_TOKEN, shape.vocab, (prompt.length,))
        text[list(prompt.image_positions)] = shape.vocab
        columns = torch.arange(prompt.length)
        if padding == "left":
            columns += longest - prompt.length
        elif padding == "holes":
            columns = torch.randperm(longest)[: prompt.length].sort().values
        ids[row, columns], mask[row, columns] = text, 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if not images:
        return batch
    ratio_ids = torch.zeros(len(prompts), images, dtype=torch.int64)
    tile_mask = torch.zeros(len(prompts), images, 4, dtype=torch.int64)
    tile_mask[:, :, 0] = 1
    pixels = torch.zeros(len(prompts), images, 4, 3, shape.tile_side, shape.tile_side)
    tiles = []
    for row, prompt in enumerate(prompts):
        tiles.append([RATIOS[i - 1][0] * RATIOS[i - 1][1] for i in prompt.ratio_ids])
        for image, (ratio_id, count) in enumerate(zip(prompt.ratio_ids, tiles[-1])):
            ratio_ids[row, image], tile_mask[row, image, :count] = ratio_id, 1
            pixels[row, image, :count] = torch.randn_like(pixels[row, image, :count])
    ranges = [get_cross_attention_token_mask(row, shape.vocab) for row in ids.tolist()]
    dense = convert_sparse_cross_attention_mask_to_dense(ranges, tiles, 4, longest)
    return batch | {
        "pixel_values": pixels,
        "aspect_ratio_ids": ratio_ids,
        "aspect_ratio_mask": tile_mask,
        "cross_attention_mask": torch.from_numpy(dense),
    }


def to(batch: dict[str, Any], device: str | torch.device) -> dict[str, Any]:
    return {
        name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()
    }


def with_gates_as_one(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients, those of all gates as one: each is one sum of terms that cancel, with any relative
    error, but not all of them do at once."""
    single = [name for name, grad in grads.items() if grad.numel() == 1]
    found = {name: grad for name, grad in grads.items() if name not in single}
    return found | {"gates": torch.cat([grads[name].flatten() for name in single])}


def assert_close(
    actual: Tensor, expected: Tensor, where: Tensor | None = None, rtol: float = 1e-4
) -> None:
    """The largest difference is at most ``rtol`` times the largest value, where ``where`` is true."""
    actual, expected = actual.cpu(), expected.cpu()
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if where is not None:
        actual, expected = actual[where.cpu().bool()], expected[where.cpu().bool()]
    assert actual.isfinite().all() and expected.isfinite().all()
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error <= rtol, f"relative error {error:.2e}, allowed {rtol:.0e}"
