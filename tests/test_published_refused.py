"""Formats that are not read are named, with what to load instead; so is what cannot be told apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from published_folders import (
    FOLDERS,
    SELF_LAYERS,
    TEXT,
    Published,
    Written,
    four_bit,
    fp8,
    gptq,
    write_folder,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from mllama import MllamaForConditionalGeneration
from mllama.checkpoints.checkpoint import CheckpointError
from mllama.demo import checkpoint_path


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        MllamaForConditionalGeneration.from_pretrained(folder, backend="reference", device="cpu")
    return str(caught.value)


def mlx(weight: Tensor) -> Written:
    rows, columns = weight.shape
    scales = torch.ones(rows, columns // 64, dtype=torch.bfloat16)
    numbers = torch.zeros(rows, columns // 8, dtype=torch.uint32)
    return {"weight": numbers, "scales": scales, "biases": scales.clone()}, weight


def awq(weight: Tensor) -> Written:
    rows, columns = weight.shape
    return {
        "qweight": torch.zeros(columns, rows // 8, dtype=torch.int32),
        "qzeros": torch.zeros(columns // 32, rows // 8, dtype=torch.int32),
        "scales": torch.ones(columns // 32, rows, dtype=torch.float16),
    }, weight


def named(*ends: str, dtype: torch.dtype = torch.uint8) -> Any:
    def write(weight: Tensor) -> Written:
        return {end: torch.zeros(weight.shape[0], 16, dtype=dtype) for end in ends}, weight

    return write


REFUSED = {
    "MLX": (mlx, {"group_size": 64, "bits": 4}, "GGUF"),
    "AWQ": (awq, {"quant_method": "awq", "bits": 4}, "GPTQ"),
    "EXL2": (named("q_weight", "q_invperm", "q_scale", "q_scale_max", "q_groups"), None, "GGUF"),
    "EXL3": (named("trellis", "suh", "svh"), {"quant_method": "exl3"}, "GGUF"),
    "HQQ": (named("W_q", "scale", "zero", "meta"), {"quant_method": "hqq"}, "bitsandbytes"),
    "torchao": (named("_weight_qdata", "_weight_scale"), {"quant_method": "torchao"}, "quantization="),
    "quanto": (named("weight._data", "weight._scale"), {"quant_method": "quanto"}, "quantization="),
    "NVFP4": (named("weight_packed", "weight_scale", "weight_global_scale"), None, "quantization="),
    "AQLM": (named("codes", "codebooks", "scales"), {"quant_method": "aqlm"}, "quantization="),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_formats_are_refused_by_their_keys(tmp_path, name):
    write, config, instead = REFUSED[name]
    write_folder(tmp_path, Published(write, config, TEXT, None))
    text = refusal(tmp_path)
    assert f"{name} " in text and "not read; load" in text and instead in text
    assert "model.safetensors" in text and "model.layers.0" in text


@pytest.mark.parametrize("method", ["awq", "AWQ", "hqq", "torchao", "vptq", "mxfp4", "exl2", "mlx"])
def test_formats_are_refused_by_their_name(tmp_path, method):
    shutil.copytree(checkpoint_path(), tmp_path, dirs_exist_ok=True)
    change_config(tmp_path, quant_method=method)
    assert f"quant_method {method!r}" in refusal(tmp_path) and "load" in refusal(tmp_path)


@pytest.mark.parametrize("method", ["a new one", "", 5, None, ["gptq"], {"a": 1}, "x" * 10**6])
def test_an_unknown_method_is_an_error(tmp_path, method):
    write_folder(tmp_path, FOLDERS["gptq"])
    change_config(tmp_path, quant_method=method)
    if method is None:  # what is stored says enough
        MllamaForConditionalGeneration.from_pretrained(tmp_path, backend="reference", device="cpu")
    else:
        assert "unknown quant_method" in refusal(tmp_path) and len(refusal(tmp_path)) < 2000


def change_config(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = config.get("quantization_config", {}) | entries
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model-q4_k.uqff", "UQFF is not read"),
        ("qmodel.pt", "HQQ is not read"),
        ("model.gguf", "the GGUF file itself"),
    ],
)
def test_files_of_another_kind(tmp_path, name, words):
    shutil.copytree(checkpoint_path(), tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").rename(tmp_path / "residual.safetensors")
    (tmp_path / name).write_bytes(b"")
    assert words in refusal(tmp_path) and name in refusal(tmp_path)


def test_weights_that_are_rotated_or_sparse_are_refused(tmp_path):
    write_folder(tmp_path, FOLDERS["w4a16"])
    change_config(tmp_path, transform_config={"config_groups": {"u": {"type": "hadamard"}}})
    assert "transform_config" in refusal(tmp_path)
    change_config(tmp_path, transform_config={}, sparsity_config={"format": "sparse-24-bitmask"})
    assert "sparsity_config" in refusal(tmp_path) and "sparse-24-bitmask" in refusal(tmp_path)
    change_config(tmp_path, sparsity_config={"format": "dense"})
    MllamaForConditionalGeneration.from_pretrained(tmp_path, backend="reference", device="cpu")


def test_a_folder_that_waits_for_being_compressed(tmp_path):
    def write(weight: Tensor) -> Written:
        return {"weight": weight, "weight_scale": torch.ones(len(weight), 1)}, weight

    write_folder(tmp_path, Published(write, {"quant_method": "compressed-tensors"}, TEXT, None))
    assert "saved before it was compressed" in refusal(tmp_path)


def test_zeros_whose_count_nothing_tells(tmp_path):
    write_folder(tmp_path, Published(gptq(zero=True), None, SELF_LAYERS, None))
    assert "without a checkpoint_format" in refusal(tmp_path)


def test_zeros_that_others_read_differently(tmp_path):
    config = {"quant_method": "gptq", "sym": False}
    write_folder(tmp_path, Published(gptq(zero=True), config, SELF_LAYERS, None))
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("qzeros"))
    tensors[name][0, 0] |= 0xF
    save_file(tensors, path)
    assert "gptq_v2" in refusal(tmp_path) and "16" in refusal(tmp_path)


@pytest.mark.parametrize("sym", ["false", 0, []])
def test_symmetry_that_is_no_truth_value(tmp_path, sym):
    write_folder(tmp_path, FOLDERS["gptq"])
    change_config(tmp_path, sym=sym)
    assert f"sym must be true or false, got {sym!r}" in refusal(tmp_path)


def test_marlins_own_order_is_refused(tmp_path):
    write_folder(tmp_path, FOLDERS["gptq"])
    change_config(tmp_path, checkpoint_format="marlin")
    assert "checkpoint_format 'marlin'" in refusal(tmp_path)


def test_negative_scales_are_autorounds_only(tmp_path):
    config = {"quant_method": "gptq", "bits": 4, "sym": True}
    write_folder(tmp_path, Published(gptq(negative=True), config, SELF_LAYERS, None))
    assert "not negative" in refusal(tmp_path) and "scales" in refusal(tmp_path)
    change_config(tmp_path, autoround_version="0.5.1")
    MllamaForConditionalGeneration.from_pretrained(tmp_path, backend="reference", device="cpu")


def test_empty_biases_of_text_layers_are_left_out(tmp_path):
    def write(weight: Tensor) -> Written:
        stored, decoded = gptq()(weight)
        return stored | {"bias": torch.zeros(len(weight), dtype=torch.float16)}, decoded

    write_folder(tmp_path, Published(write, {"quant_method": "gptq"}, SELF_LAYERS, None))
    MllamaForConditionalGeneration.from_pretrained(tmp_path, backend="reference", device="cpu")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("o_proj.bias"))
    tensors[name][0] = 1
    save_file(tensors, path)
    assert "extra" in refusal(tmp_path) and "o_proj.bias" in refusal(tmp_path)


def notes_of(folder: Path, caplog: Any) -> str:
    with caplog.at_level("INFO", logger="mllama"):
        MllamaForConditionalGeneration.from_pretrained(folder, backend="reference", device="cpu")
    return caplog.text


def test_a_vision_tower_that_was_not_spared_is_told(tmp_path, caplog):
    config = {"quant_method": "compressed-tensors", "ignore": ["re:vision_model.*"]}
    modules = rf"{TEXT}|vision_model\.transformer\.layers\.0\..*(fc1|fc2)"
    write_folder(tmp_path, Published(fp8(), config, modules, None))
    assert "vision tower is quantised" in notes_of(tmp_path, caplog)


@pytest.mark.parametrize("kind", ["fp8 dynamic", "int8", "bnb int8"])
def test_activations_are_not_quantised_and_it_is_told(tmp_path, caplog, kind):
    write_folder(tmp_path, FOLDERS[kind])
    assert "other loaders quantise activations" in notes_of(tmp_path, caplog)


def test_scales_of_activations_and_of_the_cache_are_left_out(tmp_path, caplog):
    """As folders of static FP8 have them, and those with a quantised cache."""

    def write(weight: Tensor) -> Written:
        stored, decoded = fp8("one")(weight)
        return stored | {"input_scale": torch.ones(1), "k_scale": torch.ones(1)}, decoded

    config = {"quant_method": "fp8", "activation_scheme": "static"}
    write_folder(tmp_path, Published(write, config, TEXT, "fp8"))
    assert "other loaders quantise activations" in notes_of(tmp_path, caplog)


def test_what_is_decoded_is_told_with_its_cost(tmp_path, caplog):
    write_folder(tmp_path, FOLDERS["w4a16 in another order"])
    text = notes_of(tmp_path, caplog)
    assert "14 weights are decoded (columns that were quantised in another order)" in text
    assert "GB in 16 bits instead of" in text


def test_skip_lists_do_not_decide(tmp_path):
    """A published loader took every name below a skipped layer for quantised, and others for plain."""
    write_folder(tmp_path, Published(four_bit(), None, TEXT, "nf4"))
    change_config(
        tmp_path, quant_method="bitsandbytes", llm_int8_skip_modules=["q_proj", "layers.1"]
    )
    model = MllamaForConditionalGeneration.from_pretrained(
        tmp_path, backend="reference", device="cpu"
    )
    change_config(tmp_path, llm_int8_skip_modules=None)
    again = MllamaForConditionalGeneration.from_pretrained(
        tmp_path, backend="reference", device="cpu"
    )
    ids = torch.tensor([[438, 1, 2]])
    assert torch.equal(model(input_ids=ids).logits, again(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["bnb nf4", "w4a16", "gptq"])
def test_a_file_that_was_cut_is_all_that_is_told(tmp_path, kind):
    write_folder(tmp_path, FOLDERS[kind])
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "1 problem:" in refusal(tmp_path) and "is truncated" in refusal(tmp_path)
