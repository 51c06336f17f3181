"""State dicts, backends, outputs, and errors: what surrounds a forward."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
import transformers
from model_helpers import Prompt, Shape, assert_close, batch_of, hf_model, our_model

import mllama
import mllama_kernels.reference as reference
from mllama.backend import Ops
from mllama.outputs import CausalLMOutput
from mllama_kernels.skinny_linear import MAX_ROWS

pytestmark = pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated")
SHAPE = Shape(layers=3, cross=(1,), local_layers=2, taps=(0, 1), global_layers=1)


@pytest.fixture(scope="module")
def hf() -> transformers.MllamaForConditionalGeneration:
    return hf_model(SHAPE)


@pytest.fixture
def model(hf: transformers.MllamaForConditionalGeneration) -> mllama.MllamaForConditionalGeneration:
    return our_model(SHAPE, hf)


def test_state_dicts_interchange(hf: Any, model: Any) -> None:
    ours, theirs = model.state_dict(), hf.state_dict()
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert ours[name].equal(value), name
        assert ours[name].is_contiguous()
    other = hf_model(SHAPE)
    other.load_state_dict(ours)
    assert all(a.equal(b) for a, b in zip(other.state_dict().values(), theirs.values()))


def test_parameters_are_the_published_ones_fused(hf: Any, model: Any) -> None:
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in hf.parameters())
    attention = model.model.language_model.layers[0].self_attn
    weights = [getattr(attention, f"{n}_proj").weight for n in "qkv"]
    for one, next_one in itertools.pairwise(weights):
        assert one.data_ptr() + one.nbytes == next_one.data_ptr()
    assert {name for name, _ in model.named_modules()} <= {name for name, _ in hf.named_modules()}
    assert attention.k_proj.weight.equal(hf.model.language_model.layers[0].self_attn.k_proj.weight)


def test_loading_names_every_fault(model: Any) -> None:
    state = dict(model.state_dict())
    del state["model.language_model.layers.0.self_attn.k_proj.weight"]
    state["model.language_model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 5)
    state["model.language_model.layers.0.self_attn.extra_proj.weight"] = torch.zeros(1)
    state["model.language_model.layers.0.self_attn.v_proj.bias"] = torch.zeros(1)
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(state)
    text = str(error.value)
    assert (
        'Missing key(s) in state_dict: "model.language_model.layers.0.self_attn.k_proj.weight"'
        in text
    )
    assert "size mismatch for model.language_model.layers.1.mlp.up_proj.weight" in text
    assert "self_attn.extra_proj.weight" in text
    assert "self_attn.v_proj.bias" in text
    assert "qkv_proj" not in text and "gate_up_proj" not in text


def test_copies_are_independent(model: Any) -> None:
    batch = batch_of(SHAPE, [Prompt(9, (2,), (2,))])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            expected = model(**batch).logits
            for parameter in twin.parameters():
                parameter.zero_()
            assert twin(**batch).logits.abs().max() == 0
            assert twin.model.language_model.layers[0].self_attn.q_proj.weight.abs().max() == 0
            assert_close(model(**batch).logits, expected, rtol=1e-6)


def test_published_parameter_count() -> None:
    """The 11B instruct model, on the meta device: 10,670,220,835 parameters in 906 tensors."""
    with torch.device("meta"):
        model = mllama.MllamaForConditionalGeneration(
            mllama.MllamaConfig(vision_config={"image_size": 560}), backend="reference"
        )
    assert sum(p.numel() for p in model.parameters()) == 10_670_220_835
    assert len(model.state_dict()) == 906


def test_fresh_model_is_initialised_like_transformers() -> None:
    model = mllama.MllamaForConditionalGeneration(
        mllama.MllamaConfig(**SHAPE.configs()), backend="reference"
    )
    theirs = transformers.MllamaForConditionalGeneration(
        transformers.MllamaConfig(**SHAPE.configs())
    )
    expected = theirs.state_dict()
    for name, value in model.state_dict().items():
        # Single values are gates, some of them drawn with a deviation of 0.02.
        assert abs(value.mean() - expected[name].mean()) < 0.1, name
        if value.numel() > 100:
            assert value.std().item() == pytest.approx(expected[name].std().item(), rel=0.3), name
    batch = batch_of(SHAPE, [Prompt(9, (2,), (2,))])
    with torch.no_grad():
        first = model(**batch).logits
        batch["pixel_values"] = torch.randn_like(batch["pixel_values"])
        assert first.equal(model(**batch).logits), "closed gates: no image matters yet"


def test_backend_is_one_switch_for_the_whole_model(model: Any, monkeypatch: Any) -> None:
    calls = []
    original = reference.swiglu

    def counted(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return original(x)

    monkeypatch.setattr(reference, "swiglu", counted)
    model.backend = "reference"
    assert model.model.language_model.layers[0].self_attn.ops is model.ops
    with torch.no_grad():
        model(**batch_of(SHAPE, [Prompt(MAX_ROWS + 1)]))
    assert len(calls) == 2
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'cuda'"):
        model.backend = "cuda"


def test_kernels_that_cannot_be_loaded_say_why(monkeypatch: Any) -> None:
    monkeypatch.setattr("mllama_kernels._library.missing", "the compiled library is missing")
    assert Ops("auto").backend == "reference"
    with pytest.raises(RuntimeError, match=r'backend="kernels": the compiled library is missing'):
        Ops("kernels")


def test_outputs_are_read_like_those_of_transformers(model: Any) -> None:
    batch = batch_of(SHAPE, [Prompt(9, (2,), (2,))])
    with torch.no_grad():
        output = model(**batch, use_cache=False)
    assert output[0] is output.logits is output["logits"]
    assert output.keys() == ["logits"]
    assert "loss" not in output
    with torch.no_grad():
        output = model(
            **batch, labels=batch["input_ids"], use_cache=True, output_hidden_states=True
        )
    loss, _, past, hidden = output.to_tuple()
    assert loss.dim() == 0 and past is output.past_key_values
    assert len(hidden) == 4
    with pytest.raises(KeyError):
        output["attentions"]
    with pytest.raises(KeyError):
        output["attentions"] = None


def test_an_output_is_a_dictionary_of_its_fields() -> None:
    """Also one that a library makes anew, of another's contents (accelerate) or by pickling."""
    logits, hidden = torch.ones(1, 2, 3), (torch.ones(1, 2, 4),)
    output = CausalLMOutput(logits=logits, hidden_states=hidden)
    assert isinstance(output, dict) and dict(output) == {"logits": logits, "hidden_states": hidden}
    assert [*output] == [*output.keys()] == ["logits", "hidden_states"] and len(output) == 2
    halved = type(output)({name: value for name, value in output.items() if name == "logits"})
    assert halved.logits is logits and halved.hidden_states is None and halved.loss is None
    output.loss = torch.tensor(1.0)
    assert output[0] is output["loss"] is output.loss and next(iter(output)) == "loss"
    output["logits"] = None
    assert "logits" not in output and output.logits is None
    for copied in (copy.deepcopy(output), pickle.loads(pickle.dumps(output))):
        assert type(copied) is CausalLMOutput and copied.loss == 1 and copied.logits is None
        assert [*copied] == ["loss", "hidden_states"] and copied[1][0].equal(hidden[0])


def test_training_mode_keeps_no_cache(model: Any) -> None:
    batch = batch_of(SHAPE, [Prompt(9, (2,), (2,))])
    assert model.train()(**batch).past_key_values is None
    assert model.eval()(**batch).past_key_values.columns == 9
    assert not model(**batch, use_cache=True).logits.requires_grad


def _batch() -> dict[str, Any]:
    return batch_of(SHAPE, [Prompt(9, (2,), (2,)), Prompt(9, (2, 5), (6, 1))])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": torch.zeros(2, 9)}, r"integers, got \(2, 9\) torch.float32"),
        ({"input_ids": torch.full((2, 9), 104)}, r"within 0\.\.103 .* got ids from 104 to 104"),
        ({"input_ids": torch.full((2, 9), -1)}, r"got ids from -1 to -1"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, "must not be empty"),
        (
            {"input_ids": torch.zeros(2, 1025, dtype=torch.int64)},
            "too long: 1025 tokens, .* at most 1024",
        ),
        ({"attention_mask": torch.ones(2, 8)}, r"attention_mask must be \(2, 9\), .* got \(2, 8\)"),
        (
            {"position_ids": torch.arange(9)},
            r"position_ids must be \(2, 9\) or \(1, 9\), got \(9,\)",
        ),
        ({"input_ids": torch.full((2, 9), 5)}, r"has \[0, 0\] image tokens .* but \[1, 2\] images"),
        ({"pixel_values": None}, r"has \[1, 2\] image tokens per sequence, but no images"),
        (
            {"pixel_values": torch.zeros(2, 2, 4, 3, 42, 42)},
            r"a tile must be \(3, 56, 56\), got \(3, 42, 42\)",
        ),
        ({"pixel_values": torch.zeros(2, 2, 5, 3, 56, 56)}, "5 tile slots .* max_num_tiles 4"),
        ({"pixel_values": torch.zeros(2, 4, 3, 56, 56)}, "pixel_values must be floating point"),
        ({"aspect_ratio_ids": None}, "need aspect_ratio_ids and aspect_ratio_mask"),
        ({"aspect_ratio_ids": torch.full((2, 2), 9)}, r"within 0\.\.8, got 9 to 9"),
        (
            {"aspect_ratio_mask": torch.ones(2, 4)},
            r"aspect_ratio_mask must be \(2, 2, 4\), got \(2, 4\)",
        ),
        ({"cross_attention_states": torch.zeros(16, 17, 256)}, "not both"),
        ({"cross_attention_mask": torch.ones(2, 9, 3, 4)}, r"over 8 tiles .* got \(2, 9, 3, 4\)"),
        ({"cross_attention_mask": torch.ones(2, 7, 2, 4)}, "has 7 text positions, expected 9"),
        (
            {"labels": torch.zeros(2, 9, dtype=torch.int64), "logits_to_keep": 1},
            "leave logits_to_keep at 0",
        ),
        ({"past_key_values": ()}, "must be a mllama.MllamaCache, got tuple"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    change: dict[str, Any], message: str, model: Any, monkeypatch: Any
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a module ran before the check")

    monkeypatch.setattr(model.model.vision_model, "encode", never)
    monkeypatch.setattr(model.model.language_model.embed_tokens, "forward", never)
    with pytest.raises(ValueError, match=message):
        model(**_batch() | change)


def test_precomputed_states_of_the_wrong_width(model: Any) -> None:
    with pytest.raises(
        ValueError, match=r"cross_attention_states must be .* 256\) .* got \(8, 17, 200\)"
    ):
        model(torch.zeros(2, 4, dtype=torch.int64), cross_attention_states=torch.zeros(8, 17, 200))


def test_cache_of_another_batch(model: Any) -> None:
    cache = mllama.MllamaCache(model.config.text_config, 3, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="holds 3 sequences, the batch has 2"):
        model(torch.zeros(2, 4, dtype=torch.int64), past_key_values=cache)
