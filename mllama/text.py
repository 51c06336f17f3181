"""The text tower: Llama 3 layers on packed tokens, with gated cross-attention layers between them."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from mllama.arguments import refuse
from mllama.backend import Ops
from mllama.base import MllamaPreTrainedModel
from mllama.cache import MllamaCache
from mllama.checks import TextInputs, check_cross_attention_mask, check_states, check_text
from mllama.config import MllamaTextConfig
from mllama.kinds import Kinds, KnownKinds
from mllama.layers import Recomputing, ResidualStream, RMSNorm, recomputing
from mllama.outputs import BaseModelOutput
from mllama.packed import PackedTokens
from mllama.quantization.workspace import PART
from mllama.rope import RotaryEmbedding
from mllama.semantics import SemanticsLike
from mllama.stores import CacheRows
from mllama.text_layers import (
    DecoderLayer,
    LayerInputs,
    MllamaCrossAttentionDecoderLayer,
    MllamaSelfAttentionDecoderLayer,
    MllamaTextCrossAttention,
)
from mllama.tiles import ImageTiles, TileView, view_of_tokens
from mllama.varlen import VarlenBatch
from mllama.vocabulary import EXTRA_ROWS


@dataclass(frozen=True)
class Checked:
    """The text and the new images of a forward, checked by the model that the tower is part of.

    Attributes:
        given: the tower's arguments that the text was made of: what a hook has put in the place of one
            counts instead.
    """

    text: TextInputs
    tiles: ImageTiles | None
    given: dict[str, Any]


_LAYERS = (MllamaSelfAttentionDecoderLayer, MllamaCrossAttentionDecoderLayer)


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
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)
        self._rotary, self._kinds = RotaryEmbedding(config), KnownKinds()
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
        checked: Checked | None = None,
        **others: Any,
    ) -> BaseModelOutput | tuple[Any, ...]:
        """Run the tower on (B, L) tokens.

        Args:
            input_ids: (B, L) int64; or ``inputs_embeds`` (B, L, E) instead.
            attention_mask: (B, L) or (B, past + L), 0 at padding, which may lie anywhere.
            position_ids: (B, L) or (1, L); default: on from the cache, one per column, padding included.
                Without mask and cache, another text begins wherever they do not continue by one: texts packed
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
            checked: from the model that this one is part of, the same as it has checked it.
            columns_to_keep: how many of the last columns of a long text with a cache are returned at least;
                not in the signature, since only the models here ask for it.
            others: see :mod:`mllama.arguments`.
        Returns: ``last_hidden_state`` (B, L, E), zero at padding; ``past_key_values``;
            ``hidden_states``.
        Raises: ValueError naming what was given and what is expected.
        """
        columns_to_keep = others.pop("columns_to_keep", sys.maxsize)
        refuse(others)
        tiles = checked.tiles if checked is not None else None
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
        }
        if checked is not None and all(map(is_, given.values(), checked.given.values())):
            text = checked.text
        else:
            checked, cache = None, given.pop("past_key_values")
            text = check_text(self.config, **given, cache=cache, embedding=self.embed_tokens)
        if cross_attention_states is not (tiles.states if tiles is not None else None):
            checked, tiles = None, self._tiles(cross_attention_states, text.batch, tiles)
        if checked is None:
            new_tiles = tiles.table.shape[1] if tiles is not None else 0
            check_cross_attention_mask(cross_attention_mask, text, new_tiles, past_key_values)
        with self.no_grad_if_caching(use_cache, past_key_values) as caching:
            output = self.run(
                text,
                tiles,
                cross_attention_mask,
                past_key_values,
                caching,
                self.wants_hidden_states(output_hidden_states),
                columns_to_keep,
            )
        return output.to_tuple() if return_dict is False else output

    def _tiles(
        self, states: Tensor | None, batch: int, checked: ImageTiles | None
    ) -> ImageTiles | None:
        """The new images by their states; of those that were checked, others in their places."""
        if states is None:
            return None
        if checked is not None and states.shape == checked.states.shape:
            return replace(checked, states=states)
        check_states(self.config, states, batch)
        return ImageTiles.from_states(states, batch)

    def run(
        self,
        text: TextInputs,
        tiles: ImageTiles | None,
        cross_attention_mask: Tensor | None,
        cache: MllamaCache | None,
        caching: bool,
        output_hidden_states: bool,
        columns_to_keep: int = sys.maxsize,
    ) -> BaseModelOutput:
        """The forward on checked inputs, with the new images as tiles; ``caching`` makes a cache.

        A long text goes through the layers in parts, each of which reads the keys and values of those
        before it from the cache, so that what a layer takes does not grow with the text. Of such a text only
        the last ``columns_to_keep`` columns are returned.
        """
        parts = None
        if text.batch * text.length > PART and (caching or cache is not None):
            if not (output_hidden_states or torch.compiler.is_compiling()):
                parts = list(text.parts(PART))
        first = text if parts is None else parts[0][1]
        given = first.inputs_embeds
        embeds = self.embed_tokens(first.input_ids) if given is None else given
        if (
            cache is None and caching
        ):  # FSDP may compute in another dtype than it keeps the weights in
            cache = MllamaCache(self.config, text.batch, dtype=embeds.dtype, device=embeds.device)
        varlen = text.varlen(cache)
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
                varlen,
                cross_attention_mask,
                self.semantics,
                cache.visible_tiles if cache is not None else None,
                cache.lengths if cache is not None else None,
                past=cache.columns if cache is not None else 0,
                new_images=tiles is not None,
            )
        states = tiles.states if tiles is not None else None
        if parts is None:
            last, hidden = self._through_layers(
                text, embeds, varlen, cache, states, table, view, output_hidden_states
            )
        else:
            kept, hidden = [], []
            with cache.kept_on_error():
                for begin, part in parts:
                    if begin:
                        given = part.inputs_embeds
                        embeds = self.embed_tokens(part.input_ids) if given is None else given
                    last, _ = self._through_layers(
                        part,
                        embeds,
                        part.varlen(cache),
                        cache,
                        None if begin else states,  # the cache has them then
                        table,
                        view.of_columns(varlen, begin, begin + part.length),
                        False,
                    )
                    kept.append(last[:, max(text.length - columns_to_keep - begin, 0) :])
            last = torch.cat(kept, dim=1)
        return BaseModelOutput(
            last_hidden_state=last,
            past_key_values=cache,
            hidden_states=(*hidden, last) if output_hidden_states else None,
        )

    def _through_layers(
        self,
        text: TextInputs,
        embeds: Tensor,
        varlen: VarlenBatch,
        cache: MllamaCache | None,
        states: Tensor | None,
        table: Tensor | None,
        view: TileView,
        output_hidden_states: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """The normed stream (B, L, E) after all layers, and if asked for what it was before each."""
        columns = text.positions(cache)
        positions = varlen.unpad(columns.expand(text.batch, -1))
        packed = PackedTokens(positions, varlen, cache, table, view, states)
        hidden: list[Tensor] | None = [] if output_hidden_states else None
        last = varlen.pad(self.forward_packed(varlen.unpad(embeds), packed, hidden))
        if cache is not None:
            text.advance(cache, varlen, columns)
        return last, hidden or []

    def forward_packed(
        self, x: Tensor, packed: PackedTokens, hidden: list[Tensor] | None = None
    ) -> Tensor:
        """The normed stream (N, E) after all layers, from embeddings x (N, E); keys and values are appended
        to the cache, whose lengths are the caller's to advance.

        Args:
            hidden: gets the stream before each layer, (B, L, E).
        """
        varlen = packed.varlen
        cos, sin = self._rotary(packed.positions, x.dtype)
        inputs = LayerInputs(
            cos,
            sin,
            packed.positions,
            varlen,
            packed.cache,
            packed.tile_states,
            packed.tile_table,
            packed.view,
        )
        stream = ResidualStream(self.ops, x, varlen, self._kinds.of(self))
        recomputed = self.recomputed(len(self.layers))
        for index, layer in enumerate(self.layers):
            if packed.tile_table is None and self._sees_images(layer, index):
                continue  # no image: the layer adds nothing
            if hidden is not None:
                hidden.append(varlen.pad(stream.value()))
            if index in recomputed:
                stream.x = recomputing(self._through, layer, stream.value(), inputs, stream.kinds)
            elif stream.kinds.get(layer) in _LAYERS:
                layer.add_to(stream, inputs)
            else:
                stream.x = _called(layer, stream.value(), inputs)
        return stream.norm(self.norm)

    def store_tiles(self, states: Tensor, rows: CacheRows) -> None:
        """Put the keys and values of new tiles, by their states (n, P, E), where text will read them.

        Raises: TypeError where a cross-attention layer has been replaced by something else.
        """
        kinds = self._kinds.of(self)
        for index in self.config.cross_attention_layers:
            attention = getattr(self.layers[index], "cross_attn", None)
            if not isinstance(attention, MllamaTextCrossAttention):
                kind = type(self.layers[index] if attention is None else attention).__name__
                raise TypeError(
                    f"layer {index} has no cross-attention of this package, but a {kind}"
                )
            attention.store(states, rows, kinds)

    def _sees_images(self, layer: nn.Module, index: int) -> bool:
        """Whether a layer is one with cross-attention; of one that is wrapped its place says it."""
        if isinstance(layer, DecoderLayer):
            return isinstance(layer, MllamaCrossAttentionDecoderLayer)
        return index in self.config.cross_attention_layers

    def _through(self, layer: nn.Module, x: Tensor, inputs: LayerInputs, kinds: Kinds) -> Tensor:
        """The stream after a layer from the stream x before it, with nothing pending."""
        if kinds.get(layer) not in _LAYERS:
            return _called(layer, x, inputs)
        stream = ResidualStream(self.ops, x, inputs.varlen, kinds)
        layer.add_to(stream, inputs)
        return stream.value()


def _called(layer: nn.Module, x: Tensor, inputs: LayerInputs) -> Tensor:
    """What a layer that is not exactly the plain thing makes of the stream x, called as in `transformers`."""
    return inputs.varlen.unpad(layer(inputs.varlen.pad(x), **inputs.published()))
