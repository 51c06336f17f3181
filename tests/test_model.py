"""The model against `transformers` on random configurations, images and prompts."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import transformers
from model_helpers import (
    BACKENDS,
    RATIOS,
    TILE_SIDES,
    Prompt,
    Shape,
    assert_close,
    batch_of,
    cast_hf,
    hf_model,
    our_model,
    randomise,
    to,
)

import mllama

pytestmark = pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


def _random_prompts(rng: random.Random, longest: int) -> list[Prompt]:
    return [Prompt.draw(rng, longest, rng.randint(0, 3)) for _ in range(rng.randint(1, 3))]


def _compare(shape: Shape, batch: dict, backend: tuple[str, str], attention: str) -> None:
    hf = hf_model(shape, attention)
    model = our_model(shape, hf, backend)
    with torch.no_grad():
        expected = hf(**batch, output_hidden_states=True)
        results = [
            model(**to(batch, backend[1]), output_hidden_states=True, use_cache=use_cache)
            for use_cache in (True, False)
        ]
    where = batch["attention_mask"]
    for result in results:
        assert_close(result.logits, expected.logits, where)
        assert len(result.hidden_states) == len(expected.hidden_states)
        for ours, theirs in zip(result.hidden_states, expected.hidden_states):
            assert_close(ours, theirs, where)
        assert (result.logits[where.to(backend[1]) == 0] == 0).all(), "padding is not computed"


@pytest.mark.parametrize(
    "draw", [*range(6), *(pytest.param(i, marks=pytest.mark.full) for i in range(6, 60))]
)
def test_random_models_and_inputs(draw: int, seed: int, backend: tuple[str, str]) -> None:
    rng = random.Random(1000 * seed + draw)
    torch.manual_seed(rng.randrange(2**31))
    shape = Shape.draw(rng)
    longest = rng.choice([1, 5, 40, 300])
    prompts = _random_prompts(rng, max(3, longest))
    padding, attention = rng.choice(["left", "right", "holes"]), rng.choice(["eager", "sdpa"])
    print(f"seed {seed}: {shape}, {prompts}, {padding}, {attention}")
    _compare(shape, batch_of(shape, prompts, padding), backend, attention)


@pytest.mark.parametrize("tile_side", TILE_SIDES)
def test_every_aspect_ratio_and_padding_residue(tile_side: int, backend: tuple[str, str]) -> None:
    shape = Shape(tile_side=tile_side, vision_head_dim=80)
    prompts = [
        Prompt(9, (0, 3, 4), (1, 2, 3)),
        Prompt(7, (2, 5, 6), (4, 5, 6)),
        Prompt(8, (4, 5), (7, 8)),
    ]
    batch = batch_of(shape, prompts)
    assert batch["aspect_ratio_ids"].unique().tolist() == list(range(len(RATIOS) + 1))
    _compare(shape, batch, backend, "eager")


@pytest.mark.parametrize("padding", ["left", "right", "holes"])
def test_text_without_images(padding: str, backend: tuple[str, str]) -> None:
    shape = Shape()
    _compare(shape, batch_of(shape, [Prompt(1), Prompt(70), Prompt(30)], padding), backend, "eager")


def test_positions_and_embeddings_may_be_given(backend: tuple[str, str]) -> None:
    shape = Shape()
    batch = batch_of(shape, [Prompt(12, (3,), (6,)), Prompt(20, (0, 9), (2, 1))])
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    _compare(shape, batch, backend, "eager")
    hf = hf_model(shape)
    model = our_model(shape, hf, backend)
    embeds = torch.randn(2, 20, 256)
    del batch["input_ids"]
    with torch.no_grad():
        expected = hf(**batch, inputs_embeds=embeds).logits
        actual = model(**to({**batch, "inputs_embeds": embeds}, backend[1])).logits
    assert_close(actual, expected, batch["attention_mask"])


def test_precomputed_states_replace_the_vision_tower(backend: tuple[str, str]) -> None:
    shape = Shape()
    hf = hf_model(shape)
    model = our_model(shape, hf, backend)
    batch = batch_of(shape, [Prompt(12, (3,), (6,)), Prompt(15, (0, 9), (2, 1))])
    images = [batch.pop(name) for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")]
    with torch.no_grad():
        vision = hf.model.vision_model(*images).last_hidden_state
        states = hf.model.multi_modal_projector(vision).flatten(0, 2)
        expected = hf(**batch, cross_attention_states=states).logits
        del model.model.vision_model, model.model.multi_modal_projector
        actual = model(**to({**batch, "cross_attention_states": states}, backend[1])).logits
    assert_close(actual, expected, batch["attention_mask"])


def test_vision_model_alone(backend: tuple[str, str]) -> None:
    shape = Shape(vision_head_dim=80)
    hf = hf_model(shape).model.vision_model
    model = mllama.MllamaVisionModel(
        mllama.MllamaVisionConfig(**shape.configs()["vision_config"]),
        backend=backend[0],
        semantics="transformers",
    )
    model.load_state_dict(hf.state_dict())
    model.to(backend[1])
    batch = batch_of(shape, [Prompt(3, (0, 1), (6, 3)), Prompt(3, (1,), (1,))])
    images = {k: batch[k] for k in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    with torch.no_grad():
        expected = hf(**images).last_hidden_state
        assert_close(model(**to(images, backend[1])).last_hidden_state, expected)


def test_causal_lm_has_no_vision_tower(backend: tuple[str, str]) -> None:
    """Text alone, and with states; `transformers` takes the mask of the latter ready made."""
    shape = Shape()
    config = transformers.MllamaTextConfig(**shape.configs()["text_config"])
    config._attn_implementation = "eager"
    hf = transformers.MllamaForCausalLM(config).eval()
    randomise(hf)
    ours = mllama.MllamaTextConfig(**shape.configs()["text_config"])
    model = mllama.MllamaForCausalLM(ours, backend=backend[0], semantics="transformers").eval()
    assert set(model.state_dict()) == set(hf.state_dict())
    model.load_state_dict(hf.state_dict())
    model.to(backend[1])
    batch = batch_of(shape, [Prompt(12), Prompt(20)])
    states, shown = torch.randn(2 * 4, 17, 256), torch.randint(0, 2, (2, 20, 1, 4))
    shown[:, :3] = 0
    bias = (1.0 - shown.flatten(2).repeat_interleave(17, -1).unsqueeze(1)) * torch.finfo(
        torch.float32
    ).min
    rows = shown.flatten(2).any(-1).float()[:, None, :, None]
    with torch.no_grad():
        expected = hf(**batch)
        assert_close(
            model(**to(batch, backend[1])).logits, expected.logits, batch["attention_mask"]
        )
        expected = hf(
            **batch,
            cross_attention_states=states,
            cross_attention_mask=bias * rows,
            full_text_row_masked_out_mask=rows,
        )
        batch |= {"cross_attention_states": states, "cross_attention_mask": shown}
        assert_close(
            model(**to(batch, backend[1])).logits, expected.logits, batch["attention_mask"]
        )


def test_no_mask_shows_every_tile(backend: tuple[str, str]) -> None:
    """As eager `transformers`; its sdpa applies a causal mask here by accident."""
    shape = Shape()
    batch = batch_of(shape, [Prompt(12, (3,), (2,)), Prompt(12, (0,), (5,))])
    del batch["cross_attention_mask"]
    _compare(shape, batch, backend, "eager")


def test_bfloat16_is_as_close_to_float64_as_transformers(backend: tuple[str, str]) -> None:
    ours = theirs = 0.0
    for head_dim in (64, 80, 128):
        shape = Shape(head_dim=head_dim, vision_head_dim=head_dim, layers=6, cross=(1, 4))
        hf = hf_model(shape, "sdpa")
        for parameter in hf.parameters():
            parameter.data = parameter.data.bfloat16().float()
        batch = batch_of(shape, [Prompt(60, (10, 30), (6, 2)), Prompt(90, (0,), (3,))])
        batch["pixel_values"] = batch["pixel_values"].bfloat16().float()
        where = batch["attention_mask"].bool()
        model = our_model(shape, hf, backend, dtype=torch.bfloat16)
        with torch.no_grad():
            exact = cast_hf(copy.deepcopy(hf), torch.float64)(**batch).logits[where]
            plain = cast_hf(hf, torch.bfloat16)(**batch).logits[where].double()
            actual = model(**to(batch, backend[1])).logits.cpu()[where].double()
        ours += (actual - exact).square().mean().item()
        theirs += (plain - exact).square().mean().item()
    print(f"mean squared distance from float64: ours {ours:.3e}, transformers {theirs:.3e}")
    assert ours**0.5 <= 1.5 * theirs**0.5


_TEXT_11B = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
_TEXT_90B = {"hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8}


@pytest.mark.parametrize(
    ("text", "intermediate", "side"),
    [
        pytest.param(_TEXT_11B, 14336, 448, id="11B", marks=pytest.mark.full),
        pytest.param(_TEXT_90B, 28672, 560, id="90B", marks=pytest.mark.full),
        pytest.param(_TEXT_11B, 1024, 56, id="11B-narrow"),
    ],
)
def test_checkpoint_dimensions(
    text: dict, intermediate: int, side: int, backend: tuple[str, str]
) -> None:
    """The published widths with one layer of each kind and a small vocabulary."""
    shape = Shape(
        tile_side=side, layers=2, cross=(1,), local_layers=2, global_layers=1, taps=(0, 1)
    )
    configs = shape.configs()
    configs["text_config"] |= text | {"intermediate_size": intermediate}
    configs["vision_config"] |= {
        "hidden_size": 1280,
        "attention_heads": 16,
        "intermediate_size": 5120,
    }
    configs["vision_config"] |= {"vision_output_dim": 1280 * 3}
    config = transformers.MllamaConfig(**configs)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):  # billions of numbers are drawn once only
        hf = transformers.MllamaForConditionalGeneration(config).eval()
        model = mllama.MllamaForConditionalGeneration(
            mllama.MllamaConfig(**configs), backend=backend[0], semantics="transformers"
        ).eval()
    hf.to_empty(device="cpu")
    rotary = type(hf.model.language_model.rotary_emb)(config.text_config)
    hf.model.language_model.rotary_emb = rotary
    randomise(hf)
    batch = batch_of(shape, [Prompt(8, (3,), (2,))])
    with torch.no_grad():
        expected = hf(**batch).logits
        model.to_empty(device=backend[1])
        targets = model.state_dict()
        for name, value in hf.state_dict().items():  # never two whole models in memory
            targets[name].copy_(value)
            value.set_()
        actual = model(**to(batch, backend[1])).logits
    assert_close(actual, expected)


def test_loss_ignores_image_tokens_and_minus_100(backend: tuple[str, str]) -> None:
    shape = Shape()
    hf = hf_model(shape)
    model = our_model(shape, hf, backend)
    batch = batch_of(shape, [Prompt(12, (3,), (6,)), Prompt(12, (0, 9), (2, 1))])
    labels = batch["input_ids"].clone()
    labels[0, :2] = -100
    masked = labels.masked_fill(labels == shape.vocab, -100)
    with torch.no_grad():
        expected = hf(**batch, labels=masked).loss
        actual = model(**to({**batch, "labels": labels}, backend[1]))
    assert_close(actual.loss, expected)
    assert actual.past_key_values is None
    labels[0, 5] = shape.vocab + 1
    with pytest.raises(ValueError, match=r"labels must be -100 or within 0\.\.95"):
        model(**to({**batch, "labels": labels}, backend[1]))


def test_logits_to_keep() -> None:
    shape = Shape()
    hf = hf_model(shape)
    model = our_model(shape, hf)
    batch = batch_of(shape, [Prompt(12, (3,), (6,)), Prompt(9, (0,), (1,))])
    with torch.no_grad():
        every = model(**batch).logits
        assert_close(model(**batch, logits_to_keep=2).logits, every[:, -2:])
        picked = torch.tensor([4, 11])
        assert_close(model(**batch, logits_to_keep=picked).logits, every[:, picked])


@pytest.mark.parametrize("unseen", [False, True], ids=["seen", "unseen"])
@pytest.mark.parametrize("blank", [(0,), (1,), (0, 1)])
def test_an_image_without_tiles(
    backend: tuple[str, str], unseen: bool, blank: tuple[int, ...]
) -> None:
    """Its tile mask is all zeros; there may be pixels all the same, and text that sees it or does not."""
    shape = Shape()
    hf = hf_model(shape)
    model = our_model(shape, hf, backend)
    batch = batch_of(shape, [Prompt(9, (2,), (2,)), Prompt(7, (1,), (6,))])
    for row in blank:
        batch["aspect_ratio_mask"][row] = 0
        if unseen:
            batch["cross_attention_mask"][row] = 0
    images = {k: batch[k] for k in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    with torch.no_grad():
        expected = hf.model.vision_model(**images).last_hidden_state
        found = model.model.vision_model(**to(images, backend[1])).last_hidden_state
        assert_close(found, expected)
        real = batch["attention_mask"]
        for caching in (False, True):
            expected = hf(**batch, use_cache=caching).logits
            found = model(**to(batch, backend[1]), use_cache=caching).logits
            assert_close(found, expected, where=real)
