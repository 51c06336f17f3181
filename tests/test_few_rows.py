"""Decoding: five ops per layer, and the modules themselves wherever someone has put something in between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_helpers import (
    BACKENDS,
    Counting,
    Prompt,
    Shape,
    assert_close,
    batch_of,
    hf_model,
    our_model,
    to,
)
from torch import Tensor, nn

from mllama.kinds import Asked
from mllama.linear import Block, Projection
from mllama_kernels.skinny_linear import MAX_ROWS

SHAPE = Shape(vision_head_dim=64, tile_side=28)


@pytest.fixture
def model() -> Any:
    return our_model(SHAPE, hf_model(SHAPE))


def ops_of(model: Any, run: Callable[[], Any]) -> Counter[str]:
    counts: Counter[str] = Counter()
    with model.ops.replaced(lambda ops: Counting(ops, counts)):
        run()
    return counts


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decode_step_takes_five_ops_per_layer(backend: tuple[str, str]) -> None:
    model = our_model(SHAPE, hf_model(SHAPE), backend)
    batch = to(batch_of(SHAPE, [Prompt(20, (1,), (3,)), Prompt(20, (0,), (1,))]), backend[1])
    cache = model(**batch, use_cache=True).past_key_values
    step = torch.randint(3, 90, (2, 1), device=backend[1])
    counts = ops_of(model, lambda: model(step, past_key_values=cache))
    crosses, layers = len(SHAPE.cross), SHAPE.layers
    assert counts == {
        "skinny_linear": 4 * layers + 1,  # what reads or adds to the stream, and the head
        "rotary_attention_cached": layers - crosses,
        "cross_attention": crosses,
        "rms_norm": 1,  # the last one
    }


@pytest.mark.parametrize("rows", [1, MAX_ROWS, MAX_ROWS + 1])
def test_both_ways_agree(model: Any, rows: int) -> None:
    batch = batch_of(SHAPE, [Prompt(rows, (0,), (3,))])
    with torch.no_grad():
        counts: Counter[str] = ops_of(model, lambda: model(**batch))
        fused = model(**batch).logits
    assert ("skinny_linear" in counts) == (rows <= MAX_ROWS)
    separate = model(**batch, use_cache=False)  # with gradients, so no fusion
    assert separate.logits.requires_grad
    assert_close(fused, separate.logits.detach(), rtol=1e-5)


def test_a_short_prompt_has_gradients(model: Any) -> None:
    ids = torch.randint(3, 90, (1, 5))
    model(ids, labels=ids).loss.backward()
    assert model.model.language_model.layers[0].mlp.down_proj.weight.grad.abs().max() > 0


class Adapted(nn.Module):
    """Wraps a linear as adapters do, weight and all."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.weight = base, base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 1


def test_what_is_put_around_a_linear_is_called(model: Any) -> None:
    ids = torch.randint(3, 90, (1, 5))
    layer = model.model.language_model.layers[0]
    with torch.no_grad():
        before = model(ids).logits
        calls: list[Any] = []
        hook = layer.mlp.down_proj.register_forward_hook(lambda *args: calls.append(args))
        assert_close(model(ids).logits, before, rtol=1e-5)
        assert len(calls) == 1
        hook.remove()
        layer.self_attn.o_proj = Adapted(layer.self_attn.o_proj)
        after = model(ids).logits
    assert (after - before).abs().max() > 0.01 * before.abs().max()


def test_what_is_plain() -> None:
    """A kernel reads the weight of exactly a plain linear; anything else is called."""

    def read(linear: nn.Module) -> Any:
        owner = Block()
        projection = Projection(owner, 4, {"a": 3})
        owner.a = linear
        return projection.kernel_weight(Asked)

    plain, biased = nn.Linear(4, 3, bias=False), nn.Linear(4, 3)
    assert read(plain).matrix is plain.weight and read(plain).bias is None
    assert read(biased).bias is biased.bias
    assert read(Adapted(nn.Linear(4, 3, bias=False))) is None
    moved = nn.Linear(4, 3, bias=False)
    moved.forward = lambda x: x  # as offloading libraries replace it
    assert read(moved) is None
    parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3, bias=False))
    assert read(parametrised) is None
    owner = Block()
    joint = Projection(owner, 4, {"a": 2, "b": 3})
    assert joint.kernel_weight(Asked).matrix.equal(torch.cat([owner.a.weight, owner.b.weight]))
    owner.b = Adapted(owner.b)
    assert joint.kernel_weight(Asked) is None
    owner.b = nn.Linear(4, 3)
    assert joint.kernel_weight(Asked) is None, "its bias would be lost"


@pytest.mark.parametrize("change", ["assigned", "loaded", "nothing"])
def test_a_weight_written_just_before_its_product_is_not_promised(model: Any, change: str) -> None:
    mlp = model.model.language_model.layers[0].mlp
    if change == "assigned":
        mlp.up_proj.weight.data = mlp.up_proj.weight.data.clone()
    elif change == "loaded":
        mlp.load_state_dict({n: w.clone() for n, w in mlp.state_dict().items()}, assign=True)
    promised: list[bool] = []

    class Recording(Counting):
        def skinny_linear(self, x: Tensor, weight: Tensor, **options: Any) -> Tensor:
            if weight.data_ptr() == mlp.gate_proj.weight.data_ptr():
                promised.append(options["weight_is_constant"])
            return self._ops.skinny_linear(x, weight, **options)

    ids = torch.randint(3, 90, (1, 5))
    with torch.no_grad(), model.ops.replaced(lambda ops: Recording(ops, Counter())):
        first, second = model(ids).logits, model(ids).logits
    assert promised == [change == "nothing", True]
    assert first.equal(second)
