"""Models of folders that others quantised: their logits are those of `transformers` on decoded weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_helpers import BACKENDS
from published_folders import FOLDERS, write_folder
from safetensors.torch import load_file, save_file
from torch import Tensor

from mllama import MllamaForConditionalGeneration, MllamaProcessor
from mllama.checkpoints.checkpoint import CheckpointError
from mllama.demo import checkpoint_path, questions_for, sample_picture

# One of each encoding and way of being read.
KINDS = (
    "bnb nf4",
    "bnb fp4",
    "bnb int8",
    "fp8 dynamic",
    "w4a16 asymmetric",
    "AutoRound",
    "w8a16 of groups",
)


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    processor = MllamaProcessor.from_pretrained(checkpoint_path())
    picture, scene = sample_picture(7)
    question, *_ = questions_for(scene, 7)[0]
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    return dict(processor(images=picture, text=text, add_special_tokens=False, return_tensors="pt"))


def plain_folder(folder: Path, decoded: dict[str, Tensor]) -> Path:
    """The demo's checkpoint with decoded weights in the place of its own, in float32."""
    shutil.copytree(checkpoint_path(), folder)
    tensors = load_file(folder / "model.safetensors")
    assert decoded.keys() <= tensors.keys()
    tensors = {name: t.float() for name, t in tensors.items()} | decoded
    save_file(
        {n: t.contiguous() for n, t in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=KINDS)
def folders(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[str, Path, Path]:
    """A kind, its folder, and that of its decoded weights."""
    folder = tmp_path_factory.mktemp("published")
    decoded = write_folder(folder / "quantized", FOLDERS[request.param])
    return request.param, folder / "quantized", plain_folder(folder / "plain", decoded)


@pytest.mark.parametrize("run", BACKENDS)
def test_logits_are_those_of_transformers_on_the_decoded_weights(folders, batch, run):
    backend, device = run
    _, quantized, plain = folders
    theirs = transformers.MllamaForConditionalGeneration.from_pretrained(
        plain, dtype=torch.float32, attn_implementation="eager"
    )
    model = MllamaForConditionalGeneration.from_pretrained(
        quantized, dtype="float32", backend=backend, device=device, semantics="transformers"
    )
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    with torch.no_grad():
        wanted = theirs.to(device)(**batch).logits
        found = model(**batch).logits
    assert torch.allclose(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max())), (
        (found - wanted).abs().max()
    )


def test_greedy_tokens_are_those_of_the_decoded_weights(folders, batch):
    _, quantized, plain = folders
    tokens = [
        MllamaForConditionalGeneration.from_pretrained(
            folder, dtype="float32", backend="reference", device="cpu"
        ).generate(**batch, max_new_tokens=8, do_sample=False)
        for folder in (quantized, plain)
    ]
    assert torch.equal(*tokens)


def test_a_plain_model_has_the_decoded_weights(folders):
    kind, quantized, plain = folders
    load = MllamaForConditionalGeneration.from_pretrained
    model = load(quantized, dequantize=True, dtype="float32", backend="reference", device="cpu")
    assert model.quantization is None
    wanted = load(plain, backend="reference", device="cpu").state_dict()
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name]), (kind, name)


def test_names_as_third_parties_write_them(tmp_path):
    """The names in memory, as fine-tuning tools write them since transformers 4.52."""
    decoded = write_folder(tmp_path, FOLDERS["bnb nf4"])
    path = tmp_path / "model.safetensors"
    renamed = {}
    for name, tensor in load_file(path).items():
        name = name.replace("language_model.lm_head", "lm_head")
        name = name.replace("language_model.model.", "model.language_model.")
        name = name.replace(
            "vision_model.", "model.vision_model.", name.startswith("vision_model.")
        )
        renamed[name.replace("multi_modal_projector", "model.multi_modal_projector")] = tensor
    save_file(renamed, path)
    model = MllamaForConditionalGeneration.from_pretrained(
        tmp_path, backend="reference", device="cpu"
    )
    assert model.quantization.encoding == "nf4" and decoded


def test_parts_of_a_weight_may_lie_in_two_shards(tmp_path):
    decoded = write_folder(tmp_path, FOLDERS["bnb nf4"])
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    wanted = MllamaForConditionalGeneration.from_pretrained(
        tmp_path, backend="reference", device="cpu", dequantize=True
    ).state_dict()
    path.unlink()
    names = ("a.safetensors", "b.safetensors")
    place = {name: names[i % 2] for i, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({n: t for n, t in tensors.items() if place[n] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    found = MllamaForConditionalGeneration.from_pretrained(
        tmp_path, backend="reference", device="cpu", dequantize=True
    ).state_dict()
    assert decoded and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_model_is_saved_and_loaded_with_every_bit(folders, tmp_path):
    """In our own form, or as compressed-tensors, and the folder's config.json says which."""
    kind, quantized, _ = folders
    load = MllamaForConditionalGeneration.from_pretrained
    first = load(quantized, backend="reference", device="cpu")
    first.save_pretrained(tmp_path)
    again = load(tmp_path, backend="reference", device="cpu")
    wanted, found = first.state_dict(), again.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        bits = [t.contiguous().view(torch.uint8) for t in (tensor, found[name])]
        assert torch.equal(*bits), name
    if FOLDERS[kind].encoding is not None:
        assert again.quantization.encoding == first.quantization.encoding


def test_an_encoding_that_is_asked_for(tmp_path):
    load = MllamaForConditionalGeneration.from_pretrained
    write_folder(tmp_path / "nf4", FOLDERS["bnb nf4"])
    assert load(tmp_path / "nf4", quantization="nf4", device="cpu").quantization.encoding == "nf4"
    with pytest.raises(CheckpointError, match="it is quantised, nf4"):
        load(tmp_path / "nf4", quantization="q4_0", device="cpu")
    # What is decoded anyway may be encoded again.
    write_folder(tmp_path / "decoded", FOLDERS["gptq in another order"])
    model = load(tmp_path / "decoded", quantization="q8_0", device="cpu")
    weight = next(n for n in model.state_dict() if "layers.0.mlp.down_proj" in n)
    assert weight.endswith(".q8_0")
