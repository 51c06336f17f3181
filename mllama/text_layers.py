"""The layers of the text tower: attention and MLPs on packed tokens, around the residual stream."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mllama.backend import Ops
from mllama.config import MllamaTextConfig
from mllama.kinds import Asked, Kinds, call_on_rows
from mllama.layers import ResidualStream, RMSNorm
from mllama.linear import Block, Product, Projection, side_by_side
from mllama.parallel.rules import ColumnParallel, RowParallel
from mllama.stores import CacheRows
from mllama.tiles import TileView
from mllama.varlen import VarlenBatch


@dataclass(frozen=True)
class LayerInputs:
    """What all layers of one forward share besides the residual stream.

    A layer or attention that is called, since somebody has put something around it, gets this as its
    ``attention_mask``, and the rest under the names that `transformers` has for it; what is given there
    counts.

    Attributes:
        cos, sin: (N, D / 2) in the stream's dtype.
        positions: (N,) int64.
        varlen: how the N tokens form B sequences.
        cache: where k and v of earlier tokens are; None to attend within this call only.
        tile_states: (n, P, E) of the images that are new in this call; None if none is.
        tile_table: (B, T) int32 slots of the tiles; None if there is no image at all, and then the
            cross-attention layers are skipped.
        view: which tiles each token sees.
    """

    cos: Tensor
    sin: Tensor
    positions: Tensor
    varlen: VarlenBatch
    cache: CacheRows | None
    tile_states: Tensor | None
    tile_table: Tensor | None
    view: TileView

    def published(self) -> dict[str, Any]:
        """The arguments of a decoder layer besides its hidden states, by the names of `transformers`."""
        return {
            "cross_attention_states": self.tile_states,
            "cross_attention_mask": self.view.tile_mask,
            "attention_mask": self,
            "full_text_row_masked_out_mask": self.view.row_mask,
            **self.attention_arguments(),
        }

    def attention_arguments(self) -> dict[str, Any]:
        """Those that a self-attention takes as well, without the mask."""
        return {
            "position_ids": self.varlen.pad(self.positions),
            "past_key_values": self.cache,
            "use_cache": self.cache is not None,
            "position_embeddings": (self.cos, self.sin),
        }

    @classmethod
    def given_as(cls, attention_mask: Any, owner: nn.Module, **others: Any) -> LayerInputs:
        """The inputs of a module that was called, ``others`` in place of what they were made of.

        Raises: TypeError for a mask of another kind: the modules of the text tower are parts of it.
        """
        if not isinstance(attention_mask, cls):
            raise TypeError(
                f"{type(owner).__name__} is called by its text tower, which gives a {cls.__name__} as "
                f"attention_mask; got {type(attention_mask).__name__}"
            )
        return replace(attention_mask, **others)


def _heads_of(config: MllamaTextConfig, *names: str) -> ColumnParallel:
    """Queries, keys and values are split by heads; fewer key/value heads than ranks are repeated."""
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    units = {name: heads if name == "q_proj" else kv for name in names}
    return ColumnParallel(units, "heads", may_repeat=frozenset(names) - {"q_proj"})


def _outputs_of(config: MllamaTextConfig) -> RowParallel:
    return RowParallel(config.num_attention_heads, "heads")


class MllamaTextMLP(Block):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: MllamaTextConfig, ops: Ops) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.ops, self.act_fn = ops, nn.SiLU()
        sizes = {"gate_proj": inner, "up_proj": inner}
        self.gate_up = Projection(self, width, sizes, rule=ColumnParallel())
        self.down = Projection(self, inner, {"down_proj": width}, rule=RowParallel())

    def forward(self, x: Tensor) -> Tensor:
        """x (..., E) to (..., E)."""
        y = side_by_side(self.gate_up(self.ops, x))
        y = self.ops.swiglu(y) if self._is_swiglu(Asked) else self._activated(y, None)
        return self.down(self.ops, y)

    def add_to(
        self,
        stream: ResidualStream,
        norm: nn.Module,
        gate: Tensor | None = None,
        row_mask: Tensor | None = None,
    ) -> None:
        """Add what the normalised stream gives, through a gate if there is one."""
        is_swiglu = self._is_swiglu(stream.kinds)
        y = stream.read(norm, self.gate_up, swiglu=is_swiglu)
        if not is_swiglu:
            y = self._activated(side_by_side(y), stream.varlen)
        stream.add(self.down, y, gate, row_mask)

    def _is_swiglu(self, kinds: Kinds) -> bool:
        return kinds.get(self.act_fn) is nn.SiLU

    def _activated(self, gate_up: Tensor, varlen: VarlenBatch | None) -> Tensor:
        """Both products side by side, by an activation that has to be called."""
        self.gate_up.require_whole(self.act_fn)
        gate, up = gate_up.chunk(2, dim=-1)
        return call_on_rows(self.act_fn, gate, varlen) * up


class MllamaTextSelfAttention(Block):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: MllamaTextConfig, layer: int, ops: Ops) -> None:
        super().__init__()
        self.ops, self.layer, self.head_dim = ops, layer, config.head_dim
        width, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
        sizes = {"q_proj": width, "k_proj": kv, "v_proj": kv}
        self.qkv = Projection(self, width, sizes, rule=_heads_of(config, *sizes))
        self.output = Projection(self, width, {"o_proj": width}, rule=_outputs_of(config))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: LayerInputs,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: CacheRows | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> tuple[Tensor, None]:
        """hidden_states (B, L, E) to (B, L, E); there are no attention weights. See :class:`LayerInputs`."""
        cos, sin = position_embeddings
        inputs = LayerInputs.given_as(attention_mask, self, cos=cos, sin=sin, cache=past_key_values)
        varlen = inputs.varlen
        qkv = self.qkv(self.ops, varlen.unpad(hidden_states), varlen=varlen)
        out = self.output(self.ops, self.attend(qkv, inputs), varlen=varlen)
        return varlen.pad(out), None

    def add_to(self, stream: ResidualStream, norm: nn.Module, inputs: LayerInputs) -> None:
        """Add what the normalised stream gives."""
        stream.add(self.output, self.attend(stream.read(norm, self.qkv), inputs))

    def attend(self, qkv: Product, inputs: LayerInputs) -> Tensor:
        """q, k and v, side by side (N, (Hq + 2 Hkv) D) to (N, Hq D)."""
        heads, (q, k, v) = (-1, self.head_dim), self.qkv.split(qkv)
        q, k, v = q.unflatten(1, heads), k.unflatten(1, heads), v.unflatten(1, heads)
        varlen = inputs.varlen
        if inputs.cache is None:
            out = self.ops.rotary_attention(
                q,
                k,
                v,
                inputs.cos,
                inputs.sin,
                cu_seqlens=varlen.texts,
                max_seqlen=varlen.max_seqlen,
            )
        else:
            k_pages, v_pages = inputs.cache.store.pages(self.layer)
            out = self.ops.rotary_attention_cached(
                q,
                k,
                v,
                inputs.cos,
                inputs.sin,
                k_pages,
                v_pages,
                inputs.cache.page_table,
                varlen.cu_seqlens,
                inputs.cache.lengths,
                max_seqlen=varlen.max_seqlen,
            )
        return out.flatten(1)


class MllamaTextCrossAttention(Block):
    """Grouped-query attention from text to image tiles, with normalised queries and keys."""

    def __init__(self, config: MllamaTextConfig, layer: int, ops: Ops) -> None:
        super().__init__()
        self.ops, self.layer, self.head_dim = ops, layer, config.head_dim
        width, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
        sizes = {"k_proj": kv, "v_proj": kv}
        self.query = Projection(self, width, {"q_proj": width}, rule=_heads_of(config, "q_proj"))
        self.key_value = Projection(self, width, sizes, rule=_heads_of(config, *sizes))
        self.output = Projection(self, width, {"o_proj": width}, rule=_outputs_of(config))
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, ops)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, ops)

    def forward(
        self,
        hidden_states: Tensor,
        cross_attention_states: Tensor | None = None,
        past_key_values: CacheRows | None = None,
        attention_mask: LayerInputs | None = None,
        use_cache: bool | None = None,
    ) -> tuple[Tensor, None]:
        """hidden_states (B, L, E) to (B, L, E); there are no attention weights. See :class:`LayerInputs`."""
        others = {"tile_states": cross_attention_states, "cache": past_key_values}
        inputs = LayerInputs.given_as(attention_mask, self, **others)
        varlen = inputs.varlen
        q = self.query(self.ops, varlen.unpad(hidden_states), varlen=varlen)
        out = self.output(self.ops, self.attend(q, inputs, Asked), varlen=varlen)
        return varlen.pad(out), None

    def add_to(
        self, stream: ResidualStream, norm: nn.Module, inputs: LayerInputs, gate: Tensor
    ) -> None:
        """Add what the normalised stream gives, through the gate."""
        q = stream.read(norm, self.query)
        stream.add(self.output, self.attend(q, inputs, stream.kinds), gate)

    def attend(self, q: Tensor, inputs: LayerInputs, kinds: Kinds) -> Tensor:
        """q (N, Hq D) to (N, Hq D)."""
        q = q.unflatten(-1, (-1, self.head_dim))
        is_plain = kinds.get(self.q_norm) is RMSNorm
        if not is_plain:
            q = self._called_q_norm(q, inputs.varlen)
        states, cache = inputs.tile_states, inputs.cache
        if cache is None:
            k, v = self._keys_and_values(states, kinds)
        else:
            if states is not None:
                self.store(states, cache, kinds)
            k, v = cache.store.tiles(self.layer)
        out = self.ops.cross_attention(
            q,
            k,
            v,
            inputs.view.tile_mask,
            q_norm_weight=self.q_norm.weight if is_plain else None,
            eps=self.q_norm.variance_epsilon if is_plain else 0.0,
            tile_table=inputs.tile_table,
            cu_seqlens=inputs.varlen.cu_seqlens,
            max_seqlen=inputs.varlen.max_seqlen,
        )
        return out.flatten(1)

    def store(self, states: Tensor, rows: CacheRows, kinds: Kinds) -> None:
        """Put the keys and values of new tiles, by their states (n, P, E), where they are read."""
        rows.store_tiles(self.layer, *self._keys_and_values(states, kinds))

    def _keys_and_values(self, states: Tensor, kinds: Kinds) -> tuple[Tensor, Tensor]:
        """states (n, P, E) to normalised k, and v, (n, P, Hkv, D)."""
        kv = self.key_value(self.ops, states, kinds)
        k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in self.key_value.split(kv))
        if kinds.get(self.k_norm) is RMSNorm:
            return self.ops.rms_norm(k, self.k_norm.weight, self.k_norm.variance_epsilon), v
        self.key_value.require_whole(self.k_norm)
        return self.k_norm(k.transpose(1, 2)).transpose(1, 2), v  # heads first, as there

    def _called_q_norm(self, q: Tensor, varlen: VarlenBatch) -> Tensor:
        self.query.require_whole(self.q_norm)
        heads_first = varlen.pad(q).transpose(1, 2)
        return varlen.unpad(self.q_norm(heads_first).transpose(1, 2))


class DecoderLayer(nn.Module):
    """What both kinds of layers have in common: how they are called."""

    def __init__(self, config: MllamaTextConfig, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)

    def forward(
        self,
        hidden_states: Tensor,
        cross_attention_states: Tensor | None = None,
        cross_attention_mask: Tensor | None = None,
        attention_mask: LayerInputs | None = None,
        full_text_row_masked_out_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: CacheRows | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """hidden_states (B, L, E) to (B, L, E). See :class:`LayerInputs`."""
        cos, sin = position_embeddings or (None, None)
        inputs = LayerInputs.given_as(
            attention_mask,
            self,
            cos=cos,
            sin=sin,
            cache=past_key_values,
            tile_states=cross_attention_states,
            view=TileView(cross_attention_mask, full_text_row_masked_out_mask),
        )
        if position_ids is not None:
            columns = position_ids.expand(inputs.varlen.batch, -1)
            inputs = replace(inputs, positions=inputs.varlen.unpad(columns))
        stream = ResidualStream(self.ops, inputs.varlen.unpad(hidden_states), inputs.varlen)
        self.add_to(stream, inputs)
        return inputs.varlen.pad(stream.value())

    def add_to(self, stream: ResidualStream, inputs: LayerInputs) -> None:
        """Add the layer's branches to the stream."""
        raise NotImplementedError

    def _add_called_mlp(
        self, stream: ResidualStream, gate: Tensor | None = None, row_mask: Tensor | None = None
    ) -> None:
        """Add what an MLP gives that is not exactly the plain thing."""
        varlen = stream.varlen
        out = self.mlp(varlen.pad(stream.norm(self.post_attention_layernorm)))
        stream.put(varlen.unpad(out), gate, row_mask)


class MllamaSelfAttentionDecoderLayer(DecoderLayer):
    def __init__(self, config: MllamaTextConfig, layer: int, ops: Ops) -> None:
        super().__init__(config, ops)
        self.self_attn = MllamaTextSelfAttention(config, layer, ops)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)
        self.mlp = MllamaTextMLP(config, ops)

    def add_to(self, stream: ResidualStream, inputs: LayerInputs) -> None:
        norm, varlen = self.input_layernorm, stream.varlen
        if stream.kinds.get(self.self_attn) is MllamaTextSelfAttention:
            self.self_attn.add_to(stream, norm, inputs)
        else:
            out, _ = self.self_attn(
                hidden_states=varlen.pad(stream.norm(norm)),
                attention_mask=inputs,
                **inputs.attention_arguments(),
            )
            stream.put(varlen.unpad(out))
        if stream.kinds.get(self.mlp) is MllamaTextMLP:
            self.mlp.add_to(stream, self.post_attention_layernorm)
        else:
            self._add_called_mlp(stream)


class MllamaCrossAttentionDecoderLayer(DecoderLayer):
    def __init__(self, config: MllamaTextConfig, layer: int, ops: Ops) -> None:
        super().__init__(config, ops)
        self.cross_attn = MllamaTextCrossAttention(config, layer, ops)
        self.cross_attn_attn_gate = nn.Parameter(torch.zeros(1))
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)
        self.mlp = MllamaTextMLP(config, ops)
        self.cross_attn_mlp_gate = nn.Parameter(torch.zeros(1))

    def add_to(self, stream: ResidualStream, inputs: LayerInputs) -> None:
        norm, varlen = self.input_layernorm, stream.varlen
        if stream.kinds.get(self.cross_attn) is MllamaTextCrossAttention:
            self.cross_attn.add_to(stream, norm, inputs, self.cross_attn_attn_gate)
        else:
            out, _ = self.cross_attn(
                hidden_states=varlen.pad(stream.norm(norm)),
                attention_mask=inputs,
                cross_attention_states=inputs.tile_states,
                past_key_values=inputs.cache,
            )
            stream.put(varlen.unpad(out), self.cross_attn_attn_gate)
        gate, row_mask = self.cross_attn_mlp_gate, inputs.view.row_mask
        if stream.kinds.get(self.mlp) is MllamaTextMLP:
            self.mlp.add_to(stream, self.post_attention_layernorm, gate, row_mask)
        else:
            self._add_called_mlp(stream, gate, row_mask)
        stream.value()  # the gate is this layer's, and may be gone with it (FSDP) when the next one reads
