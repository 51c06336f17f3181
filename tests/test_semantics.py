"""Each switch in which published implementations disagree, and the rule that chooses between them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import BACKENDS, Prompt, Shape, assert_close, batch_of, hf_model, our_model, to
from torch import nn

import mllama
from mllama.semantics import PRESETS, Semantics, resolve_semantics, semantics_of_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated")

# Text before the images, two images, and a sequence without any.
PROMPTS = [Prompt(14, (4,), (2,)), Prompt(20, (6, 11), (6, 1)), Prompt(9)]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


def _make_meta_like(hf: nn.Module, batch: dict[str, Any]) -> None:
    """Turn a `transformers` model into what Meta's code computes, with hooks only.

    The vision taps move from the output of layer i to its input, which is the output of layer i - 1,
    and the cross-attention output is zeroed on the rows that see no image.
    """
    vision = hf.model.vision_model
    vision.intermediate_layers_indices = [i - 1 for i in vision.intermediate_layers_indices]
    sees_image = (batch["cross_attention_mask"] == 1).flatten(2).any(-1, keepdim=True)
    for layer in hf.model.language_model.layers:
        if hasattr(layer, "cross_attn"):
            layer.cross_attn.register_forward_hook(
                lambda module, args, output: (output[0] * sees_image, *output[1:])
            )


def test_meta_equals_transformers_with_taps_moved_and_imageless_rows_zeroed(
    backend: tuple[str, str],
) -> None:
    shape = Shape(local_layers=5, taps=(1, 2, 4))
    batch = batch_of(shape, PROMPTS)
    hf = hf_model(shape)
    model = our_model(shape, hf, backend, "meta")
    where = batch["attention_mask"]
    with torch.no_grad():
        todays = hf(**batch).logits
        _make_meta_like(hf, batch)
        expected = hf(**batch, output_hidden_states=True)
        for use_cache in (True, False):
            actual = model(**to(batch, backend[1]), output_hidden_states=True, use_cache=use_cache)
            assert_close(actual.logits, expected.logits, where)
            for ours, theirs in zip(actual.hidden_states, expected.hidden_states):
                assert_close(ours, theirs, where)
    assert (todays - expected.logits)[where.bool()].abs().max() > 0.1, (
        "the switches must matter here"
    )


def test_meta_text_is_independent_of_what_it_cannot_see(backend: tuple[str, str]) -> None:
    """A sequence without image equals itself alone, and text before an image does not depend on it."""
    shape = Shape()
    model = our_model(shape, hf_model(shape), backend, "meta")
    batch = batch_of(shape, [Prompt(14, (4,), (2,)), Prompt(14)])
    with torch.no_grad():
        first = model(**to(batch, backend[1])).logits
        alone = model(batch["input_ids"][1:].to(backend[1])).logits
        batch["pixel_values"] = torch.randn_like(batch["pixel_values"])
        second = model(**to(batch, backend[1])).logits
    assert_close(first[1:], alone, rtol=1e-5)
    assert_close(first[0, :4], second[0, :4], rtol=1e-6)
    assert (first[0, 4:] - second[0, 4:]).abs().max() > 0.01


@pytest.mark.parametrize("switch", ["vision_taps", "imageless_rows"])
def test_each_switch_alone(switch: str) -> None:
    """From "transformers", one switch at a time to Meta's side, against the same change by hooks."""
    shape = Shape(local_layers=5, taps=(1, 2, 4))
    batch = batch_of(shape, PROMPTS)
    hf = hf_model(shape)
    choice = {"preset": "transformers", switch: getattr(PRESETS["meta"], switch)}
    model = our_model(shape, hf, semantics=choice)
    taps = list(hf.model.vision_model.intermediate_layers_indices)
    if switch == "vision_taps":
        hf.model.vision_model.intermediate_layers_indices = [i - 1 for i in taps]
    else:
        _make_meta_like(hf, batch)
        hf.model.vision_model.intermediate_layers_indices = taps
    with torch.no_grad():
        assert_close(model(**batch).logits, hf(**batch).logits, batch["attention_mask"])


def test_first_tap_is_the_input_of_the_encoder() -> None:
    """Tap 0 under "meta" has no layer before it: it is the patch embedding itself."""
    shape = Shape(taps=(0,))
    hf = hf_model(shape)
    model = our_model(shape, hf, semantics="meta").model.vision_model
    batch = batch_of(shape, [Prompt(3, (0,), (6,))])
    seen: list[torch.Tensor] = []
    encoder = hf.model.vision_model.transformer
    encoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True
    )
    images = [batch[k] for k in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")]
    with torch.no_grad():
        hf.model.vision_model(*images)
        tap = model(*images).last_hidden_state[..., 128:]
    assert_close(tap[0, 0], seen[0].view(4, 24, 128)[:, :17])


@pytest.mark.parametrize("rows", ["prompt_only", "repeat_last"])
def test_generated_tokens_after_several_images(rows: str, backend: tuple[str, str]) -> None:
    """A decode step without a mask equals a full forward whose mask rows are written out by hand."""
    shape = Shape()
    semantics = {"preset": "transformers", "decode_rows": rows, "imageless_rows": "zero"}
    model = our_model(shape, hf_model(shape), backend, semantics)
    batch = batch_of(shape, [Prompt(12, (4,), (2,)), Prompt(12, (3, 7), (6, 1)), Prompt(12)])
    new = torch.randint(3, shape.vocab, (3, 2))
    mask = batch["cross_attention_mask"]
    shown = mask[:, -1:].clone()
    if rows == "prompt_only":
        shown[1] = 0  # the only sequence with two images
    full = {
        **batch,
        "input_ids": torch.cat([batch["input_ids"], new], 1),
        "attention_mask": torch.ones(3, 14),
        "cross_attention_mask": torch.cat([mask, shown, shown], 1),
    }
    with torch.no_grad():
        expected = model(**to(full, backend[1]), use_cache=False).logits[:, 12:]
        cache = model(**to(batch, backend[1]), use_cache=True).past_key_values
        steps = [
            model(new[:, i : i + 1].to(backend[1]), past_key_values=cache).logits for i in (0, 1)
        ]
    assert_close(torch.cat(steps, 1), expected)


def test_resolution() -> None:
    assert resolve_semantics("auto") == resolve_semantics("meta") == Semantics()
    assert resolve_semantics("transformers") == Semantics("output", "leak", "repeat_last")
    assert resolve_semantics({"vision_taps": "output"}) == Semantics(vision_taps="output")
    assert Semantics(vision_taps="output").name == "custom"
    with pytest.raises(ValueError, match="got 'hf'"):
        resolve_semantics("hf")
    with pytest.raises(ValueError, match=r"unknown switches \['taps'\]"):
        resolve_semantics({"taps": "input"})
    with pytest.raises(ValueError, match="vision_taps must be one of"):
        resolve_semantics({"vision_taps": "both"})


@pytest.mark.parametrize(
    ("config", "original", "name", "reason"),
    [
        ({"transformers_version": "4.55.4"}, False, "meta", "written by transformers 4.55.4"),
        ({"transformers_version": "4.56.0"}, False, "transformers", "4.56 or later"),
        ({"transformers_version": "4.45.0.dev0"}, False, "meta", "older than 4.56"),
        (
            {"transformers_version": "5.17.0"},
            False,
            "transformers",
            "written by transformers 5.17.0",
        ),
        ({"transformers_version": "next"}, False, "meta", "unreadable transformers_version 'next'"),
        ({}, False, "meta", "names no transformers_version"),
        ({"transformers_version": "5.0.0"}, True, "meta", "Meta's original layout"),
        # transformers copies our entry when it saves a model again, which then is its own.
        (
            {"transformers_version": "5.0.0", "semantics": "meta"},
            False,
            "transformers",
            "4.56 or later",
        ),
        ({"semantics": "transformers"}, False, "transformers", "records semantics 'transformers'"),
        ({"semantics": {"vision_taps": "output"}}, False, "custom", "records semantics"),
    ],
)
def test_auto_reads_the_checkpoint(config: dict, original: bool, name: str, reason: str) -> None:
    semantics, why = semantics_of_checkpoint(config, original_layout=original)
    assert semantics.name == name
    assert reason in why


def test_auto_on_folders_of_transformers_and_of_our_own(tmp_path: Path) -> None:
    shape = Shape(layers=3, cross=(1,), local_layers=2, taps=(0, 1), global_layers=1)
    hf = hf_model(shape)
    hf.save_pretrained(tmp_path / "hf")
    model = mllama.MllamaForConditionalGeneration.from_pretrained(
        tmp_path / "hf", backend="reference"
    )
    assert model.semantics.name == "transformers"
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["transformers_version"] = "4.51.3"
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    model = mllama.MllamaForConditionalGeneration.from_pretrained(
        tmp_path / "hf", backend="reference"
    )
    assert model.semantics.name == "meta"
    chosen = our_model(shape, hf, semantics={"decode_rows": "repeat_last"})
    chosen.save_pretrained(tmp_path / "own")
    again = mllama.MllamaForConditionalGeneration.from_pretrained(
        tmp_path / "own", backend="reference"
    )
    assert again.semantics == chosen.semantics == Semantics(decode_rows="repeat_last")
