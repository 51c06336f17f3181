"""The vision tower's gradients against those of `transformers`."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from model_helpers import (
    Prompt,
    Shape,
    assert_close,
    batch_of,
    hf_model,
    our_model,
    with_gates_as_one,
)

import mllama_kernels
import mllama_kernels._library as library
from mllama_kernels import reference

SHAPE = Shape(tile_side=56, local_layers=2, global_layers=1, taps=(0, 1))
PREFIXES = (
    "patch_embedding",
    "class_embedding",
    "gated_positional_embedding",
    "pre_tile_positional_embedding",
    "layernorm_pre",
)


def gradients(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tower = model.model.vision_model
    inputs = [batch[n] for n in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")]
    out = tower(*inputs).last_hidden_state
    weights = torch.linspace(-1, 1, out.numel()).view_as(out)
    (out * weights.sin()).sum().backward()
    return {n: p.grad for n, p in tower.named_parameters() if n.startswith(PREFIXES)}


@pytest.mark.skipif(
    library.missing is not None or library.simulated, reason="needs the CPU kernels"
)
def test_patch_embed_in_the_tower_gives_the_gradients_of_transformers():
    """Images of one aspect ratio share rows of the tables; others have tiles of padding."""
    batch = batch_of(SHAPE, [Prompt(8, (0, 3), (2, 5)), Prompt(6, (1,), (5,))])
    hf = hf_model(SHAPE)
    model = our_model(SHAPE, hf)
    ops = {name: getattr(reference, name) for name in reference.__all__}
    ops["patch_embed"] = mllama_kernels.patch_embed
    expected = gradients(hf, batch)
    with model.ops.replaced(lambda _: types.SimpleNamespace(**ops)):
        actual = gradients(model, batch)
    assert len(expected) == 9 and actual.keys() == expected.keys()
    actual, expected = with_gates_as_one(actual), with_gates_as_one(expected)
    for name in expected:
        assert_close(actual[name], expected[name])
