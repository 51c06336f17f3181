"""Options of generate(): their values against transformers, and that none of its options is forgotten."""

from __future__ import annotations

import inspect
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from generation_helpers import SHAPE, Script, endless_model
from model_helpers import BACKENDS, PAD_TOKEN, Prompt, batch_of, hf_model, our_model, to
from torch import Tensor
from transformers.generation import logits_process, stopping_criteria

import mllama
from mllama.generation.options import HONOURED, NEUTRAL, REFUSED, WITHOUT_EFFECT
from mllama.generation.prompt import MODEL_INPUTS
from mllama.generation.sampling import row_seeds

pytestmark = [
    pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated"),
    pytest.mark.filterwarnings("error:.*decoding is greedy"),
]

PROMPTS = [Prompt(9, (1,), (6,)), Prompt(6), Prompt(4, (0, 2), (1, 3))]
PROMPT = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(params=BACKENDS)
def both(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """transformers' model and ours with the same weights, and no two logits that a rounding decides on."""
    torch.manual_seed(1)
    hf = hf_model(SHAPE)
    return hf, our_model(SHAPE, hf, request.param)


@pytest.fixture
def model() -> Any:
    return endless_model()


def test_every_option_of_transformers_is_in_one_table() -> None:
    """A new one must be honoured, accepted at what asks for nothing, or refused in words."""
    theirs = set(vars(transformers.GenerationConfig()))
    for function in (
        transformers.GenerationMixin.generate,
        transformers.MllamaForConditionalGeneration.forward,
        transformers.MllamaForCausalLM.forward,
    ):
        theirs |= set(inspect.signature(function).parameters)
    theirs |= {"tokenizer", "assistant_tokenizer", "trust_remote_code"}  # taken out of the rest
    own = set(inspect.signature(mllama.MllamaForCausalLM.generate).parameters)
    arguments = (own - {"inputs_and_options"}) | {"inputs", *MODEL_INPUTS}
    theirs -= {"kwargs"}
    tables = {
        "argument": arguments | {"self"},
        "honoured": HONOURED,
        "neutral": NEUTRAL.keys(),
        "without effect": WITHOUT_EFFECT,
        "refused": REFUSED.keys(),
    }
    places = {name: [t for t, names in tables.items() if name in names] for name in theirs}
    assert {name: found for name, found in places.items() if len(found) != 1} == {}
    every = [name for names in tables.values() for name in names]
    assert len(every) == len(set(every)), "a name is in two tables"


def test_what_transformers_says_by_default_asks_for_nothing(model: Any) -> None:
    """Its defaults, given one by one and together, as people copy them."""
    expected = model.generate(PROMPT, max_new_tokens=4)
    defaults = transformers.GenerationConfig._get_default_generation_params()
    del defaults["max_length"]
    for name, value in defaults.items():
        assert model.generate(PROMPT, max_new_tokens=4, **{name: value}).equal(expected), name
    assert model.generate(PROMPT, max_new_tokens=4, **defaults).equal(expected)
    nothing = dict.fromkeys([*NEUTRAL, *REFUSED, *WITHOUT_EFFECT, *HONOURED - {"max_new_tokens"}])
    assert model.generate(PROMPT, max_new_tokens=4, **nothing).equal(expected[:, :8])
    neutral = {name: values[0] for name, (values, _) in NEUTRAL.items()}
    assert model.generate(PROMPT, max_new_tokens=4, **neutral).equal(expected)
    assert "".join(map(str, model.generate(PROMPT, None, max_new_tokens=4).tolist()))


def others(neutral: Any) -> Any:
    return "quantized" if isinstance(neutral, str) else [3] if neutral in ([], {}) else 0.5


@pytest.mark.parametrize("name", sorted(NEUTRAL.keys() | REFUSED.keys()))
def test_what_is_not_there_is_refused_by_name(name: str, model: Any) -> None:
    value = others(NEUTRAL[name][0][0]) if name in NEUTRAL else 3
    hint = NEUTRAL[name][1] if name in NEUTRAL else REFUSED[name]
    with pytest.raises(ValueError, match=f"{name}.*is not supported") as raised:
        model.generate(PROMPT, **{name: value})
    assert str(raised.value).endswith(hint)
    model.generation_config = {name: value}
    with pytest.raises(ValueError, match=f"{name}.*generation_config.*may override"):
        model.generate(PROMPT)
    assert model.generate(PROMPT, max_new_tokens=1, **{name: None}).shape == (1, 5)


def test_a_checkpoint_may_say_what_is_not_known_here(model: Any) -> None:
    model.generation_config = {"num_beams": 1, "transformers_version": "9.0", "new_thing": 3}
    with pytest.warns(UserWarning, match=r"unknown \['new_thing'\]: ignored"):
        model.generate(PROMPT, max_new_tokens=1)


def compare(both: tuple[Any, Any], batch: dict[str, Tensor], **options: Any) -> Any:
    """Tokens, scores, logits and hidden states of both models, as far as rows are still at work."""
    hf, ours = both
    options = {"max_new_tokens": 12, "pad_token_id": PAD_TOKEN, "do_sample": False} | options
    outputs = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    expected = hf.generate(**batch, **options, **outputs)
    actual = ours.generate(**to(batch, ours.device), **options, **outputs)
    assert actual.sequences.cpu().equal(expected.sequences)
    plain = ours.generate(**to(batch, ours.device), **options)
    assert plain.cpu().equal(expected.sequences), "what is returned besides changes no token"
    for name in ("scores", "logits"):
        ours_kept, theirs = getattr(actual, name), getattr(expected, name)
        assert len(ours_kept) == len(theirs)
        for a, b in zip(ours_kept, theirs):
            assert a.dtype == torch.float32 and a.isinf().cpu().equal(b.isinf())
            limit = 1e-4 * expected.logits[0].abs().max().item()
            torch.testing.assert_close(a.cpu(), b, rtol=0, atol=limit)
    return expected


def test_options_that_work_on_the_logits_equal_transformers(both: tuple[Any, Any]) -> None:
    batch = batch_of(SHAPE, PROMPTS)
    free = compare(both, batch, eos_token_id=[]).sequences
    stops = free[:, 11].tolist()  # each row would end early
    early = compare(both, batch, eos_token_id=stops).sequences
    assert early.shape[1] < 21
    late = compare(both, batch, eos_token_id=stops, min_new_tokens=8).sequences
    assert late.shape[1] >= 17
    assert compare(both, batch, eos_token_id=stops, min_length=17).sequences.equal(late)
    bad = [[int(free[0, 9])], free[1, 12:14].tolist(), free[2, 8:11].tolist(), [stops[0]]]
    banned = compare(both, batch, eos_token_id=stops[:1], bad_words_ids=bad).sequences
    assert not banned.equal(free)
    for size in (1, 2, 3):
        compare(both, batch, eos_token_id=[], no_repeat_ngram_size=size)
    compare(both, batch, eos_token_id=stops, no_repeat_ngram_size=2, min_new_tokens=5)


def test_callables_equal_transformers(both: tuple[Any, Any]) -> None:
    batch = batch_of(SHAPE, PROMPTS)
    calls: list[tuple[int, ...]] = []

    def allowed(row: int, ids: Tensor) -> list[int]:
        assert ids.dim() == 1 and ids.dtype == torch.int64
        calls.append((row, len(ids)))
        return [10 + row, 20 + len(ids), 30]

    compare(both, batch, eos_token_id=[], prefix_allowed_tokens_fn=allowed)
    assert calls[:3] == calls[72:75] == [(0, 9), (1, 9), (2, 9)]
    processors = transformers.LogitsProcessorList(
        [
            logits_process.SuppressTokensLogitsProcessor([5, 6, 7]),
            lambda ids, scores: scores.roll(ids.shape[1], dims=-1),
        ]
    )
    text = batch_of(SHAPE, [Prompt(7), Prompt(3)])  # its penalty cannot take image tokens
    compare(both, text, eos_token_id=[], logits_processor=processors, repetition_penalty=1.4)
    own = [logits_process.RepetitionPenaltyLogitsProcessor(3.0)]  # in place of the option's
    compare(both, text, eos_token_id=[], logits_processor=own, repetition_penalty=1.4)
    stops = compare(both, batch, eos_token_id=[]).sequences[:, 11].tolist()

    def odd(ids: Tensor, scores: Any) -> Tensor:
        assert scores is None or len(scores) == ids.shape[1] - 9
        return ids[:, -1] % 7 == 3

    for criteria in ([odd], [lambda ids, scores: ids.shape[1] > 12], [odd, lambda i, s: False]):
        compare(both, batch, eos_token_id=stops[:1], stopping_criteria=criteria)
    length = stopping_criteria.MaxLengthCriteria(13)
    assert (
        compare(both, batch, eos_token_id=[], stopping_criteria=[length]).sequences.shape[1] == 13
    )


@pytest.mark.parametrize(
    "filters",
    [
        {"temperature": 0.7},
        {"top_k": 5, "temperature": 1.3},
        {"top_k": 0, "top_p": 0.8},
        {"top_k": 20, "min_p": 0.05, "repetition_penalty": 1.3},
    ],
)
def test_scores_of_a_sample_equal_transformers(both: tuple[Any, Any], filters: dict) -> None:
    """Of the first token, whose text does not depend on a draw; and the draw is none of what is dropped."""
    hf, ours = both
    batch = batch_of(SHAPE, [Prompt(7), Prompt(3)])
    options = {"do_sample": True, "eos_token_id": [], "pad_token_id": PAD_TOKEN, **filters}
    kept = {"output_scores": True, "return_dict_in_generate": True}
    expected = hf.generate(**batch, max_new_tokens=1, **options, **kept).scores[0]
    output = ours.generate(**to(batch, ours.device), max_new_tokens=9, seed=5, **options, **kept)
    torch.testing.assert_close(output.scores[0].cpu(), expected, rtol=1e-4, atol=1e-4)
    for step, scores in enumerate(output.scores):
        assert scores.gather(1, output.sequences[:, 7 + step, None]).isfinite().all()
    plain = ours.generate(**to(batch, ours.device), max_new_tokens=9, seed=5, **options)
    assert plain.equal(output.sequences)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_hidden_states_equal_transformers(both: tuple[Any, Any], padding: str) -> None:
    hf, ours = both
    for prompts in (PROMPTS, [Prompt(5), Prompt(3)]):
        batch = batch_of(SHAPE, prompts)
        options = {"max_new_tokens": 3, "eos_token_id": [], "do_sample": False}
        options |= {"pad_token_id": PAD_TOKEN, "return_dict_in_generate": True}
        expected = hf.generate(**batch, **options, output_hidden_states=True).hidden_states
        given = dict(batch)
        if padding == "right":  # two columns more, which no row uses
            for name in ("input_ids", "attention_mask", "cross_attention_mask"):
                if name in given:
                    given[name] = torch.cat([given[name], torch.zeros_like(given[name][:, :2])], 1)
        output = ours.generate(**to(given, ours.device), **options, output_hidden_states=True)
        actual, length = output.hidden_states, batch["input_ids"].shape[1]
        assert len(actual) == len(expected) == 3
        assert actual[0][0].shape[1] == given["input_ids"].shape[1]
        real = batch["attention_mask"].bool()
        for step, (a, b) in enumerate(zip(actual, expected)):
            assert len(a) == len(b)
            for mine, theirs in zip(a, b):
                mine = mine[:, :length].cpu()
                if not step:
                    assert mine[~real].eq(0).all()
                    mine, theirs = mine[real], theirs[real]
                limit = 1e-4 * theirs.abs().max().item()
                torch.testing.assert_close(mine, theirs, rtol=0, atol=limit)


def test_the_output_has_the_fields_of_transformers(model: Any) -> None:
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    theirs = list(inspect.signature(GenerateDecoderOnlyOutput).parameters)
    output = model.generate(PROMPT, max_new_tokens=2, return_dict_in_generate=True)
    assert list(vars(output)) == theirs
    assert output.keys() == ["sequences", "past_key_values"] and output.scores is None
    assert output["sequences"] is output[0] is output.sequences
    with pytest.warns(UserWarning, match=r"\['output_scores'\] need return_dict_in_generate"):
        assert torch.is_tensor(model.generate(PROMPT, max_new_tokens=2, output_scores=True))


@pytest.mark.parametrize("images", [True, False])
def test_embeddings_equal_transformers(both: tuple[Any, Any], images: bool) -> None:
    hf, ours = both
    batch = batch_of(SHAPE, PROMPTS if images else [Prompt(9), Prompt(6)])
    ids = batch.pop("input_ids")
    embeds = hf.get_input_embeddings()(ids).detach() * 1.5
    options = {"max_new_tokens": 8, "eos_token_id": [], "pad_token_id": PAD_TOKEN}
    expected = hf.generate(inputs_embeds=embeds, **batch, **options, do_sample=False)
    given = to({"inputs_embeds": embeds, **batch}, ours.device)
    output = ours.generate(**given, **options, return_dict_in_generate=True)
    assert output.sequences.cpu().equal(expected) and expected.shape[1] == 8
    with_ids = ours.generate(ids.to(ours.device), **given, **options)
    assert with_ids.cpu().equal(torch.cat([ids, expected], 1))
    longest = ours.generate(**given, max_length=13, eos_token_id=[], pad_token_id=PAD_TOKEN)
    assert longest.cpu().equal(expected[:, :4]), "max_length counts the embeddings"
    # The next turn continues with the cache, by embeddings or by ids.
    answer = hf.get_input_embeddings()(torch.cat([expected, expected[:, :2]], 1))
    turn = batch | {
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones(len(ids), 10).long()], 1)
    }
    whole = to(turn | {"inputs_embeds": torch.cat([embeds, answer], 1)}, ours.device)
    if images:  # the mask tells what a token sees; the new ones see what the last one saw
        mask = whole["cross_attention_mask"]
        seen = mask[:, -1:].expand(-1, 10, -1, -1)
        whole["cross_attention_mask"] = torch.cat([mask, seen], 1)
    if images:
        wrong = whole | {"aspect_ratio_ids": whole["aspect_ratio_ids"].clone()}
        wrong["aspect_ratio_ids"][1, 0] = 1
        with pytest.raises(
            ValueError, match=r"pixel_values has \[1, 1, 2\] images per row and past"
        ):
            ours.generate(**wrong, **options, past_key_values=output.past_key_values)
    fresh = ours.generate(**whole, **options)
    assert ours.generate(**whole, **options, past_key_values=output.past_key_values).equal(fresh)


def test_configurations_go_one_before_the_other(model: Any) -> None:
    expected = model.generate(PROMPT, max_new_tokens=9)
    theirs = transformers.GenerationConfig(max_new_tokens=5, do_sample=False)
    for config in (theirs, {"max_new_tokens": 5}, mllama.GenerationConfig(max_new_tokens=5)):
        assert model.generate(PROMPT, config).equal(expected[:, :9])
        assert model.generate(PROMPT, generation_config=config).equal(expected[:, :9])
        assert model.generate(PROMPT, config, max_new_tokens=3).equal(expected[:, :7])
        assert model.generate(PROMPT, config, max_length=6).equal(expected[:, :6])
    model.generation_config = {"max_new_tokens": 2, "do_sample": True, "temperature": 9.0}
    assert model.generate(PROMPT, theirs).equal(expected[:, :9])
    assert model.generate(PROMPT, {"temperature": 0}).equal(expected[:, :6])
    assert model.generate(PROMPT, {"do_sample": False, "max_length": 7}).equal(expected[:, :7])
    output = model.generate(PROMPT, {"return_dict_in_generate": True, "output_logits": True})
    assert len(output.logits) == 2
    assert model.generate(inputs=PROMPT, do_sample=False).equal(expected[:, :6])


def test_temperature_zero_is_greedy(model: Any) -> None:
    expected = model.generate(PROMPT, max_new_tokens=6)
    for options in (
        {"temperature": 0},
        {"temperature": 0.0, "do_sample": True, "top_p": 0.9},
        {"temperature": np.float32(0), "do_sample": True, "seed": 3},
        {"temperature": torch.tensor(0.0), "do_sample": None},
    ):
        assert model.generate(PROMPT, max_new_tokens=6, **options).equal(expected)
    model.generation_config |= {"do_sample": True, "temperature": 0}
    assert model.generate(PROMPT, max_new_tokens=6).equal(expected)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.6}, {"top_p": 0.5, "top_k": 3}, {"min_p": 0.2, "do_sample": False}],
)
@pytest.mark.filterwarnings("default:.*decoding is greedy")
def test_sampling_options_of_greedy_decoding_bring_one_warning(model: Any, options: dict) -> None:
    expected = model.generate(PROMPT, max_new_tokens=3)
    for given in (options, {"generation_config": options}):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert model.generate(PROMPT, max_new_tokens=3, **given).equal(expected)
        assert len(caught) == 1 and caught[0].filename == __file__
        names = [name for name in options if name != "do_sample"]
        assert all(name in str(caught[0].message) for name in names)
    model.generation_config |= options | {"do_sample": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what a checkpoint says is nobody's mistake
        model.generate(PROMPT, max_new_tokens=3, do_sample=False)


def test_numbers_may_be_those_of_numpy_and_torch(model: Any) -> None:
    options = {"max_new_tokens": 7, "do_sample": True, "temperature": 1.5, "top_k": 9, "seed": 4}
    options |= {"eos_token_id": [95, 94], "top_p": 0.5, "repetition_penalty": 2.0, "min_p": 0.25}
    options |= {"num_return_sequences": 2, "pad_token_id": 0, "bad_words_ids": [[5], [6, 7]]}
    expected = model.generate(PROMPT, **options)
    for array in (np.asarray, torch.tensor):
        given = {name: array(value) for name, value in options.items() if name != "bad_words_ids"}
        given["bad_words_ids"] = [array([5]), list(map(array, [6, 7]))]
        assert model.generate(PROMPT, **given).equal(expected)
        seeds = [array(4), row_seeds(4, 2)[1]]
        assert model.generate(PROMPT, **given | {"seed": seeds}).equal(expected)
    with pytest.raises(ValueError, match=r"max_new_tokens must be an integer >= 1, got 2\.5"):
        model.generate(PROMPT, max_new_tokens=np.float64(2.5))


def test_several_answers_to_each_prompt(model: Any) -> None:
    batch = batch_of(SHAPE, PROMPTS)
    options = {"do_sample": True, "temperature": 2.0, "seed": 11, "max_new_tokens": 6}
    several = model.generate(**batch, num_return_sequences=3, **options)
    assert several.shape == (9, 15) and several[:, 9:].unique(dim=0).shape[0] == 9
    rows = torch.arange(3).repeat_interleave(3)
    copies = {name: value[rows] for name, value in batch.items()}
    assert several.equal(model.generate(**copies, **options))
    with torch.no_grad():
        images = (batch[n].flatten(0, 1) for n in ("pixel_values", "aspect_ratio_ids"))
        states = model.model.vision_model.encode(*images, batch["aspect_ratio_mask"].flatten(0, 1))
        states = model.model.multi_modal_projector(states.flatten(0, 1))
    given = {n: batch[n] for n in ("input_ids", "attention_mask", "cross_attention_mask")}
    given["cross_attention_states"] = states
    assert model.generate(**given, num_return_sequences=3, **options).equal(several)
    with pytest.raises(ValueError, match="num_return_sequences=2 is not supported in greedy"):
        model.generate(PROMPT, num_return_sequences=2)


def test_rows_of_different_seeds_do_not_repeat_each_other(model: Any) -> None:
    ids = PROMPT.expand(6, -1)
    options = {"do_sample": True, "temperature": 3.0, "max_new_tokens": 8}
    answers = [
        tuple(row) for s in range(20, 26) for row in model.generate(ids, seed=s, **options).tolist()
    ]
    assert len(set(answers)) == 36
    assert answers[::6][1] == tuple(model.generate(PROMPT, seed=21, **options)[0].tolist())
    seeds = [seed for s in range(-50, 50) for seed in row_seeds(s, 40)]
    assert len(set(seeds)) == 4000 and row_seeds(7, 1) == [7]


def test_rows_that_processors_leave_nothing_are_named(model: Any) -> None:
    def nothing(ids: Tensor, scores: Tensor) -> Tensor:
        scores[1] = -torch.inf
        return scores

    with pytest.raises(RuntimeError, match="logits of row 1 are not finite at new token 0"):
        model.generate(PROMPT.expand(2, -1), logits_processor=[nothing])
    with pytest.raises(TypeError, match=r"must return scores \(1, 96\), got NoneType"):
        model.generate(PROMPT, logits_processor=[lambda ids, scores: None])
    with pytest.raises(TypeError, match=r"or one for each of 1 rows, got .3,."):
        model.generate(PROMPT, stopping_criteria=[lambda ids, scores: torch.zeros(3)])
    with pytest.raises(ValueError, match="prefix_allowed_tokens_fn allows no token in row 0"):
        model.generate(PROMPT, prefix_allowed_tokens_fn=lambda row, ids: [])
    for token in (-1, SHAPE.vocab):
        with pytest.raises(ValueError, match=rf"tokens within 0\.\.95, got .*{token}.* in row 0"):
            model.generate(PROMPT, prefix_allowed_tokens_fn=lambda row, ids: [5, token])  # noqa: B023
    with pytest.raises(TypeError, match="or one for each of 1 rows, got None"):
        model.generate(PROMPT, stopping_criteria=[lambda ids, scores: None])


def test_an_ended_row_is_as_a_cache_has_it(model: Any) -> None:
    """Rows that a criterion ends continue with padding, which the cache does not keep."""
    batch = batch_of(SHAPE, [Prompt(6), Prompt(6)])
    cache = model.new_cache(2)
    options = {"max_new_tokens": 6, "past_key_values": cache}
    ends = [lambda ids, scores: torch.tensor([ids.shape[1] == 8, False])]
    answer = model.generate(**batch, **options, stopping_criteria=ends)
    assert answer[0, 8:].eq(PAD_TOKEN).all() and cache.lengths.tolist() == [7, 11]
    alone = {name: value[:1] for name, value in batch.items()}
    assert answer[:1, :8].equal(model.generate(**alone, max_new_tokens=2))


def test_streams_take_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script(monkeypatch)
    text = "one two"
    said = "".join(
        script.model.stream(
            **script.say(text),
            stopping_criteria=[lambda ids, scores: ids.shape[1] == 4 + 3],
            return_dict_in_generate=False,
            num_return_sequences=1,
        )
    )
    assert said == "one"
    seen = []
    config = {"logits_processor": [lambda ids, scores: seen.append(ids.shape) or scores]}
    with pytest.raises(TypeError, match=r"stream\(\) yields text"):
        script.model.stream(**script.say(text), output_logits=True)
    assert "".join(script.model.stream(**script.say(text), **config)) == text
    assert seen[0] == (1, 4) and len(seen) == len(text) + 1


@pytest.mark.parametrize("draw", range(3))
def test_options_together_equal_transformers(draw: int, seed: int, both: tuple[Any, Any]) -> None:
    rng = random.Random(1000 * seed + draw)
    batch = batch_of(SHAPE, [Prompt.draw(rng, 12, 0) for _ in range(rng.randint(1, 3))])
    vocabulary = range(3, SHAPE.vocab)
    choices = {
        "repetition_penalty": rng.uniform(0.8, 2),
        "no_repeat_ngram_size": rng.randint(1, 3),
        "bad_words_ids": [rng.sample(vocabulary, rng.randint(1, 2)) for _ in range(9)],
        "min_new_tokens": rng.randint(1, 9),
        "prefix_allowed_tokens_fn": lambda row, ids: range(row, 90 - ids.shape[0]),
        "logits_processor": [logits_process.SuppressTokensLogitsProcessor([8, 9])],
    }
    chosen = rng.sample(sorted(choices), rng.randint(2, 6))
    options = {name: choices[name] for name in chosen}
    print(options)
    compare(both, batch, eos_token_id=rng.sample(vocabulary, 12), **options)
