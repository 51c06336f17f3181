"""Random sets of all arguments that a forward of `transformers` takes, with and without the kernels."""

from __future__ import annotations

import copy
import inspect
import random
from typing import Any

import pytest
import torch
import transformers
from model_helpers import Prompt, Shape, batch_of
from torch import Tensor, nn
from transformers_helpers import (
    V4,
    assert_same,
    build,
    count_ops,
    llama_config,
    llava_config,
    mllama_config,
    text_batch,
)

from mllama_kernels.transformers import accelerate

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* is deprecated"),
    pytest.mark.filterwarnings("ignore:.*output_attentions=True"),
]
SHAPE = Shape(local_layers=2, global_layers=1, taps=(0,), layers=3, cross=(1,))
SETS = 30  # of arguments, for a family; more where some argument was not drawn
ROWS, LENGTH, VOCABULARY = 2, 16, 95
# Arguments without a meaning for these models, or that only say how something else is laid out.
UNUSED = {
    "image_sizes",  # Pixtral's towers in Llava
    "mm_encoder_outputs",
    "output_router_logits",  # mixtures of experts
    "seq_idx",  # Mamba
    "self",
    "kwargs",
}


def _model(family: str, attention: str) -> nn.Module:
    if family == "llama":
        return build(transformers.LlamaForCausalLM, llama_config(attention, num_hidden_layers=2))
    if family == "mllama":
        config = mllama_config(SHAPE, attention)
        return build(transformers.MllamaForConditionalGeneration, config)
    if family == "mllama text":
        config = mllama_config(SHAPE, attention).text_config
        return build(transformers.MllamaForCausalLM, config)
    return build(transformers.LlavaForConditionalGeneration, llava_config(attention))


class Draw:
    """One set of arguments.

    Attributes:
        given: the arguments.
        tokens: (B, L) bool, where outputs mean something.
        past: tokens of an earlier call, in a cache.
    """

    def __init__(self, rng: random.Random, family: str, model: nn.Module) -> None:
        self.rng, self.family, self.model = rng, family, model
        self.given: dict[str, Any] = {}
        self.past = rng.choice([0, 0, 0, 4])
        self._tokens()
        self._positions()
        self._caches()
        self._images()
        self._outputs()
        self._labels()

    def _maybe(self, name: str, *values: Any) -> None:
        if self.rng.random() < 0.5:
            self.given[name] = self.rng.choice(values)

    def _tokens(self) -> None:
        padding = self.rng.choice(["none", "left", "right", "around", "between"])
        batch = text_batch(ROWS, LENGTH, padding)
        self.ids = batch["input_ids"]
        mask, kind = batch["attention_mask"], self.rng.choice(["none", "2-D", "2-D", "bool", "4-D"])
        if self.family in ("llava", "mllama") and kind == "4-D":
            kind = "2-D"
        self.tokens = torch.ones_like(mask, dtype=torch.bool)
        if kind != "none":
            self.tokens = mask.bool()
            before = torch.ones(ROWS, self.past, dtype=mask.dtype)
            mask = torch.cat([before, mask], dim=1)
            if kind == "bool":
                mask = mask.bool()
            elif kind == "4-D":
                seen = torch.rand(ROWS, 1, LENGTH, self.past + LENGTH) < 0.7
                seen[..., 0] = True
                mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
                self.tokens = torch.ones_like(self.tokens)
            self.given["attention_mask"] = mask

    def _positions(self) -> None:
        plain = torch.arange(self.past, self.past + LENGTH)
        restarting = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)])
        later = torch.cat([torch.arange(5), torch.arange(LENGTH - 5) + 40])
        each = torch.stack([restarting, plain])
        self._maybe("position_ids", plain[None], restarting[None], later[None], each)
        if V4 and self.rng.random() < 0.5:
            self.given["cache_position"] = plain
        self._maybe("is_causal", True, None)
        if (
            self.rng.random() < 0.2
        ):  # only flash attention reads them, not the masks of sdpa and eager
            bounds = torch.tensor([0, 5, LENGTH], dtype=torch.int32)
            self.given |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
            self.given |= {"max_length_q": LENGTH - 5, "max_length_k": LENGTH - 5}

    def _caches(self) -> None:
        self._maybe("use_cache", True, False, None)
        if self.past:
            cache = transformers.DynamicCache(config=self.model.config)
            ids = torch.randint(3, VOCABULARY, (ROWS, self.past))
            with torch.no_grad():
                self.model(input_ids=ids, past_key_values=cache, use_cache=True)
            self.given["past_key_values"] = cache
        elif self.rng.random() < 0.3:
            self.given["past_key_values"] = transformers.DynamicCache(config=self.model.config)

    def _images(self) -> None:
        ids = self.ids
        if self.family == "mllama" and self.rng.random() < 0.8:
            prompts = [Prompt(LENGTH, (2,), (6,)), Prompt(LENGTH, (1, 5), (2, 1))]
            batch = batch_of(SHAPE, prompts)
            names = ["pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"]
            mask = batch["cross_attention_mask"]
            kind = self.rng.choice(["all", "none", "rows", "zero"])
            if kind == "rows":
                mask[:, 6:9] = 0
            elif kind == "zero":
                mask[0] = 0
            if kind != "none":
                before = mask.new_zeros(ROWS, self.past, *mask.shape[2:])
                batch["cross_attention_mask"] = torch.cat([before, mask], dim=1)
                names.append("cross_attention_mask")
            if self.rng.random() < 0.2:
                batch["aspect_ratio_mask"][1, 0] = 0  # an image that is padding all over
            self.given |= {name: batch[name] for name in names}
        if self.family == "mllama text" and self.rng.random() < 0.6:
            self.given["cross_attention_states"] = torch.randn(ROWS * 2, 17, SHAPE.heads * 64)
            if self.rng.random() < 0.7:
                shown = torch.rand(ROWS, 1, LENGTH, 2 * 17) < 0.5
                rows = shown.any(-1, keepdim=True).float()
                hidden = torch.zeros(shown.shape).masked_fill(
                    ~shown, torch.finfo(torch.float32).min
                )
                self.given["cross_attention_mask"] = hidden * rows
                self.given["full_text_row_masked_out_mask"] = rows
        if self.family == "mllama" and "pixel_values" not in self.given:
            self._maybe("cross_attention_states", torch.randn(ROWS * 4, 17, SHAPE.heads * 64))
        if self.family == "llava" and self.rng.random() < 0.7:
            ids[:, 3:12] = 95
            self.given["pixel_values"] = torch.randn(ROWS, 3, 42, 42)
            self._maybe("vision_feature_layer", -1, -2, [-2, -1], 1)
            if isinstance(self.given.get("vision_feature_layer"), list):
                self.given["vision_feature_layer"] = -1  # two would need another projector
            self._maybe("vision_feature_select_strategy", "default", None)
        if "pixel_values" not in self.given and self.rng.random() < 0.3:
            with torch.no_grad():
                self.given["inputs_embeds"] = self.model.get_input_embeddings()(ids)
        else:
            self.given["input_ids"] = ids

    def _outputs(self) -> None:
        self._maybe("output_hidden_states", True, False, None)
        self._maybe("output_attentions", True, False, None)
        self._maybe("return_dict", True, False, None)
        self._maybe("logits_to_keep", 0, 3, torch.tensor([1, 4, LENGTH - 1]))

    def _labels(self) -> None:
        if self.rng.random() < 0.5:
            return
        labels = self.ids.masked_fill(~self.tokens | (self.ids >= VOCABULARY), -100)
        labels[:, 1:].masked_fill_(~self.tokens[:, :-1], -100)
        self.given["labels"] = labels
        self.given.pop("logits_to_keep", None)
        shifted = labels.roll(-1, 1)
        shifted[:, -1] = -100
        self._maybe("shift_labels", shifted, shifted.masked_fill(shifted % 3 == 0, -100))
        self._maybe("num_items_in_batch", 7, torch.tensor(9))
        if self.rng.random() < 0.3:
            self.given["ignore_index"] = -7
            for name in self.given.keys() & {"labels", "shift_labels"}:
                self.given[name] = self.given[name].masked_fill(self.given[name] == -100, -7)


def _run(model: nn.Module, draw: Draw) -> Any:
    torch.manual_seed(5)
    with torch.set_grad_enabled(model.training):
        return model(**copy.deepcopy(draw.given))


def _compare(ours: Any, theirs: Any, tokens: Tensor, keep: Any) -> None:
    """Everything in two outputs; what belongs to tokens, only at tokens that mean something."""
    if torch.is_tensor(theirs):
        ours, theirs = ours.detach(), theirs.detach()
        rows = tokens[:, -keep:] if isinstance(keep, int) else tokens[:, keep]
        where = next(
            (
                mask
                for mask in (tokens, rows)
                if theirs.dim() == 3 and theirs.shape[:2] == mask.shape
            ),
            None,
        )
        if theirs.dim() == 4:  # weights, (B, H, Lq, Lk)
            ours, theirs = (t.transpose(1, 2)[tokens] for t in (ours, theirs))
        assert_same(ours, theirs, where)
    elif isinstance(theirs, transformers.Cache):
        assert len(ours.layers) == len(theirs.layers)
        for one, other in zip(ours.layers, theirs.layers):
            assert (one.keys is None) == (other.keys is None)
            if other.keys is not None:
                assert one.keys.shape == other.keys.shape
    elif isinstance(theirs, (tuple, list)):
        for one, other in zip(ours, theirs, strict=True):
            _compare(one, other, tokens, keep)
    else:
        assert ours == theirs, (ours, theirs)


@pytest.mark.parametrize("family", ["llama", "mllama", "mllama text", "llava"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_values(family, attention, request, monkeypatch):
    model = _model(family, attention)
    rng = random.Random(f"{family} {attention} {request.config.getoption('--seed')}")
    calls = count_ops(monkeypatch)
    method = inspect.signature(type(model).forward)
    missing, number = method.parameters.keys() - UNUSED, 0
    while number < SETS or (missing and number < 20 * SETS):
        number += 1
        draw = Draw(rng, family, model)
        loss = rng.random() < 0.5
        model.train(rng.random() < 0.4)
        said = {n: tuple(v.shape) if torch.is_tensor(v) else v for n, v in draw.given.items()}
        try:
            expected: Any = _run(model, draw)
        except Exception as error:
            expected = error
        report = accelerate(model, loss=loss)
        try:
            if isinstance(expected, Exception):
                with pytest.raises(type(expected)):
                    _run(model, draw)
                model = _model(
                    family, attention
                )  # release 4 leaves its recorders in the broken one
                continue
            missing -= draw.given.keys()
            actual = _run(model, draw)
            keep = draw.given.get("logits_to_keep", 0)
            if isinstance(expected, tuple):
                fused = len(actual) < len(expected)
                pairs = [
                    *zip(actual, expected[:1] + expected[2:] if fused else expected, strict=True)
                ]
            else:
                fused = actual.get("logits") is None
                names = [name for name in expected if not (fused and name == "logits")]
                assert [name for name in actual if actual[name] is not None] == names
                pairs = [(actual[name], expected[name]) for name in names]
            assert not fused or (loss and model.training and "labels" in draw.given)
            for ours, theirs in pairs:
                _compare(ours, theirs, draw.tokens, keep)
        except BaseException as error:
            raise AssertionError(
                f"set {number}, training {model.training}, {loss=}: {said}"
            ) from error
        finally:
            report.revert()
            model.eval()
    assert calls["rms_norm"] >= SETS and calls["rotary_attention"] > 0
    assert not missing, f"arguments that no set holds: {missing}"


@pytest.mark.skipif(V4, reason="release 4 does not list them")
def test_every_further_argument_is_known():
    """Those that every model takes without naming them."""
    known = transformers.utils.TransformersKwargs.__annotations__.keys()
    drawn = {
        "num_items_in_batch",
        "output_hidden_states",
        "output_attentions",
        "position_ids",
        "is_causal",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
    }
    assert known - UNUSED == drawn
