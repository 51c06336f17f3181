"""What an engine is planned to take, before there is a model, is what it takes."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch
from engine_helpers import small_model
from generation_helpers import byte_tokenizer

import mllama
from mllama import cli
from mllama.commands import engines
from mllama.demo import checkpoint_path
from mllama.engine import engine as engine_module
from mllama.engine.engine import Engine
from mllama.engine.pages import PAGE_SIZE
from mllama.engine.runner import Runner
from mllama.engine.sizes import EnginePlan, plan_engine
from mllama.quantization.plan import named_config, weight_bytes
from mllama.stores import KeyValueStore

GB = 10**9
LARGE = named_config("11b")
LARGE_BYTES = weight_bytes(LARGE, "bfloat16")


def planned(free: int | None, config: Any = LARGE, **options: Any) -> EnginePlan:
    store = KeyValueStore(config.get_text_config(), dtype=torch.bfloat16, device="meta")
    given = {"device": "cuda", "weights": LARGE_BYTES, **options}
    return plan_engine(config, store, free, **given)


def test_pools_take_shares_of_what_the_weights_leave() -> None:
    made = planned(80 * GB)
    left = 80 * GB - made.weights - made.workspace - made.graphs
    assert 0.49 * left < made.pages <= 0.51 * left and 0.24 * left < made.tiles <= 0.25 * left
    assert made.total < 80 * GB and made.weights == LARGE_BYTES
    assert made.sizes.limits.max_length == 131_072
    made.require_fit(80 * GB, "cuda:0")
    roomy = planned(None, max_length=100, max_batch_size=3)
    assert (roomy.sizes.num_pages, roomy.sizes.num_slots) == (3 * 2, 3 * 4 * 4)
    assert planned(80 * GB, max_images=20, max_batch_size=1).sizes.num_slots == 80


def test_a_context_is_cut_to_what_there_is_memory_for() -> None:
    made = planned(25 * GB)
    length = made.sizes.limits.max_length
    assert 2048 <= length < 131_072 and made.sizes.num_pages * PAGE_SIZE == length
    assert made.total <= 25 * GB
    made.require_fit(25 * GB, "cuda:0")


def test_what_is_asked_for_is_given_or_refused_with_the_numbers() -> None:
    made = planned(30 * GB, max_length=50_000)
    assert made.sizes.limits.max_length == 50_000 and made.sizes.num_pages >= 782
    made = planned(30 * GB, max_length=100_000)
    with pytest.raises(
        ValueError, match=r"context of 100000 tokens .* GB are missing; a max_length"
    ):
        made.require_fit(30 * GB, "cuda:0")
    # What it proposes fits, and a page more does not.
    fits = planned(30 * GB, max_length=made.longest)
    assert 50_000 < made.longest < 100_000 and fits.total <= 30 * GB
    assert planned(30 * GB, max_length=made.longest + PAGE_SIZE).total > 30 * GB
    made = planned(21 * GB)
    with pytest.raises(ValueError, match=r"weights 21\.3\d, .* no context fits; --force loads"):
        made.require_fit(21 * GB, "cuda:0", "--force loads it")
    with pytest.raises(ValueError, match="max_length=131073 is beyond the model's context, 131072"):
        planned(80 * GB, max_length=131_073)


def test_an_engine_allocates_what_was_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    options = {"max_batch_size": 3, "max_length": 300, "max_images": 2}
    store = KeyValueStore(model.config.text_config, dtype=torch.float32, device="meta")
    made = plan_engine(model.config, store, 10**9, "cpu", **options)
    stores: list[KeyValueStore] = []

    class Recorder(Runner):
        def __init__(self, model: Any, store: KeyValueStore, *others: Any) -> None:
            stores.append(store)
            super().__init__(model, store, *others)

    monkeypatch.setattr(engine_module, "Runner", Recorder)
    with Engine(model, byte_tokenizer(), **options):
        pass
    assert stores[0].page_values.nbytes == made.pages
    assert stores[0].tile_values.nbytes == made.tiles == 3 * 2 * 4 * made.sizes.slot_bytes


def test_too_little_memory_is_refused_unless_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match=r"0\.00 GB free: .* force=True goes on all the same"):
        Engine(small_model(), byte_tokenizer())
    with Engine(small_model(), byte_tokenizer(), max_batch_size=1, force=True) as engine:
        assert engine.stats().gauges["pages"] == 1024 // PAGE_SIZE  # of one answer at its longest


# The commands


def options_of(*arguments: str) -> argparse.Namespace:
    return cli.build_parser().parse_args(["serve", "--device", "cpu", *arguments])


def test_a_command_plans_what_it_then_makes() -> None:
    model = mllama.MllamaForConditionalGeneration.from_pretrained(checkpoint_path(), device="cpu")
    processor = mllama.MllamaProcessor.from_pretrained(checkpoint_path())
    options = options_of("--max-batch-size", "2", "--max-images", "3")
    said: list[str] = []
    plan = engines.plan_of(options, str(checkpoint_path()), said.append)
    assert plan.weights == sum(p.nbytes for p in model.parameters())
    with engines.start_engine(model, processor, options, plan, None) as engine:
        gauges = engine.stats().gauges
    assert gauges["pages"] == plan.sizes.num_pages and gauges["tiles"] == plan.sizes.num_slots == 24
    assert said[0].startswith("memory: weights ") and f"{plan.sizes.num_pages:,} pages" in said[0]
    assert "up to 2 answers at once" in said[1]


@pytest.mark.parametrize("encoding", ["q8_0", "float32", "bfloat16"])
def test_weights_are_planned_as_they_are_loaded(encoding: str) -> None:
    plan = engines.plan_of(
        options_of("--quantization-encoding", encoding), str(checkpoint_path()), lambda line: None
    )
    model = mllama.MllamaForConditionalGeneration.from_pretrained(
        checkpoint_path(), device="cpu", quantization=encoding
    )
    tensors = [*model.parameters(), *model.buffers()]
    loaded = sum(t.nbytes for t in tensors)
    assert plan.weights == pytest.approx(loaded, rel=0.02)
    store = KeyValueStore(model.config.text_config, dtype=model.dtype, device="meta")
    assert plan.pages == (plan.sizes.num_pages + 1) * store.page_nbytes()


def test_a_command_refuses_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "free_bytes", lambda device: 10**6)
    with pytest.raises(ValueError, match=r"cpu has 0\.00 GB free.*--force loads it all the same"):
        engines.plan_of(options_of(), str(checkpoint_path()), lambda line: None)
    engines.plan_of(options_of("--force"), str(checkpoint_path()), lambda line: None)
