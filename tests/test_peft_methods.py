"""Every method of PEFT on our model: it trains to the numbers that it has on that of `transformers`, or fails
there as here."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from model_helpers import Prompt, Shape, assert_close, batch_of, hf_model, our_model
from torch import Tensor, nn

peft = pytest.importorskip("peft")
from peft_methods import METHODS, config_of  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
# What they compute of a token depends on how many there are, padding included, of which we have none: by
# what is drawn for each, or by a mean over all.
COUNTS_PADDING = {"LILY", "PVERA", "LoRA with dropout"}
CASES = [(method, False) for method in METHODS]
CASES += [(method, True) for method in METHODS if method not in COUNTS_PADDING]
SHAPE = Shape(tile_side=28, local_layers=1, global_layers=1, taps=(0,), layers=2, cross=(1,))


@pytest.fixture(scope="module")
def hf() -> nn.Module:
    return hf_model(SHAPE)


def trained(
    model: nn.Module, method: str, padded: bool
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The loss of a step, its gradients, and the logits at real tokens without any."""
    torch.manual_seed(5)
    # The image first: no padding predicts a token.
    second = Prompt(9, (0,), (1,)) if padded else Prompt(12, (2,), (2,))
    batch = batch_of(SHAPE, [Prompt(12, (3,), (6,)), second])
    hidden = (batch["attention_mask"] == 0) | (batch["input_ids"] >= SHAPE.vocab)
    batch["labels"] = batch["input_ids"].masked_fill(hidden, -100)
    torch.manual_seed(6)
    config = config_of(method)
    if method == "LoRA on everything" and not isinstance(model, transformers.PreTrainedModel):
        config.exclude_modules = [
            "lm_head"
        ]  # PEFT leaves out only that of the models of `transformers`
    adapted = peft.get_peft_model(model.train(), config)
    torch.manual_seed(7)
    with torch.no_grad():  # many begin where they change nothing
        for _, parameter in sorted(adapted.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    by_task = method in ("MULTITASK_PROMPT_TUNING", "POLY")
    more: dict[str, Any] = {"task_ids": torch.zeros(2, dtype=torch.int64)} if by_task else {}
    torch.manual_seed(8)  # for what drops out
    loss = adapted(**batch, **more).loss
    loss.backward()
    found = {n: p.grad for n, p in adapted.named_parameters() if p.grad is not None}
    with torch.no_grad():
        logits = adapted.eval()(**batch, **more, use_cache=False).logits
    return loss.detach(), found, logits[batch["attention_mask"].bool()]


@pytest.mark.parametrize(("method", "padded"), CASES)
def test_method(hf: nn.Module, method: str, padded: bool) -> None:
    ours = our_model(SHAPE, hf)
    try:
        loss, expected, logits = trained(copy.deepcopy(hf), method, padded)
    except Exception as error:
        with pytest.raises(Exception):  # noqa: B017
            trained(ours, method, padded)
        pytest.skip(f"not on a model of transformers: {type(error).__name__}: {error!s:.100}")
    assert expected and any(gradient.any() for gradient in expected.values())
    our_loss, found, our_logits = trained(ours, method, padded)
    assert_close(our_loss, loss)
    assert_close(our_logits, logits)
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in found.items():
        assert (gradient - expected[name]).abs().max() <= 1e-3 * max(
            expected[name].abs().max(), 1e-2 * largest
        ), name
