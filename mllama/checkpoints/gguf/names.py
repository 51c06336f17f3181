"""What the tensors of GGUF files are called, and where each of them belongs.

Two converters have written such files, and each file is in one of two dialects:

- "split": a text file and a projector file, as Ollama published them until May 2025. Vision norms are called
  `ln1` and `ln2`, the vision output projection `attn_out`, and the first feed-forward layer `ffn_down`.
- "unified": one file for both, as Ollama's own converter writes it. Vision norms are called `attn_norm` and
  `ffn_norm`, the output projection `attn_output`, the first feed-forward layer `ffn_up`; and the rows of q
  and k are interleaved in all attentions, not only in those with a rotary embedding.

The feed-forward layers are told by shape, which fails only where both are square.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mllama.checkpoints.key_layout import HEAD, PROJECTOR, TEXT, VISION

Dialect = Literal["split", "unified"]
# Whose number of heads the rows of a projection are interleaved by.
Heads = Literal["text", "text kv", "vision"]

ROPE_FREQUENCIES = "rope_freqs.weight"
POSITION_GATE = (
    "v.position_embd.gate"  # holds 1 - tanh(gate), and the next tanh(gate), of the same gate
)
TILE_POSITION_GATE = "v.tile_position_embd.gate"

_ENDS = {
    "token_embd.weight": TEXT + "embed_tokens.weight",
    "output_norm.weight": TEXT + "norm.weight",
    "output.weight": HEAD + "weight",
    "mm.0.weight": PROJECTOR + "weight",
    "mm.0.bias": PROJECTOR + "bias",
    "v.class_embd": VISION + "class_embedding",
    "v.patch_embd.weight": VISION + "patch_embedding.weight",
    "v.position_embd.weight": VISION + "gated_positional_embedding.embedding",
    TILE_POSITION_GATE: VISION + "gated_positional_embedding.gate",
    "v.tile_position_embd.weight": VISION + "gated_positional_embedding.tile_embedding.weight",
    **{
        f"v.{place}_tile_position_embd.{end}": f"{VISION}{place}_tile_positional_embedding.{own}"
        for place in ("pre", "post")
        for end, own in (("weight", "embedding.weight"), ("gate", "gate"))
    },
    **{
        f"v.{place}_ln.{kind}": f"{VISION}layernorm_{place}.{kind}"
        for place in ("pre", "post")
        for kind in ("weight", "bias")
    },
}
_TEXT_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    **{f"cross_attn_{p}_proj.weight": f"cross_attn.{p}_proj.weight" for p in "qkvo"},
    **{f"cross_attn_{p}_norm.weight": f"cross_attn.{p}_norm.weight" for p in "qk"},
    "cross_attn_attn_gate": "cross_attn_attn_gate",
    "cross_attn_mlp_gate": "cross_attn_mlp_gate",
}
_VISION_LAYER = {
    **{f"attn_{p}.weight": f"self_attn.{p}_proj.weight" for p in "qkv"},
    "attn_out.weight": "self_attn.o_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    **{
        f"{name}.{kind}": f"{own}.{kind}"
        for names, own in (
            (("ln1", "attn_norm"), "input_layernorm"),
            (("ln2", "ffn_norm"), "post_attention_layernorm"),
        )
        for name in names
        for kind in ("weight", "bias")
    },
    "attn_gate": "gate_attn",
    "ffn_gate": "gate_ffn",
}
# Layers are numbered without leading zeros: one name for one tensor.
_LAYER = re.compile(r"(blk|v\.blk|v\.global\.blk)\.(0|[1-9][0-9]{0,5})\.(.+)", re.ASCII)
_STACKS = {
    "blk": (TEXT + "layers", _TEXT_LAYER),
    "v.blk": (VISION + "transformer.layers", _VISION_LAYER),
    "v.global.blk": (VISION + "global_transformer.layers", _VISION_LAYER),
}
_FEED_FORWARD = re.compile(r"ffn_(up|down)\.(weight|bias)")
_UNIFIED = re.compile(r"v\.blk\.\d+\.attn_norm\.", re.ASCII)
_INTERLEAVED: dict[str, Heads] = {
    "blk.attn_q.weight": "text",
    "blk.attn_k.weight": "text kv",
}
_INTERLEAVED_IN_UNIFIED: dict[str, Heads] = {
    "blk.cross_attn_q_proj.weight": "text",
    "blk.cross_attn_k_proj.weight": "text kv",
    **{f"v.{stack}.attn_{p}.weight": "vision" for stack in ("blk", "global.blk") for p in "qk"},
}


@dataclass(frozen=True)
class Place:
    """Where a tensor belongs.

    Attributes:
        name: the canonical name of the parameter.
        heads: by whose heads the rows are interleaved; None: they are in the published order.
        is_tanh: the tensor holds tanh of the parameter.
    """

    name: str
    heads: Heads | None = None
    is_tanh: bool = False


def is_vision(name: str) -> bool:
    """Whether a tensor is of the vision tower or the projector."""
    return name.startswith(("v.", "mm."))


def dialect_of(names: Iterable[str]) -> Dialect:
    return "unified" if any(map(_UNIFIED.match, names)) else "split"


def place_of(
    name: str, shape: tuple[int, ...], dialect: Dialect, vision_inner: int, vision_width: int
) -> Place | None:
    """Where a tensor belongs; None for a name that is not known.

    Args:
        vision_inner, vision_width: of the vision tower's feed-forward layers, by which these are told.
    """
    if name in _ENDS:
        return Place(_ENDS[name], is_tanh=name.endswith(".gate"))
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return None
    stack, table = _STACKS[layer[1]]
    prefix, end = f"{stack}.{layer[2]}.", layer[3]
    if table is _VISION_LAYER and (match := _FEED_FORWARD.fullmatch(end)):
        first = "down" if dialect == "split" else "up"
        is_first = match[1] == first
        if vision_inner != vision_width:
            is_first = shape[0] == vision_inner
        return Place(f"{prefix}mlp.{'fc1' if is_first else 'fc2'}.{match[2]}")
    if end not in table:
        return None
    kind = f"{layer[1]}.{end}"
    heads = _INTERLEAVED.get(kind)
    if heads is None and dialect == "unified":
        heads = _INTERLEAVED_IN_UNIFIED.get(kind)
    is_tanh = table is _VISION_LAYER and end in ("attn_gate", "ffn_gate")
    return Place(prefix + table[end], heads, is_tanh)
