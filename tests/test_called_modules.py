"""A module is called unless it is exactly the plain thing: who hooks, wraps or replaces one sees and gives
what they would in `transformers`."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import Prompt, Shape, assert_close, batch_of, hf_model, our_model
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import mllama
import mllama_kernels
from mllama.demo import checkpoint_path
from mllama.kinds import Asked, KnownKinds

SHAPE = Shape(layers=3, cross=(1,), local_layers=2, global_layers=1, taps=(0, 1), tile_side=28)
# Last parts of names in both models, and the towers.
PARTS = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2"),
    *("q_norm", "k_norm", "norm", "input_layernorm", "post_attention_layernorm"),
    *("layernorm_pre", "layernorm_post", "patch_embedding", "embed_tokens", "lm_head"),
    *("embedding", "tile_embedding", "gated_positional_embedding", "multi_modal_projector"),
    *("pre_tile_positional_embedding", "post_tile_positional_embedding"),
    *("mlp", "self_attn", "cross_attn"),
)  # fmt: skip
BLOCKS = {
    "text layer": "model.language_model.layers.0",
    "cross layer": "model.language_model.layers.1",
    "vision layer": "model.vision_model.transformer.layers.1",
    "global layer": "model.vision_model.global_transformer.layers.0",
    "encoder": "model.vision_model.transformer",
    "vision tower": "model.vision_model",
    "text tower": "model.language_model",
    "both": "model",
}


@pytest.fixture(scope="module")
def hf() -> nn.Module:
    return hf_model(SHAPE)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    return batch_of(SHAPE, [Prompt(12, (3,), (6,)), Prompt(9, (0,), (1,))])


def named(model: nn.Module, part: str) -> list[nn.Module]:
    return [m for name, m in model.named_modules() if name.rsplit(".", 1)[-1] == part]


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """At the real tokens, (n, V)."""
    with torch.no_grad():
        found = model(**batch, use_cache=False).logits
    return found[batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()]


def scaled(out: Any) -> Any:
    """What a module gives, made another, also for a norm: the first of a tuple, the state of an output."""
    if isinstance(out, tuple):
        return (scaled(out[0]), *out[1:])
    if isinstance(out, Tensor):
        return out * 1.5 + 0.3 * out.roll(1, -1)
    out["last_hidden_state"] = scaled(out["last_hidden_state"])
    return out


def assert_same_effect(
    hf: nn.Module, change: Callable[[nn.Module], None], batch: dict[str, Tensor]
) -> None:
    """The change does to our model what it does to that of `transformers`, whenever it is made."""
    theirs = copy.deepcopy(hf)
    before = logits(theirs, batch)
    change(theirs)
    expected = logits(theirs, batch)
    assert (expected - before).abs().max() > 1e-3 * before.abs().max(), "it has an effect"
    for has_run in (False, True):
        model = our_model(SHAPE, hf)
        if has_run:
            assert_close(logits(model, batch), before)
        change(model)
        assert_close(logits(model, batch), expected)


@pytest.mark.parametrize("part", PARTS)
def test_a_hook_on_a_module_counts(hf: nn.Module, batch: dict[str, Tensor], part: str) -> None:
    def change(model: nn.Module) -> None:
        assert named(model, part)
        for module in named(model, part):
            module.register_forward_hook(lambda m, i, out: scaled(out))

    assert_same_effect(hf, change, batch)


@pytest.mark.parametrize("part", PARTS)
def test_a_replaced_module_counts(hf: nn.Module, batch: dict[str, Tensor], part: str) -> None:
    def change(model: nn.Module) -> None:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if name == part:
                    cls, new = type(child), copy.deepcopy(child)
                    forward = lambda self, *a, cls=cls, **k: scaled(cls.forward(self, *a, **k))  # noqa: E731
                    new.__class__ = type(f"Other{cls.__name__}", (cls,), {"forward": forward})
                    setattr(parent, name, new)

    assert_same_effect(hf, change, batch)


@pytest.mark.parametrize("part", PARTS)
def test_a_forward_put_on_an_instance_counts(
    hf: nn.Module, batch: dict[str, Tensor], part: str
) -> None:
    def change(model: nn.Module) -> None:
        for module in named(model, part):
            original = module.forward
            module.forward = lambda *a, original=original, **k: scaled(original(*a, **k))

    assert_same_effect(hf, change, batch)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_hook_on_a_block_counts(hf: nn.Module, batch: dict[str, Tensor], block: str) -> None:
    def change(model: nn.Module) -> None:
        model.get_submodule(BLOCKS[block]).register_forward_hook(lambda m, i, out: scaled(out))

    assert_same_effect(hf, change, batch)


SEEN = {
    **BLOCKS,
    **{
        f"{layer} {part}": f"{BLOCKS[layer]}.{part}"
        for layer, parts in {
            "text layer": (
                "self_attn",
                "mlp",
                "input_layernorm",
                "mlp.up_proj",
                "self_attn.o_proj",
            ),
            "cross layer": ("cross_attn", "mlp", "post_attention_layernorm", "cross_attn.q_proj"),
            "vision layer": ("self_attn", "mlp", "input_layernorm", "mlp.fc1", "self_attn.q_proj"),
        }.items()
        for part in parts
    },
    "q_norm": "model.language_model.layers.1.cross_attn.q_norm",
    "projector": "model.multi_modal_projector",
    "position": "model.vision_model.gated_positional_embedding",
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("block", SEEN)
def test_a_hook_sees_what_it_sees_in_transformers(hf: nn.Module, block: str, padded: bool) -> None:
    """The same tensor at the same place or name, of the same shape and values at real tokens, in and out."""
    prompts = [Prompt(12, (3,), (6,)), Prompt(9 if padded else 12, (0,), (1,))]
    batch = batch_of(SHAPE, prompts)
    seen: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
    for model in (hf, our_model(SHAPE, hf)):
        module = model.get_submodule(SEEN[block])
        hook = module.register_forward_hook(
            lambda m, args, kwargs, out: seen.append((args, kwargs, out)), with_kwargs=True
        )
        logits(model, batch)
        hook.remove()
    (args, kwargs, out), (our_args, our_kwargs, our_out) = seen
    assert len(our_args) == len(args)
    assert kwargs.keys() <= our_kwargs.keys() | {"full_text_row_masked_out_mask"}
    for states, ours in zip(args, our_args, strict=True):
        assert_same_tokens(ours, states, batch)
    for name in ("hidden_states", "hidden_state", "pixel_values", "input_ids", "use_cache"):
        if isinstance(kwargs.get(name), Tensor):
            assert_same_tokens(our_kwargs[name], kwargs[name], batch)
    first = lambda out: out[0] if isinstance(out, (tuple, dict)) else out  # noqa: E731
    assert type(our_out) is type(out) or isinstance(our_out, dict)
    assert_same_tokens(first(our_out), first(out), batch)


def assert_same_tokens(ours: Tensor, theirs: Tensor, batch: dict[str, Tensor]) -> None:
    real = batch["attention_mask"].bool()
    assert ours.shape == theirs.shape
    if theirs.shape[:2] == real.shape:
        ours, theirs = ours[real], theirs[real]
    elif theirs.dim() == 4 and theirs.shape[0] == len(real) and theirs.shape[2] == real.shape[1]:
        ours, theirs = ours.transpose(1, 2)[real], theirs.transpose(1, 2)[real]
    assert_close(ours.double(), theirs.double())


def test_what_a_hook_puts_in_the_place_of_an_argument_counts(
    hf: nn.Module, batch: dict[str, Tensor]
) -> None:
    """Of the towers and layers: ids, embeddings, image states, positions."""
    model = our_model(SHAPE, hf)
    others = torch.randint(3, 90, batch["input_ids"].shape)
    others[batch["input_ids"] == SHAPE.vocab] = SHAPE.vocab
    states = {"x": torch.randn(2 * 4, model.model.vision_model.num_patches, 256)}
    replaced: dict[str, dict[str, Any]] = {
        "input_ids": {"input_ids": others},
        "inputs_embeds": {"input_ids": None, "inputs_embeds": torch.randn(*others.shape, 256)},
        "position_ids": {"position_ids": torch.arange(others.shape[1])[None] * 2},
        "cross_attention_states": {"cross_attention_states": states["x"]},
    }
    for name, new in replaced.items():
        found = []
        for one in (hf, model):
            hook = one.model.language_model.register_forward_pre_hook(
                lambda m, args, kwargs, new=new: (args, kwargs | new), with_kwargs=True
            )
            found.append(logits(one, batch))
            hook.remove()
        assert_close(found[1], found[0])
        assert (found[1] - logits(model, batch)).abs().max() > 1e-3, name


def test_a_mask_of_another_kind_is_refused(hf: nn.Module, batch: dict[str, Tensor]) -> None:
    for path, name in (
        ("model.language_model.layers.0", "LayerInputs"),
        ("model.language_model.layers.0.self_attn", "LayerInputs"),
        ("model.vision_model.transformer.layers.0.self_attn", "Padding"),
    ):
        model = our_model(SHAPE, hf)
        model.get_submodule(path).register_forward_pre_hook(
            lambda m, args, kwargs: (args, kwargs | {"attention_mask": torch.zeros(1)}),
            with_kwargs=True,
        )
        with pytest.raises(TypeError, match=f"gives a {name} as attention_mask; got Tensor"):
            logits(model, batch)


@pytest.mark.parametrize("part", ["mlp", "self_attn", "cross_attn", "input_layernorm", "q_norm"])
def test_decoding_and_generation_call_it_too(
    hf: nn.Module, batch: dict[str, Tensor], part: str
) -> None:
    """With a cache, step by step, as in one go."""
    model, theirs = our_model(SHAPE, hf), copy.deepcopy(hf)
    for one in (model, theirs):
        for module in named(one, part):
            module.register_forward_hook(lambda m, i, out: scaled(out))
    batch = batch_of(SHAPE, [Prompt(12, (3,), (6,))])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": []}
    assert model.generate(**batch, **options).equal(theirs.generate(**batch, **options))


def test_gradients_pass_through_a_hooked_block(hf: nn.Module, batch: dict[str, Tensor]) -> None:
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == SHAPE.vocab, -100)
    labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    found = []
    for model in (copy.deepcopy(hf), our_model(SHAPE, hf)):
        for part in ("self_attn", "cross_attn", "mlp", "post_attention_layernorm", "k_proj"):
            for module in named(model, part):
                module.register_forward_hook(lambda m, i, out: scaled(out))
        model.train()(**batch, labels=labels).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[1].items():
        if gradient.numel() > 1:
            assert_close(gradient, found[0][name], rtol=1e-3)


CHANGES: dict[str, Callable[[nn.Linear], Any]] = {
    "hook": lambda m: m.register_forward_hook(lambda m, i, out: out * 2),
    "hook before": lambda m: m.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
    "forward": lambda m: setattr(m, "forward", lambda x: nn.functional.linear(x, m.weight) * 2),
    "class": lambda m: setattr(m, "__class__", Doubled),
    "parametrized": lambda m: nn.utils.parametrize.register_parametrization(m, "weight", Twice()),
    "values": lambda m: m.weight.data.mul_(2),
    "data": lambda m: setattr(m.weight, "data", m.weight.data * 2),
    "parameter": lambda m: setattr(m, "weight", nn.Parameter(m.weight.data * 2)),
    "bias": lambda m: setattr(m, "bias", nn.Parameter(torch.ones(m.out_features))),
    "loaded": lambda m: m.load_state_dict({"weight": m.weight.data * 2}),
    "assigned": lambda m: m.load_state_dict({"weight": m.weight.data * 2}, assign=True),
}


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["mlp.down_proj", "mlp.up_proj", "self_attn.k_proj"])
def test_what_was_found_is_found_anew_after_a_change(
    hf: nn.Module, change: str, grad: bool, name: str
) -> None:
    """Between two forwards of one model, at few rows, where all of it is fused."""
    model, ids = our_model(SHAPE, hf), torch.randint(3, 90, (1, 5))
    with torch.set_grad_enabled(grad):
        before = model(ids, use_cache=False).logits.detach()
        CHANGES[change](model.model.language_model.layers[0].get_submodule(name))
        after = model(ids, use_cache=False).logits.detach()
    fresh = our_model(SHAPE, hf)
    CHANGES[change](fresh.model.language_model.layers[0].get_submodule(name))
    with torch.set_grad_enabled(grad):
        assert after.equal(fresh(ids, use_cache=False).logits)
    assert (after - before).abs().max() > 1e-3 * before.abs().max()


def test_a_hook_on_all_modules_counts_and_goes(hf: nn.Module) -> None:
    model, ids, seen = our_model(SHAPE, hf), torch.randint(3, 90, (1, 5)), []
    before = logits(model, {"input_ids": ids})
    hook = register_module_forward_hook(lambda module, args, out: seen.append(module))
    again = logits(model, {"input_ids": ids})
    hook.remove()
    assert_close(again, before, rtol=1e-5)
    text = model.model.language_model
    assert {*text.layers[0].modules()} - {text.layers[0]} <= {*seen}
    assert logits(model, {"input_ids": ids}).equal(before)


def test_kinds_are_asked_once(hf: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    model, known = our_model(SHAPE, hf), KnownKinds()
    asked: list[nn.Module] = []
    original = Asked.get
    looked = lambda module: (asked.append(module), original(module))[1]  # noqa: E731
    monkeypatch.setattr(Asked, "get", staticmethod(looked))
    text = model.model.language_model
    kinds = known.of(text)
    assert len(asked) == len(list(text.modules())) == len({*asked})
    asked.clear()
    assert known.of(text) is kinds and not asked
    hook = text.layers[0].mlp.register_forward_hook(lambda *args: None)
    assert known.of(text).get(text.layers[0].mlp) is None and asked
    hook.remove()
    assert known.of(text).get(text.layers[0].mlp) is type(text.layers[0].mlp)
    gone = weakref.ref(text.layers[0].mlp.down_proj)
    text.layers[0].mlp.down_proj = nn.Linear(4, 4)
    asked.clear()
    del kinds
    gc.collect()
    assert gone() is None, "what was replaced is not kept"
    twin = copy.deepcopy(text)
    assert twin._kinds.of(twin).get(twin.layers[0].mlp) is type(text.layers[0].mlp)


def calls_of(run: Callable[[], Any]) -> int:
    """Calls of Python functions of both packages."""
    roots = tuple(str(Path(p.__file__).parent) + "/" for p in (mllama, mllama_kernels))
    count = 0

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(roots)

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


def test_a_decode_step_asks_little() -> None:
    """What a load has decided is not asked again for every product: it took 567 calls when it was."""
    model = mllama.MllamaForConditionalGeneration.from_pretrained(checkpoint_path(), device="cpu")
    ids = torch.arange(3, 23).unsqueeze(0)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        step = lambda: model(ids[:, :1], past_key_values=cache, logits_to_keep=1)  # noqa: E731
        step()
        assert calls_of(step) < 250


class Mixing(nn.Linear):
    """Takes the mean over the tokens out of what it gives, and keeps the shape of what it got."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = tuple(x.shape)
        y = super().forward(x)
        return y - y.mean(1, keepdim=True)


@pytest.mark.parametrize("part", ["o_proj", "q_proj", "down_proj"])
def test_what_may_mix_tokens_gets_sequences(
    hf: nn.Module, part: str, batch: dict[str, Tensor]
) -> None:
    """Of a padded batch too, in which nothing of one row may reach another."""
    model = our_model(SHAPE, hf)
    linears = named(model.model.language_model, part)
    for linear in linears:
        linear.__class__ = Mixing
    with torch.no_grad():
        model(**batch, use_cache=False)
        assert all(m.seen[:2] == batch["input_ids"].shape for m in linears)
        other = {**batch, "input_ids": batch["input_ids"].clone()}
        other["input_ids"][1, -3:] = other["input_ids"][1, -3:].flip(0)
        changed, before = (model(**b, use_cache=False).logits[0] for b in (other, batch))
    assert changed.equal(before)


@pytest.mark.parametrize("change", ["", "hook", "forward", "dora"])
def test_lora_computes_no_padding(
    hf: nn.Module, change: str, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets the real tokens only, unless somebody looks on, or it is a variant."""
    peft = pytest.importorskip("peft")
    name = "model.language_model.layers.0.self_attn.q_proj"
    config = peft.LoraConfig(target_modules=[name], use_dora=change == "dora")
    model = peft.get_peft_model(our_model(SHAPE, hf), config)
    lora = model.get_submodule(f"base_model.model.{name}")
    if change == "hook":
        lora.lora_B.default.register_forward_hook(lambda *_: None)
    shapes: list[torch.Size] = []
    forward = type(lora).forward
    watched = lambda self, x: shapes.append(x.shape) or forward(self, x)  # noqa: E731
    monkeypatch.setattr(type(lora), "forward", watched)
    if change == "forward":
        lora.forward = lora.forward
    with torch.no_grad():
        model(**batch, use_cache=False)
    mask = batch["attention_mask"]
    width = lora.base_layer.in_features
    assert set(shapes) == {(*mask.shape, width) if change else (int(mask.sum()), width)}
