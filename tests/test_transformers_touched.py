"""Whatever others do to a module of an accelerated model counts, as it does without the kernels.

For every kind of submodule, found by walking the models: hooks, other classes, another `forward` and
adapters, before and after :func:`accelerate`. The modules are called as often, with the same arguments,
and the model computes the same.
"""

from __future__ import annotations

import copy
import functools
import sys
from typing import Any

import pytest
import torch
import touches
import transformers
from model_helpers import Prompt, Shape, batch_of
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers_helpers import (
    V4,
    assert_same,
    assert_same_gradients,
    build,
    count_ops,
    gradients,
    llama_config,
    llava_config,
    mllama_config,
    needs_backward,
    text_batch,
)

from mllama_kernels.transformers import accelerate

pytestmark = pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated")
SHAPE = Shape(tile_side=28, local_layers=1, global_layers=1, taps=(0,), layers=2, cross=(1,))
# Llava looks at what enters the last layer of its tower, and at nothing that comes of it.
UNUSED = {"vision_tower", "vision_model", "encoder", "post_layernorm"}


def _mllama(attention: str) -> nn.Module:
    return build(transformers.MllamaForConditionalGeneration, mllama_config(SHAPE, attention))


@functools.cache
def _case(family: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model that nobody has touched, to be copied, and a batch of more rows than decoding has."""
    torch.manual_seed(3)
    if family == "mllama":
        prompts = [Prompt(12, (3,), (6,)), Prompt(16, (2,), (2,))]
        return _mllama("sdpa"), batch_of(SHAPE, prompts)
    if family == "llama":
        config = llama_config(num_hidden_layers=1)
        return build(transformers.LlamaForCausalLM, config), text_batch(padding="left")
    config = llava_config()
    config.text_config.num_hidden_layers = 1
    model, batch = build(transformers.LlavaForConditionalGeneration, config), text_batch()
    batch["input_ids"][:, 4:13] = 95
    return model, batch | {"pixel_values": torch.randn(2, 3, 42, 42)}


def _cases() -> list[Any]:
    """Every kind of submodule of every family."""
    found = []
    for family in ("mllama", "llama", "llava"):
        for kind, path in touches.kinds_of(_case(family)[0]).items():
            found.append(pytest.param(family, path, id=f"{family}-{kind or 'model'}"))
    return found


def _outcome(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """The logits of a prompt and of a token after it."""
    with torch.no_grad():
        first = model(**batch, use_cache=True)
        mask = batch["attention_mask"]
        then = {
            "input_ids": batch["input_ids"][:, -1:].clamp(max=90),
            "attention_mask": torch.cat([mask, mask[:, -1:]], dim=1),
            "past_key_values": first.past_key_values,
        }
        if "cross_attention_mask" in batch:
            shown = batch["cross_attention_mask"]
            then["cross_attention_mask"] = torch.cat([shown, shown[:, -1:]], dim=1)
            if V4:
                then["cache_position"] = torch.tensor([mask.shape[1]])
        second = model(**then, use_cache=True)
    return [first.logits[mask.bool()], second.logits]


def _step(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of a sum over the logits, by name."""
    logits = model(**batch).logits
    logits[batch["attention_mask"].bool()].square().mean().backward()
    return gradients(model)


def _touched(
    touch: touches.Touch, family: str, path: str, order: str, run: Any, **options: Any
) -> tuple[Any, list[Any]] | Exception:
    """What a model computes and what the calls of the module were given, or what was raised."""
    original, batch = _case(family)
    model, seen = copy.deepcopy(original), []
    try:
        if order == "accelerated first":
            accelerate(model, **options)
        touch(model, path, seen)
        if order == "touched first":
            accelerate(model, **options)
        return run(model, batch), seen
    except Exception as error:
        return error


@functools.cache
def _untouched(family: str) -> list[Tensor]:
    return _outcome(*_case(family))


def _compare(touch: touches.Touch, family: str, path: str) -> None:
    plain = _touched(touch, family, path, "plain", _outcome)
    orders = ["accelerated first"]
    if touch not in touches.HOOKS:
        orders.append("touched first")
    for order in orders:
        fast = _touched(touch, family, path, order, _outcome)
        if isinstance(plain, Exception):  # transformers cannot take it either
            assert type(fast) is type(plain), (order, fast)
            continue
        if isinstance(fast, Exception):
            raise fast
        assert fast[1] == plain[1], order
        for ours, theirs in zip(fast[0], plain[0], strict=True):
            assert_same(ours, theirs)
    unused = family == "llava" and path.rpartition(".")[2] in UNUSED
    if not isinstance(plain, Exception) and plain[1] and not unused:
        effect = (plain[0][0] - _untouched(family)[0]).abs().max()
        assert effect > 1e-3, "a touch that nobody could notice proves nothing"


@pytest.mark.share(3)
@pytest.mark.parametrize("touch", touches.HOOKS + touches.REPLACEMENTS, ids=lambda t: t.__name__)
@pytest.mark.parametrize("family, path", _cases())
def test_calls(family, path, touch):
    if not path and touch in (touches.subclass, touches.around):
        pytest.skip("nothing has the model as a module")
    _compare(touch, family, path)


@needs_backward
@pytest.mark.parametrize("family, path", _cases())
def test_gradients(family, path):
    plain, fast = (
        _touched(touches.gradient_hooks, family, path, order, _step)
        for order in ("plain", "accelerated first")
    )
    if isinstance(plain, Exception):
        assert type(fast) is type(plain), fast
        return
    if isinstance(fast, Exception):
        raise fast
    assert fast[1] == plain[1]
    assert_same_gradients(fast[0], plain[0])


TEXT, VISION = "model.language_model.layers", "model.vision_model"
EVERY = {
    "patch_embed": 1,
    "vision_attention": 6,
    "cross_attention": 2,
    "rotary_attention": 2,
    "add_rms_norm": 4,
    "swiglu": 4,
}


@pytest.mark.parametrize(
    "path, touch, left",
    [
        (f"{TEXT}.0", touches.hooks, {}),
        (f"{TEXT}.0.self_attn", touches.hooks, {}),
        (f"{TEXT}.1.cross_attn", touches.hooks, {}),
        (f"{TEXT}.0.self_attn.q_proj", touches.around, {}),
        (f"{TEXT}.1.cross_attn.q_norm", touches.around, {}),
        (f"{TEXT}.0.mlp.gate_proj", touches.own_forward, {}),
        (f"{TEXT}.0.mlp", touches.around, {}),
        (f"{VISION}.transformer.layers.0", touches.hooks, {}),
        (f"{VISION}.layernorm_post", touches.around, {}),
        # The fusion around the module, only for it.
        (f"{TEXT}.0.post_attention_layernorm", touches.hooks, {"add_rms_norm": 3}),
        (f"{TEXT}.1.post_attention_layernorm", touches.around, {"add_rms_norm": 3}),
        (f"{TEXT}.0.mlp.act_fn", touches.hooks, {"swiglu": 3}),
        (f"{TEXT}.0.self_attn", touches.pre_hook_with_kwargs, {"rotary_attention": 1}),
        (f"{TEXT}.1.cross_attn", touches.hook_with_kwargs, {"cross_attention": 1}),
        (f"{TEXT}.1.cross_attn", touches.own_forward, {"cross_attention": 1}),
        (f"{VISION}.patch_embedding", touches.hooks, {"patch_embed": 0}),
        # Masks, which are handed down for all layers or for none.
        (
            f"{TEXT}.0",
            touches.hook_with_kwargs,
            {"rotary_attention": 0, "cross_attention": 0, "add_rms_norm": 2},
        ),
        ("model.language_model.rotary_emb", touches.hooks, {"rotary_attention": 0}),
        (f"{VISION}.transformer", touches.pre_hook_with_kwargs, {"vision_attention": 0}),
        (f"{VISION}.transformer.layers.0.self_attn", touches.around, {"vision_attention": 0}),
    ],
)
def test_what_is_given_up(path, touch, left, monkeypatch):
    shape = Shape()
    model = build(transformers.MllamaForConditionalGeneration, mllama_config(shape))
    batch = batch_of(shape, [Prompt(12, (3,), (6,)), Prompt(16, (2,), (2,))])
    accelerate(model)
    touch(model, path, [])
    calls = count_ops(monkeypatch)
    with torch.no_grad():
        model(**batch)
    assert {op: calls[op] for op in EVERY} == EVERY | left


def test_masks_of_one_layer_of_each_kind(monkeypatch):
    """Layers whose norm stays are those of `transformers`, and pass on what they are given."""
    shape = Shape()
    model = build(transformers.MllamaForConditionalGeneration, mllama_config(shape))
    batch = batch_of(shape, [Prompt(12, (3,), (6,)), Prompt(16, (2,), (2,))])
    with torch.no_grad():
        expected = model(**batch).logits
        accelerate(model, rms_norm=False)
        for touched, rotary in ((False, 2), (True, 0)):
            with monkeypatch.context() as patch:
                calls = count_ops(patch)
                assert_same(model(**batch).logits, expected, batch["attention_mask"])
            assert calls["rotary_attention"] == rotary
            attention = model.get_submodule(f"{TEXT}.0.self_attn")
            if not touched:
                attention.register_forward_hook(lambda *_: None, with_kwargs=True)


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """The loss of a training step."""
    labels = batch["input_ids"].masked_fill(batch["input_ids"] > 95, -100)
    labels[:, 1:].masked_fill_(~batch["attention_mask"].bool()[:, :-1], -100)
    return [model.train()(**batch, labels=labels).loss.detach()]


@needs_backward
@pytest.mark.parametrize("family", ["mllama", "llama", "llava"])
@pytest.mark.parametrize("path", ["model", "lm_head"])
@pytest.mark.parametrize("touch", touches.HOOKS + touches.REPLACEMENTS, ids=lambda t: t.__name__)
def test_a_loss_without_logits(family, path, touch):
    """What computes it does not call the head, and calls the body by itself."""
    (plain, seen), (fast, fast_seen) = (
        _touched(touch, family, path, order, _loss, loss=True)
        for order in ("plain", "accelerated first")
    )
    assert fast_seen == seen and seen
    assert_same(fast[0], plain[0])


def test_meta_semantics_around_a_hook():
    """A token that sees no image gets nothing from an attention that is given a dense mask, either."""
    original, batch = _case("mllama")
    model = copy.deepcopy(original)
    accelerate(model, semantics="meta")
    expected = _outcome(model, batch)
    attention = model.get_submodule(f"{TEXT}.1.cross_attn")
    attention.register_forward_hook(lambda *_: None, with_kwargs=True)
    for ours, theirs in zip(_outcome(model, batch), expected, strict=True):
        assert_same(ours, theirs)
    assert (expected[0] - _untouched("mllama")[0]).abs().max() > 1e-3, "the semantics differ"


OPTIONS = [
    ("mllama", f"{VISION}.patch_embedding", lambda: nn.Conv2d(3, 128, 14, 14)),
    (
        "mllama",
        f"{VISION}.patch_embedding",
        lambda: nn.Conv2d(3, 128, 14, 14, padding=1, bias=False),
    ),
    ("mllama", f"{VISION}.layernorm_pre", lambda: nn.LayerNorm(128, elementwise_affine=False)),
    ("mllama", f"{VISION}.layernorm_pre", lambda: nn.LayerNorm(128, bias=False)),
    ("mllama", f"{VISION}.layernorm_pre", lambda: nn.LayerNorm((5, 128))),
    (
        "mllama",
        f"{VISION}.gated_positional_embedding.tile_embedding",
        lambda: nn.Embedding(9, 4 * 5 * 128, padding_idx=6),
    ),
    (
        "mllama",
        f"{VISION}.pre_tile_positional_embedding.embedding",
        lambda: nn.Embedding(9, 4 * 128, max_norm=0.5),
    ),
    ("mllama", f"{TEXT}.0.self_attn.q_proj", lambda: nn.Linear(256, 256)),
    ("mllama", f"{TEXT}.0.mlp.up_proj", lambda: nn.Linear(256, 160)),
    ("mllama", f"{TEXT}.1.cross_attn.k_proj", lambda: nn.Linear(256, 128)),
    ("llava", "model.vision_tower.pre_layrnorm", lambda: nn.LayerNorm(128, bias=False)),
    (
        "llava",
        "model.vision_tower.embeddings.position_embedding",
        lambda: nn.Embedding(10, 128, max_norm=0.5),
    ),
]


@needs_backward
@pytest.mark.parametrize("family, path, make", OPTIONS)
def test_the_same_class_with_other_options(family, path, make):
    if V4:
        path = path.replace("vision_tower.", "vision_tower.vision_model.")
    replacement = make()

    def replace(model: nn.Module, path: str, seen: list[Any]) -> None:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, copy.deepcopy(replacement))
        seen.append("replaced")

    _compare(replace, family, path)
    plain, fast = (
        _touched(replace, family, path, order, _step) for order in ("plain", "accelerated first")
    )
    assert_same_gradients(fast[0], plain[0])


def _text(model: nn.Module) -> nn.Module:
    return getattr(model.model, "language_model", model.model)


def _sees_all(model: nn.Module) -> None:
    for layer in _text(model).layers:
        if hasattr(layer, "self_attn"):
            layer.self_attn.is_causal = False


def _attends_otherwise(model: nn.Module) -> None:
    attention = _text(model).layers[0].self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = "twice"


def _norm_of_one_number(model: nn.Module) -> None:
    for name in ("input_layernorm", "post_attention_layernorm"):
        norm = getattr(_text(model).layers[0], name)
        norm.weight = nn.Parameter(torch.tensor([1.7]))


def _one_gate(model: nn.Module) -> None:
    mlp = _text(model).layers[0].mlp
    mlp.gate_proj.weight = nn.Parameter(mlp.gate_proj.weight[:1].detach())


def _sizes_that_do_not_fit(model: nn.Module) -> None:
    mlp = _text(model).layers[0].mlp
    mlp.gate_proj, mlp.up_proj = nn.Linear(256, 150), nn.Linear(256, 170)


def _other_positions(model: nn.Module) -> None:
    tower = getattr(model.model, "vision_tower", None)
    if tower is not None:
        embeddings = getattr(tower, "vision_model", tower).embeddings
        embeddings.position_ids = embeddings.position_ids.flip(-1)


@pytest.mark.parametrize("family", ["mllama", "llama", "llava"])
@pytest.mark.parametrize(
    "change",
    [
        _sees_all,
        _attends_otherwise,
        _norm_of_one_number,
        _one_gate,
        _sizes_that_do_not_fit,
        _other_positions,
    ],
)
def test_attributes_of_modules(family, change, monkeypatch):
    """Without a mask that says the same: what modules of `transformers` read of themselves counts."""
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def twice(*args: Any, **kwargs: Any) -> Any:
        out, weights = sdpa(*args, **kwargs)
        return out * 2, weights

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "twice", twice)
    _compare(lambda model, path, seen: change(model), family, "")


@pytest.mark.parametrize("family", ["mllama", "llama", "llava"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["apply_rotary_pos_emb", "attention", "wrapped"])
def test_functions_of_transformers(family, implementation, name, monkeypatch):
    """Those that others put in the place of what an attention calls, for one model or for all."""
    original, batch = _case(family)
    models = [copy.deepcopy(original) for _ in range(2)]
    for model in models:
        model.set_attn_implementation(implementation)
    accelerate(models[1])
    before = _outcome(models[0], batch)
    modules = {sys.modules[type(m).__module__] for m in original.modules()}
    for module in [m for m in modules if hasattr(m, "eager_attention_forward")]:
        attends = module.eager_attention_forward
        if implementation == "sdpa":
            attends = ALL_ATTENTION_FUNCTIONS["sdpa"]

        def twice(*args: Any, attends: Any = attends, **kwargs: Any) -> Any:
            out, weights = attends(*args, **kwargs)
            return out * 2, weights

        if name == "apply_rotary_pos_emb":
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda q, k, *_, **__: (q * 0.5, k))
            continue
        other = functools.wraps(attends)(twice) if name == "wrapped" else twice
        if implementation == "eager":
            monkeypatch.setattr(module, "eager_attention_forward", other)
        else:
            monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", other)
            break
    plain, fast = (_outcome(model, batch) for model in models)
    for ours, theirs, once in zip(fast, plain, before, strict=True):
        assert_same(ours, theirs)
        assert (theirs - once).abs().max() > 1e-3


ADAPTED = (nn.Linear, nn.Conv2d, nn.Embedding)


@pytest.mark.parametrize(
    "family, path",
    [c for c in _cases() if isinstance(_case(c.values[0])[0].get_submodule(c.values[1]), ADAPTED)],
)
def test_adapters(family, path):
    """LoRA on one module, which is read like any other when nothing else is there."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(4)
    config = peft.LoraConfig(r=2, target_modules=[path], init_lora_weights=False)
    weights: list[Tensor] = []

    def adapter(model: nn.Module, path: str, seen: list[Any]) -> None:
        adapted = peft.inject_adapter_in_model(config, model)
        added = [p for name, p in adapted.named_parameters() if "lora_" in name]
        assert added
        with torch.no_grad():
            for number, parameter in enumerate(added):
                if len(weights) == number:
                    weights.append(torch.randn_like(parameter) * 0.3)
                parameter.copy_(weights[number])
        seen.append("adapted")

    _compare(adapter, family, path)
