"""Meta's `original/` layout: names, shard merging, transforms, faults."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from meta_writer import PARAMS, meta_state_dict, write_original
from split_checkpoints import check_ranks
from torch import Tensor
from transformers import MllamaConfig, MllamaForConditionalGeneration

import mllama
from mllama.checkpoints import meta_files, meta_params
from mllama.checkpoints.checkpoint import CheckpointError
from mllama.checkpoints.meta_layout import (
    gather_per_ratio,
    halves_from_pairs,
    resize_positions,
    resize_tile_positions,
)
from mllama.checkpoints.meta_params import (
    config_from_params,
    cross_attention_layers,
    feed_forward_size,
)

RATIOS = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
# Meta's code fixes the vision tower's layer counts and taps; here they are small, see `small_tower`.
CONFIG = {
    "image_token_index": 512,
    "text_config": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 224,
        "num_hidden_layers": 10,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "cross_attention_layers": [3, 8],
        "bos_token_id": 256,
        "eos_token_id": [257, 264, 265],
        "pad_token_id": 260,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "vision_config": {
        "hidden_size": 128,
        "intermediate_size": 512,
        "image_size": 28,
        "num_hidden_layers": 4,
        "num_global_layers": 2,
        "intermediate_layers_indices": [0, 2, 3],
        "vision_output_dim": 512,
    },
}


@pytest.fixture(autouse=True)
def small_tower(request, monkeypatch) -> None:
    """A tower of six layers for all tests that load weights; the others see the real constants."""
    if "published" not in request.fixturenames:
        return
    monkeypatch.setattr(meta_params, "_VISION_LAYERS", 4)
    monkeypatch.setattr(meta_params, "_GLOBAL_LAYERS", 2)
    monkeypatch.setattr(meta_params, "_TAPS", [0, 2, 3])


def _consistent_rows(tokens: int, width: int) -> Tensor:
    """Rows per aspect ratio, gathered cell by cell from one random square table."""
    square = torch.randn(4, 4, tokens, width)
    rows = torch.zeros(9, 4, tokens, width)
    for index, (height, breadth) in enumerate(RATIOS, start=1):
        for y in range(height):
            for x in range(breadth):
                rows[index, y * breadth + x] = square[y, x]
    return rows.reshape(9, -1)


@pytest.fixture(scope="module")
def published() -> tuple[dict[str, Tensor], dict]:
    """Random weights under published names, every tensor (gates too) non-trivial, and the config."""
    torch.manual_seed(11)
    config = MllamaConfig(**CONFIG)
    with torch.device("meta"):
        names = MllamaForConditionalGeneration(config).state_dict()
    weights = {}
    for name, tensor in names.items():
        if name.endswith("tile_embedding.weight"):
            value = _consistent_rows(5, 128)
        elif name.endswith("tile_positional_embedding.embedding.weight"):
            value = _consistent_rows(1, 128)
        else:
            value = torch.randn(tensor.shape)
        name = name.removeprefix("model.").replace("language_model.", "language_model.model.")
        name = name.replace("lm_head", "language_model.lm_head")
        weights[name] = value.to(torch.bfloat16)
    return weights, config.to_dict()


def _load(folder: Path, **options) -> dict[str, Tensor]:
    model = mllama.MllamaForConditionalGeneration.from_pretrained(
        folder, backend="reference", **options
    )
    state = {}
    for name, tensor in model.state_dict().items():
        name = name.removeprefix("model.").replace("language_model.", "language_model.model.")
        state[name.replace("lm_head", "language_model.lm_head")] = tensor
    return state


def _assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not actual[name].equal(expected[name])]
    assert not different


@pytest.mark.parametrize("shards", [1, 8])
def test_every_tensor_comes_back(tmp_path, published, shards):
    weights, config = published
    write_original(tmp_path, weights, config, shards)
    state = _load(tmp_path)
    assert next(iter(state.values())).dtype == torch.bfloat16
    _assert_same(state, weights)


def test_subfolder_and_small_windows(tmp_path, published, monkeypatch):
    weights, config = published
    write_original(tmp_path / "original", weights, config, 2)
    monkeypatch.setattr(meta_files, "_WINDOW_BYTES", 500_000)  # remaps the files several times
    _assert_same(_load(tmp_path), weights)


def test_config_semantics_and_generation_defaults(tmp_path, published, caplog):
    weights, config = published
    write_original(tmp_path, weights, config)
    with caplog.at_level("INFO", logger="mllama"):
        model = mllama.MllamaForConditionalGeneration.from_pretrained(tmp_path, backend="reference")
    messages = [r.getMessage() for r in caplog.records if "semantics" in r.getMessage()]
    assert len(messages) == 1 and "Meta's original layout" in messages[0]
    assert model.semantics.name == "meta"
    for part in ("text_config", "vision_config"):
        made = getattr(model.config, part).to_dict()
        assert {k: made[k] for k in CONFIG[part]} == CONFIG[part]
    assert model.config.image_token_index == 512
    assert model.generation_config.eos_token_id == [257, 264, 265]
    assert (model.generation_config.temperature, model.generation_config.top_p) == (0.6, 0.9)


def test_text_class_takes_the_text_part(tmp_path, published):
    weights, config = published
    write_original(tmp_path, weights, config)
    model = mllama.MllamaForCausalLM.from_pretrained(tmp_path, backend="reference")
    state = model.state_dict()
    assert not any("vision" in name for name in state)
    embed = weights["language_model.model.embed_tokens.weight"]
    assert embed.shape[0] == 520 and state["model.embed_tokens.weight"].equal(embed)


def test_params_of_the_released_models():
    """Layer placement, feed-forward widths and rope of the published 11B and 90B configurations."""
    assert cross_attention_layers(32, 8) == [3, 8, 13, 18, 23, 28, 33, 38]
    assert cross_attention_layers(80, 20) == list(range(3, 100, 5))
    config = config_from_params(PARAMS, 1280)
    text, vision = config["text_config"], config["vision_config"]
    assert (text["intermediate_size"], text["num_hidden_layers"]) == (14336, 40)
    assert (text["bos_token_id"], text["pad_token_id"]) == (128000, 128004)
    assert text["eos_token_id"] == [128001, 128008, 128009]
    assert (config["image_token_index"], vision["image_size"]) == (128256, 560)
    assert (vision["vision_output_dim"], vision["intermediate_size"]) == (7680, 5120)
    assert (vision["num_hidden_layers"], vision["num_global_layers"]) == (32, 8)
    assert (vision["attention_heads"], vision["patch_size"]) == (16, 14)
    assert vision["intermediate_layers_indices"] == [3, 7, 15, 23, 30]
    assert vision["supported_aspect_ratios"] == RATIOS
    assert feed_forward_size(8192, 1.3, 4096) == 28672


def _rotate_pairs(x: Tensor, angles: Tensor) -> Tensor:
    value = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.view_as_real(value).flatten(-2)


def _rotate_halves(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def test_rotary_permutation_keeps_the_scores():
    """Meta's rows rotated in pairs and ours rotated in halves give the same q.k."""
    torch.manual_seed(3)
    heads, dim, width, length = 3, 8, 16, 5
    wq, wk = torch.randn(2, heads * dim, width, dtype=torch.float64)
    x = torch.randn(length, width, dtype=torch.float64)
    angles = torch.rand(length, 1, dim // 2, dtype=torch.float64) * 6

    def scores(rotate, wq, wk):
        q = rotate((x @ wq.T).view(length, heads, dim), angles)
        k = rotate((x @ wk.T).view(length, heads, dim), angles)
        return torch.einsum("ihd,jhd->hij", q, k)

    ours = scores(_rotate_halves, halves_from_pairs(wq, heads), halves_from_pairs(wk, heads))
    torch.testing.assert_close(ours, scores(_rotate_pairs, wq, wk))


def test_resized_positions_keep_linear_ramps():
    """Bilinear with aligned corners reproduces a linear function on any grid; the class token stays."""
    ramp = torch.linspace(0, 1, 4, dtype=torch.float64)
    patches = torch.stack(torch.meshgrid(ramp, ramp, indexing="ij"), -1).reshape(16, 2)
    table = torch.cat([torch.full((1, 2), 9.0, dtype=torch.float64), patches])
    assert resize_positions(table, 4) is table
    resized = resize_positions(table, 7)
    fine = torch.linspace(0, 1, 7, dtype=torch.float64)
    expected = torch.stack(torch.meshgrid(fine, fine, indexing="ij"), -1).reshape(49, 2)
    assert resized[0].eq(9).all()
    torch.testing.assert_close(resized[1:], expected, atol=1e-12, rtol=0)


def test_resized_tile_positions_interpolate_across_tiles():
    tiles, old, new = 4, 2, 3

    def table(grid):
        ramp = torch.linspace(0, 1, tiles * grid, dtype=torch.float64)
        plane = torch.stack(torch.meshgrid(ramp, ramp, indexing="ij"), -1)
        cells = plane.view(tiles, grid, tiles, grid, 2).transpose(1, 2)
        class_token = torch.arange(16, dtype=torch.float64).view(4, 4, 1, 1).expand(4, 4, 1, 2)
        return torch.cat([class_token, cells.reshape(tiles, tiles, grid * grid, 2)], dim=2)

    torch.testing.assert_close(
        resize_tile_positions(table(old), new), table(new), atol=1e-12, rtol=0
    )


def test_positions_of_another_tile_size_are_resized(tmp_path, published):
    weights, config = published
    write_original(tmp_path, weights, config)
    params = json.loads((tmp_path / "params.json").read_text())
    (tmp_path / "params.json").write_text(json.dumps(params | {"vision_chunk_size": 56}))
    model = mllama.MllamaForConditionalGeneration.from_pretrained(tmp_path, backend="reference")
    position = model.model.vision_model.gated_positional_embedding
    assert position.embedding.shape == (17, 128)
    assert position.tile_embedding.weight.shape == (9, 4 * 17 * 128)
    stored = weights["vision_model.gated_positional_embedding.embedding"]
    assert position.embedding[0].equal(stored[0])
    assert position.embedding[[1, 4, 13, 16]].equal(stored[1:])  # corners are aligned


def test_gathered_rows_ignore_unused_cells():
    square = torch.randn(4, 4, 2, 3)
    rows = gather_per_ratio(square, RATIOS).view(9, 4, 2, 3)
    assert not rows[0].any()
    assert rows[6].equal(square[:2, :2].reshape(4, 2, 3))
    assert rows[2, :2].equal(square[0, :2]) and not rows[2, 2:].any()
    assert rows[8].equal(square[:, 0])


def test_all_faults_are_listed_together(tmp_path, published):
    weights, config = published
    write_original(tmp_path, weights, config, 2)
    for index in range(2):
        path = tmp_path / f"consolidated.{index:02d}.pth"
        shard = torch.load(path, weights_only=True)
        del shard["text_model.layers.0.attention.wq.weight"]
        shard["text_model.unknown.weight"] = torch.zeros(2)
        shard["text_model.layers.1.feed_forward.w1.weight"] = torch.zeros(7, 64)
        shard["text_model.norm.weight"] = torch.zeros(64, dtype=torch.int8)
        shard["vision_model.vision_encoder.conv1._linear.weight"] = torch.zeros(64, 587)
        shard["text_model.layers.2.feed_forward.w2.weight"] = torch.zeros(64 + index, 112)
        shard["text_model.rope.freqs"] = torch.zeros(4)  # known and ignored
        torch.save(shard, path)
    with pytest.raises(CheckpointError) as caught:
        _load(tmp_path)
    text = str(caught.value)
    assert "consolidated.00.pth lacks text_model.layers.0.attention.wq.weight" in text
    assert "consolidated.01.pth holds text_model.unknown.weight, which is unknown" in text
    files = "consolidated.00.pth, consolidated.01.pth"
    wrong = "text_model.layers.1.feed_forward.w1.weight in"
    assert f"{wrong} {files} is (14, 64), expected (224, 64)" in text
    assert f"text_model.norm.weight in {files} is int8" in text
    assert "conv1._linear.weight has unusable shapes" in text
    assert "layers.2.feed_forward.w2.weight has unusable shapes [(64, 112), (65, 112)]" in text
    assert len(caught.value.problems) == 8


@pytest.mark.parametrize("keep", [0, 1000, -100])
def test_truncated_file_is_named(tmp_path, published, keep):
    weights, config = published
    write_original(tmp_path, weights, config, 2)
    path = tmp_path / "consolidated.01.pth"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"consolidated\.01\.pth is truncated"):
        _load(tmp_path)


class _Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


@pytest.mark.parametrize("plain_pickle", [False, True])
def test_pickled_code_is_refused_and_never_runs(tmp_path, published, plain_pickle, monkeypatch):
    weights, config = published
    monkeypatch.chdir(tmp_path)
    write_original(tmp_path, weights, config)
    if plain_pickle:
        (tmp_path / "consolidated.pth").write_bytes(pickle.dumps({"a": _Bomb()}))
    else:
        torch.save({"a": _Bomb()}, tmp_path / "consolidated.pth")
    with pytest.raises(CheckpointError, match=r"consolidated\.pth"):
        _load(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_gap_in_the_numbering(tmp_path, published):
    weights, config = published
    write_original(tmp_path, weights, config, 2)
    (tmp_path / "consolidated.00.pth").unlink()
    with pytest.raises(CheckpointError, match=r"numbered from 00 without gaps"):
        _load(tmp_path)


def test_params_without_an_entry(tmp_path, published):
    weights, config = published
    write_original(tmp_path, weights, config)
    params = json.loads((tmp_path / "params.json").read_text())
    del params["vision_num_cross_attention_layers"]
    (tmp_path / "params.json").write_text(json.dumps(params))
    with pytest.raises(CheckpointError, match=r"lacks 'vision_num_cross_attention_layers'"):
        _load(tmp_path)


def test_writer_uses_every_weight_once(published):
    """The inverse used above is complete: as many Meta tensors as ours, plus the second embedding."""
    weights, config = published
    assert len(meta_state_dict(weights, config)) == len(weights) + 1


@pytest.mark.parametrize("shards", [1, 2])
def test_each_rank_of_a_split_model_reads_its_part(published, tmp_path, shards):
    weights, config = published
    write_original(tmp_path, weights, config, shards)
    check_ranks(tmp_path, 2, 4, backend="reference")
