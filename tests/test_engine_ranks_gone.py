"""Two ranks of an engine one of which is gone, or hangs, or waits for long."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
from engine_helpers import Engine, byte_tokenizer, put, small_model, wait
from two_ranks import pair

from mllama.engine.interface import Options, Unavailable, WorkFailed
from mllama.engine.prompts import Prompt

PROMPT, ENDLESS = Prompt((5, 6, 7)), Options(max_tokens=900, ignore_eos=True)
SECONDS = 4.0  # that one rank waits for the other


@pytest.fixture
def ranks():
    with pair(SECONDS) as made:
        yield made


def started(ranks: Any) -> Engine:
    return Engine(ranks.split(small_model()), byte_tokenizer(), num_pages=40, num_slots=4)


def test_ranks_wait_for_requests_longer_than_for_each_other(ranks):
    engine = started(ranks)
    for i in range(2):
        time.sleep(1.5 * SECONDS)
        _, client = put(engine, PROMPT, Options(max_tokens=5, ignore_eos=True), str(i))
        wait(lambda client=client: client.has_ended)
        assert client.usage.completion_tokens == 5
    engine.close()
    assert ranks.ended() is None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("is_idle", [False, True])
def test_a_rank_that_is_gone_or_hangs_ends_the_engine(number, is_idle, ranks):
    engine = started(ranks)
    _, client = put(engine, PROMPT, ENDLESS, "a")
    wait(lambda: client.pieces)
    if is_idle:
        engine.loop.cancel("a")
        wait(lambda: not engine.loop._jobs)
    os.kill(ranks.other.pid, number)
    begin = time.monotonic()
    wait(lambda: engine.loop.state == "dead", 30)
    assert time.monotonic() - begin < 10 * SECONDS
    if not is_idle:
        wait(lambda: client.has_ended)
        assert isinstance(client.pieces[-1], WorkFailed)
    with pytest.raises(Unavailable, match="it is dead"):
        engine.submit_prompt(PROMPT)
    begin = time.monotonic()
    engine.close()
    assert time.monotonic() - begin < SECONDS, "nothing is waited for"


def test_a_first_rank_that_is_gone_ends_the_others(ranks):
    engine = started(ranks)
    engine.loop._runner.stay = lambda: time.sleep(3 * SECONDS)
    assert "the first rank does not say any longer" in str(ranks.ended())
    wait(lambda: engine.loop.state == "ready")
    engine.close()
