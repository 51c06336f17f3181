"""The engine: whatever the pools, the chunks and the company, each answer is that of its request alone."""

from __future__ import annotations

import os
import random
import threading
import time
from dataclasses import replace

import pytest
import torch
from engine_helpers import (
    END,
    IMAGE,
    SHAPE,
    Client,
    Engines,
    Failing,
    Held,
    OnOrder,
    Recorder,
    alone,
    assert_same,
    byte_tokenizer,
    check_given_back,
    put,
    put_together,
    random_picture,
    randomise,
    small_model,
    wait,
)

import mllama
from mllama.engine import jobs
from mllama.engine.answers import Answer, Vocabulary
from mllama.engine.engine import Engine
from mllama.engine.interface import Options, Overloaded, Refused, Unavailable, WorkFailed
from mllama.engine.prompts import PreparedPicture, Prompt
from mllama.engine.sampling import Likelihood
from mllama.generation.sampling import row_seeds
from mllama.generation.stopping import StopStrings

# The smallest that answers every request of these tests, and others.
ROOMY = {"num_pages": 400, "num_slots": 64}
TINY = {"num_pages": 7, "num_slots": 12}


@pytest.fixture
def engines(monkeypatch):
    monkeypatch.setattr(jobs, "Answer", Recorder)
    made = []

    def of(model):
        made.append(Engines(model))
        return made[-1]

    yield of
    for one in made:
        one.close()


def random_options(rng: random.Random) -> Options:
    options = Options(
        max_tokens=rng.choice([1, 5, 20, 40]),
        seed=rng.randrange(2**40),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
        min_tokens=rng.choice([0, 0, 3]),
        stop_token_ids=tuple(rng.sample(range(256), rng.choice([0, 10]))),
        stop=rng.choice([(), (), ("a", "b", "the")]),
    )
    if rng.random() < 0.4:
        options = replace(
            options,
            temperature=rng.choice([0.3, 1.0, 2.0]),
            top_k=rng.choice([None, 5, 50]),
            top_p=rng.choice([1.0, 0.8]),
            min_p=rng.choice([0.0, 0.05]),
        )
    return replace(options, min_tokens=min(options.min_tokens, options.max_tokens))


def random_prompt(rng: random.Random, pictures, known: list[tuple[Prompt, list[int]]]) -> Prompt:
    """A conversation, or the next turn of one, with many equal beginnings."""
    tokens, shown = [], []
    if known and rng.random() < 0.5:
        prompt, answer = rng.choice(known)
        tokens, shown = [*prompt.tokens, *answer], list(prompt.pictures)
        tokens += [rng.randrange(3, 256) for _ in range(rng.randint(1, 5))]
    else:
        tokens = [(7 * i) % 251 + 3 for i in range(rng.choice([1, 10, 64, 65, 128, 150]))]
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        if len(shown) < 3:
            tokens.append(IMAGE)
            shown.append(rng.choice(pictures))
        tokens += [rng.randrange(3, 256) for _ in range(rng.choice([0, 3, 70]))]
    return Prompt(tuple(tokens[:380]), tuple(shown[: tokens[:380].count(IMAGE)]))


@pytest.mark.parametrize(
    "options",
    [
        {**ROOMY, "max_batch_size": 64, "max_batch_tokens": 128, "max_ce_batch_size": 4},
        {**TINY, "max_batch_size": 4, "max_batch_tokens": 9, "max_new_pictures": 2},
        {**ROOMY, "max_batch_size": 16, "prefix_reuse": False, "image_cache_bytes": 0},
    ],
    ids=["roomy", "tiny", "no reuse"],
)
@pytest.mark.parametrize("semantics", ["meta", "transformers"])
def test_answers_are_those_of_each_request_alone(semantics, options, engines, seed):
    """Pictures, turns, lengths, seeds, options, cancels; the steps are read late, too."""
    rng = random.Random(f"{seed} {semantics} {options}")
    model = small_model(semantics)
    pictures = [random_picture(rng) for _ in range(4)]
    engine = engines(model).start(max_length=448, max_queue=100, **options)
    engine.loop._delay = rng.randint(0, 1)
    known = []
    for wave, count in enumerate((64, 8)):
        asked = []
        for i in range(count):
            prompt, wanted = random_prompt(rng, pictures, known), random_options(rng)
            asked.append((prompt, wanted, *put(engine, prompt, wanted, f"{wave} {i}")))
        gone = rng.sample(asked, 3)
        for _, _, job, client in gone:
            wait(lambda client=client: client.pieces or rng.random() < 0.2)
            engine.loop.cancel(job.key)
        for prompt, wanted, job, client in asked:
            is_gone = any(job is other[2] for other in gone)
            if not is_gone:
                wait(lambda client=client: client.has_ended)
            expected, logits = alone(model, prompt, wanted)
            assert_same(job, expected, logits, prefix=is_gone)
            if not is_gone:
                known.append((prompt, job.answers[0].ids))
                if not wanted.stop:
                    said = [t for t in job.answers[0].ids if t not in job.request.stop_token_ids]
                    assert client.text() == byte_tokenizer().decode(said)
    check_given_back(engine)


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("semantics", ["meta", "transformers"])
def test_an_answer_that_gives_up_its_pages_goes_on(semantics, delay, engines, seed):
    """Without a repeated or lost token or character, with what was counted and drawn before."""
    rng, model = random.Random(f"{seed} {semantics} {delay}"), small_model(semantics)
    pictures = [random_picture(rng) for _ in range(2)]
    engine = engines(model).start(num_pages=5, num_slots=8, max_batch_size=4)
    engine.loop._delay = delay
    common = Options(max_tokens=100, ignore_eos=True, seed=7)
    wanted = [
        replace(common, repetition_penalty=1.0),
        replace(common, repetition_penalty=1.2),
        replace(common, repetition_penalty=1.0, temperature=1.5, top_p=1.0, min_p=0.0),
    ]
    prompts = [ask(60, start=3), ask(58, pictures[0], start=9), ask(57, *pictures, start=5)]
    asked = [*zip(prompts, wanted)]
    for (prompt, options), (job, client) in zip(asked, put_together(engine, asked)):
        wait(lambda client=client: client.has_ended)
        assert client.usage.completion_tokens == 100
        assert_same(job, *alone(model, prompt, options))
        assert client.text() == byte_tokenizer().decode(job.answers[0].ids)
    assert engine.stats().counters["preemptions"] > 0
    check_given_back(engine)


def ask(tokens: int = 20, *pictures, start: int = 3) -> Prompt:
    """A prompt of so many tokens, which begins with pictures."""
    text = [start + i % 200 for i in range(tokens)]
    return Prompt((*[IMAGE] * len(pictures), *text), pictures)


def test_answers_to_one_prompt_share_it_and_have_seeds_of_their_own(engines):
    model = small_model()
    engine = engines(model).start(**ROOMY)
    prompt, options = (
        ask(130),
        Options(max_tokens=12, n=3, seed=5, temperature=1.5, ignore_eos=True),
    )
    job, client = put(engine, prompt, options, "a")
    wait(lambda: client.has_ended)
    for index, seed in enumerate(row_seeds(5, 3)):
        assert_same(job, *alone(model, prompt, options, seed), index)
    reasons = [(p.index, p.finish_reason) for p in client.pieces if p.finish_reason]
    assert sorted(reasons) == [(0, "length"), (1, "length"), (2, "length")]
    assert client.usage.prompt_tokens == 130 and client.usage.completion_tokens == 36
    assert engine.stats().counters["step_tokens"] < 2 * 130


def test_the_text_is_that_of_stream(engines):
    model, tokenizer = small_model(), byte_tokenizer()
    prompt, strings = ask(5), ["e", "th", "  "]
    engine = engines(model).start(**ROOMY)
    for seed in range(8):
        options = Options(max_tokens=60, temperature=2.0, seed=seed, stop=tuple(strings))
        job, client = put(engine, prompt, options, str(seed))
        wait(lambda client=client: client.has_ended)
        streamed = model.stream(
            torch.tensor([prompt.tokens]),
            tokenizer=tokenizer,
            do_sample=True,
            temperature=2.0,
            top_k=0,
            seed=seed,
            max_new_tokens=60,
            stop_strings=strings,
        )
        assert client.text() == "".join(streamed)
        reason = next(p.finish_reason for p in client.pieces if p.finish_reason)
        # A stop string may be complete with the last token.
        assert reason == "stop" or (reason, len(job.answers[0].ids)) == ("length", 60)


def test_no_stop_string_ends_an_answer_of_too_few_tokens(engines):
    engine = engines(small_model()).start(**ROOMY)
    for least in (0, 1, 2, 5):
        options = Options(max_tokens=5, min_tokens=least, stop=("a",), logit_bias={64: 1000.0})
        _, client = put(engine, ask(5), options, str(least))
        wait(lambda client=client: client.has_ended)
        assert client.text() == "a" * max(least - 1, 0)
        assert client.usage.completion_tokens == max(least, 1)


def test_tokens_tell_where_they_are_in_the_text():
    """Among parts of characters that others complete or break, and tokens that have no text."""
    vocabulary = Vocabulary.of(byte_tokenizer())
    for seed in range(200):
        rng = random.Random(seed)
        answer = Answer(0, vocabulary, StopStrings(), frozenset())
        text, letters = "", []
        for _ in range(25):
            token = rng.choice([64, 65, END, rng.randrange(94, 256), 169, 104])
            new, (told,) = answer.push(token, Likelihood(0.0, ()))
            text += new
            letters += [told] if token < 94 else []
        text += answer.end()
        for letter in letters:
            assert text[letter.offset] == letter.text


def test_pictures_and_beginnings_are_computed_once(engines, seed):
    rng = random.Random(seed)
    picture, other = random_picture(rng), random_picture(rng)
    engine = engines(small_model()).start(**ROOMY)
    prompt, options = ask(140, picture), Options(max_tokens=3, ignore_eos=True)
    clients = [put(engine, prompt, options, str(i))[1] for i in range(3)]
    wait(lambda: all(client.has_ended for client in clients))
    assert engine.stats().counters["encoded_pictures"] == 1
    _, client = put(engine, Prompt((*prompt.tokens, 9), prompt.pictures), options, "next turn")
    wait(lambda: client.has_ended)
    assert client.usage.cached_tokens == 128
    assert engine.stats().counters["prefix_hits"] >= 2
    assert engine.stats().counters["picture_hits"] >= 1
    _, client = put(engine, ask(140, other), options, "another picture")
    wait(lambda: client.has_ended)
    assert client.usage.cached_tokens == 0
    assert engine.stats().counters["encoded_pictures"] == 2


def test_what_is_added_to_logits(engines):
    """A bias, and penalties of presence and frequency, which count the answer and not the prompt."""
    model = small_model()
    engine = engines(model).start(**ROOMY)
    prompt, common = ask(8), {"max_tokens": 12, "ignore_eos": True}
    expected, logits = alone(model, prompt, Options(max_tokens=1, repetition_penalty=1.0))
    found = {}
    for name, options in {
        "bias": Options(logit_bias={77: 1000.0}, **common),
        "ban": Options(logit_bias={expected[0]: -1000.0}, **common),
        "presence": Options(presence_penalty=1000.0, **common),
        "both": Options(logit_bias={77: 30.0, 78: 29.0}, frequency_penalty=0.5, **common),
    }.items():
        job, client = put(engine, prompt, options, name)
        wait(lambda client=client: client.has_ended)
        found[name] = job.answers[0].ids
    assert found["bias"] == [77] * 12
    assert expected[0] not in found["ban"] and found["ban"][0] == logits[0].topk(2).indices[1]
    assert len(set(found["presence"])) == 12 and found["presence"][0] == expected[0]
    assert set(found["both"]) == {77, 78}


def test_log_probabilities_are_the_models_own(engines):
    model = small_model()
    engine = engines(model).start(**ROOMY)
    prompt = ask(8)
    options = Options(max_tokens=6, top_logprobs=4, temperature=0.1, seed=1, repetition_penalty=2.0)
    options = replace(options, ignore_eos=True)
    job, client = put(engine, prompt, options, "a")
    wait(lambda: client.has_ended)
    expected, logits = alone(model, prompt, options)
    told = [token for piece in client.pieces for token in piece.tokens]
    assert len(told) == 6 and job.answers[0].ids == expected
    for token, id_, row in zip(told, expected, logits.double().log_softmax(-1)):
        assert token.logprob == pytest.approx(row[id_].item(), abs=1e-4)
        best = row.topk(4).values.tolist()
        assert [other.logprob for other in token.likeliest] == pytest.approx(best, abs=1e-4)


def test_random_cancels_give_everything_back(engines, seed):
    rng = random.Random(seed)
    engine = engines(small_model()).start(**TINY, max_batch_size=4, max_queue=1000)
    pictures = [random_picture(rng) for _ in range(3)]
    keys = []
    for i in range(60):
        prompt = ask(rng.choice([1, 70, 200]), *rng.sample(pictures, rng.choice([0, 0, 1])))
        put(engine, prompt, Options(max_tokens=rng.randint(1, 50), n=rng.choice([1, 2])), str(i))
        keys.append(str(i))
        if rng.random() < 0.8:
            engine.loop.cancel(keys.pop(rng.randrange(len(keys))))
            time.sleep(rng.choice([0, 0, 0.02]))
    for key in [*keys, *keys, "unknown"]:
        engine.loop.cancel(key)
    check_given_back(engine)


@pytest.mark.parametrize("delay", [0, 1])
def test_a_step_that_fails_ends_its_requests_alone(delay, engines):
    model = small_model()
    engine = engines(model).start(**ROOMY, max_batch_size=2, max_batch_tokens=2)
    engine.loop._delay = delay
    options = Options(max_tokens=60, ignore_eos=True, seed=3, repetition_penalty=1.2)
    Failing(engine, 1, after=20)  # two have begun, and none has ended
    clients = [put(engine, ask(4, start=10 * i + 3), options, str(i)) for i in range(4)]
    wait(lambda: all(client.has_ended for _, client in clients))
    failed = [any(isinstance(p, WorkFailed) for p in client.pieces) for _, client in clients]
    assert any(failed) and not all(failed)
    for i, (job, _) in enumerate(clients):
        expected = alone(model, ask(4, start=10 * i + 3), options)
        assert_same(job, *expected, prefix=failed[i])
    check_given_back(engine)
    assert engine.loop.state == "ready"


def test_text_that_cannot_be_written_ends_its_request_alone(engines):
    engine = engines(shared_model()).start(**ROOMY)
    options = Options(max_tokens=12, ignore_eos=True)
    jobs_ = [engine.job(str(i), ask(start=9 * i + 3), options, Client()) for i in range(3)]

    def broken(token, likelihood):
        raise ValueError("no such token")

    jobs_[1].answers[0].push = broken
    for job in jobs_:
        engine.loop.put(job)
    wait(lambda: all(job.outbox.has_ended for job in jobs_))
    ends = [isinstance(job.outbox.pieces[-1], WorkFailed) for job in jobs_]
    assert ends == [False, True, False]
    check_given_back(engine)


def test_three_failures_one_after_another_are_the_end(engines):
    engine = engines(small_model()).start(**ROOMY, max_batch_size=1)
    Failing(engine, 3)
    clients = [client for _, client in put_together(engine, [(ask(), Options(max_tokens=5))] * 4)]
    wait(lambda: all(client.has_ended for client in clients))
    assert all(isinstance(client.pieces[-1], WorkFailed) for client in clients)
    wait(lambda: engine.loop.state == "dead")
    with pytest.raises(Unavailable, match="dead"):
        engine.submit_prompt(ask())


def test_numbers_that_are_not_finite_end_their_request_alone(engines):
    model = small_model()
    broken = SHAPE.vocab + 1  # which no answer has, since the head does not know it
    with torch.no_grad():
        model.get_input_embeddings().weight[broken] = float("nan")
    engine = engines(model).start(**ROOMY)
    options = Options(max_tokens=8, seed=1, repetition_penalty=1.0)
    prompts = [Prompt((5, 6, broken)), ask(30), Prompt((5, 6, broken)), ask(9)]
    clients = [put(engine, prompt, options, str(i)) for i, prompt in enumerate(prompts)]
    wait(lambda: all(client.has_ended for _, client in clients))
    for (job, client), prompt in zip(clients, prompts):
        if broken in prompt.tokens:
            assert "not finite" in str(client.pieces[-1])
        else:
            assert_same(job, *alone(model, prompt, options))
    check_given_back(engine)


@pytest.mark.parametrize("semantics", ["meta", "transformers"])
def test_what_pages_and_slots_held_before_does_not_matter(semantics, engines, seed):
    """Those of a request whose numbers were not finite are another's next."""
    rng, model = random.Random(seed), small_model(semantics)
    engine = engines(model).start(num_pages=12, num_slots=12, max_batch_size=4)
    store = engine.loop._runner.forward.store
    for values in (store.page_values, store.tile_values):
        values.fill_(float("nan"))
    options = Options(max_tokens=6, repetition_penalty=1.0)
    pictures = [random_picture(rng) for _ in range(2)]
    prompts = [ask(1), ask(64), ask(30, pictures[0]), ask(70, pictures[1]), ask(9)]
    asked = [put(engine, prompt, options, str(i)) for i, prompt in enumerate(prompts)]
    wait(lambda: all(client.has_ended for _, client in asked))
    for (job, _), prompt in zip(asked, prompts):
        assert_same(job, *alone(model, prompt, options))


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        (Prompt(()), {}, "the prompt has no token"),
        (ask(448), {}, "the prompt has 448 tokens and a context at most 448"),
        (Prompt((5, 400)), {}, "the prompt has the token 400; expected 0 to 264"),
        (Prompt((5, -1)), {}, "the prompt has the token -1"),
        (Prompt((5, 6.5)), {}, "the prompt has the token 6.5"),
        (Prompt((5, "a")), {}, "the prompt has the token 'a'"),
        (Prompt((5, IMAGE)), {}, "1 image tokens and 0 pictures"),
        (ask(), {"n": 0}, "n must be an integer of at least 1, got 0"),
        (ask(), {"max_tokens": 0}, "max_tokens must be an integer of at least 1"),
        (ask(), {"max_tokens": 2.5}, "max_tokens must be an integer of at least 1, got 2.5"),
        (ask(), {"min_tokens": None}, "min_tokens must be an integer of at least 0, got None"),
        (ask(), {"seed": 1.5}, "seed must be an integer of at most 64 bits, got 1.5"),
        (ask(), {"top_p": 1.5}, "top_p must be .* got 1.5"),  # also where the answer is greedy
        (ask(), {"stop": "the end"}, "stop must be a tuple of strings, got 'the end'"),
        (ask(), {"stop_token_ids": (5, 257)}, r"stop_token_ids .* 0 to 256, got \[257\]"),
        (ask(), {"stop_token_ids": 5}, "stop_token_ids must be a collection of tokens, got 5"),
        (ask(), {"temperature": -1.0}, "temperature must be .* got -1.0"),
        (ask(), {"temperature": 1.0, "top_p": 1.5}, "top_p must be .* got 1.5"),
        (ask(), {"logit_bias": {257: 1.0}}, r"logit_bias .* 0 to 256, got \[257\]"),
        (ask(), {"logit_bias": {7: float("nan")}}, "logit_bias must be a finite .* got nan"),
        (ask(), {"presence_penalty": 1e9}, "presence_penalty must be .* got 1000000000.0"),
        (ask(), {"top_logprobs": 21}, "top_logprobs must be .* at most 20, got 21"),
        (ask(), {"stop": ("a", "")}, "stop has an empty string"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_it_is_queued(prompt, options, words, engines):
    engine = engines(shared_model()).start(num_pages=7, num_slots=8)
    with pytest.raises(Refused, match=words):
        engine.submit_prompt(prompt, Options(**options))
    assert engine.stats().counters["steps"] == 0


_MODELS: list = []


def shared_model():
    if not _MODELS:
        _MODELS.append(small_model())
    return _MODELS[0]


def test_pictures_that_no_pool_or_tower_takes_are_refused(engines, seed):
    rng = random.Random(seed)
    pictures = [random_picture(rng) for _ in range(6)]
    engine = engines(shared_model()).start(num_pages=7, num_slots=4)
    with pytest.raises(Refused, match="tiles, the pool has 4"):
        engine.submit_prompt(ask(4, *pictures))
    wide = PreparedPicture.of(torch.zeros(4, 3, 56, 56), 1, torch.tensor([1, 0, 0, 0]))
    with pytest.raises(Refused, match=r"\(4, 3, 56, 56\); the model takes \(4, 3, 28, 28\)"):
        engine.submit_prompt(ask(4, wide))
    pixels = torch.zeros(4, 3, 28, 28)
    with pytest.raises(Refused, match=r"tile mask \[0, 0, 0, 0\]"):
        engine.submit_prompt(ask(4, PreparedPicture.of(pixels, 1, torch.zeros(4).long())))
    with pytest.raises(Refused, match="aspect ratio 99; expected 1 to 8"):
        engine.submit_prompt(ask(4, PreparedPicture.of(pixels, 99, torch.ones(4).long())))


def test_the_answer_is_cut_to_what_the_context_has_left(engines):
    engine = engines(shared_model()).start(num_pages=2, num_slots=4)
    _, client = put(engine, ask(120), Options(ignore_eos=True), "a")
    _, other = put(engine, ask(120), Options(ignore_eos=True, max_tokens=10**6), "b")
    wait(lambda: client.has_ended and other.has_ended)
    assert client.usage.completion_tokens == other.usage.completion_tokens == 8


def test_a_queue_has_an_end(engines):
    engine = engines(shared_model()).start(**ROOMY, max_batch_size=1, max_queue=2)
    held = Held(engine)
    put(engine, ask(), Options(max_tokens=5), "0")
    assert held.is_held.wait(300)
    for i in range(1, 3):
        put(engine, ask(), Options(max_tokens=5), str(i))
    with pytest.raises(Overloaded, match="2 requests wait already; at most 2 do"):
        engine.submit_prompt(ask())
    for i in range(3):
        engine.loop.cancel(str(i))
    held.go()
    check_given_back(engine)


def test_closing_ends_what_runs_and_draining_does_not(engines):
    engine = engines(shared_model()).start(**ROOMY)
    texts = engine.submit_prompt(ask(), Options(max_tokens=20, ignore_eos=True))
    engine.loop.drain()
    with pytest.raises(Unavailable, match="draining"):
        engine.submit_prompt(ask())
    list(texts)
    assert texts.pieces[-1].usage.completion_tokens == 20
    engine = engines(shared_model()).start(**ROOMY)
    OnOrder(engine)
    texts = engine.submit_prompt(ask(), Options(max_tokens=900, ignore_eos=True))
    next(texts)
    engine.close()
    with pytest.raises(WorkFailed, match="has ended"):
        list(texts)


def test_a_reader_that_goes_away_ends_its_request(engines):
    for leave in (lambda texts: texts.close(), lambda texts: None):
        engine = engines(shared_model()).start(**ROOMY)
        OnOrder(engine)
        texts = engine.submit_prompt(ask(), Options(max_tokens=900, ignore_eos=True))
        next(texts)
        leave(texts)
        del texts
        check_given_back(engine)


def test_another_thread_may_close_an_answer_that_is_waited_for(engines):
    engine = engines(shared_model()).start(**ROOMY)
    texts = engine.submit_prompt(ask(), Options(max_tokens=900, ignore_eos=True))
    next(texts)
    texts._box = type(texts._box)()  # of which nothing comes
    reader = threading.Thread(target=list, args=(texts,), daemon=True)
    reader.start()
    texts.close()
    reader.join(60)
    assert not reader.is_alive()
    check_given_back(engine)


def test_what_is_new_in_a_step_is_handed_over_at_once(engines):
    engine = engines(shared_model()).start(**ROOMY)
    client = Client()
    for i in range(6):
        options = Options(max_tokens=20, ignore_eos=True)
        engine.loop.put(engine.job(str(i), ask(start=i + 3), options, client))
    wait(lambda: sum(p.usage is not None for p in client.pieces) == 6)
    assert client.times_given <= engine.stats().counters["steps"]


@pytest.mark.skipif("MLLAMA_TEST_RANKS" in os.environ, reason="of the model, not of its copy")
def test_a_hook_is_called_or_refused(engines):
    model = small_model()
    options = Options(max_tokens=6, repetition_penalty=1.0)
    layer = model.model.language_model.layers[0]
    layer.register_forward_hook(lambda module, args, output: output * 1.5)
    engine = engines(model).start(**ROOMY)
    asked = [put(engine, ask(9 + i), options, str(i)) for i in range(4)]
    wait(lambda: all(client.has_ended for _, client in asked))
    for i, (job, _) in enumerate(asked):
        assert_same(job, *alone(model, ask(9 + i), options))
    model.model.register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(TypeError, match=r"does not call the model\.model itself"):
        engines(model).start(**ROOMY)


def test_too_small_pools_are_named():
    with pytest.raises(
        ValueError, match="num_pages must be None or an integer of at least 1, got 0"
    ):
        Engine(shared_model(), byte_tokenizer(), num_pages=0)
    with pytest.raises(
        ValueError, match=r"max_queue must be .* got 0; image_cache_bytes .* got -1"
    ):
        Engine(shared_model(), byte_tokenizer(), max_queue=0, image_cache_bytes=-1)
    with pytest.raises(ValueError, match=r"10000000 pages of 64 tokens .* GB free"):
        Engine(shared_model(), byte_tokenizer(), num_pages=10**7)
    with pytest.raises(ValueError, match="max_length=400 takes 7 pages of 64 tokens, there are 6"):
        Engine(shared_model(), byte_tokenizer(), num_pages=6, max_length=400)
    with pytest.raises(ValueError, match="max_length=2000 is beyond the model's context, 1024"):
        Engine(shared_model(), byte_tokenizer(), max_length=2000)


def test_text_models_have_no_pictures(engines):
    config = mllama.MllamaTextConfig(**SHAPE.configs()["text_config"])
    model = mllama.MllamaForCausalLM(config).eval()
    randomise(model)
    model.generation_config = {"eos_token_id": END, "pad_token_id": 0}
    engine = engines(model).start(num_pages=20)
    options = Options(max_tokens=9, repetition_penalty=1.0)
    job, client = put(engine, ask(7), options, "a")
    wait(lambda: client.has_ended)
    assert_same(job, *alone(model, ask(7), options))


@pytest.mark.parametrize("num_slots", [0, 16])
def test_how_full_the_pools_are(engines, num_slots, monkeypatch):
    """By the fuller one: two pages of text, or one and the slots of a picture."""
    engine = engines(small_model()).start(num_pages=20, num_slots=num_slots)
    count, seen = engine.loop.counts.step, []

    def counted(*step):
        count(*step)
        seen.append(engine.stats().gauges["cache_usage_ratio"])

    monkeypatch.setattr(engine.loop.counts, "step", counted)
    picture = random_picture(random.Random(0))
    held = {Prompt((5,) * 70): 2 / 20}
    if num_slots:
        held[Prompt((IMAGE, 5), (picture,))] = int(picture.tile_mask.sum()) / num_slots
    for prompt, share in held.items():
        _, client = put(engine, prompt, Options(max_tokens=3, ignore_eos=True), "0")
        wait(lambda client=client: client.has_ended)
        check_given_back(engine)
        assert max(seen) == share and engine.stats().gauges["cache_usage_ratio"] == 0
        seen.clear()
