"""The text tower: Llama 3 layers on packed tokens, with gated cross-attention layers between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mllama.arguments import refuse
from mllama.backend import Ops
from mllama.base import MllamaPreTrainedModel
from mllama.cache import MllamaCache
from mllama.checks import TextInputs, check_cross_attention_mask, check_states, check_text
from mllama.config import MllamaTextConfig
from mllama.layers import FusedLinear, Recomputing, ResidualStream, RMSNorm
from mllama.outputs import BaseModelOutput
from mllama.packing import Packing
from mllama.rope import RotaryEmbedding
from mllama.semantics import SemanticsLike
from mllama.tiles import ImageTiles, TileView, view_of_tokens
from mllama.vocabulary import EXTRA_ROWS


@dataclass(frozen=True)
class LayerInputs:
    """What all layers of one forward share besides the residual stream.

    Attributes:
        cos, sin: (N, D / 2) in the stream's dtype.
        packing: how the N tokens form B sequences.
        cache: where k and v of earlier tokens are; None to attend within this call only.
        tile_states: (n, P, E) of the images that are new in this call; None if none is.
        tile_table: (B, T) int32 slots of the tiles; None if there is no image at all, and then the
            cross-attention layers are skipped.
        view: which tiles each token sees.
    """

    cos: Tensor
    sin: Tensor
    packing: Packing
    cache: MllamaCache | None
    tile_states: Tensor | None
    tile_table: Tensor | None
    view: TileView


class MllamaTextMLP(nn.Module):
    """Adds ``down(silu(gate(x)) * up(x))`` of the normalised stream to it."""

    def __init__(self, config: MllamaTextConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = FusedLinear(self, width, {"gate_proj": inner, "up_proj": inner})
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(
        self,
        stream: ResidualStream,
        norm: RMSNorm,
        gate: Tensor | None = None,
        row_mask: Tensor | None = None,
    ) -> ResidualStream:
        stream = stream.copy()
        inner = stream.read(norm, self.gate_up_proj, swiglu=True)
        stream.add(self.down_proj, inner, gate, row_mask)
        return stream


class MllamaTextSelfAttention(nn.Module):
    """Adds causal grouped-query attention with rotary positions to the stream."""

    def __init__(self, config: MllamaTextConfig, layer: int, ops: Ops) -> None:
        super().__init__()
        self.ops, self.layer, self.head_dim = ops, layer, config.head_dim
        kv = config.num_key_value_heads * config.head_dim
        self.qkv_proj = FusedLinear(
            self, config.hidden_size, {"q_proj": config.hidden_size, "k_proj": kv, "v_proj": kv}
        )
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, stream: ResidualStream, norm: RMSNorm, inputs: LayerInputs) -> ResidualStream:
        stream = stream.copy()
        qkv = stream.read(norm, self.qkv_proj)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in self.qkv_proj.split(qkv))
        packing = inputs.packing
        if inputs.cache is None:
            out = self.ops.rotary_attention(
                q,
                k,
                v,
                inputs.cos,
                inputs.sin,
                cu_seqlens=packing.texts,
                max_seqlen=packing.max_seqlen,
            )
        else:
            k_pages, v_pages = inputs.cache.pages(self.layer)
            out = self.ops.rotary_attention_cached(
                q,
                k,
                v,
                inputs.cos,
                inputs.sin,
                k_pages,
                v_pages,
                inputs.cache.page_table,
                packing.cu_seqlens,
                inputs.cache.lengths,
                max_seqlen=packing.max_seqlen,
            )
        stream.add(self.o_proj, out.flatten(1))
        return stream


class MllamaTextCrossAttention(nn.Module):
    """Adds gated grouped-query attention from text to image tiles, with normalised queries and keys."""

    def __init__(self, config: MllamaTextConfig, layer: int, ops: Ops) -> None:
        super().__init__()
        self.ops, self.layer, self.head_dim = ops, layer, config.head_dim
        kv = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.kv_proj = FusedLinear(self, config.hidden_size, {"k_proj": kv, "v_proj": kv})
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def keys_and_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """states (n, P, E) to normalised k, and v, (n, P, Hkv, D)."""
        k, v = (
            t.unflatten(-1, (-1, self.head_dim)) for t in self.kv_proj.split(self.kv_proj(states))
        )
        return self.ops.rms_norm(k, self.k_norm.weight, self.k_norm.eps), v

    def forward(
        self, stream: ResidualStream, norm: RMSNorm, inputs: LayerInputs, gate: Tensor
    ) -> ResidualStream:
        stream = stream.copy()
        k = v = None
        if inputs.tile_states is not None:
            k, v = self.keys_and_values(inputs.tile_states)
        if inputs.cache is not None:
            if k is not None:
                inputs.cache.store_tiles(self.layer, k, v)
            k, v = inputs.cache.tiles(self.layer)
        out = self.ops.cross_attention(
            stream.read(norm, self.q_proj).unflatten(-1, (-1, self.head_dim)),
            k,
            v,
            inputs.view.tile_mask,
            q_norm_weight=self.q_norm.weight,
            eps=self.q_norm.eps,
            tile_table=inputs.tile_table,
            cu_seqlens=inputs.packing.cu_seqlens,
            max_seqlen=inputs.packing.max_seqlen,
        )
        stream.add(self.o_proj, out.flatten(1), gate)
        return stream


class MllamaSelfAttentionDecoderLayer(nn.Module):
    def __init__(self, config: MllamaTextConfig, layer: int, ops: Ops) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MllamaTextSelfAttention(config, layer, ops)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MllamaTextMLP(config)

    def forward(self, stream: ResidualStream, inputs: LayerInputs) -> ResidualStream:
        stream = self.self_attn(stream, self.input_layernorm, inputs)
        return self.mlp(stream, self.post_attention_layernorm)


class MllamaCrossAttentionDecoderLayer(nn.Module):
    def __init__(self, config: MllamaTextConfig, layer: int, ops: Ops) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn = MllamaTextCrossAttention(config, layer, ops)
        self.cross_attn_attn_gate = nn.Parameter(torch.zeros(1))
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MllamaTextMLP(config)
        self.cross_attn_mlp_gate = nn.Parameter(torch.zeros(1))

    def forward(self, stream: ResidualStream, inputs: LayerInputs) -> ResidualStream:
        stream = self.cross_attn(stream, self.input_layernorm, inputs, self.cross_attn_attn_gate)
        stream = self.mlp(
            stream,
            self.post_attention_layernorm,
            self.cross_attn_mlp_gate,
            inputs.view.row_mask,
        )
        stream.value()  # the gate is this layer's, and may be gone with it (FSDP) when the next one reads
        return stream


class MllamaTextModel(Recomputing, MllamaPreTrainedModel):
    """The text tower without the output head.

    Args:
        config, backend, semantics: see :class:`MllamaPreTrainedModel`.
    """

    config: MllamaTextConfig
    input_modalities = ("text",)

    def __init__(
        self,
        config: MllamaTextConfig,
        *,
        backend: str | Ops = "auto",
        semantics: SemanticsLike | None = None,
    ) -> None:
        super().__init__(config, backend=backend, semantics=semantics)
        config, ops = self.config, self.ops
        rows, pad = config.vocab_size + EXTRA_ROWS, config.pad_token_id
        if pad is not None and pad >= rows:
            raise ValueError(f"pad_token_id {pad} is outside the embedding's {rows} rows")
        self.embed_tokens = nn.Embedding(rows, config.hidden_size, pad)
        cross = set(config.cross_attention_layers)
        self.layers = nn.ModuleList(
            (MllamaCrossAttentionDecoderLayer if i in cross else MllamaSelfAttentionDecoderLayer)(
                config, i, ops
            )
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._rotary = RotaryEmbedding(config)
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cross_attention_states: Tensor | None = None,
        cross_attention_mask: Tensor | None = None,
        past_key_values: MllamaCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        checked: tuple[TextInputs, ImageTiles | None] | None = None,
        **others: Any,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Run the tower on (B, L) tokens.

        Args:
            input_ids: (B, L) int64; or ``inputs_embeds`` (B, L, E) instead.
            attention_mask: (B, L) or (B, past + L), 0 at padding, which may lie anywhere.
            position_ids: (B, L) or (1, L); default: on from the cache, one per column, padding included.
                Without mask and cache, another text begins wherever they do not go on by one: texts packed
                into a row, which do not see each other.
            cross_attention_states: (B * M * tiles, P, E) projected vision states of images that are not
                in the cache yet.
            cross_attention_mask: (B, L, M, tiles) or with the rows of the past before, M counting all
                images, old ones first; 1 where a token sees a tile. Absent: on a cache that holds
                images the tokens are taken for generated ones and see what the last token saw;
                otherwise every token sees every tile.
            past_key_values: the cache of an earlier call, extended in place.
            use_cache: return a cache; default: the config's choice, but not in training mode. With a
                cache the forward is inference: its results carry no gradient.
            output_hidden_states: return the stream before each layer, and the normed result; default:
                the config's choice.
            return_dict: False for a tuple.
            checked: the text and its new images in place of all that tells of them, from the model that
                this one is part of.
            others: see :mod:`mllama.arguments`.
        Returns: ``last_hidden_state`` (B, L, E), zero at padding; ``past_key_values``;
            ``hidden_states``.
        Raises: ValueError naming what was given and what is expected.
        """
        refuse(others)
        if checked is None:
            text = check_text(
                self.config,
                input_ids,
                inputs_embeds,
                attention_mask,
                position_ids,
                past_key_values,
                self.embed_tokens,
            )
            tiles = None
            if cross_attention_states is not None:
                check_states(self.config, cross_attention_states, text.batch)
                tiles = ImageTiles.of_states(cross_attention_states, text.batch)
            new_tiles = tiles.table.shape[1] if tiles is not None else 0
            check_cross_attention_mask(cross_attention_mask, text, new_tiles, past_key_values)
            checked = text, tiles
        with self.no_grad_if_caching(use_cache, past_key_values) as caching:
            output = self.run(
                *checked,
                cross_attention_mask,
                past_key_values,
                caching,
                self.wants_hidden_states(output_hidden_states),
            )
        return output.to_tuple() if return_dict is False else output

    def run(
        self,
        text: TextInputs,
        tiles: ImageTiles | None,
        cross_attention_mask: Tensor | None,
        cache: MllamaCache | None,
        caching: bool,
        output_hidden_states: bool,
    ) -> BaseModelOutput:
        """The forward on checked inputs, with the new images as tiles; ``caching`` makes a cache."""
        embeds = (
            self.embed_tokens(text.input_ids) if text.inputs_embeds is None else text.inputs_embeds
        )
        if (
            cache is None and caching
        ):  # FSDP may compute in another dtype than it keeps the weights in
            cache = MllamaCache(self.config, text.batch, dtype=embeds.dtype, device=embeds.device)
        packing = text.packing(cache)
        if cache is not None:
            cache.reserve(text.length)
            if tiles is not None:
                cache.add_tiles(tiles)
        table = tiles.table if cache is None and tiles is not None else None
        if cache is not None and cache.num_tiles:
            table = cache.tile_table
        view = TileView(None, None)
        if table is not None:
            view = view_of_tokens(
                table,
                packing,
                cross_attention_mask,
                self.semantics,
                cache.memory if cache is not None else None,
                cache.lengths if cache is not None else None,
                past=cache.columns if cache is not None else 0,
                new_images=tiles is not None,
            )
        positions = text.positions(cache)
        x = packing.pack(embeds)
        cos, sin = self._rotary(packing.pack(positions.expand(text.batch, -1)), x.dtype)
        inputs = LayerInputs(
            cos, sin, packing, cache, tiles.states if tiles is not None else None, table, view
        )
        stream, hidden = ResidualStream(self.ops, x), []
        for index, layer in enumerate(self.layers):
            if isinstance(layer, MllamaCrossAttentionDecoderLayer) and table is None:
                continue  # no image: the layer adds nothing
            if output_hidden_states:
                hidden.append(packing.unpack(stream.value()))
            if self.recomputes(index):
                x = self.run_layer(index, self._alone, layer, stream.value(), inputs)
                stream = ResidualStream(self.ops, x)
            else:
                stream = layer(stream, inputs)
        last = packing.unpack(stream.norm(self.norm))
        if cache is not None:
            text.advance(cache, packing, positions)
        return BaseModelOutput(
            last_hidden_state=last,
            past_key_values=cache,
            hidden_states=(*hidden, last) if output_hidden_states else None,
        )

    def _alone(self, layer: nn.Module, x: Tensor, inputs: LayerInputs) -> Tensor:
        """The stream behind a layer from the stream x before it, with nothing pending."""
        return layer(ResidualStream(self.ops, x), inputs).value()
