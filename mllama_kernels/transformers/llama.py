"""Llama decoders."""

from __future__ import annotations

import sys

from torch import nn
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
)

from mllama_kernels.transformers.patch_plan import PatchPlan
from mllama_kernels.transformers.text import (
    decoder_layer_forward,
    mlp_forward,
    norm_forward,
    self_attention_forward,
    text_model_forward,
)
from mllama_kernels.transformers.wrappers import class_of, inside, modules_of


def plan_llama(plan: PatchPlan, tower: LlamaModel) -> None:
    plan_text(plan, tower, LlamaDecoderLayer, LlamaRMSNorm, LlamaMLP, LlamaAttention)


def plan_text(
    plan: PatchPlan,
    tower: nn.Module,
    layer: type[nn.Module],
    norm: type[nn.Module],
    mlp: type[nn.Module],
    attention: type[nn.Module],
) -> None:
    """What Llama decoders and Mllama's text tower have in common."""
    plan.add_all("rms_norm", modules_of(tower, norm), norm_forward)
    layers = modules_of(tower, layer)
    norms = [inside(child.post_attention_layernorm) for child in layers]
    if all(class_of(child) is norm for child in norms) and plan.free("rms_norm", *layers, *norms):
        plan.add_all("rms_norm", layers, decoder_layer_forward)
    mlps = modules_of(tower, mlp)
    others = {type(m.act_fn).__name__ for m in mlps} - {"SiLU", "SiLUActivation"}
    if others and "swiglu" in plan.ops:
        plan.left["swiglu"] = f"the activation is {', '.join(sorted(others))}"
    elif mlps:
        plan.add_all("swiglu", mlps, mlp_forward)
    attentions = modules_of(tower, attention)
    if attentions and plan.takes_heads("rotary_attention", attentions[0].head_dim, tower):
        if plan.free("rotary_attention", tower, *attentions):
            modeling = sys.modules[class_of(tower).__module__]
            plan.add(
                "rotary_attention",
                tower,
                text_model_forward,
                finds_packing=hasattr(modeling, "create_causal_mask"),
            )
            plan.add_all("rotary_attention", attentions, self_attention_forward)
