"""A model trains through the kernels that have a backward as it does through plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_helpers import (
    BACKENDS,
    Prompt,
    Shape,
    assert_close,
    batch_of,
    hf_model,
    our_model,
    to,
    with_gates_as_one,
)

import mllama_kernels
from mllama_kernels import reference

SHAPES = [
    Shape(layers=3, cross=(1,)),
    Shape(heads=8, kv_heads=1, head_dim=80, vision_head_dim=80, layers=3, cross=(1,)),
]


class Differentiable:
    """The kernels that have a backward, and of the other ops the reference; counts the former."""

    def __init__(self, calls: set[str]) -> None:
        self.calls = calls

    def __getattr__(self, name: str) -> Any:
        if not hasattr(torch.ops.mllama_kernels, f"{name}_backward"):
            return getattr(reference, name)
        kernel = getattr(mllama_kernels, name)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            self.calls.add(name)
            return kernel(*args, **kwargs)

        return recorded


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_those_of_the_reference(backend: tuple[str, str], shape: Shape) -> None:
    hf = hf_model(shape)
    model = our_model(shape, hf, ("reference", backend[1])).train()
    prompts = [Prompt(12, (3,), (6,)), Prompt(9, (0,), (1,)), Prompt(7, (), ())]
    batch = to(batch_of(shape, prompts), backend[1])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels == shape.vocab, -100)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**batch, labels=labels).loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        assert all(grad.any() for grad in grads.values())
        return with_gates_as_one(grads)

    expected, calls = gradients(), set()
    with model.ops.replaced(lambda _: Differentiable(calls)):
        actual = gradients()
    assert {"swiglu", "rotary_attention", "cross_attention", "vision_attention"} <= calls
    for name, gradient in actual.items():
        assert_close(gradient, expected[name], rtol=1e-4)
