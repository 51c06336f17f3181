"""The parts that Llama and Mllama's text tower share: norm, MLP, causal self-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

import mllama_kernels as ops
from mllama_kernels._dispatch import has_ops
from mllama_kernels.transformers.patch import Patch, by_name, is_plain
from mllama_kernels.transformers.rows import (
    Sequences,
    sequences_of_padding,
    sequences_of_positions,
)
from mllama_kernels.transformers.support import (
    KNOWN_IMPLEMENTATIONS,
    NAME,
    causal_attention,
    drops_out,
    full_attention,
    has_many_rows,
    project,
    rotate,
    takes,
    takes_heads,
)


def norm_forward(patch: Patch, hidden_states: Tensor) -> Tensor:
    norm = patch.module
    if not takes(hidden_states, norm.weight):
        return patch.original(hidden_states)
    return ops.rms_norm(hidden_states, norm.weight, norm.variance_epsilon)


# What a decoder layer is given besides the arguments of its self-attention.
_LAYER_ONLY = {
    "hidden_states",
    "cross_attention_states",
    "cross_attention_mask",
    "full_text_row_masked_out_mask",
}


def decoder_layer_forward(patch: Patch, *args: Any, **kwargs: Any) -> Tensor:
    """The layer with its middle sum and norm in one op."""
    layer = patch.module
    inputs = by_name(patch, args, kwargs)
    stream, norm = inputs["hidden_states"], layer.post_attention_layernorm
    attended, _ = layer.self_attn(
        hidden_states=layer.input_layernorm(stream),
        **{name: value for name, value in inputs.items() if name not in _LAYER_ONLY},
    )
    if is_plain(norm) and takes(attended, stream, norm.weight):
        x, stream = ops.add_rms_norm(attended, stream, norm.weight, norm.variance_epsilon)
    else:
        stream = stream + attended
        x = norm(stream)
    return stream + layer.mlp(x)


def mlp_forward(patch: Patch, x: Tensor) -> Tensor:
    mlp = patch.module
    if not has_ops(x.device):
        return patch.original(x)
    return project(mlp.down_proj, ops.swiglu(_gate_and_up(mlp.gate_proj, mlp.up_proj, x)))


def _gate_and_up(gate: nn.Module, up: nn.Module, x: Tensor) -> Tensor:
    """Both products of x (..., E), side by side in the last dimension."""
    if (
        not has_many_rows(x)
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()  # which places the products itself
        or torch.is_autocast_enabled(x.device.type)
        or not all(type(m) is nn.Linear and is_plain(m) and takes(x, m.weight) for m in (gate, up))
    ):
        return torch.cat([project(gate, x), project(up, x)], dim=-1)
    # Each product goes where the other expects it: nothing is copied.
    rows = x.flatten(0, -2)
    both = x.new_empty(rows.shape[0], gate.out_features + up.out_features)
    for linear, out in zip((gate, up), both.split([gate.out_features, up.out_features], dim=1)):
        if linear.bias is None:
            torch.mm(rows, linear.weight.t(), out=out)
        else:
            torch.addmm(linear.bias, rows, linear.weight.t(), out=out)
    return both.unflatten(0, x.shape[:-1])


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
            return sequences_of_positions(self.position_ids.expand(self.batch, -1))
        if not torch.is_tensor(self.mask) or self.mask.dim() != 2:
            return None
        return sequences_of_padding(self.mask[:, : self.past + self.length])


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
    inputs = by_name(patch, args, kwargs)
    call = TextCall(patch.module, inputs, patch.options["finds_packing"])
    return patch.original(**inputs, mllama_kernels_call=call)


def self_attention_forward(
    patch: Patch,
    *args: Any,
    mllama_kernels_call: TextCall | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    attention, call = patch.module, mllama_kernels_call
    inputs = by_name(patch, args, kwargs)
    x, cache = inputs["hidden_states"], inputs.get("past_key_values")
    mask, layer = inputs.get("attention_mask"), attention.layer_idx
    sequences, decodes = None, False
    if call is not None and not drops_out(attention) and takes_heads(attention.head_dim, x.device):
        sequences = call.prefill(mask, cache)
        decodes = sequences is None and call.decodes(mask, cache, layer)
    if not (sequences is not None or decodes) or x.shape[1] != call.length:
        return patch.original(**inputs)

    q, k, v = (
        project(linear, x).unflatten(-1, (-1, attention.head_dim))
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if not takes(q, k, v):
        return patch.original(**inputs)
    half = attention.head_dim // 2
    cos, sin = (t[..., :half].to(q.device, q.dtype) for t in inputs["position_embeddings"])
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
