"""An accelerated Llava against the same model without: Llama decoder, CLIP tower."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import Tensor
from transformers_helpers import assert_same, build, count_ops, llava_config

from mllama_kernels.transformers import accelerate


def llava_batch(rows: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(3, 95, (rows, 24))
    ids[:, 4:13] = 95
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(rows, 3, 42, 42),
    }


def llava(attention: str = "sdpa") -> transformers.LlavaForConditionalGeneration:
    return build(transformers.LlavaForConditionalGeneration, llava_config(attention))


@pytest.mark.parametrize("attention", ["sdpa", "eager", "mllama_kernels"])
def test_logits_and_tokens(attention, monkeypatch):
    model, batch = llava(attention), llava_batch()
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True)
        tokens = model.generate(**batch, max_new_tokens=6, do_sample=False)
        report = accelerate(model)
        assert not report.left
        with monkeypatch.context() as patch:
            calls = count_ops(patch)
            actual = model(**batch, output_hidden_states=True)
        assert_same(actual.logits, expected.logits, batch["attention_mask"])
        assert_same(actual.image_hidden_states, expected.image_hidden_states)
        assert model.generate(**batch, max_new_tokens=6, do_sample=False).equal(tokens)
    assert calls["patch_embed"] == 1 and calls["rotary_attention"] == 3
    assert calls["vision_attention"] == 3


def test_embeddings_and_the_norm_after_them_stay_what_they_are(monkeypatch):
    """Called by themselves, they embed and normalise; only the tower has both in one op."""
    model, batch = llava(), llava_batch()
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    x = torch.randn(2, 10, 128)
    with torch.no_grad():
        expected, embedded = tower.pre_layrnorm(x), tower.embeddings(batch["pixel_values"])
        features = tower(pixel_values=batch["pixel_values"]).last_hidden_state
        expected_images = model(**batch).image_hidden_states
        accelerate(model)
        assert tower.embeddings(batch["pixel_values"]).equal(embedded)
        assert tower.embeddings(pixel_values=batch["pixel_values"]).equal(embedded)
        assert tower.pre_layrnorm(x).equal(expected) and tower.pre_layrnorm(input=x).equal(expected)
        clone = copy.deepcopy(model)
        calls = count_ops(monkeypatch)
        for copied in (clone, model):
            assert_same(copied(**batch).image_hidden_states, expected_images)
        assert calls["patch_embed"] == 2
        # A copy of one of them, as adapters train it in the place of the module.
        tower.embeddings = copy.deepcopy(tower.embeddings)
        assert_same(model(**batch).image_hidden_states, expected_images)
        assert calls["patch_embed"] == 3
        assert_same(tower(pixel_values=batch["pixel_values"]).last_hidden_state, features)


def test_other_image_sizes_use_interpolated_positions(monkeypatch):
    model = llava()
    tower = model.model.vision_tower
    pixels = torch.randn(2, 3, 56, 70)
    with torch.no_grad():
        expected = tower(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
        accelerate(model)
        calls = count_ops(monkeypatch)
        actual = tower(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
    assert_same(actual, expected)
    assert calls["patch_embed"] == 0 and calls["vision_attention"] == 3


def test_other_towers_are_named():
    config = llava_config()
    config.text_config = transformers.MistralConfig(
        vocab_size=96,
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=160,
        num_hidden_layers=2,
    )
    report = accelerate(build(transformers.LlavaForConditionalGeneration, config))
    assert report.left == {"language_model": "a MistralModel; supported is LlamaModel"}
    assert set(report.replaced) == {"vision_attention", "patch_embed"}
