"""The engine over two ranks: the first answers as one process would, and the other computes along."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_helpers import (
    IMAGE,
    Engine,
    Recorder,
    alone,
    assert_same,
    byte_tokenizer,
    check_given_back,
    put,
    put_together,
    random_picture,
    small_model,
    wait,
)
from two_ranks import pair

import mllama
from mllama.checkpoints.weights import plan_source
from mllama.engine import jobs
from mllama.engine.interface import Options
from mllama.engine.prompts import Prompt
from mllama.generation.sampling import row_seeds
from mllama.parallel import channel
from mllama.parallel.channel import Channel
from mllama.stores import KeyValueStore

COMMON = Options(max_tokens=12, ignore_eos=True, repetition_penalty=1.0)
# One of the two decodes a token that is on the device only; both sample on the first rank alone.
DELAYS = [0, 1]


@pytest.fixture
def ranks():
    with pair() as made:
        yield made


@pytest.fixture(autouse=True)
def tokens_are_kept(monkeypatch):
    monkeypatch.setattr(jobs, "Answer", Recorder)


@pytest.fixture
def sent(monkeypatch) -> list[tuple[Any, list[tuple[int, ...]]]]:
    """The messages to the other rank, and the shapes of the tensors that go along with each."""
    found: list[tuple[Any, list[tuple[int, ...]]]] = []
    send = Channel.send

    def noted(self: Channel, message: Any, tensors: Any = ()) -> None:
        found.append((message, [tuple(tensor.shape) for tensor in tensors]))
        send(self, message, tensors)

    monkeypatch.setattr(Channel, "send", noted)
    return found


def started(part: Any, delay: int = 0, **options: Any) -> Engine:
    engine = Engine(part, byte_tokenizer(), **{"num_pages": 60, "num_slots": 32, **options})
    engine.loop._delay = delay
    return engine


@pytest.mark.parametrize("delay", DELAYS)
@pytest.mark.parametrize("semantics", ["meta", "transformers"])
def test_answers_are_those_of_each_request_alone(semantics, delay, ranks, seed):
    """Text, pictures, draws, penalties, several answers and log-probabilities, in one batch; each rank has
    half of the pages, and the other comes to its end with the engine."""
    rng, model = random.Random(seed), small_model(semantics)
    pictures = [random_picture(rng) for _ in range(2)]
    wanted = [
        COMMON,
        replace(COMMON, temperature=1.5, seed=3, top_k=40),
        replace(COMMON, repetition_penalty=1.3),
        replace(COMMON, temperature=1.0, seed=8, top_p=0.8, n=3),
        replace(COMMON, top_logprobs=3),
    ]
    with started(ranks.split(model), delay) as engine:
        asked = []
        for i, options in enumerate(wanted * 2):
            shown = tuple(rng.sample(pictures, i % 3))
            prompt = Prompt((*[IMAGE] * len(shown), *range(3 + i, 20 + 5 * i)), shown)
            asked.append((prompt, options, *put(engine, prompt, options, str(i))))
        for prompt, options, job, client in asked:
            wait(lambda client=client: client.has_ended)
            for index, own in enumerate(row_seeds(options.seed or 0, options.n)):
                drawn = own if options.temperature else None
                assert_same(job, *alone(model, prompt, options, drawn), index)
        check_given_back(engine)
        whole = model.config.get_text_config().num_key_value_heads
        assert engine.loop._runner.forward.store.page_values.shape[3] == whole // 2
    assert ranks.ended() is None


@pytest.mark.parametrize("delay", DELAYS)
def test_pages_are_given_up_and_pictures_shared_as_on_one_rank(delay, ranks, seed):
    model, rng = small_model(), random.Random(seed)
    picture = random_picture(rng)
    options = replace(COMMON, max_tokens=90)
    prompts = [Prompt((IMAGE, *range(3 + 9 * i, 60 + 9 * i)), (picture,)) for i in range(3)]
    with started(ranks.split(model), delay, num_pages=5, num_slots=8, max_length=256) as engine:
        asked = put_together(engine, [(prompt, options) for prompt in prompts])
        for prompt, (job, client) in zip(prompts, asked):
            wait(lambda client=client: client.has_ended)
            assert_same(job, *alone(model, prompt, options))
        counters = engine.stats().counters
        assert counters["preemptions"] and counters["picture_hits"]
        check_given_back(engine)
    assert ranks.ended() is None


def test_pixels_go_out_once_for_each_new_picture(sent, ranks, seed):
    rng = random.Random(seed)
    first, second = random_picture(rng), random_picture(rng)
    with started(ranks.split(small_model())) as engine:
        for i, shown in enumerate([(first,), (first,), (first, second), (second, first)]):
            prompt = Prompt((*[IMAGE] * len(shown), 5, 6), shown)
            _, client = put(engine, prompt, COMMON, str(i))
            wait(lambda client=client: client.has_ended)
        assert engine.stats().counters["encoded_pictures"] == 2
    assert ranks.ended() is None
    assert [shape for _, along in sent for shape in along] == [(4, 3, 28, 28)] * 2


def test_a_cancelled_request_and_a_failed_choice_leave_the_ranks_together(ranks, monkeypatch):
    model = small_model()
    prompt = Prompt(tuple(range(3, 40)))
    with started(ranks.split(model)) as engine:
        _, gone = put(engine, prompt, replace(COMMON, max_tokens=400), "gone")
        wait(lambda: gone.pieces)
        engine.loop.cancel("gone")
        wait(lambda: not engine.loop._jobs)
        runner = engine.loop._runner
        accept, failed = runner._accept, []

        def fail_once(rows: Any) -> None:  # once the forward of all ranks is done
            if not failed:
                failed.append(rows)
                raise RuntimeError("no memory")
            accept(rows)

        monkeypatch.setattr(runner, "_accept", fail_once)
        _, ended = put(engine, prompt, COMMON, "fails")
        wait(lambda: ended.has_ended)
        assert failed and "step that computed" in str(ended.pieces[-1])
        job, client = put(engine, prompt, COMMON, "goes on")
        wait(lambda: client.has_ended)
        assert_same(job, *alone(model, prompt, COMMON))
        check_given_back(engine)
    assert ranks.ended() is None


def test_a_long_plan_is_told_in_parts(sent, ranks):
    model, options = small_model(), replace(COMMON, max_tokens=2)
    prompts = [Prompt((3 + i, *(3 + j % 200 for j in range(900)))) for i in range(34)]
    sizes = {
        "num_pages": 600,
        "max_batch_tokens": 32000,
        "max_batch_size": 34,
        "max_ce_batch_size": 34,
    }
    with started(ranks.split(model), **sizes) as engine:
        asked = put_together(engine, [(prompt, options) for prompt in prompts])
        wait(lambda: all(client.has_ended for _, client in asked))
        for prompt, (job, _) in list(zip(prompts, asked))[-2:]:
            assert_same(job, *alone(model, prompt, options))
    assert ranks.ended() is None
    assert max(len(pickle.dumps(message)) for message, _ in sent) > channel._FRAME


def test_who_is_first_has_the_engine(ranks):
    whole = small_model()
    with pytest.raises(ValueError, match="a model that is split over ranks"):
        mllama.follow(whole)
    part = ranks.split(whole)
    with pytest.raises(ValueError, match=r"this is the first rank, which has the engine"):
        mllama.follow(part)
    with started(part):
        pass
    assert ranks.ended() is None


def test_what_is_planned_for_a_rank_is_its_part(ranks):
    part = ranks.split(small_model())
    source = plan_source(type(part), ranks.model_folder, tensor_parallel=2)
    own = sum(parameter.nbytes for parameter in part.parameters())
    row = part.lm_head.weight[0].nbytes  # of an odd vocabulary one rank has a row more
    assert source.nbytes - own in (0, row)
    meta = KeyValueStore(source.config.get_text_config(), dtype=torch.float32, device="meta")
    with started(part) as engine:
        assert engine.loop._runner.forward.store.page_nbytes() == meta.page_nbytes()
    assert ranks.ended() is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_pages": 0}, "num_pages must be"),
        ({"num_pages": 10**8}, "force=True goes on all the same"),
        ({"max_length": 2000}, "is beyond the model's context"),
    ],
)
def test_an_engine_that_is_not_made_lets_the_others_go(options, words, ranks):
    part = ranks.split(small_model())
    with pytest.raises(ValueError, match=words):
        started(part, **options)
    reason = ranks.ended()
    assert reason is not None and reason.startswith("the engine of the first rank was not made")
    assert words in reason


def test_another_rank_than_the_first_makes_no_engine(monkeypatch):
    model = small_model()

    class Second:
        ranks = type("Ranks", (), {"rank": 1, "size": 2})()

    monkeypatch.setattr(model, "share", Second)
    with pytest.raises(
        ValueError, match=r"this is rank 1 of 2: the first has the engine, the others call"
    ):
        Engine(model, byte_tokenizer())
