"""attn_implementation="mllama_kernels" in models that know nothing of us."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers_helpers import assert_same, build, count_ops, llama_config, text_batch

from mllama_kernels.transformers import attention_interface
from mllama_kernels.transformers.rows import (
    Sequences,
    sequences_from_padding,
    sequences_from_positions,
)


def test_from_pretrained(tmp_path, monkeypatch):
    build(transformers.LlamaForCausalLM, llama_config()).save_pretrained(tmp_path)
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
        for name in ("sdpa", "mllama_kernels")
    ]
    batch = text_batch(padding="around")
    with torch.no_grad():
        expected = models[0](**batch).logits
        calls = count_ops(monkeypatch)
        assert_same(models[1](**batch).logits, expected, batch["attention_mask"])
    assert calls == {"rotary_attention": 3}


def _config(kind: str):
    sizes = {"vocab_size": 96, "hidden_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 160}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return {
        "qwen2": lambda: transformers.Qwen2Config(**sizes, **heads, **tokens),
        "mistral": lambda: transformers.MistralConfig(
            **sizes, **heads, **tokens, sliding_window=6, head_dim=32
        ),
        "gemma": lambda: transformers.GemmaConfig(**sizes, **heads, **tokens, head_dim=32),
    }[kind]()


@pytest.mark.parametrize("kind", ["qwen2", "mistral", "gemma"])
@pytest.mark.parametrize("padding", ["none", "left", "between"])
def test_other_decoders(kind, padding):
    """A sliding window included: its masks are left to sdpa."""
    config = _config(kind)
    config._attn_implementation = "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    batch = text_batch(padding=padding)
    options = {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        expected, tokens = model(**batch).logits, model.generate(**batch, **options)
        model.set_attn_implementation("mllama_kernels")
        assert_same(model(**batch).logits, expected, batch["attention_mask"])
        assert model.generate(**batch, **options).equal(tokens)


def test_an_encoder_is_not_causal(monkeypatch):
    config = transformers.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=2,
        num_hidden_layers=2,
        image_size=28,
    )
    config.patch_size = 14
    model = transformers.CLIPVisionModel(config).eval()
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected = model(pixel_values=pixels).last_hidden_state
        model.set_attn_implementation("mllama_kernels")
        calls = count_ops(monkeypatch)
        assert_same(model(pixel_values=pixels).last_hidden_state, expected)
    assert calls == {"vision_attention": 2}


class Module(nn.Module):
    num_key_value_groups = 2
    is_causal = True


def _qkv(queries: int = 10, keys: int = 10, batch: int = 1):
    return [torch.randn(batch, heads, n, 64) for heads, n in ((4, queries), (2, keys), (2, keys))]


def _attend(*args, **options):
    return attention_interface.attention_forward(Module().eval(), *args, **options)[0]


def _sdpa(q, k, v, mask, **options):
    k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
    return out.transpose(1, 2)


def test_bounds_of_packed_sequences(monkeypatch):
    q, k, v = _qkv()
    bounds = torch.tensor([0, 3, 3, 8, 10], dtype=torch.int32)
    number = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2, 2])
    visible = (number[:, None] == number).tril()
    calls = count_ops(monkeypatch)
    options = {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": 5,
        "max_length_k": 5,
    }
    assert_same(_attend(q, k, v, None, **options), _sdpa(q, k, v, visible))
    assert calls == {"rotary_attention": 1}
    custom = torch.rand(1, 1, 10, 10) < 0.5
    custom.diagonal(dim1=-2, dim2=-1).fill_(True)
    assert_same(_attend(q, k, v, custom, **options), _sdpa(q, k, v, custom))


@pytest.mark.parametrize("queries", [1, 4])
def test_what_follows_a_static_prompt_is_not_seen(queries):
    """Without a mask, several queries are the first ones of the keys; a single one sees all keys."""
    q, k, v = _qkv(queries, 12)
    visible = torch.ones(queries, 12, dtype=torch.bool)
    if queries > 1:
        visible = visible.tril()
    assert_same(_attend(q, k, v, None), _sdpa(q, k, v, visible))


def test_a_scale_is_used():
    q, k, v = _qkv(6, 6)
    assert_same(
        _attend(q, k, v, None, scaling=0.5), _sdpa(q, k, v, None, is_causal=True, scale=0.5)
    )
    assert_same(
        _attend(q[:, :, :1], k, v, None, scaling=0.5), _sdpa(q[:, :, :1], k, v, None, scale=0.5)
    )
    unmasked = _attend(q, k, v, None, scaling=0.5, is_causal=False)
    assert_same(unmasked, _sdpa(q, k, v, None, scale=0.5))


@pytest.mark.parametrize("option", ["s_aux", "softcap"])
def test_what_sdpa_would_ignore_is_refused(option):
    with pytest.raises(NotImplementedError, match=option):
        _attend(*_qkv(), None, **{option: torch.ones(4)})


def test_dropout_and_head_sizes_fall_back(monkeypatch):
    q, k, v = _qkv()
    sequences = Sequences(torch.tensor([0, 4, 10], dtype=torch.int32), 10)
    expected = _attend(q, k, v, sequences)
    calls = count_ops(monkeypatch)
    module = Module().train()
    out, _ = attention_interface.attention_forward(module, q, k, v, sequences, dropout=0.9)
    assert (out == 0).all(-1).any()
    narrow = [t[..., :12] for t in (q, k, v)]
    assert _attend(*narrow, sequences).shape == (1, 10, 4, 12)
    monkeypatch.setattr(attention_interface, "takes_heads", lambda *_: False)
    assert_same(_attend(q, k, v, sequences), expected)
    assert not calls


def test_sequences_from_padding():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    bounds = sequences_from_padding(mask).cu_seqlens.tolist()
    assert bounds == [0, 2, 5, 5, 5, 8, 10, 11, 13, 15, 15, 20, 20]
    assert sequences_from_padding(torch.ones(2, 5)) == Sequences(None, 5)
    assert sequences_from_padding(torch.tensor([[1, 0, 1]])) is None


def test_sequences_as_a_mask():
    sequences = sequences_from_positions(torch.tensor([[0, 1, 0, 1], [5, 6, 7, 8]]))
    assert sequences.cu_seqlens.tolist() == [0, 2, 4, 8]
    two = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2)).tril().bool()
    assert sequences.mask(2)[0, 0].equal(two)
    assert sequences.mask(2)[1, 0].equal(torch.ones(4, 4).tril().bool())
    assert Sequences(None, 3).mask(2).equal(torch.ones(2, 1, 3, 3).tril().bool())
    assert sequences_from_positions(torch.arange(6).expand(2, -1)) == Sequences(None, 6)


def test_a_static_cache_keeps_its_masks():
    model = build(transformers.LlamaForCausalLM, llama_config())
    other = copy.deepcopy(model)
    other.set_attn_implementation("mllama_kernels")
    batch = text_batch(padding="left")
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    options |= {"disable_compile": True}
    assert other.generate(**batch, **options).equal(model.generate(**batch, **options))
