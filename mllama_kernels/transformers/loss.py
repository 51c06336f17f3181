"""The language-modelling loss of a training step without its logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaForConditionalGeneration,
    LlavaModel,
)
from transformers.models.mllama.modeling_mllama import (
    MllamaForCausalLM,
    MllamaForConditionalGeneration,
    MllamaModel,
    MllamaTextModel,
)

import mllama_kernels as ops
from mllama_kernels._arguments import IGNORED
from mllama_kernels._dispatch import has_ops
from mllama_kernels.plain import is_plain
from mllama_kernels.transformers.handing import passes_on
from mllama_kernels.transformers.patch import Patch, by_name
from mllama_kernels.transformers.patch_plan import PatchPlan
from mllama_kernels.transformers.wrappers import class_of

_OUTPUTS = {
    LlamaForCausalLM: CausalLMOutputWithPast,
    MllamaForCausalLM: CausalLMOutputWithPast,
    MllamaForConditionalGeneration: CausalLMOutputWithPast,
    LlavaForConditionalGeneration: LlavaCausalLMOutputWithPast,
}
_BODIES = (LlamaModel, MllamaTextModel, MllamaModel, LlavaModel)
# Arguments of the loss; the model below does not know them.
_FOR_THE_LOSS = ("labels", "shift_labels", "num_items_in_batch", "ignore_index", "logits_to_keep")


def plan_loss(plan: PatchPlan, model: nn.Module) -> None:
    if "loss" not in plan.ops:
        return
    if class_of(model) not in _OUTPUTS:
        plan.left["loss"] = f"a {class_of(model).__name__} has no language-modelling loss"
    elif plan.free("loss", model):
        plan.add("loss", model, causal_lm_forward)


def causal_lm_forward(patch: Patch, *args: Any, **kwargs: Any) -> Any:
    """In training with labels: only the loss, `logits` None. Otherwise the model's own forward."""
    model = patch.module
    inputs = by_name(patch, args, kwargs)
    options = {name: inputs.get(name) for name in _FOR_THE_LOSS}
    head = model.lm_head
    keeps = options["logits_to_keep"]
    if (
        not (model.training and torch.is_grad_enabled())
        or options["labels"] is None
        or torch.is_tensor(keeps)
        or keeps
        or model.loss_function is not ForCausalLMLoss
        or not is_plain(head, nn.Linear)
        or head.bias is not None
        or not has_ops(head.weight.device)
        or not passes_on(model.model, *_BODIES)
    ):
        return patch.original(*args, **kwargs)
    body = {name: value for name, value in inputs.items() if name not in _FOR_THE_LOSS}
    outputs = model.model(**body, return_dict=True)
    states = outputs.last_hidden_state.to(head.weight.device)
    loss = _loss(states, head.weight, **options)
    return _OUTPUTS[class_of(model)](
        loss=loss, **{name: value for name, value in outputs.items() if name != "last_hidden_state"}
    )


def _loss(
    states: Tensor,
    weight: Tensor,
    *,
    labels: Tensor,
    shift_labels: Tensor | None,
    num_items_in_batch: Tensor | int | None,
    ignore_index: int | None,
    logits_to_keep: int | None,
) -> Tensor:
    """The loss of `transformers`: a row predicts the next label, averaged over rows or a given number."""
    ignored = IGNORED if ignore_index is None else ignore_index
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignored)[..., 1:]
    loss = ops.linear_cross_entropy(
        states,
        weight,
        shift_labels.to(states.device),
        ignore_index=ignored,
        reduction="mean" if num_items_in_batch is None else "sum",
    )
    if num_items_in_batch is None:
        return loss
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch
