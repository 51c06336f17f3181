"""Every method of PEFT on an accelerated model: the same numbers as without the kernels.

Those that do not train on a model of `transformers` either, fail alike.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import transformers
from model_helpers import Prompt, Shape, batch_of
from torch import Tensor, nn
from transformers_helpers import (
    assert_same,
    assert_same_gradients,
    build,
    gradients,
    llama_config,
    mllama_config,
    needs_backward,
)

from mllama_kernels.transformers import accelerate

peft = pytest.importorskip("peft")
from peft_methods import METHODS, PROMPTS, config_of  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@functools.cache
def _case(family: str) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(5)
    if family == "llama":
        model = build(transformers.LlamaForCausalLM, llama_config(num_hidden_layers=2))
        ids = torch.randint(3, 95, (2, 12))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    else:
        shape = Shape(
            tile_side=28, local_layers=1, global_layers=1, taps=(0,), layers=2, cross=(1,)
        )
        model = build(transformers.MllamaForConditionalGeneration, mllama_config(shape))
        batch = batch_of(shape, [Prompt(12, (3,), (6,)), Prompt(12, (2,), (2,))])
    labels = batch["input_ids"].masked_fill(batch["input_ids"] > 95, -100)
    return model, batch | {"labels": labels}


def _train(family: str, method: str, order: str) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The loss of a step, its gradients, and the logits without any."""
    original, batch = _case(family)
    model = copy.deepcopy(original).train()
    if order == "kernels first":
        accelerate(model)
    torch.manual_seed(6)
    adapted = peft.get_peft_model(model, config_of(method))
    torch.manual_seed(7)
    with torch.no_grad():  # many begin where they change nothing
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    if order == "adapters first":
        accelerate(adapted)
    by_task = method in ("MULTITASK_PROMPT_TUNING", "POLY")
    more = {"task_ids": torch.zeros(2, dtype=torch.int64)} if by_task else {}
    torch.manual_seed(8)  # for what drops out
    loss = adapted(**batch, **more).loss
    loss.backward()
    found = gradients(adapted)
    with torch.no_grad():
        logits = adapted.eval()(**batch, **more).logits
    return loss.detach(), found, logits


@needs_backward
@pytest.mark.parametrize(
    "family, method",
    [*(("mllama", method) for method in METHODS), *(("llama", method) for method in PROMPTS)],
)
def test_method(family, method):
    try:
        loss, expected, logits = _train(family, method, "plain")
    except Exception as error:
        for order in ("adapters first", "kernels first"):
            with pytest.raises(Exception):  # noqa: B017
                _train(family, method, order)
        pytest.skip(f"not on a {family} of transformers: {type(error).__name__}: {error!s:.100}")
    assert expected and any(gradient.any() for gradient in expected.values())
    for order in ("adapters first", "kernels first"):
        fast_loss, fast, fast_logits = _train(family, method, order)
        assert_same(fast_loss, loss)
        assert_same_gradients(fast, expected)
        assert_same(fast_logits, logits)
