"""The engine's thread: who may put a request, and what is told when something goes wrong or ends."""

from __future__ import annotations

import gc
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from engine_helpers import (
    IMAGE,
    Client,
    Engines,
    Failing,
    Held,
    OnOrder,
    byte_tokenizer,
    check_given_back,
    engine_of,
    put,
    small_model,
    wait,
)
from tokenizers import AddedToken

from mllama.engine.interface import Options, Overloaded, Unavailable, WorkFailed
from mllama.engine.prompts import Prompt

PROMPT = Prompt(tuple(range(3, 13)))
ENDLESS = Options(max_tokens=900, ignore_eos=True)


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def engines(model):
    made = Engines(model)
    yield made
    made.close()


def test_what_waits_is_counted_exactly_and_no_more_are_let_in_whoever_asks_at_once(engines):
    engine = engines.start(num_pages=20, num_slots=4, max_batch_size=1, max_queue=8)
    held = Held(engine)
    put(engine, PROMPT, ENDLESS, "runs")
    assert held.is_held.wait(300)
    for _ in range(20):
        engine.loop.cancel("unknown")  # an order, and no request
    put(engine, PROMPT, Options(max_tokens=5, n=2), "two")
    assert engine.loop.num_waiting == 2

    def one_more(i: int) -> bool:
        try:
            put(engine, PROMPT, Options(max_tokens=5), str(i))
        except Overloaded:
            return False
        return True

    with ThreadPoolExecutor(16) as threads:
        taken = list(threads.map(one_more, range(64)))
    assert sum(taken) == 6 and engine.loop.num_waiting == 8
    held.go()
    engine.loop.cancel("runs")
    wait(lambda: not engine.loop._jobs)
    assert engine.loop.num_waiting == 0
    check_given_back(engine)


def test_a_key_names_one_request(engines):
    engine = engines.start(num_pages=20, num_slots=4)
    held = Held(engine)
    _, client = put(engine, PROMPT, ENDLESS, "a")
    with pytest.raises(ValueError, match="a request with the key 'a' is being answered"):
        put(engine, PROMPT, ENDLESS, "a")
    engine.loop.cancel("a")
    held.go()
    wait(lambda: not engine.loop._jobs)
    _, again = put(engine, PROMPT, Options(max_tokens=2), "a")
    wait(lambda: again.has_ended)
    assert not client.has_ended
    check_given_back(engine)


def test_a_request_that_is_cancelled_before_it_begins_hears_nothing(engines):
    engine = engines.start(num_pages=20, num_slots=4, max_batch_size=1)
    held = Held(engine)
    put(engine, PROMPT, Options(max_tokens=3), "runs")
    assert held.is_held.wait(300)
    _, client = put(engine, PROMPT, Options(max_tokens=3), "gone")
    engine.loop.cancel("gone")
    held.go()
    wait(lambda: not engine.loop._jobs)
    assert not client.pieces
    check_given_back(engine)


def test_requests_that_cannot_be_begun_again_after_a_failed_step_end_alone(engines):
    engine = engines.start(
        num_pages=20, num_slots=4, max_batch_size=1, max_batch_tokens=4, prefix_reuse=False
    )
    held = Held(engine)
    clients = [put(engine, PROMPT, ENDLESS, "0")[1]]
    assert held.is_held.wait(300)
    clients += [put(engine, PROMPT, Options(max_tokens=3, n=2), str(i))[1] for i in (1, 2)]
    failing, add = Failing(engine, 1), engine.loop._runner.add
    refused = []

    def broken_add(sequence, *rest):
        if failing.failed and not refused:
            refused.append(sequence)
            raise RuntimeError("no memory")
        add(sequence, *rest)

    engine.loop._runner.add = broken_add
    held.go()
    wait(lambda: all(client.has_ended for client in clients))
    words = [str(client.pieces[-1]) for client in clients]
    assert "step that computed" in words[0] and "could not be begun" in words[1]
    assert clients[2].usage is not None and engine.loop.state == "ready"
    check_given_back(engine)


class Lost:
    """A constraint that gives up after a token."""

    def __init__(self) -> None:
        self.count = 0

    def fill(self, row) -> None:
        if self.count:
            raise RuntimeError("too many steps")
        row.fill(-1)

    def accept(self, token) -> None:
        self.count += 1

    def fork(self) -> Lost:
        return Lost()


def test_an_answer_that_cannot_be_held_to_its_form_ends_alone_and_says_so(engines):
    engine = engines.start(num_pages=20, num_slots=4)
    client = Client()
    engine.loop.put(engine.job("held", PROMPT, Options(max_tokens=9), client, Lost()))
    _, free = put(engine, PROMPT, Options(max_tokens=9, ignore_eos=True), "free")
    wait(lambda: client.has_ended and free.has_ended)
    assert "held to its form" in str(client.pieces[-1]) and free.usage.completion_tokens == 9
    check_given_back(engine)


def test_a_stop_string_that_no_answer_can_have_harms_nobody(model):
    """The token of images is none of the head's."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<|image|>", special=True)])
    assert tokenizer.token_to_id("<|image|>") == IMAGE
    with engine_of(model, tokenizer, num_pages=20, num_slots=4) as engine:
        options = Options(max_tokens=6, min_tokens=4, stop=("<|image|>",), ignore_eos=True)
        texts = engine.submit_prompt(PROMPT, options)
        list(texts)
    assert texts.pieces[-1].usage.completion_tokens == 6


def test_parts_of_characters_are_told_as_bytes(model):
    tokenizer = byte_tokenizer()
    with engine_of(model, tokenizer, num_pages=20, num_slots=4) as engine:
        options = Options(max_tokens=60, top_logprobs=0, temperature=2.0, seed=4, ignore_eos=True)
        texts = engine.submit_prompt(PROMPT, options)
        said = "".join(texts)
    tokens = [token for piece in texts.pieces for token in piece.tokens]
    parts = [t.data for t in tokens if t.text == "\N{REPLACEMENT CHARACTER}"]
    assert len(tokens) == 60 and parts and all(len(data) == 1 and data[0] >= 128 for data in parts)
    told = b"".join(token.data for token in tokens if token.text != "<|end|>")
    assert told.decode(errors="replace") == said


def test_the_end_of_an_engine_is_not_taken_back(engines):
    engine = engines.start(num_pages=20, num_slots=4)
    OnOrder(engine)
    texts = engine.submit_prompt(PROMPT, ENDLESS)
    next(texts)
    engine.close()
    engine.loop.drain()
    assert engine.loop.state == "dead"
    with pytest.raises(WorkFailed, match="the engine has ended"):
        list(texts)
    with pytest.raises(Unavailable, match="it is dead"):
        engine.submit_prompt(PROMPT)
    assert not engine.loop._thread.is_alive()


def test_an_engine_lives_as_long_as_somebody_reads(model):
    texts = engine_of(model, byte_tokenizer(), num_pages=20, num_slots=4).submit_prompt(
        PROMPT, Options(max_tokens=30, ignore_eos=True)
    )
    gc.collect()
    list(texts)
    assert texts.pieces[-1].usage.completion_tokens == 30
    thread = texts._engine.loop._thread
    del texts
    gc.collect()
    wait(lambda: not thread.is_alive())


def test_a_process_may_end_while_an_engine_works():
    script = (
        "from test_engine_loop import *\n"
        "engine = engine_of(small_model(), byte_tokenizer(), num_pages=20, num_slots=4)\n"
        "texts = engine.submit_prompt(PROMPT, ENDLESS)\n"
        "next(texts)\n"
    )
    subprocess.run(
        [sys.executable, "-c", script], check=True, cwd=Path(__file__).parent, timeout=500
    )
