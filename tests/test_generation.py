"""generate() and stream(): tokens equal to those of transformers, sampling, stopping, streamers."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch
import transformers
from generation_helpers import END, SHAPE, Recorder, Script, endless_model
from model_helpers import BACKENDS, PAD_TOKEN, Prompt, Shape, batch_of, hf_model, our_model, to
from torch import Tensor

import mllama
from mllama.generation import generate as generation
from mllama.generation.sampling import row_seeds

pytestmark = pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture
def model() -> Any:
    return endless_model()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    return Script(monkeypatch)


def assert_same_tokens(actual: Tensor, expected: Any, prompt_length: int) -> None:
    """Equal to the tokens of transformers, up to where its two best logits are a rounding apart."""
    actual, theirs = actual.cpu(), expected.sequences
    for row in range(len(theirs)):
        width = min(actual.shape[1], theirs.shape[1])
        differing = (actual[row, :width] != theirs[row, :width]).nonzero().flatten().tolist()
        if not differing:
            continue
        logits = expected.logits[differing[0] - prompt_length][row]
        best, second = logits.topk(2).values.tolist()
        assert best - second < 1e-5 * logits.abs().max(), (
            f"row {row} differs at column {differing[0]}: {actual[row].tolist()} against "
            f"{theirs[row].tolist()}, and it is no tie: {best} {second}"
        )
        return
    assert actual.shape == theirs.shape


def greedy_hf(hf: transformers.PreTrainedModel, batch: dict[str, Tensor], **options: Any) -> Any:
    return hf.generate(
        **batch, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
    )


@pytest.mark.parametrize(
    "draw", [*range(4), *(pytest.param(i, marks=pytest.mark.full) for i in range(4, 40))]
)
def test_greedy_equals_transformers(draw: int, seed: int, backend: tuple[str, str]) -> None:
    """Random models, batches of rows with no, one or several images, rows that end early."""
    rng = random.Random(1000 * seed + draw)
    shape = Shape.draw(rng)
    prompts = [Prompt.draw(rng, 40, rng.randint(0, 3)) for _ in range(rng.randint(1, 4))]
    batch = batch_of(shape, prompts)
    hf = hf_model(shape, rng.choice(["eager", "sdpa"]))
    stops = rng.sample(range(1, shape.vocab), 6)
    options = {"max_new_tokens": 24, "eos_token_id": stops, "pad_token_id": PAD_TOKEN}
    expected = greedy_hf(hf, batch, **options)
    actual = our_model(shape, hf, backend).generate(**to(batch, backend[1]), **options)
    assert actual.device.type == backend[1] and actual.dtype == torch.int64
    assert_same_tokens(actual, expected, batch["input_ids"].shape[1])


def test_text_only_with_penalty_equals_transformers(backend: tuple[str, str]) -> None:
    hf = hf_model(SHAPE)
    batch = batch_of(SHAPE, [Prompt(17), Prompt(5), Prompt(1)])
    options = {"max_length": 40, "repetition_penalty": 1.3, "pad_token_id": PAD_TOKEN}
    expected = greedy_hf(hf, batch, **options)
    actual = our_model(SHAPE, hf, backend).generate(**to(batch, backend[1]), **options)
    assert_same_tokens(actual, expected, 17)
    assert actual.shape[1] <= 40


def test_text_model_equals_transformers(backend: tuple[str, str]) -> None:
    shape = Shape(head_dim=32)
    text = shape.configs()["text_config"]
    hf = transformers.MllamaForCausalLM(transformers.models.mllama.MllamaTextConfig(**text)).eval()
    model = mllama.MllamaForCausalLM(mllama.MllamaTextConfig(**text), backend=backend[0])
    model.load_state_dict(hf.state_dict())
    batch = batch_of(shape, [Prompt(9), Prompt(4)])
    expected = greedy_hf(hf, batch, max_new_tokens=12)
    actual = model.to(backend[1]).eval().generate(**to(batch, backend[1]), max_new_tokens=12)
    assert_same_tokens(actual, expected, 9)


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_defaults_are_those_of_transformers() -> None:
    """20 tokens, greedy, the config's stop token; padding is found where no mask is given."""
    hf = hf_model(SHAPE)
    model = our_model(SHAPE, hf)
    ids = batch_of(SHAPE, [Prompt(6), Prompt(3)])["input_ids"]
    assert_same_tokens(model.generate(ids), greedy_hf(hf, {"input_ids": ids}), 6)
    assert model.generation_config.eos_token_id == 2
    assert model.generation_config.temperature is None


@pytest.mark.parametrize("padding", ["right", "holes"])
def test_padding_may_lie_anywhere(padding: str, model: Any) -> None:
    prompts = [Prompt(12, (2,), (5,)), Prompt(5, (0, 3), (1, 2)), Prompt(7)]
    torch.manual_seed(1)
    left = batch_of(SHAPE, prompts)
    torch.manual_seed(1)
    other = batch_of(SHAPE, prompts)
    order = other["attention_mask"].argsort(dim=1, descending=True, stable=True)  # right padding
    if padding == "holes":  # the second row has five tokens
        order[1] = order[1][torch.tensor([0, 5, 1, 6, 2, 7, 3, 8, 4, 9, 10, 11])]
    for name in ("input_ids", "attention_mask"):
        other[name] = other[name].gather(1, order)
    mask = other["cross_attention_mask"]
    other["cross_attention_mask"] = mask.gather(1, order[..., None, None].expand_as(mask))
    assert not other["input_ids"].equal(left["input_ids"])
    expected = model.generate(**left, max_new_tokens=10)[:, 12:]
    assert model.generate(**other, max_new_tokens=10)[:, 12:].equal(expected)


def test_rows_are_independent_of_their_batch(model: Any, seed: int) -> None:
    """With "meta" semantics a row says the same alone; sampling has a stream per row."""
    prompts = [Prompt(11, (3,), (6,)), Prompt(4), Prompt(8, (0, 5), (2, 1))]
    batch = batch_of(SHAPE, prompts)
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 1.5, "top_p": 0.95}
    together = model.generate(**batch, seed=seed, **options)
    assert together.equal(model.generate(**batch, seed=seed, **options))
    assert not together.equal(model.generate(**batch, seed=seed + 77, **options))
    for row in range(3):
        has_image = bool(prompts[row].ratio_ids)
        names = batch if has_image else ("input_ids", "attention_mask")
        alone = {name: batch[name][row : row + 1] for name in names}
        expected = together[row : row + 1]
        assert model.generate(**alone, seed=row_seeds(seed, 3)[row], **options).equal(expected)
        assert model.generate(**alone, seed=[row_seeds(seed, 3)[row]], **options).equal(expected)


def test_sampling_defaults_come_from_the_checkpoint(model: Any) -> None:
    batch = batch_of(SHAPE, [Prompt(6)])
    greedy = model.generate(**batch)
    model.generation_config = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 15}
    drawn = [model.generate(**batch, seed=s) for s in range(2)]
    assert drawn[0].shape == (1, 21) and not drawn[0].equal(drawn[1])
    assert model.generate(**batch, top_k=1).equal(greedy[:, :21]), "a call overrides one value"
    assert model.generate(**batch, do_sample=False).equal(greedy[:, :21])
    assert model.generate(**batch, top_p=0.0, top_k=None, max_new_tokens=2).equal(greedy[:, :8])
    torch.manual_seed(5)
    first = model.generate(**batch)
    torch.manual_seed(5)
    assert model.generate(**batch).equal(first), "without a seed, torch's generator decides"
    model.generation_config.temperature = 1e-9  # a gap of one float32 rounding decides
    assert model.generate(**batch).equal(greedy[:, :21])


def test_sampling_keeps_the_fifty_best_by_default(model: Any, monkeypatch: Any) -> None:
    configs = []
    original = generation.Sampler

    def spy(config: Any, *args: Any) -> Any:
        configs.append(config)
        return original(config, *args)

    monkeypatch.setattr(generation, "Sampler", spy)
    ids = batch_of(SHAPE, [Prompt(3)])["input_ids"]
    model.generate(ids, do_sample=True, max_new_tokens=1)
    model.generate(ids, do_sample=True, top_k=None, max_new_tokens=1)
    assert [config.top_k for config in configs] == [50, 0]


def test_stream_yields_whole_characters(script: Script) -> None:
    text = "Grüße, 日本 👩‍👩‍👧 end"
    pieces = list(script.model.stream(**script.say(text)))
    assert pieces == list(text), "every token is a byte, every piece a character"
    cut = script.say(text)
    cut["max_new_tokens"] = len("Grüße, 日".encode()) - 1
    assert "".join(script.model.stream(**cut)) == "Grüße, \N{REPLACEMENT CHARACTER}"


def test_stream_stops_before_a_stop_string(script: Script) -> None:
    stream = script.model.stream
    assert "".join(stream(**script.say("one STOP two"), stop_strings="STOP")) == "one "
    assert list(stream(**script.say("a STO"), stop_strings=["STOP"])) == ["a", " ", "STO"]
    assert "".join(stream(**script.say("日本語。次"), stop_strings=["。", "zz"])) == "日本語"
    assert "".join(stream(**script.say("to<|end|>"), stop_strings=["<|end|>"])) == "to"


def test_generate_ends_rows_with_stop_tokens_and_strings(script: Script) -> None:
    inputs = script.say("ab STOP more", "x", "never ends at all")
    sequences = script.model.generate(**inputs, stop_strings=["STOP"])
    answers = [
        script.tokenizer.decode([i for i in row if i != PAD_TOKEN], skip_special_tokens=False)
        for row in sequences[:, 4:].tolist()
    ]
    assert answers == ["ab STOP", "x<|end|>", "never ends at all<|end|>"]
    assert sequences[0, 11:].eq(PAD_TOKEN).all() and sequences[1, 6:].eq(PAD_TOKEN).all()
    assert sequences[:, :4].equal(inputs["input_ids"])


@pytest.mark.parametrize("delay", [0, 1])
def test_the_last_token_ends_every_loop(
    script: Script, delay: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading tokens a step late changes neither what comes out nor what the cache holds."""
    monkeypatch.setattr(generation, "_read_delay", lambda device: delay)
    inputs = script.say("abc", "abcdef", "a")
    for limit, made in ((1, 1), (2, 2), (7, 7), (8, 7), (20, 7)):
        inputs["max_new_tokens"] = limit
        script.rows = [row + [END] * 20 for row in script.rows]
        output = script.model.generate(**inputs, return_dict_in_generate=True)
        assert output.sequences.shape == (3, 4 + made)
        lengths = [3 + min(made, n) for n in (4, 7, 2)]
        assert output.past_key_values.lengths.tolist() == lengths
        assert output.past_key_values.next_position.flatten().tolist() == lengths
        assert output.past_key_values.get_seq_length() == 3 + made


def test_a_marker_for_bad_logits_becomes_an_error(script: Script) -> None:
    inputs = script.say("abc", [5, generation.INVALID_TOKEN, 7])
    with pytest.raises(RuntimeError, match="logits of row 1 are not finite at new token 1"):
        script.model.generate(**inputs)


def test_nan_weights_become_an_error(model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    with pytest.raises(RuntimeError, match="logits of row 0 are not finite at new token 0"):
        model.generate(batch_of(SHAPE, [Prompt(3)])["input_ids"])


def test_streamers_get_what_those_of_transformers_get() -> None:
    hf = hf_model(SHAPE)
    batch = batch_of(SHAPE, [Prompt(6, (1,), (2,)), Prompt(4, (0,), (1,))])
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": list(range(1, 50, 3))}
    theirs, ours = Recorder(), Recorder()
    hf.generate(**batch, **options, pad_token_id=PAD_TOKEN, streamer=theirs)
    our_model(SHAPE, hf).generate(**batch, **options, pad_token_id=PAD_TOKEN, streamer=ours)
    assert ours.puts == theirs.puts and ours.ends == theirs.ends == 1


def test_the_iterator_streamer_of_transformers_works(script: Script) -> None:
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=script.tokenizer)
    streamer = transformers.TextIteratorStreamer(wrapped, skip_prompt=True, timeout=300)
    arguments = {**script.say("so schön ist es"), "streamer": streamer, "tokenizer": None}
    thread = threading.Thread(target=script.model.generate, kwargs=arguments)
    thread.start()
    assert "".join(streamer).removesuffix("<|end|>") == "so schön ist es"
    thread.join()
