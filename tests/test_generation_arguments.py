"""Arguments of generate() that cannot work: each is named before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generation_helpers import Recorder, Script, endless_model


@pytest.fixture
def model() -> Any:
    return endless_model()


PROMPT = torch.tensor([[5, 6, 7, 8]])
PIXELS = torch.zeros(1, 1, 4, 3, 28, 28)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_beans": 3}, TypeError, r"unknown arguments \['num_beans'\]; options are max_new"),
        ({"num_beams": 4}, ValueError, "num_beams=4 is not supported, only 1"),
        ({"num_return_sequences": 2}, ValueError, "num_return_sequences=2 is not supported"),
        ({"use_cache": False}, ValueError, "use_cache=False is not supported"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be an integer >= 1, got 0"),
        ({"max_new_tokens": 2.5}, ValueError, "max_new_tokens must be an integer >= 1, got 2.5"),
        ({"max_length": 4}, ValueError, "max_length=4 has no room .* the prompt has 4"),
        ({"max_length": 9, "max_new_tokens": 3}, ValueError, "max_new_tokens=3 or max_length=9"),
        ({"max_new_tokens": 1021}, ValueError, "max_new_tokens=1021 does not fit.* 1024 .*1020"),
        ({"max_length": 1025}, ValueError, "max_length=1025 does not fit"),
        ({"num_beams": 4}, ValueError, r"accelerate\(\) on transformers' model has it"),
        (
            {"assistant_model": torch.nn.Identity()},
            ValueError,
            "assistant_model of type Identity is",
        ),
        ({"output_attentions": True}, ValueError, "output_attentions=True .*no attention weights"),
        (
            {"typical_p": 0.9},
            ValueError,
            r"typical_p=0.9 .*logits_processor=\[transformers.Typical",
        ),
        (
            {"cache_implementation": "quantized"},
            ValueError,
            "'quantized' .*past_key_values=model.new",
        ),
        ({"position_ids": PROMPT}, ValueError, "position_ids of type Tensor is not supported"),
        ({"temperature": -1}, ValueError, "temperature must be a number > 0"),
        ({"num_return_sequences": 0}, ValueError, "num_return_sequences must be an integer >= 1"),
        ({"min_new_tokens": -1}, ValueError, "min_new_tokens must be an integer >= 0"),
        ({"no_repeat_ngram_size": 1.5}, ValueError, "no_repeat_ngram_size must be an integer"),
        ({"bad_words_ids": [5]}, ValueError, "bad_words_ids must be a list of lists"),
        ({"bad_words_ids": [[]]}, ValueError, "bad_words_ids must be a list of lists"),
        ({"bad_words_ids": [[96]]}, ValueError, r"bad_words_ids must lie within 0\.\.95"),
        ({"logits_processor": max}, TypeError, "logits_processor must be a list of callables"),
        ({"stopping_criteria": [3]}, TypeError, "stopping_criteria must be a list of callables"),
        ({"prefix_allowed_tokens_fn": [1]}, TypeError, "must be callable, got list"),
        ({"return_dict_in_generate": "yes"}, ValueError, "must be True or False, got 'yes'"),
        ({"generation_config": 3}, TypeError, "a mapping or a GenerationConfig, got int"),
        (
            {"generation_config": {"num_beans": 3}},
            TypeError,
            r"entries of generation_config \['num_b",
        ),
        (
            {"generation_config": {"num_beams": 3}},
            ValueError,
            "num_beams=3 .*the call may override",
        ),
        ({"past_key_values": [1]}, TypeError, r"must come from new_cache\(\) or a model, got list"),
        ({"inputs": PROMPT}, TypeError, "give input_ids or inputs"),
        ({"input_ids": None}, TypeError, "generate.. needs input_ids"),
        ({"inputs_embeds": PROMPT}, ValueError, "inputs_embeds must be floating point"),
        ({"inputs_embeds": torch.zeros(1, 3, 128)}, ValueError, r"inputs_embeds must be \(1, 4\)"),
        ({"do_sample": "yes"}, ValueError, "do_sample must be True or False, got 'yes'"),
        ({"do_sample": True, "min_p": 2}, ValueError, "min_p must be"),
        ({"repetition_penalty": -1}, ValueError, "repetition_penalty must be"),
        ({"seed": [1, 2]}, ValueError, r"seed must be an integer, or 1 .*\[1, 2\]"),
        ({"seed": "x"}, ValueError, "seed must be an integer"),
        ({"eos_token_id": "</s>"}, ValueError, "eos_token_id must be a token id"),
        ({"pad_token_id": [1, 2]}, ValueError, r"pad_token_id must be one token, got \[1, 2\]"),
        ({"stop_strings": ["x"]}, ValueError, "stop_strings=.* need tokenizer="),
        ({"stop_strings": [""], "tokenizer": 1}, ValueError, "must be non-empty strings"),
        ({"stop_strings": "x", "tokenizer": 1}, TypeError, "decode method, got int"),
        ({"input_ids": [[1, 2]]}, TypeError, "input_ids must be a tensor"),
        ({"input_ids": PROMPT[0]}, ValueError, r"input_ids must be \(B, L\) int64, got \(4,\)"),
        ({"input_ids": PROMPT.to("meta")}, ValueError, "is on meta, the model on cpu"),
        ({"input_ids": PROMPT.float()}, ValueError, "got .* torch.float32"),
        ({"input_ids": PROMPT[:, :0]}, ValueError, "input_ids is empty"),
        ({"input_ids": PROMPT + 200}, ValueError, "input_ids must lie within 0..103"),
        ({"attention_mask": PROMPT[:, :2]}, ValueError, "shape of input_ids.*got .1, 2."),
        ({"attention_mask": 0 * PROMPT}, ValueError, r"rows \[0\] of input_ids have no token"),
        (
            {"cross_attention_mask": torch.ones(1, 3, 1, 4)},
            ValueError,
            r"cross_attention_mask must be \(1, 4\) by images by tiles.*got \(1, 3, 1, 4\)",
        ),
        (
            {"pixel_values": PIXELS, "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.int64)}
            | {"aspect_ratio_mask": torch.ones(1, 1, 4)},
            ValueError,
            "0. image tokens per sequence, but .1. images",
        ),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(
    model: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    ran: list[Any] = []
    model.model.language_model.layers[0].register_forward_hook(lambda *args: ran.append(args))
    with pytest.raises(error, match=message):
        model.generate(**{"input_ids": PROMPT, **arguments})
    assert not ran


def test_more_bad_arguments(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(monkeypatch)
    with pytest.raises(ValueError, match=r"the prompt has 1024 tokens .* no room"):
        model.generate(torch.ones(1, 1024, dtype=torch.int64))
    with pytest.raises(ValueError, match="past_key_values holds 2 sequences, input_ids has 1"):
        model.generate(PROMPT, past_key_values=model.new_cache(2))
    cache = model.new_cache()
    with torch.no_grad():
        model(torch.ones(1, 6, dtype=torch.int64), past_key_values=cache)
    with pytest.raises(ValueError, match=r"more tokens than rows \[0\] .*pass the whole text"):
        model.generate(PROMPT, past_key_values=cache)
    with pytest.raises(ValueError, match=r"stream\(\) takes one row of input_ids, got 2"):
        script.model.stream(**script.say("a", "b"))
    with pytest.raises(TypeError, match=r"unknown arguments .'streamer'."):
        script.model.stream(**script.say("a"), streamer=Recorder())
    with pytest.raises(
        TypeError, match=r"unknown arguments .'output_scores'.: stream.. yields text"
    ):
        script.model.stream(**script.say("a"), output_scores=True, return_dict_in_generate=False)
    with pytest.raises(ValueError, match=r"stream\(\) takes one row of input_ids, got 3"):
        script.model.stream(**script.say("a"), num_return_sequences=3, do_sample=True)
    with pytest.raises(ValueError, match="need pad_token_id"):
        model.generation_config = {"do_sample": False}
        model.generate(PROMPT.repeat(2, 1), stop_strings="x", tokenizer=script.tokenizer)


def test_neutral_arguments_of_transformers_are_accepted(model: Any) -> None:
    expected = model.generate(PROMPT, max_new_tokens=3)
    neutral = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "do_sample": False}
    off = dict.fromkeys(["temperature", "top_p", "top_k", "min_p", "stop_strings", "seed"])
    actual = model.generate(PROMPT, max_new_tokens=3, max_length=None, **neutral, **off)
    assert actual.equal(expected)
    capped = model.generate(torch.ones(1, 1020, dtype=torch.int64))
    assert capped.shape == (1, 1024), "the default of 20 tokens yields to the context"
