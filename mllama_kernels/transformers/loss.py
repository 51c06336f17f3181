"""The language-modelling loss of a training step without its logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.llava.modeling_llava import (
    LlavaCausalLMOutputWithPast,
    LlavaForConditionalGeneration,
)
from transformers.models.mllama.modeling_mllama import (
    MllamaForCausalLM,
    MllamaForConditionalGeneration,
)

import mllama_kernels as ops
from mllama_kernels._dispatch import has_ops
from mllama_kernels.transformers.patch import Patch, by_name, is_plain
from mllama_kernels.transformers.plan import Plan
from mllama_kernels.transformers.wrappers import class_of

_OUTPUTS = {
    LlamaForCausalLM: CausalLMOutputWithPast,
    MllamaForCausalLM: CausalLMOutputWithPast,
    MllamaForConditionalGeneration: CausalLMOutputWithPast,
    LlavaForConditionalGeneration: LlavaCausalLMOutputWithPast,
}
# Arguments of the loss; the model below does not know them.
_FOR_THE_LOSS = ("labels", "shift_labels", "num_items_in_batch", "ignore_index", "logits_to_keep")


def plan_loss(plan: Plan, model: nn.Module) -> None:
    if "loss" not in plan.ops:
        return
    if class_of(model) not in _OUTPUTS:
        plan.left["loss"] = f"a {class_of(model).__name__} has no language-modelling loss"
    elif plan.free("loss", model):
        plan.add("loss", model, causal_lm_forward)


def causal_lm_forward(patch: Patch, *args: Any, **kwargs: Any) -> Any:
    """In training with labels: the loss alone, `logits` None. Otherwise the model's own forward."""
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
        or type(head) is not nn.Linear
        or head.bias is not None
        or not (is_plain(head) and has_ops(head.weight.device))
        or type(head.weight) not in (Tensor, nn.Parameter)
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
    ignored = -100 if ignore_index is None else ignore_index
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
