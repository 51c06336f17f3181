"""The parts that Llama and Mllama's text tower share: norm, MLP, causal self-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.mllama.modeling_mllama import (
    MllamaCrossAttentionDecoderLayer,
    MllamaRotaryEmbedding,
    MllamaSelfAttentionDecoderLayer,
    MllamaTextCrossAttention,
    MllamaTextRMSNorm,
    MllamaTextSelfAttention,
)

import mllama_kernels as ops
from mllama_kernels._dispatch import has_ops
from mllama_kernels._product import product_into
from mllama_kernels.linear import fuses
from mllama_kernels.plain import is_bare, is_plain
from mllama_kernels.reference import rotate
from mllama_kernels.transformers.handing import gets_to, is_only_moved, passes_on
from mllama_kernels.transformers.patch import Patch, by_name
from mllama_kernels.transformers.rows import (
    Sequences,
    sequences_from_padding,
    sequences_from_positions,
)
from mllama_kernels.transformers.support import (
    KNOWN_IMPLEMENTATIONS,
    NAME,
    attends_as_written,
    causal_attention,
    drops_out,
    full_attention,
    is_plain_linear,
    project,
    takes,
    takes_heads,
)
from mllama_kernels.transformers.wrappers import has_own_forward, inside

LAYERS = (LlamaDecoderLayer, MllamaSelfAttentionDecoderLayer, MllamaCrossAttentionDecoderLayer)
ATTENTIONS = (LlamaAttention, MllamaTextSelfAttention, MllamaTextCrossAttention)
NORMS = (LlamaRMSNorm, MllamaTextRMSNorm)
_SILUS = (nn.SiLU, type(ACT2FN["silu"]))
# What these give, (B, L, D) twice, is twice the same in D / 2, which is all that the op reads.
_ROTARIES = [
    cls.forward for cls in (LlamaRotaryEmbedding, MllamaRotaryEmbedding) if has_own_forward(cls)
]


def norm_forward(patch: Patch, hidden_states: Tensor) -> Tensor:
    norm = patch.module
    fits = norm.weight.shape == hidden_states.shape[-1:]
    if not (fits and takes(hidden_states, norm.weight)):
        return patch.original(hidden_states)
    return ops.rms_norm(hidden_states, norm.weight, norm.variance_epsilon)


def fits_norm(norm: nn.Module, x: Tensor, *others: Tensor) -> bool:
    """Whether ops apply a norm in its place, to x (..., E) and what is added to it."""
    if not (is_plain(norm, *NORMS) and takes(x, *others, norm.weight)):
        return False
    return norm.weight.shape == x.shape[-1:]


# What a decoder layer is given besides the arguments of its self-attention.
_NOT_FOR_SELF_ATTENTION = {
    "hidden_states",
    "cross_attention_states",
    "cross_attention_mask",
    "full_text_row_masked_out_mask",
}


def decoder_layer_forward(
    patch: Patch,
    *args: Any,
    mllama_kernels_call: TextCall | None = None,
    mllama_kernels_view: Any = None,
    **kwargs: Any,
) -> Tensor:
    """The layer with its middle sum and norm in one op."""
    layer = patch.module
    inputs = by_name(patch, args, kwargs)
    stream, norm = inputs["hidden_states"], layer.post_attention_layernorm
    given = {
        **patch.defaults,
        **inputs,
    }  # a layer of `transformers` hands on all of them, by keyword
    handed = {n: value for n, value in given.items() if n not in _NOT_FOR_SELF_ATTENTION}
    attention = layer.self_attn
    if mllama_kernels_call is not None and gets_to(attention, self_attention_forward):
        handed["mllama_kernels_call"] = mllama_kernels_call
    attended, _ = attention(hidden_states=layer.input_layernorm(stream), **handed)
    if fits_norm(norm, attended, stream):
        x, stream = ops.add_rms_norm(attended, stream, norm.weight, norm.variance_epsilon)
    else:
        stream = stream + attended
        x = norm(stream)
    return stream + layer.mlp(x)


def mlp_forward(patch: Patch, x: Tensor) -> Tensor:
    mlp = patch.module
    if not (has_ops(x.device) and is_plain(mlp.act_fn, *_SILUS)):
        return patch.original(x)
    return project(mlp.down_proj, _gated(mlp, x))


def _gated(mlp: nn.Module, x: Tensor) -> Tensor:
    """What silu of one product of x (..., E) is times the other one."""
    gate, up = mlp.gate_proj, mlp.up_proj
    rows = x.reshape(-1, x.shape[-1])
    if (
        fuses(rows.shape[0])
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()  # which places the products itself
        or torch.is_autocast_enabled(x.device.type)
        or not (is_plain_linear(gate, x) and is_plain_linear(up, x))
        or gate.weight.shape != up.weight.shape
    ):
        both = project(gate, x), project(up, x)
        if both[0].shape != both[1].shape:  # one is for all of the other, or they do not fit
            return mlp.act_fn(both[0]) * both[1]
        return ops.swiglu(torch.cat(both, dim=-1))
    inner = gate.weight.shape[0]
    out = x.new_empty(rows.shape[0], 2 * inner)
    for linear, half in zip((gate, up), out.split(inner, dim=1)):
        product_into(half, rows, linear.weight, linear.bias)
    return ops.swiglu(out.view(*x.shape[:-1], 2 * inner))


class TextCall:
    """What one call of a text model asks its self-attention layers for.

    Layers get the mask that `transformers` made, which takes work to understand. This has what it was
    made from, and resolves it at most once, when the first layer needs it.

    Args:
        module: the text model.
        inputs: the arguments of its call.
        finds_packing: whether it takes positions that start again for packed sequences, which
            `transformers` does where it has neither mask nor cache.
    """

    def __init__(self, module: nn.Module, inputs: Mapping[str, Any], finds_packing: bool):
        config, self.finds_packing = module.config, finds_packing
        tokens = inputs.get("input_ids")
        tokens = inputs.get("inputs_embeds") if tokens is None else tokens
        self.implementation = config._attn_implementation
        self.batch, self.length = tokens.shape[:2] if tokens is not None else (0, 0)
        self.mask, self.position_ids = inputs.get("attention_mask"), inputs.get("position_ids")
        self.known = (
            tokens is not None
            and self.implementation in KNOWN_IMPLEMENTATIONS
            and not asks_weights(config, inputs)
            and getattr(config, "is_causal", True)
            and inputs.get("is_causal") in (None, True)
            and (inputs.get("cu_seq_lens_q") is None or self.implementation in ("eager", "sdpa"))
        )
        self.past = self._past(inputs.get("past_key_values")) if self.known else None
        self._resolved: tuple[Sequences | None] | None = None

    def _past(self, cache: Any) -> int | None:
        """Tokens in the cache before this call, None where that is not worth waiting for the device."""
        if cache is None:
            return 0
        past = cache.get_seq_length()
        if not torch.is_tensor(past):
            return past
        return None if self.length == 1 or torch.compiler.is_compiling() else int(past)

    def prefill(self, layer_mask: Any, cache: Any) -> Sequences | None:
        """The causal sequences of a call that starts from nothing; None if it is not such a call.

        Args:
            layer_mask, cache: what `transformers` gives the layer.
        """
        if not self.known or self.past != 0:
            return None
        if isinstance(layer_mask, Sequences):
            return layer_mask
        maskless = self.implementation in ("sdpa", NAME)
        if layer_mask is None and maskless:
            return Sequences(None, self.length)
        sequences = self._sequences()
        if self.mask is None and sequences is not None and sequences.cu_seqlens is not None:
            # Only where there is a mask although none was given has transformers seen the packing, too.
            seen = self.finds_packing and maskless and layer_mask is not None and cache is None
            return sequences if seen else None
        return sequences

    def decodes(self, layer_mask: Any, cache: Any, layer: int) -> bool:
        """Whether one new token per row sees all that a growing cache holds."""
        if not self.known or self.length != 1 or not grows(cache, layer):
            return False
        if layer_mask is None and self.implementation != "eager":
            return True
        if self.mask is None:
            return True
        sequences = self._sequences()
        return sequences is not None and sequences.cu_seqlens is None

    def _sequences(self) -> Sequences | None:
        if self._resolved is None:
            self._resolved = (self._resolve(),)
        return self._resolved[0]

    def _resolve(self) -> Sequences | None:
        if self.mask is None and self.position_ids is None:
            return Sequences(None, self.length)
        if torch.compiler.is_compiling():  # a graph cannot depend on what a mask holds
            return None
        if self.mask is None:
            return sequences_from_positions(self.position_ids.expand(self.batch, -1))
        if not torch.is_tensor(self.mask) or self.mask.dim() != 2:
            return None
        return sequences_from_padding(self.mask[:, : self.past + self.length])


def asks_weights(config: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether the caller wants the attention weights, which no kernel has."""
    asked = inputs.get("output_attentions")
    return bool(getattr(config, "output_attentions", False) if asked is None else asked)


def grows(cache: Any, layer: int) -> bool:
    """Whether a cache keeps all tokens of a layer, and nothing else."""
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return False
    return len(cache.layers) > layer and type(cache.layers[layer]).__name__ == "DynamicLayer"


def text_model_forward(patch: Patch, *args: Any, **kwargs: Any) -> Any:
    """Tells the layers what the call is about."""
    inputs, tower = by_name(patch, args, kwargs), patch.module
    rotary = tower.rotary_emb
    rotates = type(rotary).forward in _ROTARIES and (is_bare(rotary) or is_only_moved(rotary))
    if rotates and hands_down(tower):
        call = TextCall(tower, inputs, patch.options["finds_packing"])
        inputs["mllama_kernels_call"] = call
    return patch.original(**inputs)


def hands_down(tower: nn.Module) -> bool:
    """Whether what a text model is given by keyword gets to its attention, and to no code of others."""
    for layer in tower.layers:
        if gets_to(layer):  # it decides about its attention
            continue
        if not passes_on(layer, *LAYERS):
            return False
        layer = inside(layer)
        if not passes_on(layer._modules.get("self_attn") or layer.cross_attn, *ATTENTIONS):
            return False
    return True


def self_attention_forward(
    patch: Patch,
    *args: Any,
    mllama_kernels_call: TextCall | None = None,
    mllama_kernels_view: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    attention, call = patch.module, mllama_kernels_call
    inputs = by_name(patch, args, kwargs)
    x, cache = inputs["hidden_states"], inputs.get("past_key_values")
    mask, layer = inputs.get("attention_mask"), attention.layer_idx
    sequences, decodes = None, False
    if (
        call is not None
        and not drops_out(attention)
        and takes_heads(attention.head_dim, x.device)
        and getattr(attention, "is_causal", True)
        and attention.config._attn_implementation == call.implementation
        and attends_as_written(attention)
    ):
        sequences = call.prefill(mask, cache)
        decodes = sequences is None and call.decodes(mask, cache, layer)
    if not (sequences is not None or decodes) or x.shape[:2] != (call.batch, call.length):
        return patch.original(**inputs)

    heads = (-1, attention.head_dim)
    q = project(attention.q_proj, x).unflatten(-1, heads)
    k = project(attention.k_proj, x).unflatten(-1, heads)
    v = project(attention.v_proj, x).unflatten(-1, heads)
    if not takes(q, k, v):
        return patch.original(**inputs)
    half = attention.head_dim // 2
    cos, sin = inputs["position_embeddings"]
    cos, sin = cos[..., :half].to(q.device, q.dtype), sin[..., :half].to(q.device, q.dtype)
    keys = values = None
    if cache is not None:
        state = (rotate(k, cos, sin).transpose(1, 2), v.transpose(1, 2), layer)
        keys, values = cache.update(*state, *cache_position(inputs))
    if decodes:
        out = full_attention(rotate(q, cos, sin), keys, values, attention.scaling)
    else:
        out = causal_attention(q, k, v, cos, sin, sequences, attention.scaling)
    return project(attention.o_proj, out.flatten(2)), None


def cache_position(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The further argument of `Cache.update` in transformers 4: where a static cache has to write."""
    position = inputs.get("cache_position")
    return () if position is None else ({"cache_position": position},)
