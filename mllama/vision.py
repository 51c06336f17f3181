"""The vision tower: pixels of up to four tiles per image to one vector per patch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllama.arguments import refuse
from mllama.backend import Ops
from mllama.base import MllamaPreTrainedModel
from mllama.checks import check_images
from mllama.config import MllamaVisionConfig
from mllama.layers import FusedLinear, Recomputing, multiply
from mllama.outputs import VisionOutput
from mllama.semantics import SemanticsLike

# Each tile is padded with zero tokens to a multiple of this; they take part in the attention.
_PAD_TO = 8


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
    def of_tiles(cls, tile_mask: Tensor, tokens: int, num_patches: int) -> Padding:
        """From ``tile_mask`` (M, tiles), not 0 at a tile of the image; ``tokens`` per tile, ``num_patches``
        of them real. Reads on the host whether there are blank images, unless exporting."""
        is_tile = tile_mask.bool()
        is_patch = torch.arange(tokens, device=tile_mask.device) < num_patches
        mask, blank = ~(is_tile.unsqueeze(-1) & is_patch).flatten(1), ~is_tile.any(1)
        if not torch.compiler.is_exporting() and not bool(blank.any()):
            return cls(mask, None)
        return cls(mask & ~blank.unsqueeze(1), blank)


class MllamaPrecomputedAspectRatioEmbedding(nn.Module):
    """A vector per (aspect ratio, tile), scaled by ``tanh(gate)``."""

    def __init__(self, config: MllamaVisionConfig) -> None:
        super().__init__()
        self.max_num_tiles = config.max_num_tiles
        self.embedding = nn.Embedding(
            config.max_aspect_ratio_id + 1, config.max_num_tiles * config.hidden_size
        )
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, aspect_ratio_ids: Tensor) -> Tensor:
        """(M,) to (M, tiles, 1, E)."""
        rows = self.embedding(aspect_ratio_ids).unflatten(-1, (self.max_num_tiles, 1, -1))
        return rows * self.gate.tanh()


class MllamaPrecomputedPositionEmbedding(nn.Module):
    """The tables of the position embedding; the patch embedding op applies them."""

    def __init__(self, config: MllamaVisionConfig) -> None:
        super().__init__()
        tokens, width = config.num_patches, config.hidden_size
        self.gate = nn.Parameter(torch.zeros(1))
        self.embedding = nn.Parameter(torch.empty(tokens, width))
        self.tile_embedding = nn.Embedding(
            config.max_aspect_ratio_id + 1, config.max_num_tiles * tokens * width
        )


class MllamaVisionMLP(nn.Module):
    def __init__(self, config: MllamaVisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return multiply(self.fc2, F.gelu(multiply(self.fc1, x)))


class MllamaVisionAttention(nn.Module):
    def __init__(self, config: MllamaVisionConfig, ops: Ops) -> None:
        super().__init__()
        width = config.hidden_size
        self.ops, self.head_dim = ops, config.head_dim
        self.qkv_proj = FusedLinear(
            self, width, {"q_proj": width, "k_proj": width, "v_proj": width}
        )
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, padding: Padding) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (-1, self.head_dim)) for t in self.qkv_proj.split(self.qkv_proj(x))
        )
        if padding.blank is not None:
            q = q.masked_fill(padding.blank.view(-1, 1, 1, 1), 0)
        return multiply(self.o_proj, self.ops.vision_attention(q, k, v, padding.mask).flatten(2))


class MllamaVisionEncoderLayer(nn.Module):
    """Pre-norm attention and MLP, each scaled by ``tanh`` of its own gate in the global encoder."""

    def __init__(self, config: MllamaVisionConfig, ops: Ops, is_gated: bool) -> None:
        super().__init__()
        self.ops, self.is_gated = ops, is_gated
        self.self_attn = MllamaVisionAttention(config, ops)
        self.mlp = MllamaVisionMLP(config)
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        if is_gated:
            self.gate_attn = nn.Parameter(torch.full((1,), math.pi / 4))
            self.gate_ffn = nn.Parameter(torch.full((1,), math.pi / 4))

    def forward(self, x: Tensor, padding: Padding) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), padding)
        x = self.ops.gated_residual(attended, x, self.gate_attn) if self.is_gated else x + attended
        transformed = self.mlp(self.post_attention_layernorm(x))
        return (
            self.ops.gated_residual(transformed, x, self.gate_ffn)
            if self.is_gated
            else x + transformed
        )


class MllamaVisionEncoder(Recomputing, nn.Module):
    def __init__(
        self, config: MllamaVisionConfig, ops: Ops, num_layers: int, is_gated: bool
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            MllamaVisionEncoderLayer(config, ops, is_gated) for _ in range(num_layers)
        )

    def forward(
        self, x: Tensor, padding: Padding, taps: Mapping[int, list[int]] | None = None
    ) -> tuple[Tensor, list]:
        """x (M, S, E) through all layers.

        ``taps`` maps a depth (0: before the first layer, 1: after it, ...) to the places in the
        returned list where the stream at that depth goes.
        """
        taps = taps or {}
        kept: list[Tensor] = [x] * sum(map(len, taps.values()))
        for depth in range(len(self.layers) + 1):
            if depth:
                x = self.run_layer(depth - 1, self.layers[depth - 1], x, padding)
            for place in taps.get(depth, ()):
                kept[place] = x
        return x, kept


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
        position = self.gated_positional_embedding
        x = self.ops.patch_embed(
            pixel_values.to(self.patch_embedding.weight),
            aspect_ratio_ids,
            self.patch_embedding.weight,
            self.class_embedding,
            position.embedding,
            position.gate,
            position.tile_embedding.weight,
            self.pre_tile_positional_embedding.embedding.weight,
            self.pre_tile_positional_embedding.gate,
            self.layernorm_pre.weight,
            self.layernorm_pre.bias,
            self.layernorm_pre.eps,
            pad_to=_PAD_TO,
        )
        images, tiles, padded, _ = x.shape
        padding = Padding.of_tiles(aspect_ratio_mask, padded, self.num_patches)
        x, taps = self.transformer(x.flatten(1, 2), padding, self._taps)
        x = self.layernorm_post(x).view(images, tiles, padded, -1)
        x = x + self.post_tile_positional_embedding(aspect_ratio_ids)
        x, _ = self.global_transformer(x.flatten(1, 2), padding)

        def patches(t: Tensor) -> Tensor:
            return t.unflatten(1, (tiles, padded))[:, :, : self.num_patches]

        # The channels of the taps interleave: c * taps + j.
        stacked = torch.stack([patches(tap) for tap in taps], dim=-1).flatten(-2)
        return torch.cat([patches(x), stacked], dim=-1)
