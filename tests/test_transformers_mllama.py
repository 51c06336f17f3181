"""An accelerated Mllama against the same model without, and Meta's semantics against our own model."""

from __future__ import annotations

import pytest
import torch
import transformers
from model_helpers import PAD_TOKEN, Prompt, Shape, batch_of
from transformers_helpers import assert_same, build, count_ops, mllama_config

import mllama
from mllama_kernels.transformers import accelerate

pytestmark = pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated")
# Rows before an image, several images, and a prompt without any.
PROMPTS = [Prompt(12, (3,), (6,)), Prompt(20, (2, 9), (2, 1)), Prompt(7)]
SHAPE = Shape()


def mllama_model(attention: str = "sdpa") -> transformers.MllamaForConditionalGeneration:
    return build(transformers.MllamaForConditionalGeneration, mllama_config(SHAPE, attention))


@pytest.mark.parametrize("attention", ["sdpa", "eager", "mllama_kernels"])
@pytest.mark.parametrize("padding", ["left", "right", "holes"])
def test_logits(attention, padding, monkeypatch):
    model, batch = mllama_model(attention), batch_of(SHAPE, PROMPTS, padding)
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True)
        accelerate(model)
        calls = count_ops(monkeypatch)
        actual = model(**batch, output_hidden_states=True)
    assert_same(actual.logits, expected.logits, batch["attention_mask"])
    for ours, theirs in zip(actual.hidden_states, expected.hidden_states):
        assert_same(ours, theirs, batch["attention_mask"])
    expected_calls = {"patch_embed": 1, "vision_attention": 6, "cross_attention": 2, "swiglu": 4}
    expected_calls |= {"rotary_attention": 0 if padding == "holes" else 2, "add_rms_norm": 4}
    assert {op: calls[op] for op in expected_calls} == expected_calls


@pytest.mark.parametrize(
    "off", ["rms_norm", "rotary_attention", "cross_attention", "vision_attention", "patch_embed"]
)
def test_each_part_alone_can_stay(off, monkeypatch):
    model, batch = mllama_model(), batch_of(SHAPE, PROMPTS)
    with torch.no_grad():
        expected = model(**batch).logits
        report = accelerate(model, **{off: False})
        assert off not in report.replaced and not report.left
        calls = count_ops(monkeypatch)
        assert_same(model(**batch).logits, expected, batch["attention_mask"])
    assert calls[off] == 0


@pytest.mark.parametrize(
    "prompts", [[PROMPTS[0]], [PROMPTS[1]] * 2, PROMPTS], ids=["one", "equal", "ragged"]
)
def test_greedy_tokens(prompts, monkeypatch):
    model, batch = mllama_model(), batch_of(SHAPE, prompts)
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**batch, **options)
    accelerate(model)
    calls = count_ops(monkeypatch)
    assert model.generate(**batch, **options).equal(expected)
    steps = expected.shape[1] - batch["input_ids"].shape[1]
    decoding = (
        2 if len(set(prompts_key(prompts))) == 1 else 0
    )  # without padding, self-attention too
    assert calls["cross_attention"] == 2 * steps + decoding * (steps - 1)


def prompts_key(prompts):
    return [prompt.length for prompt in prompts]


def test_images_of_two_turns(monkeypatch):
    """A second image over a cache that holds the first."""
    model = mllama_model()
    batch = batch_of(SHAPE, [Prompt(20, (2, 9), (2, 3))])
    images = {n: batch[n] for n in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}

    def turns():
        cache, logits = transformers.DynamicCache(), []
        for image, (begin, end) in enumerate([(0, 8), (8, 20)]):
            out = model(
                input_ids=batch["input_ids"][:, begin:end],
                attention_mask=batch["attention_mask"][:, :end],
                cross_attention_mask=batch["cross_attention_mask"][:, :end, : image + 1],
                past_key_values=cache,
                use_cache=True,
                cache_position=torch.arange(begin, end),
                **{name: value[:, image : image + 1] for name, value in images.items()},
            )
            logits.append(out.logits)
        return torch.cat(logits, dim=1)

    with torch.no_grad():
        expected = turns()
        accelerate(model)
        calls = count_ops(monkeypatch)
        assert_same(turns(), expected)
    assert calls["cross_attention"] == 4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_cross_attention_mask(attention, monkeypatch):
    """Every tile is seen; sdpa in transformers hides some by accident, and is reproduced."""
    model, batch = mllama_model(attention), batch_of(SHAPE, PROMPTS[:1])
    del batch["cross_attention_mask"]
    with torch.no_grad():
        expected = model(**batch).logits
        accelerate(model)
        calls = count_ops(monkeypatch)
        assert_same(model(**batch).logits, expected)
    assert calls["cross_attention"] == (2 if attention == "eager" else 0)


def test_the_interface_shows_every_tile_without_a_mask():
    model, batch = mllama_model("eager"), batch_of(SHAPE, PROMPTS[:1])
    del batch["cross_attention_mask"]
    with torch.no_grad():
        expected = model(**batch).logits
        model.set_attn_implementation("mllama_kernels")
        assert_same(model(**batch).logits, expected)


@pytest.mark.parametrize("part", ["cross_layer", "cross_attention", "vision_attention"])
def test_one_layer_of_another_class_leaves_them_all(part, monkeypatch):
    """Their masks come from the model, in one form for all."""
    model, batch = mllama_model(), batch_of(SHAPE, PROMPTS)
    layer = model.model.language_model.layers[3]
    vision = model.model.vision_model.transformer.layers[1]
    module = {
        "cross_layer": layer,
        "cross_attention": getattr(layer, "cross_attn", None),
        "vision_attention": vision.self_attn,
    }[part]
    module.__class__ = type("Other", (type(module),), {})
    op = "vision_attention" if part == "vision_attention" else "cross_attention"
    with torch.no_grad():
        expected = model(**batch).logits
        report = accelerate(model)
        calls = count_ops(monkeypatch)
        assert_same(model(**batch).logits, expected, batch["attention_mask"])
    assert report.left == {op: "some of the layers are of another class"}
    assert calls[op] == 0 and op not in report.replaced


def _causal_lm(attention: str) -> transformers.MllamaForCausalLM:
    return build(transformers.MllamaForCausalLM, mllama_config(SHAPE, attention).text_config)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_text_model_with_ready_made_masks(attention, monkeypatch):
    model = _causal_lm(attention)
    batch = batch_of(SHAPE, [Prompt(12), Prompt(20)])
    shown = torch.randint(0, 2, (2, 1, 20, 4 * 17))
    rows = shown.any(-1, keepdim=True).float()
    states = {
        "cross_attention_states": torch.randn(2 * 4, 17, 256),
        "cross_attention_mask": (1.0 - shown) * torch.finfo(torch.float32).min * rows,
        "full_text_row_masked_out_mask": rows,
    }
    with torch.no_grad():
        text, both = model(**batch).logits, model(**batch, **states).logits
        accelerate(model)
        calls = count_ops(monkeypatch)
        assert_same(model(**batch).logits, text, batch["attention_mask"])
        assert_same(model(**batch, **states).logits, both, batch["attention_mask"])
    assert calls["cross_attention"] == 0 and calls["rotary_attention"] == 4


def test_bare_towers(monkeypatch):
    text = build(transformers.MllamaTextModel, mllama_config(SHAPE).text_config)
    vision = build(transformers.MllamaVisionModel, mllama_config(SHAPE).vision_config)
    batch = batch_of(SHAPE, PROMPTS)
    images = {n: batch[n] for n in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    with torch.no_grad():
        expected = text(batch["input_ids"] % SHAPE.vocab).last_hidden_state
        taps = vision(**images).last_hidden_state
        every = vision(**images, output_hidden_states=True)
        for model in (text, vision):
            accelerate(model)
        calls = count_ops(monkeypatch)
        assert_same(text(batch["input_ids"] % SHAPE.vocab).last_hidden_state, expected)
        assert_same(vision(**images).last_hidden_state, taps)
        assert calls["vision_attention"] == 6
        again = vision(**images, output_hidden_states=True)
        for ours, theirs in zip(again.hidden_states or (), every.hidden_states or (), strict=True):
            assert_same(ours, theirs)
        assert_same(again.last_hidden_state, taps)


def test_attention_weights_are_still_given():
    model, batch = mllama_model("eager"), batch_of(SHAPE, PROMPTS[:2])
    with torch.no_grad():
        expected = model(**batch, output_attentions=True)
        accelerate(model)
        actual = model(**batch, output_attentions=True)
    assert_same(actual.logits, expected.logits, batch["attention_mask"])
    assert len(actual.attentions) == len(expected.attentions) > 0
    for ours, theirs in zip(actual.attentions, expected.attentions):
        assert_same(ours, theirs)


def test_dense_masks_where_the_kernel_cannot_be_used(monkeypatch):
    """Dropout in training sends the layers back to transformers' masks, made from ours."""
    from mllama_kernels.transformers import mllama_text

    model, batch = mllama_model(), batch_of(SHAPE, PROMPTS)
    with torch.no_grad():
        expected = model(**batch).logits
        for semantics in ("transformers", "meta"):
            accelerate(model, semantics=semantics)
            with_kernels = model(**batch).logits
            with monkeypatch.context() as patch:
                patch.setattr(mllama_text, "drops_out", lambda module: True)
                calls = count_ops(patch)
                without = model(**batch).logits
            assert calls["cross_attention"] == 0
            assert_same(without, with_kernels, batch["attention_mask"])
            if semantics == "transformers":
                assert_same(without, expected, batch["attention_mask"])


def test_meta_semantics_are_those_of_our_model():
    model, batch = mllama_model(), batch_of(SHAPE, PROMPTS)
    ours = mllama.MllamaForConditionalGeneration(
        mllama.MllamaConfig(**SHAPE.configs()), backend="reference", semantics="meta"
    ).eval()
    ours.load_state_dict(model.state_dict())
    with torch.no_grad():
        before = model(**batch).logits
        expected = ours(**batch).logits
        report = accelerate(model, semantics="meta")
        actual = model(**batch).logits
        report.revert()
        assert model(**batch).logits.equal(before)
    assert_same(actual, expected, batch["attention_mask"])
    assert (before - actual).abs().max() > 1e-3, "the semantics differ"
    assert "as Meta's code computes" in str(report)
    # Text that sees no image is the same in a model without cross-attention layers.
    assert PAD_TOKEN == 0


def test_meta_semantics_are_all_or_nothing():
    with pytest.raises(ValueError, match="cannot be had here: cross_attention=False"):
        accelerate(mllama_model(), semantics="meta", cross_attention=False)


def test_vision_taps_of_a_bare_tower_in_meta_semantics():
    vision = build(transformers.MllamaVisionModel, mllama_config(SHAPE).vision_config)
    report = accelerate(vision, semantics="meta", vision_attention=False, patch_embed=False)
    assert set(report.replaced) == {"semantics"}
    ours = mllama.MllamaVisionModel(
        mllama.MllamaVisionConfig(**SHAPE.configs()["vision_config"]), backend="reference"
    )
    ours.load_state_dict(vision.state_dict())
    batch = batch_of(SHAPE, PROMPTS[:2])
    images = {n: batch[n] for n in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    with torch.no_grad():
        assert_same(vision(**images).last_hidden_state, ours(**images).last_hidden_state)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", ["seen", "unseen"])
def test_an_image_without_tiles(attention, rows):
    """Each of its tokens sees all of them alike; so does every tile a token whose mask is zero."""
    model, batch = mllama_model(attention), batch_of(SHAPE, PROMPTS)
    batch["aspect_ratio_mask"][1, 0] = batch["aspect_ratio_mask"][2] = 0
    if rows == "unseen":
        batch["cross_attention_mask"][0] = batch["cross_attention_mask"][1, 12:] = 0
    mask = batch["attention_mask"]
    with torch.no_grad():
        expected = model(**batch).logits
        accelerate(model)
        assert_same(model(**batch).logits, expected, mask)
        accelerate(model, vision_attention=False)
        assert_same(model(**batch).logits, expected, mask)
        # Meta's mask has the same value, so with the taps of transformers nothing differs there.
        accelerate(model, semantics="meta")
        shown = batch | {"aspect_ratio_mask": torch.ones_like(batch["aspect_ratio_mask"])}
        assert (model(**batch).logits - model(**shown).logits).abs().max() > 1e-3
