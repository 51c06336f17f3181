"""The vision tower: pixels of up to four tiles per image to one vector per patch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllama.arguments import refuse
from mllama.backend import Ops
from mllama.base import MllamaPreTrainedModel
from mllama.checks import check_images
from mllama.config import MllamaVisionConfig
from mllama.kinds import Asked, Kinds, KnownKinds
from mllama.layers import Recomputing, recomputing
from mllama.linear import Block, Projection
from mllama.outputs import BaseModelOutput, VisionOutput
from mllama.parallel.rules import ColumnParallel, RowParallel
from mllama.semantics import SemanticsLike
from mllama_kernels._arguments import PAD_TO


class Padding(NamedTuple):
    """Which of the S tokens of each of M images are padding; pairs of those do not attend.

    Attributes:
        mask: (M, S) bool, True at padding.
        blank: (M,) bool, the images that are nothing else, or None if none is. The published code adds the
            dtype's lowest number to the scores of such pairs, which leaves none but it: each token of a
            blank image attends to all of them evenly. Their mask is all False here.
    """

    mask: Tensor
    blank: Tensor | None

    @classmethod
    def from_tiles(cls, tile_mask: Tensor, tokens: int, num_patches: int) -> Padding:
        """From ``tile_mask`` (M, tiles), not 0 at a tile of the image; ``tokens`` per tile, ``num_patches``
        of them real. Reads on the host whether there are blank images, unless exporting."""
        is_tile = tile_mask.bool()
        is_patch = torch.arange(tokens, device=tile_mask.device) < num_patches
        mask, blank = ~(is_tile.unsqueeze(-1) & is_patch).flatten(1), ~is_tile.any(1)
        if not torch.compiler.is_exporting() and not bool(blank.any()):
            return cls(mask, None)
        return cls(mask & ~blank.unsqueeze(1), blank)


class MllamaPrecomputedAspectRatioEmbedding(nn.Module):
    """Adds a vector per (aspect ratio, tile), scaled by ``tanh(gate)``."""

    def __init__(self, config: MllamaVisionConfig) -> None:
        super().__init__()
        self.max_num_tiles = config.max_num_tiles
        self.embedding = nn.Embedding(
            config.max_aspect_ratio_id + 1, config.max_num_tiles * config.hidden_size
        )
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_state: Tensor, aspect_ratio_ids: Tensor) -> Tensor:
        """hidden_state (M, tiles, P, E) and ids (M,) or (M, 1) to (M, tiles, P, E)."""
        rows = self.embedding(aspect_ratio_ids).reshape(
            -1, self.max_num_tiles, 1, hidden_state.shape[-1]
        )
        return hidden_state + rows * self.gate.tanh()


class MllamaPrecomputedPositionEmbedding(nn.Module):
    """Adds a vector per patch, and one per (aspect ratio, tile, patch), in the shares that a gate says."""

    def __init__(self, config: MllamaVisionConfig) -> None:
        super().__init__()
        tokens, width = config.num_patches, config.hidden_size
        self.max_num_tiles = config.max_num_tiles
        self.gate = nn.Parameter(torch.zeros(1))
        self.embedding = nn.Parameter(torch.empty(tokens, width))
        self.tile_embedding = nn.Embedding(
            config.max_aspect_ratio_id + 1, config.max_num_tiles * tokens * width
        )

    def forward(self, hidden_state: Tensor, aspect_ratio_ids: Tensor) -> Tensor:
        """hidden_state (M, tiles, P, E) and ids (M,) or (M, 1) to (M, tiles, P, E)."""
        share = self.gate.tanh()
        hidden_state = hidden_state + (1 - share) * self.embedding
        tiles = self.tile_embedding(aspect_ratio_ids).reshape(
            -1, self.max_num_tiles, *self.embedding.shape
        )
        return hidden_state + share * tiles


class MllamaVisionMLP(nn.Module):
    def __init__(self, config: MllamaVisionConfig, ops: Ops) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.ops = ops
        self.activation_fn = nn.GELU()
        self.up = Projection(self, width, {"fc1": inner}, bias=True, rule=ColumnParallel())
        self.down = Projection(self, inner, {"fc2": width}, bias=True, rule=RowParallel())

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.run(hidden_states, Asked)

    def run(self, x: Tensor, kinds: Kinds) -> Tensor:
        if kinds.get(self.activation_fn) is not nn.GELU:
            self.up.require_whole(self.activation_fn)
        return self.down(self.ops, self.activation_fn(self.up(self.ops, x, kinds)), kinds)


class MllamaVisionAttention(Block):
    def __init__(self, config: MllamaVisionConfig, ops: Ops) -> None:
        super().__init__()
        width = config.hidden_size
        self.ops, self.head_dim = ops, config.head_dim
        names, heads = ("q_proj", "k_proj", "v_proj"), config.attention_heads
        rule = ColumnParallel(dict.fromkeys(names, heads), "heads")
        self.qkv = Projection(self, width, dict.fromkeys(names, width), rule=rule)
        self.output = Projection(self, width, {"o_proj": width}, rule=RowParallel(heads, "heads"))

    def forward(self, hidden_states: Tensor, attention_mask: Padding) -> tuple[Tensor, None]:
        """hidden_states (M, S, E) to (M, S, E); there are no attention weights. The mask is the tower's."""
        return self.run(hidden_states, _padding(attention_mask, self), Asked), None

    def run(self, x: Tensor, padding: Padding, kinds: Kinds) -> Tensor:
        qkv = self.qkv.split(self.qkv(self.ops, x, kinds))
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in qkv)
        if padding.blank is not None:
            q = q.masked_fill(padding.blank.view(-1, 1, 1, 1), 0)
        out = self.ops.vision_attention(q, k, v, padding.mask)
        return self.output(self.ops, out.flatten(2), kinds)


class MllamaVisionEncoderLayer(nn.Module):
    """Pre-norm attention and MLP, each scaled by ``tanh`` of its own gate in the global encoder."""

    def __init__(self, config: MllamaVisionConfig, ops: Ops, is_gated: bool) -> None:
        super().__init__()
        self.ops, self.is_gated = ops, is_gated
        self.self_attn = MllamaVisionAttention(config, ops)
        self.mlp = MllamaVisionMLP(config, ops)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        if is_gated:
            self.gate_attn = nn.Parameter(torch.full((1,), math.pi / 4))
            self.gate_ffn = nn.Parameter(torch.full((1,), math.pi / 4))

    def forward(self, hidden_state: Tensor, attention_mask: Padding) -> Tensor:
        """hidden_state (M, S, E) to (M, S, E). The mask is the tower's."""
        return self.run(hidden_state, _padding(attention_mask, self), Asked)

    def run(self, x: Tensor, padding: Padding, kinds: Kinds) -> Tensor:
        attention, mlp = self.self_attn, self.mlp
        y = self.input_layernorm(x)
        if kinds.get(attention) is MllamaVisionAttention:
            y = attention.run(y, padding, kinds)
        else:
            y, _ = attention(y, attention_mask=padding)
        x = self.ops.gated_residual(y, x, self.gate_attn) if self.is_gated else x + y
        y = self.post_attention_layernorm(x)
        y = mlp.run(y, kinds) if kinds.get(mlp) is MllamaVisionMLP else mlp(y)
        return self.ops.gated_residual(y, x, self.gate_ffn) if self.is_gated else x + y


class MllamaVisionEncoder(Recomputing, nn.Module):
    def __init__(
        self, config: MllamaVisionConfig, ops: Ops, num_layers: int, is_gated: bool
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            MllamaVisionEncoderLayer(config, ops, is_gated) for _ in range(num_layers)
        )

    def forward(self, hidden_states: Tensor, attention_mask: Padding) -> BaseModelOutput:
        """hidden_states (M, S, E) through all layers, and what each of them gave. The mask is the tower's."""
        padding = _padding(attention_mask, self)
        kept = tuple(self.depths(hidden_states, padding, Asked))[1:]
        last = kept[-1] if kept else hidden_states
        return BaseModelOutput(last_hidden_state=last, hidden_states=kept)

    def depths(self, x: Tensor, padding: Padding, kinds: Kinds) -> Iterator[Tensor]:
        """The stream x (M, S, E), and what it is after each layer."""
        yield x
        recomputed = self.recomputed(len(self.layers))
        for index, layer in enumerate(self.layers):
            if index in recomputed:
                x = recomputing(_through, layer, x, padding, kinds)
            else:
                x = _through(layer, x, padding, kinds)
            yield x


def _through(layer: nn.Module, x: Tensor, padding: Padding, kinds: Kinds) -> Tensor:
    """The stream after a layer; called as `transformers` does where it is not exactly the plain thing."""
    if kinds.get(layer) is MllamaVisionEncoderLayer:
        return layer.run(x, padding, kinds)
    return layer(hidden_state=x, attention_mask=padding)


def _padding(given: Any, owner: nn.Module) -> Padding:
    """Raises: TypeError for a mask of another kind: the modules of the vision tower are parts of it."""
    if not isinstance(given, Padding):
        raise TypeError(
            f"{type(owner).__name__} is called by its vision tower, which gives a Padding as "
            f"attention_mask; got {type(given).__name__}"
        )
    return given


class MllamaVisionModel(MllamaPreTrainedModel):
    """Both vision encoders, without the projector.

    Args:
        config, backend, semantics: see :class:`MllamaPreTrainedModel`; of the switches only
            ``vision_taps`` matters here.
    """

    config: MllamaVisionConfig
    input_modalities = ("image",)

    def __init__(
        self,
        config: MllamaVisionConfig,
        *,
        backend: str | Ops = "auto",
        semantics: SemanticsLike | None = None,
    ) -> None:
        super().__init__(config, backend=backend, semantics=semantics)
        config, ops = self.config, self.ops
        self.max_num_tiles, self.num_patches = config.max_num_tiles, config.num_patches
        self.patch_embedding = nn.Conv2d(
            config.num_channels,
            config.hidden_size,
            config.patch_size,
            config.patch_size,
            bias=False,
        )
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.gated_positional_embedding = MllamaPrecomputedPositionEmbedding(config)
        self.pre_tile_positional_embedding = MllamaPrecomputedAspectRatioEmbedding(config)
        self.post_tile_positional_embedding = MllamaPrecomputedAspectRatioEmbedding(config)
        # These two have the default epsilon in every published implementation, not norm_eps.
        self.layernorm_pre = nn.LayerNorm(config.hidden_size)
        self.layernorm_post = nn.LayerNorm(config.hidden_size)
        self.transformer = MllamaVisionEncoder(
            config, ops, config.num_hidden_layers, is_gated=False
        )
        self.global_transformer = MllamaVisionEncoder(
            config, ops, config.num_global_layers, is_gated=True
        )
        # Quirk: Meta's code taps the stream before local layer i, transformers 4.56 and later after it.
        shift = 1 if config.semantics.vision_taps == "output" else 0
        self._kinds = KnownKinds()
        self._taps: dict[int, list[int]] = {}
        for place, layer in enumerate(config.intermediate_layers_indices):
            self._taps.setdefault(layer + shift, []).append(place)
        self.init_weights()

    def forward(
        self,
        pixel_values: Tensor,
        aspect_ratio_ids: Tensor,
        aspect_ratio_mask: Tensor,
        return_dict: bool | None = None,
        **others: Any,
    ) -> VisionOutput | tuple[Tensor]:
        """Encode images.

        Args:
            pixel_values: (B, M, tiles, C, t, t), as the image processor makes them.
            aspect_ratio_ids: (B, M) int64, 0 for a padded image.
            aspect_ratio_mask: (B, M, tiles), 1 for a tile of the image, 0 for padding.
            return_dict: False for a tuple.
            others: see :mod:`mllama.arguments`.
        Returns: an object with ``last_hidden_state`` (B, M, tiles, P, vision_output_dim).
        Raises: ValueError naming what was given and what is expected.
        """
        refuse(others)
        check_images(self.config, pixel_values, aspect_ratio_ids, aspect_ratio_mask)
        batch_and_images = pixel_values.shape[:2]
        states = self.encode(
            *(t.flatten(0, 1) for t in (pixel_values, aspect_ratio_ids, aspect_ratio_mask))
        )
        output = VisionOutput(last_hidden_state=states.unflatten(0, batch_and_images))
        return output.to_tuple() if return_dict is False else output

    def encode(
        self, pixel_values: Tensor, aspect_ratio_ids: Tensor, aspect_ratio_mask: Tensor
    ) -> Tensor:
        """Pixels (M, tiles, C, t, t), ids (M,), mask (M, tiles) to (M, tiles, P, E * (1 + taps)).

        All tile slots are computed, also those of padding: real tokens attend to them.
        """
        kinds = self._kinds.of(self)
        weight = self.patch_embedding.weight
        pixels = pixel_values.to(weight.dtype)
        if not weight.is_meta:  # as offloaded weights are until the module runs
            pixels = pixels.to(weight.device)
        x = self._embed(pixels, aspect_ratio_ids, kinds)
        images, tiles, padded, _ = x.shape
        padding = Padding.from_tiles(aspect_ratio_mask, padded, self.num_patches)
        x, taps = self._encoded(self.transformer, x.flatten(1, 2), padding, kinds, self._taps)
        x = self.layernorm_post(x).view(images, tiles, padded, -1)
        x = self.post_tile_positional_embedding(x, aspect_ratio_ids.unsqueeze(-1))
        x, _ = self._encoded(self.global_transformer, x.flatten(1, 2), padding, kinds, {})

        def patches(t: Tensor) -> Tensor:
            return t.unflatten(1, (tiles, padded))[:, :, : self.num_patches]

        # The channels of the taps interleave: c * taps + j.
        stacked = torch.stack([patches(tap) for tap in taps], dim=-1).flatten(-2)
        return torch.cat([patches(x), stacked], dim=-1)

    def _embed(self, pixels: Tensor, ids: Tensor, kinds: Kinds) -> Tensor:
        """Pixels (M, tiles, C, t, t) and ids (M,) to tokens (M, tiles, P rounded up to PAD_TO, E)."""
        position, tile = self.gated_positional_embedding, self.pre_tile_positional_embedding
        convolution, norm = self.patch_embedding, self.layernorm_pre
        if self._embeds_in_one(kinds):
            return self.ops.patch_embed(
                pixels,
                ids,
                convolution.weight,
                self.class_embedding,
                position.embedding,
                position.gate,
                position.tile_embedding.weight,
                tile.embedding.weight,
                tile.gate,
                norm.weight,
                norm.bias,
                norm.eps,
                pad_to=PAD_TO,
            )
        images, tiles = pixels.shape[:2]
        ids = ids.unsqueeze(-1)
        x = convolution(pixels.flatten(0, 1)).flatten(2).transpose(1, 2)
        x = tile(x.unflatten(0, (images, tiles)), ids)
        first = self.class_embedding.expand(images, tiles, 1, -1)
        x = norm(position(torch.cat([first, x], dim=2), ids))
        return F.pad(x, (0, 0, 0, -x.shape[2] % PAD_TO))

    def _embeds_in_one(self, kinds: Kinds) -> bool:
        """Whether the op computes what the modules of the embedding would."""
        position, tile = self.gated_positional_embedding, self.pre_tile_positional_embedding
        convolution, norm = self.patch_embedding, self.layernorm_pre
        return (
            kinds.get(convolution) is nn.Conv2d
            and kinds.get(norm) is nn.LayerNorm
            and kinds.get(position) is MllamaPrecomputedPositionEmbedding
            and kinds.get(tile) is MllamaPrecomputedAspectRatioEmbedding
            and kinds.get(position.tile_embedding) is nn.Embedding
            and kinds.get(tile.embedding) is nn.Embedding
            and position.tile_embedding.max_norm is None
            and tile.embedding.max_norm is None
            and norm.bias is not None
            and convolution.bias is None
            and convolution.stride == convolution.kernel_size
            and convolution.padding in (0, (0, 0), "valid")
            and convolution.dilation == (1, 1)
            and convolution.groups == 1
        )

    def _encoded(
        self,
        encoder: nn.Module,
        x: Tensor,
        padding: Padding,
        kinds: Kinds,
        taps: Mapping[int, list[int]],
    ) -> tuple[Tensor, list[Tensor]]:
        """x (M, S, E) through all layers of an encoder.

        ``taps`` maps a depth (0: before the first layer, 1: after it, ...) to the places in the
        returned list where the stream at that depth goes.
        """
        if kinds.get(encoder) is MllamaVisionEncoder:
            last, depths = None, encoder.depths(x, padding, kinds)
        else:
            output = encoder(x, attention_mask=padding)
            last, depths = output.last_hidden_state, iter((x, *output.hidden_states))
        kept: list[Tensor] = [x] * sum(map(len, taps.values()))
        for depth, state in enumerate(depths):
            for place in taps.get(depth, ()):
                kept[place] = state
        return (state if last is None else last), kept
