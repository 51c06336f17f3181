"""Adapters that were saved under other names: applied where they have a place, and refused otherwise."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from model_helpers import Prompt, Shape, assert_close, batch_of, hf_model, our_model
from safetensors.torch import load_file, save_file
from test_lora import adapted, logits
from torch import nn

import mllama
from mllama.training.adapters import use_adapter

NEW, OLD = "base_model.model.model.language_model.", "base_model.model.language_model.model."
pytestmark = pytest.mark.filterwarnings("ignore:Found missing adapter keys")


def _edit(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def _older(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of transformers before 4.52."""
    renamed = {}
    for name, tensor in tensors.items():
        name = name.replace("base_model.model.lm_head.", "base_model.model.language_model.lm_head.")
        for part in ("vision_model.", "multi_modal_projector."):
            name = name.replace(f"base_model.model.model.{part}", f"base_model.model.{part}")
        renamed[name.replace(NEW, OLD)] = tensor
    return renamed


TINY = Shape(
    layers=2,
    cross=(1,),
    local_layers=1,
    global_layers=1,
    taps=(0,),
    tile_side=28,
    head_dim=32,
    vision_head_dim=32,
    intermediate=64,
)


@functools.cache
def _hf() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    return hf_model(TINY), batch_of(TINY, [Prompt(7, (3,), (6,)), Prompt(5)])


class Case:
    """An adapter of transformers' model, saved, with what it gives."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.plain, self.batch = _hf()
        wrapped = adapted(copy.deepcopy(self.plain), **options)
        self.expected = logits(wrapped, self.batch)
        wrapped.save_pretrained(folder)

    def ours(self) -> mllama.MllamaForConditionalGeneration:
        return our_model(TINY, self.plain)


def _from_pretrained(model: nn.Module, folder: Path) -> nn.Module:
    return peft.PeftModel.from_pretrained(model, folder)


def _second_adapter(model: nn.Module, folder: Path) -> nn.Module:
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    wrapped.load_adapter(folder, "second")
    wrapped.set_adapter("second")
    return wrapped


def _merged(model: nn.Module, folder: Path) -> nn.Module:
    use_adapter(model, folder)
    return model


WAYS = [_from_pretrained, _second_adapter, _merged]
WHOLE = {"target_modules": ["q_proj", "k_proj", "down_proj", "fc1", "multi_modal_projector"]}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{}, WHOLE, {"use_dora": True}])
@pytest.mark.parametrize("names", [_older, dict])
def test_the_older_layout_is_applied(way: Any, options: Any, names: Any, tmp_path: Path) -> None:
    case = Case(tmp_path, **options)
    _edit(tmp_path, names)
    model = way(case.ours(), tmp_path)
    assert_close(logits(model, case.batch), case.expected)


def test_modules_to_save_of_the_older_layout(tmp_path: Path) -> None:
    case = Case(tmp_path, modules_to_save=["lm_head"])
    _edit(tmp_path, _older)
    assert any(
        "language_model.lm_head" in n for n in load_file(tmp_path / "adapter_model.safetensors")
    )
    for way in (_from_pretrained, _merged):
        assert_close(logits(way(case.ours(), tmp_path), case.batch), case.expected)


def test_an_adapter_of_the_text_model_on_the_whole_one(tmp_path: Path) -> None:
    """Its names are a layout too; what it adds is the same."""
    case = Case(tmp_path, target_modules=["down_proj", "gate_proj"])
    _edit(tmp_path, lambda t: {n.replace(NEW, "base_model.model.model."): x for n, x in t.items()})
    for way in WAYS:
        assert_close(logits(way(case.ours(), tmp_path), case.batch), case.expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {n.replace("layers.", "blocks."): x for n, x in t.items()},
            "no place in the model",
        ),
        (lambda t: {n.replace("layers.1", "layers.7"): x for n, x in t.items()}, "layers.7"),
        (lambda t: {n: x for n, x in t.items() if "layers.1" not in n}, "the adapter lacks"),
        (lambda t: {n: x for n, x in t.items() if "lora_A" in n}, "the adapter lacks"),
        (
            lambda t: t | {f"{NEW}layers.0.mlp.odd_proj.lora_A.weight": torch.zeros(4, 128)},
            "odd_proj",
        ),
    ],
)
def test_one_that_does_not_fit_is_refused(
    way: Any, change: Any, message: str, tmp_path: Path
) -> None:
    case = Case(tmp_path)
    _edit(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        way(case.ours(), tmp_path)


def test_an_adapter_without_tensors_is_refused(tmp_path: Path) -> None:
    case = Case(tmp_path)
    _edit(tmp_path, lambda tensors: {})
    with pytest.raises(ValueError, match="does not fit the model"):
        use_adapter(case.ours(), tmp_path)


@pytest.mark.parametrize("way", WAYS)
def test_an_alpha_that_belongs_to_no_layer_is_refused(way: Any, tmp_path: Path) -> None:
    case = Case(tmp_path, alpha_pattern={"model.language_model.layers.0.self_attn.q_proj": 64})
    assert_close(logits(_from_pretrained(case.ours(), tmp_path), case.batch), case.expected)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace("model.language_model.", "language_model.model."))
    with pytest.raises(ValueError, match="alpha_pattern names"):
        way(case.ours(), tmp_path)


def test_a_plain_load_is_as_ever(tmp_path: Path) -> None:
    """Only an adapter's tensors are looked at, and only in a model that has adapters."""
    case = Case(tmp_path)
    model = case.ours()
    stray = {"x.lora_A.default.weight": torch.zeros(1)}
    result = model.load_state_dict(model.state_dict() | stray, strict=False)
    assert result.unexpected_keys == list(stray) and not result.missing_keys
    wrapped = adapted(model)
    state = wrapped.state_dict()
    wrapped.load_state_dict(state)
    part = {name: value for name, value in state.items() if "lm_head" in name}
    assert wrapped.load_state_dict(part, strict=False).unexpected_keys == []


def test_two_adapters_that_older_names_fit_are_told_apart_by_the_caller(tmp_path: Path) -> None:
    case = Case(tmp_path, target_modules=["q_proj"])
    _edit(tmp_path, _older)
    model = peft.PeftModel.from_pretrained(case.ours(), tmp_path)
    with pytest.raises(ValueError, match=r"key_mapping=model\._checkpoint_conversion_mapping"):
        model.load_adapter(tmp_path, "second")
    names = mllama.MllamaForConditionalGeneration._checkpoint_conversion_mapping
    model.load_adapter(tmp_path, "third", key_mapping=names)
    model.set_adapter("third")
    assert_close(logits(model, case.batch), case.expected)
