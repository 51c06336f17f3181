"""Models that are quantised while they are loaded, loaded quantised, and decoded."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import mllama
import mllama_kernels
from mllama import cli
from mllama.checkpoints import planning
from mllama.checkpoints.matching import match_checkpoint
from mllama.checkpoints.weights import CheckpointError, describe_checkpoint
from mllama.demo import checkpoint_path
from mllama.quantization.decoded import decoded_copy
from mllama.quantized_modules import QuantizedEmbedding, QuantizedLinear
from mllama_kernels import QuantizedTensor

MODEL = mllama.MllamaForConditionalGeneration
IDS = torch.arange(3, 40).unsqueeze(0)


def load(folder: Any = None, **arguments: Any) -> Any:
    return MODEL.from_pretrained(folder or checkpoint_path(), device="cpu", **arguments)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def encodings_of(model: Any) -> dict[str, str]:
    kinds = (QuantizedLinear, QuantizedEmbedding)
    return {n: m.weight.encoding for n, m in model.named_modules() if isinstance(m, kinds)}


def linears(model: Any) -> list[QuantizedLinear]:
    return [m for m in model.model.language_model.modules() if isinstance(m, QuantizedLinear)]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in q8_0."""
    folder = tmp_path_factory.mktemp("stored")
    load(quantization="q8_0").save_pretrained(folder)
    return folder


def test_weights_are_quantised_as_the_quantiser_does() -> None:
    plain, model = load(), load(quantization="q8_0")
    assert model.quantization.encoding == "q8_0" and plain.quantization is None
    name = "model.language_model.layers.0.mlp.down_proj"
    given = plain.get_submodule(name).weight.detach()
    expected = mllama_kernels.quantize(given, "q8_0").blocks()
    assert torch.equal(model.get_submodule(name).weight.blocks(), expected)
    assert "lm_head" in encodings_of(model)
    assert model.dtype == plain.dtype and model.device == plain.device
    assert model.get_memory_footprint() < 0.6 * plain.get_memory_footprint()
    close = (logits(model) - logits(plain)).float().norm() / logits(plain).float().norm()
    assert close < 0.05


@pytest.mark.parametrize("encoding", ["int8", "fp8", "q4_0", "q4_k_m"])
@pytest.mark.parametrize("backend", ["kernels", "reference"])
def test_a_model_is_its_decoded_weights(encoding: str, backend: str) -> None:
    model = load(quantization=encoding, dtype="float32", backend=backend)
    exact = logits(decoded_copy(model, torch.float64, "reference"))
    plain = logits(decoded_copy(model, torch.float32, "reference"))
    error = (logits(model).double() - exact).abs().max()
    assert error <= 1e-5 * exact.abs().max() + 2 * (plain.double() - exact).abs().max()


def test_greedy_tokens_are_those_of_the_reference() -> None:
    tokens = [
        load(quantization="q8_0", dtype="float32", backend=backend).generate(
            IDS, max_new_tokens=12, do_sample=False
        )
        for backend in ("kernels", "reference")
    ]
    assert torch.equal(*tokens)


def test_fallbacks_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="mllama"):
        model = load(quantization="q4_k")
    assert "rows of 128 are no whole blocks of q4_k: q4_0 instead" in caplog.text
    assert "q4_0" in encodings_of(model).values()
    by_width = {module.in_features: module.weight.encoding for module in linears(model)}
    assert by_width[128] in ("q4_0", "q8_0") and by_width[256] == "q4_k"


def test_overrides() -> None:
    overrides = {"*.down_proj.weight": "q4_0", "vision_model.*": "bfloat16"}
    model = load(quantization="q8_0", quantization_overrides=overrides)
    assert model.quantization.overrides == overrides
    own = encodings_of(model)
    assert {e for n, e in own.items() if n.endswith("down_proj")} == {"q4_0"}
    assert not any("vision_model" in name for name in own)
    load(quantization="q8_0", quantization_overrides={"*.lm_head.*": "bfloat16"})
    with pytest.raises(ValueError, match="go with quantization="):
        load(quantization_overrides=overrides)
    with pytest.raises(ValueError, match=r"float32, but what is not quantised has .* bfloat16"):
        load(quantization="q8_0", quantization_overrides={"vision_model.*": "float32"})


def test_what_is_stored_quantised_stays_so(stored: Path) -> None:
    model = load(stored)
    assert model.quantization.encoding == "q8_0" and model.quantization.method == "mllama_kernels"
    assert torch.equal(logits(model), logits(load(quantization="q8_0")))
    assert encodings_of(load(stored, quantization="q8_0")) == encodings_of(model)
    with pytest.raises(CheckpointError, match=r"it is quantised, q8_0 .*'int8' was asked for"):
        load(stored, quantization="int8")
    with pytest.raises(CheckpointError, match="quantised already, with overrides"):
        load(stored, quantization="q8_0", quantization_overrides={"*.lm_head.*": "int8"})


def test_a_part_of_a_model_is_loaded_quantised(stored: Path) -> None:
    part = mllama.MllamaForCausalLM.from_pretrained(stored, device="cpu")
    assert set(encodings_of(part).values()) == {"q8_0"}
    assert torch.equal(logits(part), logits(load(stored)).float())
    vision = mllama.MllamaVisionModel.from_pretrained(
        checkpoint_path(), device="cpu", quantization="q8_0"
    )
    assert set(encodings_of(vision).values()) == {"q8_0"}


def test_dequantize_gives_a_plain_model(stored: Path) -> None:
    model = load(stored, dequantize=True, dtype="float32")
    assert model.quantization is None and not encodings_of(model)
    weight = load(stored).lm_head.weight.dequantize()
    assert torch.equal(model.lm_head.weight, weight)
    with pytest.raises(ValueError, match="dequantize=True and quantization='q8_0' contradict"):
        load(stored, dequantize=True, quantization="q8_0")


def test_a_dtype_as_encoding_is_the_dtype(stored: Path) -> None:
    assert load(quantization="float32").dtype == torch.float32
    with pytest.raises(ValueError, match="contradict"):
        load(quantization="float32", dtype="bfloat16")


def test_published_arguments(stored: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import BitsAndBytesConfig

    with caplog.at_level(logging.WARNING, logger="mllama"):
        assert load(load_in_4bit=True).quantization.encoding == "q4_k"
    assert "load_in_4bit means quantization='q4_k'" in caplog.text
    assert load(load_in_8bit=True).quantization.encoding == "int8"
    given = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    assert load(quantization_config=given).quantization.encoding == "q4_k"
    given = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    assert "lm_head" not in encodings_of(load(quantization_config=given))
    # What is stored in as many bits stays as it is.
    assert load(stored, load_in_8bit=True).quantization.encoding == "q8_0"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit and load_in_8bit together"),
        ({"load_in_4bit": True, "quantization": "q6_k"}, "quantization='q6_k' together with"),
        ({"load_in_4bit": "yes"}, "load_in_4bit='yes'"),
        (
            {"quantization_config": {"load_in_8bit": True, "llm_int8_threshold": 3.0}},
            "threshold=3.0",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config.bits=4"),
        ({"quantization_config": object()}, "only a BitsAndBytesConfig"),
        (
            {"quantization_config": {"load_in_8bit": True, "llm_int8_skip_modules": ["q_porj"]}},
            "llm_int8_skip_modules names 'q_porj'",
        ),
        ({"projector": "mmproj.gguf"}, "projector='mmproj.gguf' goes with the text file of a GGUF"),
    ],
)
def test_what_cannot_be_honoured_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load(**given)


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "nan"
    shutil.copytree(checkpoint_path(), folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("layers.0.mlp.down_proj.weight"))
    tensors[name][3, 5] = float("nan")
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    load(folder)
    with pytest.raises(CheckpointError, match=f"{name} in model.safetensors.*3.*5"):
        load(folder, quantization="q8_0")


def test_what_does_not_fit_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "free_bytes", lambda device: 10**6)
    with pytest.raises(ValueError, match=r"GB are missing; .*; force=True"):
        load(quantization="q8_0")
    assert load(quantization="q8_0", force=True).quantization is not None


@pytest.mark.parametrize("version", [2, 0, None, "1", True])
def test_an_unknown_version_is_refused(stored: Path, tmp_path: Path, version: Any) -> None:
    shutil.copytree(stored, tmp_path / "other")
    config = json.loads((stored / "config.json").read_text())
    config["quantization_config"]["version"] = version
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"has version .*, this release reads 1"):
        load(tmp_path / "other")


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"encoding": "q5_k"}, "quantization_config.encoding must be one of .* got 'q5_k'"),
        ({"encoding": None}, "quantization_config.encoding must be one of .* got None"),
        ({"encoding": ["q8_0"]}, "quantization_config.encoding must be one of"),
        ({"overrides": ["*"]}, "must be a mapping of patterns to encodings, got list"),
        ({"overrides": {"*": 8}}, r"must be a mapping of patterns to encodings, got '\*': 8"),
        ({"overrides": {"*": "q5_k"}}, "must be one of .* got 'q5_k'"),
        ("q8_0", "quantization_config must be an object, got 'q8_0'"),
        ([], "quantization_config must be an object, got "),
    ],
)
def test_a_configuration_that_lies(stored: Path, tmp_path: Path, entries: Any, said: str) -> None:
    shutil.copytree(stored, tmp_path / "other")
    config = json.loads((stored / "config.json").read_text())
    own = config["quantization_config"]
    config["quantization_config"] = own | entries if isinstance(entries, dict) else entries
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"config.json: .*{said}"):
        load(tmp_path / "other")


def changed(stored: Path, folder: Path, change: Any) -> Path:
    shutil.copytree(stored, folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


NAME = "language_model.model.layers.0.mlp.down_proj.weight"


def in_int8(tensors: dict[str, Tensor], scale: Tensor | None = None, rows: int = 128) -> None:
    columns = tensors.pop(f"{NAME}.q8_0").shape[1] // 34 * 32
    tensors[f"{NAME}.int8"] = torch.zeros(rows, columns).char()
    if scale is not None or rows != 128:
        tensors[f"{NAME}.int8.scale"] = torch.ones(128) if scale is None else scale


def in_nf4(tensors: dict[str, Tensor], part: str, value: float) -> None:
    """In nf4, with a value in the first place of a part."""
    columns = tensors.pop(f"{NAME}.q8_0").shape[1] // 34 * 32
    parts = {"absmax": torch.ones(128, columns // 64), "table": torch.linspace(-1, 1, 16)}
    parts[part].flatten()[0] = value
    tensors[f"{NAME}.nf4"] = torch.zeros(128, columns // 2, dtype=torch.uint8)
    tensors.update({f"{NAME}.nf4.{name}": tensor for name, tensor in parts.items()})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.update({f"{NAME}.q8_0": t[f"{NAME}.q8_0"][:, :-1].clone()}), "whole blocks"),
        (lambda t: t.update({f"{NAME}.q8_0": t[f"{NAME}.q8_0"][:-1].clone()}), "wrong shape"),
        (lambda t: t.update({f"{NAME}.q8_0": t[f"{NAME}.q8_0"].to(torch.int32)}), "I32"),
        (lambda t: t.pop(f"{NAME}.q8_0"), f"missing: {NAME}"),
        (lambda t: t.update({NAME: torch.zeros(128, 256)}), "quantised and plain"),
        (
            lambda t: t.update({f"{NAME}.int8.scale": torch.ones(128)}),
            rf"{NAME}\.int8\.scale in model\.safetensors has no .*{NAME}\.int8 beside",
        ),
        (
            lambda t: t.update(
                {
                    f"{NAME}.int8": torch.zeros(128, 256).char(),
                    f"{NAME}.int8.scale": torch.ones(128),
                }
            ),
            rf"{NAME}\.int8 in model\.safetensors.*{NAME}\.q8_0 in model\.safetensors|"
            rf"{NAME}\.q8_0 in model\.safetensors.*{NAME}\.int8 in model\.safetensors",
        ),
        (
            lambda t: t.update(
                {"language_model.model.norm.weight.q8_0": torch.zeros(4, 34, dtype=torch.uint8)}
            ),
            "language_model.model.norm.weight.q8_0",
        ),
        (lambda t: in_int8(t, scale=-torch.ones(128)), "scale holds negative values"),
        (lambda t: in_int8(t, scale=torch.full((128,), torch.nan)), "scale holds .* no numbers"),
        (lambda t: in_int8(t, scale=torch.ones(64)), rf"{NAME}.*scale.*128.*64"),
        (lambda t: in_int8(t, scale=torch.ones(128).half()), rf"{NAME}.*scale.*float32.*float16"),
        (lambda t: in_int8(t, rows=64), rf"{NAME}.*scale.*64.*128"),
        (in_int8, rf"{NAME}\.int8 in model\.safetensors has no .*{NAME}\.int8\.scale"),
        (lambda t: in_nf4(t, "absmax", torch.nan), "absmax holds .* no numbers"),
        (lambda t: in_nf4(t, "table", torch.inf), "table holds .* infinite"),
    ],
)
def test_damaged_parts_are_refused(stored: Path, tmp_path: Path, change: Any, said: str) -> None:
    folder = changed(stored, tmp_path / "damaged", change)
    with pytest.raises(CheckpointError, match=said):
        load(folder)


def test_info_lists_encodings(stored: Path) -> None:
    found = describe_checkpoint(MODEL, stored)
    assert found["quantization"] == "mllama_kernels" and found["encoding"] == "q8_0"
    assert found["encodings"]["q8_0"]["tensors"] == len(encodings_of(load(stored)))
    assert sum(entry["bytes"] for entry in found["encodings"].values()) == found["bytes"]
    assert found["fallbacks"] == []
    assert "quantization" not in describe_checkpoint(MODEL, checkpoint_path())


def test_info_lists_fallbacks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = {"*.q_proj.weight": "q6_k", "*.up_proj.weight": "bfloat16"}
    with caplog.at_level(logging.WARNING, logger="mllama"):
        load(quantization="q4_k", quantization_overrides=overrides).save_pretrained(tmp_path)
    told = describe_checkpoint(MODEL, tmp_path)["fallbacks"]
    assert len(told) > 1 and all(line in caplog.text for line in told)
    assert cli.main(["info", "--model", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert all(line in out for line in told)
    change = json.loads((tmp_path / "config.json").read_text())
    change["quantization_config"]["overrides"] = {"nothing": "q8_0"}
    (tmp_path / "config.json").write_text(json.dumps(change))
    (told,) = describe_checkpoint(MODEL, tmp_path)["fallbacks"]
    assert "does not tell which" in told and "'nothing' matches no weight" in told


def test_what_is_read_is_packed_on_its_device_alone(stored: Path) -> None:
    found = match_checkpoint(MODEL, stored, "auto", "auto")
    read = [w for _, w in found.checkpoint.read(found.sources.values())]
    weights = [w for w in read if isinstance(w, QuantizedTensor)]
    assert weights and not any(weight.is_packed for weight in weights)
    model = load(stored)
    there = linears(model)[0].weight.device
    assert all(w.to(there).is_packed == linears(model)[0].weight.is_packed for w in weights)
    assert all(torch.equal(w.to(there).blocks(), w.blocks()) for w in weights)


def test_one_quantised_tensor_is_in_memory_while_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is made and put into its place before the next is read."""
    events: list[str] = []
    quantize = mllama_kernels.quantize

    def recorded(weight: Tensor, encoding: str) -> QuantizedTensor:
        events.append("quantised")
        return quantize(weight, encoding)

    monkeypatch.setattr(mllama_kernels, "quantize", recorded)
    checkpoint = mllama.checkpoints.safetensors_files.SafetensorsCheckpoint
    read = checkpoint.read

    def reading(self: Any, names: Any) -> Any:
        for name, tensor in read(self, names):
            events.append("read")
            yield name, tensor

    monkeypatch.setattr(checkpoint, "read", reading)
    load(quantization="q8_0")
    assert events.count("read") > events.count("quantised") > 60
    assert all(a != "quantised" or b == "read" for a, b in zip(events, events[1:]))


def test_a_quantization_is_a_value() -> None:
    model = load(quantization="q8_0")
    assert dataclasses.asdict(model.quantization) == {
        "encoding": "q8_0",
        "overrides": {},
        "method": "",
    }
