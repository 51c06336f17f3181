"""Models that change within a forward or from another thread, whose modules know their owner, whose weights
lie elsewhere, and whose activations are others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import Prompt, batch_of, hf_model, our_model
from test_called_modules import SHAPE, assert_same_effect, logits, named, scaled
from torch import Tensor, nn

from mllama.kinds import KnownKinds


@pytest.fixture(scope="module")
def hf() -> nn.Module:
    return hf_model(SHAPE)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return batch_of(SHAPE, [Prompt(12, (3,), (6,)), Prompt(9, (0,), (1,))])


def test_what_changes_within_a_forward_counts(hf: nn.Module, batch: dict[str, Tensor]) -> None:
    """A hook that registers a hook, one that replaces a module, and one that is
    gone when its turn comes."""

    def then_scale(module: nn.Module) -> None:
        module.register_forward_hook(lambda m, i, out: scaled(out))

    def hook(model: nn.Module) -> None:
        first, _, last = model.model.language_model.layers
        first.register_forward_hook(lambda *_: then_scale(last.mlp))

    def hook_of_a_linear(model: nn.Module) -> None:
        vision = model.model.vision_model
        last = vision.transformer.layers[1].mlp.fc2
        vision.layernorm_pre.register_forward_hook(lambda *_: then_scale(last))

    def module(model: nn.Module) -> None:
        class Replacing(nn.Identity):
            def forward(self, x: Tensor) -> Tensor:
                model.model.language_model.layers[2].mlp = nn.Identity()
                return x

        model.model.language_model.layers[0].post_attention_layernorm = Replacing()

    def gone(model: nn.Module) -> None:
        layers = model.model.language_model.layers
        layers[0].input_layernorm.register_forward_hook(lambda m, i, out: scaled(out))
        late = layers[2].mlp.register_forward_hook(lambda m, i, out: scaled(out))
        layers[1].register_forward_hook(lambda *_: late.remove())

    for change in (hook, hook_of_a_linear, module, gone):
        assert_same_effect(hf, change, batch)


def test_threads_keep_what_belongs_together(hf: nn.Module) -> None:
    """One that looked before a hook came writes what it found while another writes what it found after."""
    text = our_model(SHAPE, hf).model.language_model
    late: list[tuple[str, Any]] = []

    class Interrupted(KnownKinds):
        before = True

        def __setattr__(self, name: str, value: Any) -> None:
            if Interrupted.before:
                late.append((name, value))
                return
            super().__setattr__(name, value)
            while late:
                super().__setattr__(*late.pop(0))

    Interrupted.before = False
    known = Interrupted()
    Interrupted.before = True
    known.of(text)
    Interrupted.before = False
    hook = text.layers[0].mlp.register_forward_hook(lambda *_: None)
    for _ in range(2):
        assert known.of(text).get(text.layers[0].mlp) is None
    hook.remove()
    for _ in range(2):
        assert known.of(text).get(text.layers[0].mlp) is type(text.layers[0].mlp)


def test_modules_that_know_their_owner(hf: nn.Module, batch: dict[str, Tensor]) -> None:
    def change(model: nn.Module) -> None:
        layer = model.model.language_model.layers[0]
        layer.mlp.register_module("owner", layer)
        layer.mlp.register_forward_hook(lambda m, i, out: scaled(out))

    assert_same_effect(hf, change, batch)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights(
    hf: nn.Module, batch: dict[str, Tensor], where: str, tmp_path: Path
) -> None:
    """`accelerate` brings them for each module's call, and takes them away after it."""
    accelerate = pytest.importorskip("accelerate")
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": []}
    model, plain = our_model(SHAPE, hf), our_model(SHAPE, hf)
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    assert all(p.is_meta for p in model.parameters()) and model.device == torch.device("cpu")
    torch.testing.assert_close(logits(model, batch), logits(plain, batch))
    assert model.generate(**batch, **options).equal(plain.generate(**batch, **options))


@pytest.mark.parametrize("how", ["replaced", "hooked"])
@pytest.mark.parametrize("name", ["act_fn", "activation_fn"])
def test_activations(hf: nn.Module, batch: dict[str, Tensor], name: str, how: str) -> None:
    def change(model: nn.Module) -> None:
        for mlp in named(model, "mlp"):
            if hasattr(mlp, name) and how == "replaced":
                setattr(mlp, name, nn.Tanh())
            elif hasattr(mlp, name):
                getattr(mlp, name).register_forward_hook(lambda m, i, out: scaled(out))

    assert_same_effect(hf, change, batch)


def test_the_epsilon_of_a_norm_counts(hf: nn.Module, batch: dict[str, Tensor]) -> None:
    """Under the name that it has in `transformers`."""

    def change(model: nn.Module) -> None:
        for part in ("q_norm", "k_norm", "norm", "input_layernorm", "post_attention_layernorm"):
            for norm in named(model.model.language_model, part):
                norm.variance_epsilon = 0.5

    assert_same_effect(hf, change, batch)
