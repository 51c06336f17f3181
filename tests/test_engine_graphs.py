"""The decode steps of the engine, captured: one for each number of rows, pages and tiles, whoever is in them.

On a machine without a GPU with the stand-in of recorded_graphs.py.
"""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest
from engine_helpers import (
    IMAGE,
    Engines,
    Recorder,
    alone,
    assert_same,
    put,
    put_together,
    random_picture,
    small_model,
    wait,
)
from recorded_graphs import stand_in

from mllama.engine import forward, jobs
from mllama.engine.interface import Options
from mllama.engine.pages import SCRATCH_PAGE
from mllama.engine.prompts import Prompt
from mllama.engine.step import StepShape

pytestmark = pytest.mark.skipif(
    "MLLAMA_TEST_RANKS" in os.environ, reason="the graphs are those of this process alone"
)


@pytest.fixture
def recorded(monkeypatch):
    monkeypatch.setattr(forward, "captures", lambda model, store: True)
    monkeypatch.setattr(jobs, "Answer", Recorder)
    return stand_in(monkeypatch)


@pytest.mark.parametrize("semantics", ["meta", "transformers"])
@pytest.mark.parametrize("delay", [0, 1])
def test_answers_are_those_of_each_request_alone(semantics, delay, recorded, seed):
    """Of every option, with and without pictures, as the rows come and go."""
    rng = random.Random(f"{seed} {semantics}")
    model = small_model(semantics)
    pictures = [random_picture(rng) for _ in range(2)]
    common = Options(max_tokens=20, ignore_eos=True)
    wanted = [
        common,
        replace(common, temperature=1.5, seed=3, top_k=40, max_tokens=30),
        replace(common, repetition_penalty=1.3),
        replace(common, temperature=1.0, seed=8, top_p=0.8, min_p=0.01, max_tokens=24),
        replace(common, top_logprobs=3, max_tokens=9),
    ]
    engines = Engines(model)
    try:
        engine = engines.start(num_pages=60, num_slots=32, max_length=256, max_batch_size=8)
        engine.loop._delay = delay
        prepared = list(recorded.made)
        assert len(prepared) == 4 * 2, "rows up to 8, with and without tiles"
        asked = []
        for i in range(10):
            shown = tuple(rng.sample(pictures, rng.choice([0, 1, 2])))
            text = [rng.randrange(3, 256) for _ in range(rng.choice([4, 40, 70]))]
            prompt = Prompt((*[IMAGE] * len(shown), *text), shown)
            asked.append((prompt, wanted[i % len(wanted)]))
        for (prompt, options), (job, client) in zip(asked, put_together(engine, asked)):
            wait(lambda client=client: client.has_ended)
            assert_same(job, *alone(model, prompt, options))
        made, replays = len(recorded.made), sum(graph.replays for graph in recorded.made)
        shapes = {*engine.loop._runner.forward.graphs.steps}
        _, client = put(engine, Prompt((5, 6, 7)), replace(common, max_tokens=9), "alone")
        wait(lambda: client.has_ended)
        assert sum(graph.replays for graph in prepared) >= len(prepared) + 8
    finally:
        engines.close()
    assert {shape.pages for shape in shapes} == {4096 // 64}
    assert {shape.rows for shape in shapes} == {1, 2, 4, 8}
    assert {shape.tiles for shape in shapes} <= {0, 4, 8}
    assert replays > len(prepared) + 10 and len(recorded.made) == made


def test_rows_that_are_left_write_to_the_scratch_page_alone(recorded):
    model = small_model()
    engines = Engines(model)
    try:
        engine = engines.start(num_pages=20, num_slots=4, prefix_reuse=False)
        store = engine.loop._runner.forward.store
        store.page_values.fill_(7.0)  # once the steps are captured
        options = Options(max_tokens=12, ignore_eos=True)
        prompts = [Prompt(tuple(range(3 + i, 20 + i))) for i in range(3)]
        asked = put_together(engine, [(prompt, options) for prompt in prompts])
        wait(lambda: all(client.has_ended for _, client in asked))
        assert StepShape(4, 64, 0) in engine.loop._runner.forward.graphs.steps
    finally:
        engines.close()
    is_written = (store.page_values != 7.0).any(dim=-1).any(dim=3).any(dim=0).any(dim=0)
    count = {page: int(row.sum()) for page, row in enumerate(is_written) if row.any()}
    assert count.pop(SCRATCH_PAGE) >= 1
    assert sorted(count.values()) == [17 + 12 - 1] * 3


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (StepShape(1, 1, 0), (1, 64, 0)),
        (StepShape(3, 64, 5), (4, 64, 8)),
        (StepShape(9, 65, 1), (16, 512, 4)),
        (StepShape(32, 513, 4), (32, 1024, 4)),
    ],
)
def test_buckets(shape, expected):
    assert forward.bucket(shape) == StepShape(*expected)
