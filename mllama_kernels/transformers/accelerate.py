"""One call that puts a model of `transformers` on the kernels."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from typing import Any

import transformers
from torch import nn
from transformers.models.llama.modeling_llama import LlamaModel, LlamaPreTrainedModel
from transformers.models.llava.modeling_llava import LlavaModel, LlavaPreTrainedModel
from transformers.models.mllama.modeling_mllama import (
    MllamaModel,
    MllamaPreTrainedModel,
    MllamaTextCrossAttention,
    MllamaTextModel,
    MllamaVisionModel,
)

from mllama_kernels import _dispatch, _library
from mllama_kernels.transformers import clip
from mllama_kernels.transformers.llama import plan_llama
from mllama_kernels.transformers.loss import plan_loss
from mllama_kernels.transformers.mllama_text import plan_mllama_text
from mllama_kernels.transformers.mllama_vision import plan_mllama_vision
from mllama_kernels.transformers.patch import installed
from mllama_kernels.transformers.patch_plan import PatchPlan
from mllama_kernels.transformers.report import Report
from mllama_kernels.transformers.wrappers import class_of, inside, modules_of

OLDEST, NEWEST = (4, 57), (5, 23)  # the releases of transformers that the tests run
SUPPORTED = "Mllama, Llama, and Llava with a Llama decoder and a CLIP tower"
# The calls that a replaced module answers with its own forward.
FALLBACKS = {
    "rms_norm": "inputs of another dtype than the weight",
    "rotary_attention": "4-D masks, padding between tokens, several new tokens over a cache, one over a "
    "static cache, output_attentions, dropout, hooks with keyword arguments; padding under torch.compile",
    "cross_attention": "dense masks handed to the text tower, no mask with sdpa, output_attentions, dropout, "
    "hooks with keyword arguments",
    "vision_attention": "output_attentions, output_hidden_states of Mllama's tower, hooks with keyword "
    "arguments",
    "loss": "evaluation, custom losses, logits_to_keep, a head with a bias, an adapter or a hook",
    "patch_embed": "other image sizes, autocast, interpolated positions, hooked or adapted modules",
}
_FAMILIES = (MllamaPreTrainedModel, LlamaPreTrainedModel, LlavaPreTrainedModel)
_warned_of: set[str] = set()


def accelerate(
    model: nn.Module,
    *,
    rms_norm: bool = True,
    rotary_attention: bool = True,
    cross_attention: bool = True,
    vision_attention: bool = True,
    patch_embed: bool = True,
    swiglu: bool = True,
    loss: bool = False,
    semantics: str | None = None,
    strict: bool = False,
) -> Report:
    """Run a model of `transformers` on the kernels, in place.

    Modules of this one model get another `forward`; classes, other models, and the names, shapes and
    values of its parameters stay as they are. What a kernel cannot express in some call, the module's
    own forward computes as before. A second call replaces what the first one did.

    A module that others hook, replace or adapt, before this call or after it, is called with what
    `transformers` calls it with, and what it returns counts; the ops that would have read its parameters in
    its place do not run there.

    Args:
        model: a Mllama, Llama or Llava model, or one inside a PEFT, DDP or compiled wrapper.
        rms_norm, rotary_attention, cross_attention, vision_attention, patch_embed, swiglu: which parts
            to replace.
        loss: compute the loss of a training step without its logits, which it then does not return.
        semantics: "transformers" (None) computes what the installed `transformers` computes; "meta"
            what Meta's code does: vision taps before their layers, and nothing from the cross-attention
            for a token that sees no image.
        strict: refuse a release of `transformers` that is not tested, instead of warning once.
    Returns: what was replaced and what was left; its `revert` undoes it.
    Raises:
        ValueError: for other models, naming those supported, for unknown semantics, and for a model that
            compressed-tensors decompresses in its first forward.
        RuntimeError: with `strict`, for an untested release.
    """
    switches = {
        "rms_norm": rms_norm,
        "rotary_attention": rotary_attention,
        "cross_attention": cross_attention,
        "vision_attention": vision_attention,
        "patch_embed": patch_embed,
        "swiglu": swiglu,
        "loss": loss,
    }
    if semantics not in (None, "transformers", "meta"):
        raise ValueError(f'semantics must be "transformers" or "meta", got {semantics!r:.80}')
    target = _unwrapped(model)
    _check_decompressed(target)
    _check_version(strict)
    for patch in list(installed(target)):
        patch.remove()
    on = frozenset(op for op, wanted in switches.items() if wanted)
    plan = PatchPlan(target, on, semantics or "transformers")
    _plan_towers(plan, target)
    plan_loss(plan, target)
    if plan.semantics == "meta":
        _check_meta(plan, target)
    for patch in plan.patches:
        patch.install()
    replaced = plan.replaced()
    for device in sorted({p.device.type for p in target.parameters()} - {"meta"}):
        plain = _dispatch.plain_ops(device)
        if len(plain) == len(_library.OPS):
            plain = {"all": next(iter(plain.values()))}
        plan.left |= {f"{op} on {device}": why for op, why in plain.items()}
    return Report(
        model=class_of(target).__name__,
        semantics=plan.semantics,
        replaced=replaced,
        left=plan.left,
        fallbacks={op: calls for op, calls in FALLBACKS.items() if op in replaced},
        patches=plan.patches,
    )


def _check_meta(plan: PatchPlan, model: nn.Module) -> None:
    """Meta's semantics are all or nothing."""
    if not isinstance(model, MllamaPreTrainedModel):
        raise ValueError(f'semantics="meta" is about Mllama, not about {type(model).__name__}')
    replaced = plan.replaced()
    needs = {"cross_attention": MllamaTextCrossAttention, "semantics": MllamaVisionModel}
    for op, cls in needs.items():
        if modules_of(model, cls) and op not in replaced:
            why = plan.left.get(op, f"{op}=False")
            raise ValueError(f'semantics="meta" cannot be had here: {why}')


def _plan_towers(plan: PatchPlan, model: nn.Module) -> None:
    if isinstance(model, LlavaPreTrainedModel):
        _name_other_towers(plan, model)
    for tower in modules_of(model, LlamaModel):
        plan_llama(plan, tower)
    for tower in modules_of(model, clip.TOWER):
        clip.plan_clip(plan, tower)
    for tower in modules_of(model, MllamaVisionModel):
        plan_mllama_vision(plan, tower)
    owners = {inside(owner.language_model): owner for owner in modules_of(model, MllamaModel)}
    for tower in modules_of(model, MllamaTextModel):
        plan_mllama_text(plan, tower, owners.get(tower))


def _name_other_towers(plan: PatchPlan, model: nn.Module) -> None:
    """A Llava model can have other parts than a Llama decoder and a CLIP tower."""
    llava = next(module for module in model.modules() if isinstance(module, LlavaModel))
    for part, supported in (("language_model", LlamaModel), ("vision_tower", clip.TOWER)):
        tower = getattr(llava, part)
        if not modules_of(tower, supported):
            plan.left[part] = f"a {type(tower).__name__}; supported is {supported.__name__}"


@contextlib.contextmanager
def accelerated(model: nn.Module, **options: Any) -> Iterator[Report]:
    """:func:`accelerate` for the length of a `with` block."""
    report = accelerate(model, **options)
    try:
        yield report
    finally:
        report.revert()


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers, if it is one of those supported."""
    inner = model
    while not isinstance(inner, transformers.PreTrainedModel):
        if hasattr(inner, "get_base_model"):  # PEFT
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):  # torch.compile
            inner = inner._orig_mod
        elif isinstance(getattr(inner, "module", None), nn.Module):  # DDP
            inner = inner.module
        else:
            break
    if not isinstance(inner, _FAMILIES):
        raise ValueError(f"cannot accelerate a {type(inner).__name__}; supported are {SUPPORTED}")
    return inner


def _check_decompressed(model: nn.Module) -> None:
    """compressed-tensors wraps every forward when it decompresses, and takes them for methods."""
    if any(hasattr(module, "ct_decompress_hook") for module in model.modules()):
        raise ValueError(
            "cannot accelerate a model that compressed-tensors decompresses in its first forward: call the "
            "model once before, or load it with CompressedTensorsConfig(dequantize=True), in releases 4 of "
            "transformers run_compressed=False"
        )


def _check_version(strict: bool) -> None:
    version = transformers.__version__
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is not None and OLDEST <= (int(numbers[1]), int(numbers[2])) <= NEWEST:
        return
    oldest, newest = (".".join(map(str, release)) for release in (OLDEST, NEWEST))
    message = f"tested are transformers {oldest} to {newest}, and this is {version}"
    if strict:
        raise RuntimeError(message)
    if version not in _warned_of:
        _warned_of.add(version)
        warnings.warn(message, stacklevel=3)
