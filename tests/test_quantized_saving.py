"""Quantised models as folders: our own form, compressed-tensors, and killed runs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hostile_weights import state
from published_folders import FOLDERS, TEXT, Published, Written, fp8, packed, write_folder
from safetensors.torch import load_file, save_file
from torch import nn

import mllama
from mllama.checkpoints import saving
from mllama.demo import checkpoint_path
from mllama.quantized_modules import QuantizedLinear

MODEL = mllama.MllamaForConditionalGeneration
IDS = torch.arange(3, 40).unsqueeze(0)
OVERRIDES = {"*.q_proj.weight": "q8_0", "*.up_proj.weight": "bfloat16"}


def load(folder: Any = None, **arguments: Any) -> Any:
    return MODEL.from_pretrained(folder or checkpoint_path(), device="cpu", **arguments)


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.mark.parametrize(
    ("encoding", "overrides"),
    [
        ("q8_0", {}),
        ("q4_k_m", OVERRIDES),
        ("int8", {}),
        ("fp8", {}),
        ("int8", OVERRIDES),
        ("int8", {"*.up_proj.weight": "bfloat16"}),
    ],
)
def test_saved_and_loaded_and_saved_is_the_same(
    tmp_path: Path, encoding: str, overrides: dict[str, str]
) -> None:
    model = load(quantization=encoding, quantization_overrides=overrides or None)
    model.save_pretrained(tmp_path / "first")
    again = load(tmp_path / "first")
    again.save_pretrained(tmp_path / "second")
    assert hashes(tmp_path / "first") == hashes(tmp_path / "second")
    assert again.quantization.encoding == encoding
    assert again.quantization.overrides == overrides
    load(tmp_path / "first", quantization=encoding, quantization_overrides=overrides or None)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_factors_that_come_out_negative_are_read_again(tmp_path: Path) -> None:
    """As nested ones of bitsandbytes may."""
    write_folder(tmp_path, FOLDERS["bnb nf4"])
    tensors = load_file(tmp_path / "model.safetensors")
    state(nested_offset=-0.01)(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    model = load(tmp_path)
    weight = model.get_submodule("model.language_model.layers.0.mlp.down_proj").weight
    assert weight.encoding == "nf4" and bool((weight.parts()["absmax"] < 0).any())
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "saved")(IDS).logits, model(IDS).logits)


def negative_fp8(weight: torch.Tensor) -> Written:
    stored, decoded = fp8()(weight)
    return stored | {"weight_scale": -stored["weight_scale"]}, -decoded


def mixed(weight: torch.Tensor) -> Written:
    square = weight.shape[0] == weight.shape[1]
    return packed(*((8, 0) if square else (4, 32)), negative=True)(weight)


@pytest.mark.parametrize(
    ("write", "method"),
    [
        (packed(8, 0, negative=True), "compressed-tensors"),
        (negative_fp8, "compressed-tensors"),
        (mixed, "mllama_kernels"),
    ],
    ids=["int8", "fp8", "int8 and int4"],
)
def test_negative_scales_of_autoround_are_read_again(
    tmp_path: Path, write: Any, method: str
) -> None:
    """The provider is not kept, so the folder itself has to say that they are no damage."""
    config = {"quant_method": "compressed-tensors", "provider": "auto-round"}
    write_folder(tmp_path, Published(write, config, TEXT, None))
    model = load(tmp_path)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    ours, theirs = (
        {n: m.weight for n, m in one.named_modules() if isinstance(m, QuantizedLinear)}
        for one in (again, model)
    )
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name, weight in theirs.items():
        assert bool((weight.scale < 0).any()) and weight.encoding == ours[name].encoding
        assert all(map(torch.equal, *(w.parts().values() for w in (ours[name], weight))))
    again.save_pretrained(tmp_path / "again")
    assert hashes(tmp_path / "saved") == hashes(tmp_path / "again")
    # A part of it does not know how the whole was quantised, and is read again nevertheless.
    model.model.save_pretrained(tmp_path / "part")
    mllama.MllamaModel.from_pretrained(tmp_path / "part", device="cpu")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    entry = config["quantization_config"]
    assert entry["quant_method"] == method
    del (entry if method == "mllama_kernels" else entry["mllama_kernels"])["signed_scales"]
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="negative"):
        load(tmp_path / "saved")


def test_our_own_form(tmp_path: Path) -> None:
    model = load(quantization="q8_0")
    model.save_pretrained(tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert entry == {
        "quant_method": "mllama_kernels",
        "version": 1,
        "encoding": "q8_0",
        "overrides": {},
    }
    name = "language_model.model.layers.0.mlp.down_proj.weight"
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert name not in file.keys()
        blocks = file.get_tensor(f"{name}.q8_0")
    own = model.model.language_model.layers[0].mlp.down_proj.weight
    assert torch.equal(blocks, own.blocks()) and blocks.dtype == torch.uint8
    assert blocks.shape == (own.shape[0], own.shape[1] // 32 * 34)


@pytest.mark.parametrize("encoding", ["int8", "fp8"])
def test_eight_bits_are_written_as_compressed_tensors(tmp_path: Path, encoding: str) -> None:
    model = load(quantization=encoding)
    model.save_pretrained(tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert entry["quant_method"] == "compressed-tensors"
    assert entry["format"] == {"int8": "int-quantized", "fp8": "float-quantized"}[encoding]
    assert entry["config_groups"]["group_0"]["format"] == entry["format"]
    modules = {name.removesuffix(".weight") for name, _ in plain_weights(tmp_path)}
    # By each name that a module has in `transformers`, before 4.52 and since.
    own = {
        n for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), nn.Parameter)
    }
    assert set(entry["ignore"]) == modules | own
    assert all("*" not in name and not name.startswith("re:") for name in entry["ignore"])
    name = "language_model.lm_head.weight"
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        weight, scale = file.get_tensor(name), file.get_tensor(f"{name}_scale")
    assert scale.shape == (weight.shape[0], 1)
    assert torch.equal(weight.float() * scale, model.lm_head.weight.dequantize())


@pytest.mark.parametrize("encoding", ["int8", "fp8"])
def test_transformers_reads_eight_bits(tmp_path: Path, encoding: str) -> None:
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    model = load(
        quantization=encoding,
        quantization_overrides={"*.up_proj.weight": "float32"},
        dtype="float32",
        semantics="transformers",
    )
    model.save_pretrained(tmp_path)
    theirs, told = transformers.MllamaForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(told.values())
    inputs = one_image(model)
    with torch.no_grad():
        got, want = model(**inputs).logits, theirs.eval()(**inputs).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("encoding", ["int8", "fp8"])
def test_transformers_reads_eight_bits_beside_bfloat16(tmp_path: Path, encoding: str) -> None:
    """It decodes to the type of the scales, which are float32, so all has to be cast once it has."""
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    model = load(quantization=encoding, semantics="transformers")
    model.save_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    theirs = transformers.MllamaForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=transformers.CompressedTensorsConfig(dequantize=True)
    )
    theirs = theirs.eval().to(torch.bfloat16)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            decoded = module.weight.dequantize().to(torch.bfloat16)
            assert torch.equal(theirs.get_submodule(name).weight, decoded), name
    inputs = one_image(model)
    with torch.no_grad():
        got, want = model(**inputs).logits, theirs(**inputs).logits
    assert want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=0, atol=float(want.std()) / 8)


def one_image(model: Any) -> dict[str, torch.Tensor]:
    """A prompt of 18 tokens about an image of one tile."""
    vision = model.config.vision_config
    size = (1, 1, vision.max_num_tiles, 3, vision.image_size, vision.image_size)
    torch.manual_seed(0)
    inputs = {
        "input_ids": torch.tensor([[model.config.image_token_index, *range(3, 20)]]),
        "pixel_values": torch.randn(size),
        "aspect_ratio_ids": torch.tensor([[1]]),
        "aspect_ratio_mask": torch.tensor([[[1] + [0] * (vision.max_num_tiles - 1)]]),
        "cross_attention_mask": torch.ones(1, 18, 1, vision.max_num_tiles, dtype=torch.long),
    }
    inputs["cross_attention_mask"][..., 1:] = 0
    return inputs


def plain_weights(folder: Path) -> list[tuple[str, torch.Tensor]]:
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        names = [n for n in file.keys() if n.endswith(".weight")]
        return [(n, file.get_tensor(n)) for n in names if f"{n}_scale" not in file.keys()]


def test_a_decoded_folder_is_plain(tmp_path: Path) -> None:
    load(quantization="q8_0").save_pretrained(tmp_path / "quantised")
    load(tmp_path / "quantised", dequantize=True).save_pretrained(tmp_path / "plain")
    model = load(tmp_path / "plain")
    assert model.quantization is None
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())


def test_shards_and_a_given_state_dict(tmp_path: Path) -> None:
    model = load(quantization="q8_0")
    model.save_pretrained(tmp_path / "one", max_shard_size="200KB", state_dict=model.state_dict())
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 5
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "one")(IDS).logits, model(IDS).logits)


def test_a_killed_run_leaves_nothing_that_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, written = load(quantization="q8_0"), []
    save_file = saving.save_file

    def dying(*arguments: Any, **options: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(1)
        save_file(*arguments, **options)

    monkeypatch.setattr(saving, "save_file", dying)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path / "killed", max_shard_size="200KB")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load(tmp_path / "killed")
    assert not list((tmp_path / "killed").iterdir())
