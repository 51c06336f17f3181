"""Adapters on quantised linears: trained, run beside them, and what has no weight to train."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import mllama
from mllama.demo import checkpoint_path
from mllama.quantization.decoded import decoded_copy
from mllama.quantized_modules import QuantizedLinear
from mllama.training.adapters import use_adapter

MODEL = mllama.MllamaForConditionalGeneration
IDS = torch.arange(3, 40).unsqueeze(0)
TARGETS = ["q_proj", "v_proj", "down_proj", "lm_head", "embed_tokens"]


@pytest.fixture(scope="module")
def base() -> Any:
    return MODEL.from_pretrained(
        checkpoint_path(), device="cpu", dtype="float32", quantization="q8_0"
    )


def wrapped(model: nn.Module, **options: Any) -> Any:
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | options))
    torch.manual_seed(0)
    learner = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, parameter in learner.named_parameters():
            if "lora_B" in name or "embedding_A" in name:
                parameter.normal_(0, 0.02)
    return learner


def loss_and_gradients(learner: Any) -> tuple[Tensor, dict[str, Tensor]]:
    out = learner.train()(input_ids=IDS, labels=IDS)
    out.loss.backward()
    # Without an image the layers of cross-attention are left out.
    return out.loss, {n: p.grad for n, p in learner.named_parameters() if p.grad is not None}


def test_losses_and_gradients_are_those_on_the_decoded_weights(base: Any) -> None:
    loss, gradients = loss_and_gradients(wrapped(base))
    plain, expected = loss_and_gradients(wrapped(decoded_copy(base, torch.float32, "auto")))
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected.keys() and len(gradients) > 20
    for name, gradient in gradients.items():
        scale = expected[name].abs().max()
        assert (gradient - expected[name]).abs().max() <= 1e-3 * scale + 1e-6, name


def test_an_adapter_runs_beside_quantised_weights(base: Any, tmp_path: Path) -> None:
    learner = wrapped(base, target_modules=["q_proj", "v_proj", "down_proj"])
    learner.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = learner(input_ids=IDS).logits
    model = copy.deepcopy(base)
    use_adapter(model, tmp_path)
    assert isinstance(model.model.language_model.layers[0].self_attn.k_proj, QuantizedLinear)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-4)
        assert not torch.allclose(expected, base(IDS).logits, atol=1e-3)
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape[1] > IDS.shape[1]


def test_an_adapter_is_merged_where_nothing_is_quantised(tmp_path: Path) -> None:
    plain = MODEL.from_pretrained(checkpoint_path(), device="cpu", dtype="float32")
    wrapped(plain, target_modules=["q_proj"]).save_pretrained(tmp_path)
    overrides = {"*.q_proj.weight": "float32"}
    model = MODEL.from_pretrained(
        checkpoint_path(),
        device="cpu",
        dtype="float32",
        quantization="q8_0",
        quantization_overrides=overrides,
    )
    use_adapter(model, tmp_path)
    assert not any("lora" in name for name, _ in model.named_modules())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True}, "QuantizedTensor"),
        ({"init_lora_weights": "pissa"}, "float32"),
        (
            {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
            r"q8_0. and no rows of it can be trained .trainable_token_indices.",
        ),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            r"q8_0. and cannot be trained as a whole .modules_to_save.",
        ),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
            r"q8_0. and cannot be trained as a whole .modules_to_save.",
        ),
    ],
)
def test_what_needs_the_weight_is_refused(base: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        wrapped(base, **options)


@pytest.mark.parametrize("encoding", ["q8_0", "int8"])
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("target", ["q_proj", "embed_tokens"])
def test_merging_is_refused(encoding: str, safe: bool, target: str) -> None:
    model = MODEL.from_pretrained(checkpoint_path(), device="cpu", quantization=encoding)
    learner = wrapped(model, target_modules=[target])
    said = rf"{encoding}. and no adapter can be merged into it .merge_and_unload, merge_adapter."
    for merge in (learner.merge_and_unload, learner.merge_adapter):
        with pytest.raises(TypeError, match=said):
            merge(safe_merge=safe)
    with torch.no_grad():  # it runs on as before
        assert learner(input_ids=IDS).logits.isfinite().all()


@pytest.mark.parametrize("encoding", ["int8", "fp8", "q8_0"])
def test_a_method_that_reads_the_weight_is_refused(encoding: str) -> None:
    """The numbers of int8 and fp8 are codes, which such a method would take for the values."""
    model = MODEL.from_pretrained(checkpoint_path(), dtype="float32", quantization=encoding)
    config = peft.HRAConfig(r=8, target_modules=["q_proj"])
    learner = peft.get_peft_model(model, config)
    said = (
        rf"peft.tuners.hra.layer reads the values .* quantised .{encoding}., whose data are codes"
    )
    with pytest.raises(TypeError, match=said), torch.no_grad():
        learner(input_ids=IDS)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float"])
def test_a_cast_is_of_what_is_plain(base: Any, cast: str) -> None:
    model = getattr(copy.deepcopy(base), cast)()
    assert model.lm_head.weight.encoding == "q8_0"
    with torch.no_grad():
        assert model(IDS).logits.dtype == model.dtype == getattr(torch, cast)
    with pytest.raises(TypeError, match="cannot be cast"):
        model.type(torch.float32)


def test_quantised_weights_are_not_drawn_anew(base: Any) -> None:
    gates = [p for n, p in base.named_parameters() if n.endswith("gate")]
    before = [gate.clone() for gate in gates]
    with pytest.raises(TypeError, match="cannot be drawn anew"):
        base.init_weights()
    assert all(map(torch.equal, gates, before))


def test_an_adapter_that_replaces_quantised_weights_is_refused(base: Any, tmp_path: Path) -> None:
    plain = decoded_copy(base, torch.float32, "auto")
    learner = wrapped(plain, target_modules=["q_proj"], modules_to_save=["lm_head"])
    learner.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="replace a weight that is quantised"):
        use_adapter(copy.deepcopy(base), tmp_path)
