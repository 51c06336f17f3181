"""What `accelerate` does to a model besides its numbers: report, revert, copies, refusals."""

from __future__ import annotations

import copy
import io
import types
import warnings

import pytest
import torch
import transformers
from model_helpers import Prompt, Shape, batch_of
from torch import nn
from transformers.models.llama import modeling_llama
from transformers_helpers import (
    assert_same,
    build,
    count_ops,
    llama_config,
    llava_config,
    mllama_config,
    text_batch,
)

from mllama_kernels import _dispatch, _library
from mllama_kernels.transformers import Report, accelerate, accelerated
from mllama_kernels.transformers import accelerate as accelerate_function
from mllama_kernels.transformers.patch import Patch


def llama(**changes) -> transformers.LlamaForCausalLM:
    return build(transformers.LlamaForCausalLM, llama_config(**changes))


def forwards(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if "forward" in vars(module)}


def test_the_report():
    model = llama(num_hidden_layers=2, hidden_act="gelu")
    report = accelerate(model)
    assert isinstance(report, Report)
    assert report.replaced["rms_norm"] == [
        "model.layers.0.input_layernorm",
        "model.layers.0.post_attention_layernorm",
        "model.layers.1.input_layernorm",
        "model.layers.1.post_attention_layernorm",
        "model.norm",
        "model.layers.0",
        "model.layers.1",
    ]
    version = transformers.__version__
    assert str(report).splitlines() == [
        f"LlamaForCausalLM, transformers {version}, as transformers computes",
        "replaced",
        "  rms_norm          5 LlamaRMSNorm, 2 LlamaDecoderLayer",
        "  rotary_attention  1 LlamaModel, 2 LlamaAttention",
        "left",
        "  swiglu            the activation is GELUActivation",
        "the module's own forward serves",
        "  rms_norm          inputs of another dtype than the weight",
        "  rotary_attention  4-D masks, padding between tokens, several new tokens over a cache, one over a",
        "                    static cache, output_attentions, dropout, hooks with keyword arguments; padding",
        "                    under torch.compile",
    ]
    nothing = accelerate(model, rms_norm=False, rotary_attention=False, swiglu=False)
    assert str(nothing).splitlines()[1:] == ["replaced", "  nothing"]
    assert not forwards(model)


def test_revert_restores_the_bits_and_leaves_no_trace():
    model, batch = llama(), text_batch(padding="left")
    names, state = dict(model.named_parameters()), set(vars(model.model))
    with torch.no_grad():
        expected = model(**batch).logits
        report = accelerate(model)
        assert not model(**batch).logits.equal(expected)
        assert dict(model.named_parameters()).keys() == names.keys()
        assert all(p is names[n] for n, p in model.named_parameters())
        report.revert()
        assert model(**batch).logits.equal(expected)
        report.revert()
    assert not forwards(model) and set(vars(model.model)) == state


def test_a_second_call_replaces_the_first(monkeypatch):
    model, batch = llama(), text_batch()
    with torch.no_grad():
        expected = model(**batch).logits
        first = accelerate(model)
        actual, patched = model(**batch).logits, forwards(model)
        second = accelerate(model)
        assert str(first).splitlines()[1:] == str(second).splitlines()[1:]
        assert forwards(model) == patched and model(**batch).logits.equal(actual)
        accelerate(model, swiglu=False)
        calls = count_ops(monkeypatch)
        model(**batch)
        assert calls["swiglu"] == 0 and calls["rms_norm"] == 4
        accelerate(model).revert()
        assert model(**batch).logits.equal(expected)


def test_the_context_manager():
    model, batch = llama(), text_batch()
    with torch.no_grad():
        expected = model(**batch).logits
        with accelerated(model, swiglu=False) as report:
            assert set(report.replaced) == {"rms_norm", "rotary_attention"}
            assert_same(model(**batch).logits, expected)
        assert model(**batch).logits.equal(expected)
        with pytest.raises(KeyError), accelerated(model):
            raise KeyError
    assert not forwards(model)


def test_only_this_instance():
    config = llama_config()
    model, other = (build(transformers.LlamaForCausalLM, config) for _ in range(2))
    methods = {
        cls: cls.forward
        for cls in vars(modeling_llama).values()
        if isinstance(cls, type) and issubclass(cls, nn.Module)
    }
    attention = config._attn_implementation
    with torch.no_grad():
        expected = other(**text_batch()).logits
        torch.manual_seed(0)
        accelerate(model)
    assert all(cls.forward is method for cls, method in methods.items())
    assert not forwards(other) and config._attn_implementation == attention
    assert expected.isfinite().all()


def test_copies_stay_accelerated_and_independent(monkeypatch):
    model, batch = llama(), text_batch()
    report = accelerate(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for clone in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with torch.no_grad():
            expected = model(**batch).logits
            assert clone(**batch).logits.equal(expected)
            for parameter in clone.parameters():
                parameter.zero_()
            assert clone(**batch).logits.abs().max() == 0, "a copy runs on its own weights"
            with monkeypatch.context() as patch:
                calls = count_ops(patch)
                clone(**batch)
            assert calls["rms_norm"] == 4
            accelerate(clone).revert()
            assert not forwards(clone) and forwards(model)
            assert model(**batch).logits.equal(expected)
    report.revert()


def test_saving_knows_nothing_of_it(tmp_path):
    model, batch = llama(), text_batch()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    accelerate(model)
    assert model.state_dict().keys() == state.keys()
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == state.keys()
    assert all(value.equal(state[name]) for name, value in loaded.state_dict().items())
    assert "mllama_kernels" not in (tmp_path / "config.json").read_text()
    with torch.no_grad():
        assert_same(model(**batch).logits, loaded(**batch).logits)


def test_arguments_are_inspected_as_before():
    import inspect

    model = llama().model
    before = inspect.signature(model.forward)
    accelerate(model)
    assert inspect.signature(model.forward) == before


def test_wrappers_are_looked_through():
    report = accelerate(nn.DataParallel(llama()))
    assert (
        report.model == "LlamaForCausalLM" and report.replaced["swiglu"][0] == "model.layers.0.mlp"
    )


def test_other_models_are_refused():
    gpt = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=10)
    )
    message = "cannot accelerate a GPT2LMHeadModel; supported are Mllama, Llama, and Llava with"
    with pytest.raises(ValueError, match=message):
        accelerate(gpt)
    with pytest.raises(ValueError, match="cannot accelerate a Linear"):
        accelerate(nn.Linear(2, 2))


def test_a_compressed_model_is_called_before():
    """compressed-tensors decompresses it in its first call, and wraps the methods of its modules there."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    weights = {"num_bits": 8, "type": "int", "strategy": "channel"}
    config = QuantizationConfig(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]
    )
    model, batch = llama(num_hidden_layers=1), text_batch()
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data.fill_(0.01)
    ModelCompressor(quantization_config=config).compress_model(model)
    with pytest.raises(ValueError, match=r"call the model once before.*dequantize=True"):
        accelerate(model)
    assert not any(isinstance(vars(m).get("forward"), Patch) for m in model.modules())
    with torch.no_grad():
        want = model(**batch).logits
        report = accelerate(model)
        got = model(**batch).logits
    assert "swiglu" in report.replaced
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_bad_arguments():
    with pytest.raises(ValueError, match='"transformers" or "meta", got \'llama\''):
        accelerate(llama(), semantics="llama")
    with pytest.raises(ValueError, match="is about Mllama, not about LlamaForCausalLM"):
        accelerate(llama(), semantics="meta")
    with pytest.raises(TypeError):
        accelerate(llama(), layer_norm=True)


def test_versions(monkeypatch):
    module = __import__("sys").modules[accelerate_function.__module__]
    monkeypatch.setattr(module.transformers, "__version__", "4.56.2")
    monkeypatch.setattr(module, "_warned_of", set())
    model = llama()
    with pytest.raises(
        RuntimeError, match=r"tested are transformers 4\.57 to 5\.\d+, and this is 4\.56\.2"
    ):
        accelerate(model, strict=True)
    with pytest.warns(UserWarning, match="this is 4.56.2"):
        accelerate(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerate(model)
        monkeypatch.undo()
        accelerate(model, strict=True)


def test_a_module_that_others_have_replaced_is_left(monkeypatch):
    model, batch = llama(), text_batch()
    norm, attention = model.model.norm, model.model.layers[1].self_attn
    norm.forward = types.MethodType(lambda self, x: x * self.weight, norm)
    doubled = types.MethodType(
        lambda self, *a, **k: tuple(
            t * 2 if t is not None else t for t in type(self).forward(self, *a, **k)
        ),
        attention,
    )
    attention.forward = doubled
    with torch.no_grad():
        expected = model(**batch).logits
        report = accelerate(model)
        assert_same(model(**batch).logits, expected)
    assert report.left == {
        "rms_norm": "model.norm: its forward is replaced already",
        "rotary_attention": "model.layers.1.self_attn: its forward is replaced already",
    }
    assert len(report.replaced["rms_norm"]) == 6 + 3 and "rotary_attention" not in report.replaced
    report.revert()
    assert attention.forward is doubled


def test_a_wrapper_around_a_patch_survives_revert():
    """Whoever has wrapped the forward since keeps a working module."""
    model, batch = llama(), text_batch()
    with torch.no_grad():
        expected = model(**batch).logits
        report = accelerate(model)
        inner = model.model.norm.forward
        model.model.norm.forward = lambda x: inner(x)
        report.revert()
        assert model(**batch).logits.equal(expected)


def test_a_subclass_may_compute_something_else():
    model = llama()

    class Shifted(modeling_llama.LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states) + 1

    model.model.norm.__class__ = Shifted
    report = accelerate(model)
    assert "model.norm" not in report.replaced["rms_norm"]


def test_mllama_report_names_every_part():
    model = build(transformers.MllamaForConditionalGeneration, mllama_config(Shape()))
    report = accelerate(model)
    assert set(report.replaced) == {
        "rms_norm",
        "rotary_attention",
        "cross_attention",
        "vision_attention",
        "patch_embed",
        "swiglu",
    }
    assert not report.left
    assert (
        "  cross_attention   1 MllamaModel, 2 MllamaCrossAttentionDecoderLayer, 2 MllamaTextCrossAttention"
        in str(report)
    )


@pytest.mark.parametrize("kind", ["llama", "mllama", "llava"])
def test_without_kernels_for_a_device_modules_serve_themselves(kind, monkeypatch):
    model, batch = {"llama": _llama_case, "mllama": _mllama_case, "llava": _llava_case}[kind]()
    reason = "the library was built without this device"
    monkeypatch.setattr(_dispatch, "BACKEND", "auto")
    monkeypatch.setattr(_library, "unavailable", lambda device: reason)
    monkeypatch.setattr(_library, "missing", reason)
    with torch.no_grad():
        expected = model(**batch).logits
        report = accelerate(model)
        calls = count_ops(monkeypatch)
        assert_same(model(**batch).logits, expected, batch["attention_mask"])
    assert not calls
    assert report.left == {"all on cpu": reason}


def _llama_case():
    return llama(), text_batch(padding="left")


def _mllama_case():
    shape = Shape()
    model = build(transformers.MllamaForConditionalGeneration, mllama_config(shape))
    return model, batch_of(shape, [Prompt(12, (3,), (6,)), Prompt(20, (2, 9), (2, 1))])


def _llava_case():
    batch = text_batch()
    batch["input_ids"][:, 4:13] = 95
    batch["pixel_values"] = torch.randn(2, 3, 42, 42)
    return build(transformers.LlavaForConditionalGeneration, llava_config()), batch
