"""Quantised linears and embeddings in the places of plain ones, and projections that they are part of."""

from __future__ import annotations

import copy
import io
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_helpers import Counting
from torch import Tensor, nn

import mllama
import mllama_kernels
from mllama.backend import Ops
from mllama.demo import checkpoint_path
from mllama.kinds import Asked
from mllama.linear import Block, Projection
from mllama.quantized_modules import QuantizedEmbedding, QuantizedLinear
from mllama_kernels import QuantizedTensor, quantize

ENCODINGS = ["q8_0", "q6_k", "q4_k", "q4_0", "int8", "fp8"]
SIZES = {"q_proj": 64, "k_proj": 32, "v_proj": 32}


def linear(encoding: str, out: int = 48, width: int = 256, bias: bool = False) -> QuantizedLinear:
    weight = quantize(torch.randn(out, width), encoding)
    return QuantizedLinear(weight, nn.Parameter(torch.randn(out)) if bias else None, Ops())


class Owner(Block):
    """q, k and v of the given encodings; None for a plain one."""

    def __init__(self, *encodings: str | None) -> None:
        super().__init__()
        self.qkv = Projection(self, 256, SIZES)
        for (name, size), encoding in zip(SIZES.items(), encodings, strict=True):
            if encoding is not None:
                self.register_module(name, linear(encoding, size))
        self.qkv.pack()

    def product(self, x: Tensor, counts: Counter[str] | None = None) -> tuple[Tensor, ...]:
        ops = Counting(mllama_kernels, Counter() if counts is None else counts)
        return self.qkv.split(self.qkv(ops, x))


def decoded(module: nn.Module) -> Tensor:
    weight = module.weight
    return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_a_linear_is_the_product_with_its_decoded_weight(encoding: str, rows: int) -> None:
    module = linear(encoding, bias=True)
    x = torch.randn(rows, 256, requires_grad=True)
    y, plain = module(x), F.linear(x, decoded(module), module.bias)
    torch.testing.assert_close(y, plain, rtol=1e-4, atol=1e-4)
    (given,) = torch.autograd.grad(y.square().sum(), x)
    (wanted,) = torch.autograd.grad(plain.square().sum(), x)
    torch.testing.assert_close(given, wanted, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_embedding_gathers_decoded_rows(encoding: str) -> None:
    module = QuantizedEmbedding(
        quantize(torch.randn(40, 256), encoding), None, torch.float32, Ops()
    )
    ids = torch.tensor([[3, 3], [39, 0]])
    assert torch.equal(module(ids), module.weight.dequantize()[ids])
    assert module.bfloat16()(ids).dtype == torch.bfloat16
    assert torch.equal(module(ids), module.weight.dequantize(torch.bfloat16)[ids])


@pytest.mark.parametrize(
    ("encodings", "calls"),
    [
        (("q8_0", "q8_0", "q8_0"), {"quantized_linear": 1}),
        (("q4_k", "q4_k", "q6_k"), {"quantized_linear": 2}),
        (("q4_k", "q6_k", "q4_k"), {"quantized_linear": 2}),
        (("q8_0", None, None), {"quantized_linear": 1, "skinny_linear": 2}),
        ((None, "q8_0", "q8_0"), {"quantized_linear": 1, "skinny_linear": 2 - 1}),
    ],
)
def test_as_many_products_as_encodings(encodings: Any, calls: dict[str, int]) -> None:
    owner, x, counts = Owner(*encodings), torch.randn(2, 256), Counter()
    with torch.no_grad():
        for y, name in zip(owner.product(x, counts), SIZES):
            expected = F.linear(x, decoded(owner.get_submodule(name)))
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert counts == calls


def test_weights_of_one_encoding_lie_in_one_memory() -> None:
    owner = Owner("q8_0", "q8_0", "q8_0")
    whole = owner.qkv.kernel_weight(Asked).matrix
    begin = whole.planes[0].data_ptr()
    end = begin + whole.planes[0].nbytes
    for name in SIZES:
        assert begin <= owner.get_submodule(name).packed.data_ptr() < end
    before = owner.q_proj.weight.blocks()
    owner.q_proj.set_quantized(quantize(torch.randn(64, 256), "q8_0"))
    assert not torch.equal(owner.q_proj.weight.blocks(), before)
    again = owner.qkv.kernel_weight(Asked).matrix
    assert again is not whole
    assert torch.equal(again.blocks()[:64], owner.q_proj.weight.blocks())
    assert owner.qkv.kernel_weight(Asked).matrix is again


def test_a_hook_is_called_and_the_others_stay_products() -> None:
    owner, seen, x = Owner("q8_0", "q8_0", "q8_0"), [], torch.randn(3, 256)
    expected = owner.product(x)
    owner.k_proj.register_forward_hook(lambda module, args, y: seen.append(y) or 2 * y)
    q, k, v = owner.product(x)
    assert len(seen) == 1
    torch.testing.assert_close((q, k, v), (expected[0], 2 * expected[1], expected[2]))


def test_a_weight_is_not_assigned_trained_or_pickled() -> None:
    module = linear("q4_k")
    for value in (nn.Parameter(torch.zeros(48, 256)), torch.zeros(48, 256), None):
        with pytest.raises(TypeError, match=r"is quantised .q4_k. and cannot be assigned"):
            module.weight = value
    with pytest.raises(TypeError, match="which has no gradient"):
        module.requires_grad_()
    module.requires_grad_(False)
    with pytest.raises(TypeError, match="not pickled"):
        torch.save(module, io.BytesIO())
    with pytest.raises(TypeError, match="cannot be cast"):
        module.type(torch.float16)
    assert not list(module.parameters())


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_copies_and_state_dicts(encoding: str) -> None:
    module, other = linear(encoding), linear(encoding)
    x = torch.randn(2, 256)
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x), module(x))
    assert twin.packed.data_ptr() != module.packed.data_ptr()
    state = module.state_dict()
    assert all(f"weight.{encoding}" in name for name in state)
    assert all(type(tensor) is Tensor for tensor in state.values())
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), module(x))


def test_a_state_dict_of_another_kind_is_refused() -> None:
    module = linear("q8_0")
    for state in (linear("q4_0").state_dict(), nn.Linear(256, 48, bias=False).state_dict(), {}):
        with pytest.raises(RuntimeError, match=r"Missing key.*weight.q8_0"):
            module.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"expected \(48, 256\), got parts of \(16, 256\)"):
        module.load_state_dict(linear("q8_0", 16).state_dict())
    plain = nn.Linear(256, 48, bias=False)
    with pytest.raises(RuntimeError, match=r"Missing key[^$]*Unexpected key"):
        plain.load_state_dict(module.state_dict())


def test_a_cast_leaves_the_weight() -> None:
    module = linear("q6_k", bias=True)
    before = module.weight.blocks()
    module.to(torch.bfloat16)
    assert module.bias.dtype == torch.bfloat16 and torch.equal(module.weight.blocks(), before)
    assert module(torch.randn(1, 256).bfloat16()).dtype == torch.bfloat16


@pytest.fixture(scope="module")
def demo() -> Any:
    return mllama.MllamaForConditionalGeneration.from_pretrained(
        checkpoint_path(), device="cpu", dtype="float32", quantization="q8_0"
    )


def test_a_decode_step_keeps_its_launches(demo: Any) -> None:
    plain = mllama.MllamaForConditionalGeneration.from_pretrained(checkpoint_path(), device="cpu")
    found = []
    for model in (plain, demo):
        ids, counts = torch.arange(3, 23).unsqueeze(0), Counter()
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
            with model.ops.replaced(lambda ops, counts=counts: Counting(ops, counts)):
                model(ids[:, :1], past_key_values=cache, logits_to_keep=1)
        found.append(counts)
    linears = found[0].pop("skinny_linear")
    assert found[1].pop("quantized_linear") == linears
    assert found[1].pop("quantized_rows") == 1
    assert found[0] == found[1]


def test_a_whole_model_is_copied_and_counted(demo: Any) -> None:
    ids = torch.arange(3, 23).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(demo)(ids).logits, demo(ids).logits)
    plain = mllama.MllamaForConditionalGeneration.from_pretrained(checkpoint_path(), device="cpu")
    assert demo.num_parameters() == plain.num_parameters()
    with pytest.raises(TypeError, match="cannot be resized"):
        copy.deepcopy(demo).resize_token_embeddings(500)


def test_a_linear_compiles_as_one_graph() -> None:
    module, x = linear("q8_0"), torch.randn(2, 256)
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), module(x))


@pytest.mark.parametrize("lengths", [(250,), (90, 70), (150, 4)])
def test_a_long_prompt_is_read_in_parts(
    monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...]
) -> None:
    """The same as in one piece, with keys and values of earlier parts from the cache."""
    from mllama import head, text

    config = mllama.MllamaTextConfig(
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=96,
        num_hidden_layers=3,
        cross_attention_layers=[1],
        vocab_size=50,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = mllama.MllamaForCausalLM(config, backend="reference").eval()
    for name, parameter in model.named_parameters():
        if "gate" in name:
            nn.init.ones_(parameter)
    longest = max(lengths)
    ids = torch.randint(3, 50, (len(lengths), longest))
    mask = torch.stack([torch.arange(longest) >= longest - length for length in lengths]).long()
    states = torch.randn(len(lengths) * 2, 5, 64)
    seen = torch.randint(0, 2, (len(lengths), longest, 1, 2))
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "cross_attention_states": states,
        "cross_attention_mask": seen,
    }
    assert len(lengths) * longest > 64
    rows: list[int] = []
    run = text.MllamaTextModel._through_layers
    monkeypatch.setattr(
        text.MllamaTextModel,
        "_through_layers",
        lambda self, part, *rest: rows.append(part.length) or run(self, part, *rest),
    )
    results = []
    with torch.no_grad():
        for part in (64, 10**9):
            monkeypatch.setattr(text, "PART", part)
            monkeypatch.setattr(head, "PART", part)
            first = model(**inputs, use_cache=True, logits_to_keep=1)
            cache = first.past_key_values
            token = torch.full((len(lengths), 1), 7)
            more = torch.cat([mask, torch.ones_like(token)], 1)
            then = model(input_ids=token, attention_mask=more, past_key_values=cache)
            results.append((first.logits, then.logits, cache.lengths, cache.columns))
            whole = model(**inputs, use_cache=True).logits
            torch.testing.assert_close(whole[:, -1:], first.logits, rtol=1e-4, atol=1e-4)
    assert len(rows) > 6 and max(rows[:2]) * len(lengths) <= 64
    assert results[0][3] == results[1][3] and torch.equal(results[0][2], results[1][2])
    for parts, piece in zip(results[0][:2], results[1][:2]):
        torch.testing.assert_close(parts, piece, rtol=1e-4, atol=1e-4)
