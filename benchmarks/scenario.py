"""How large the benchmarked models and their inputs are, and what they have to multiply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

import mllama
from benchmarks import ceilings
from benchmarks.shapes import (
    HQ,
    PATCH,
    TILE,
    TILES,
    VISION_DIM,
    VISION_HEADS,
    VISION_WIDTH,
    VOCAB,
    D,
)

PAD = 128004
SMALL_VOCABULARY = VOCAB // 16
SMALLER_TILES = (TILE, 336, 224, 112)  # pixels; the first that a quick run has the time for


@dataclass(frozen=True)
class Layers:
    """How many layers of each kind; ``cross`` counts among ``text``, ``taps`` among ``local``."""

    text: int
    cross: tuple[int, ...]
    local: int
    global_: int
    taps: tuple[int, ...]

    def configs(self, vocabulary: int = VOCAB, tile: int = TILE) -> dict[str, Any]:
        """Keyword arguments of MllamaConfig, ours or that of `transformers`."""
        rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0}
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"original_max_position_embeddings": 8192}
        vision = {
            "image_size": tile,
            "num_hidden_layers": self.local,
            "num_global_layers": self.global_,
            "intermediate_layers_indices": list(self.taps),
            "vision_output_dim": VISION_WIDTH * (1 + len(self.taps)),
        }
        text = {
            "num_hidden_layers": self.text,
            "cross_attention_layers": list(self.cross),
            "rope_parameters": rope,
            "vocab_size": vocabulary,
            "pad_token_id": min(PAD, vocabulary - 1),
        }
        return {"vision_config": vision, "text_config": text, "image_token_index": vocabulary}


FULL = Layers(40, (3, 8, 13, 18, 23, 28, 33, 38), 32, 8, (3, 7, 15, 23, 30))
REDUCED = Layers(5, (3,), 1, 1, (0,))


@dataclass(frozen=True)
class Scenario:
    """One image of four tiles of ``tile`` pixels per row, ``prompt`` tokens with it, ``new`` after it."""

    batch: int
    prompt: int
    new: int
    tile: int = TILE

    @property
    def image_tokens(self) -> int:
        return TILES * ((self.tile // PATCH) ** 2 + 1)

    def sizes(self, layers: Layers) -> dict[str, int]:
        """What a row says of both."""
        smaller = {} if self.tile == TILE else {"tile pixels": self.tile}
        depth = {"text layers": layers.text, "vision layers": layers.local + layers.global_}
        return {"tiles": TILES, **smaller, **depth}


def scenarios(device: torch.device, quick: bool) -> list[Scenario]:
    if device.type == "cpu":  # the larger batches are about decoding: their images are small
        many = [Scenario(batch, 32, 8, SMALLER_TILES[-1]) for batch in (8, 16)]
        return [Scenario(1, 32, 8), *([] if quick else many)]
    if quick:
        return [Scenario(1, 32, 16), Scenario(1, 1024, 64)]
    many = (Scenario(batch, 1024, 64) for batch in (8, 32))
    return [Scenario(1, 32, 32), Scenario(1, 1024, 128), *many]


def products(model: Any, scenario: Scenario) -> tuple[int, int]:
    """Multiply-adds per row of a forward over useful tokens: of weights, and of attention by its masks."""
    text, vision = model.config.text_config, model.config.vision_config
    tokens, image = scenario.prompt, scenario.image_tokens
    weight_products = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or "embed" in name:
            continue
        reads_image = "vision" in name or "multi_modal" in name or "cross_attn.k_proj" in name
        reads_image = reads_image or "cross_attn.v_proj" in name
        weight_products += parameter.numel() * (image if reads_image else tokens)
    layers = vision.num_hidden_layers + vision.num_global_layers
    attention = len(text.self_attention_layers) * HQ * D * tokens * tokens // 2
    attention += len(text.cross_attention_layers) * HQ * D * tokens * image
    attention += layers * VISION_HEADS * VISION_DIM * image * image
    return weight_products, attention


def fitting(
    layers: Layers,
    scenario: Scenario,
    flops: Callable[[Any, Scenario], int],
    seconds: float,
    tflops: float,
) -> Scenario:
    """The scenario with the largest tiles whose ``flops`` take so many seconds, or with the smallest."""
    for tile in SMALLER_TILES:
        smaller = replace(scenario, tile=tile)
        with torch.device("meta"):
            config = mllama.MllamaConfig(**layers.configs(SMALL_VOCABULARY, tile))
            model = mllama.MllamaForConditionalGeneration(config)
        if flops(model, smaller) <= seconds * tflops * ceilings.TERA:
            break
    return smaller
