"""The decode step: it reads nothing on the host, and what it does once it does on every replay.

On a machine without a GPU a stand-in takes the place of the CUDA graph, see recorded_graphs.py.
"""

from __future__ import annotations

import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import pytest
import torch
from generation_helpers import Recorder, byte_tokenizer, second_turn
from model_helpers import PAD_TOKEN, Prompt, Shape, batch_of, hf_model, our_model, to
from recorded_graphs import FakeStream, RecordedGraph, stand_in
from torch import Tensor, nn

import mllama
import mllama_kernels._library as library
from mllama.engine import graphs, lending
from mllama.engine.graphs import CapturedStep
from mllama.engine.lending import rounded_pages
from mllama.generation import borrowing
from mllama.generation import generate as generation

pytestmark = [
    pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated"),
    pytest.mark.skipif(
        library.missing is not None, reason=f"the compiled ops are not there: {library.missing}"
    ),
]

SHAPE = Shape(head_dim=64, vision_head_dim=64, intermediate=96, tile_side=28)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> type[RecordedGraph]:
    """Let generation capture on the CPU."""
    monkeypatch.setattr(generation, "captures", lambda model, tokens: model.cuda_graph)
    monkeypatch.setattr(lending, "_budget", lambda device: 2**30)
    return stand_in(monkeypatch)


@pytest.fixture
def model() -> mllama.MllamaForConditionalGeneration:
    model = our_model(SHAPE, hf_model(SHAPE), ("kernels", "cpu"))
    model.generation_config = {"pad_token_id": PAD_TOKEN}
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.3},
        {"do_sample": True, "seed": 3, "temperature": 1.7},
        {"do_sample": True, "seed": 3, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    ],
    ids=["greedy", "penalty", "sample", "filters"],
)
def test_replayed_steps_do_what_steps_do(
    model: Any, recorded: type[RecordedGraph], options: dict[str, Any]
) -> None:
    batch = batch_of(SHAPE, [Prompt(60, (2, 7), (6, 2)), Prompt(5), Prompt(9, (0,), (8,))])
    cache = model.new_cache(3)
    replayed = model.generate(**batch, max_new_tokens=20, past_key_values=cache, **options)
    assert [graph.replays for graph in recorded.made] == [17], "prefill, two to warm up, the rest"
    assert cache.lengths.tolist() == [79, 24, 28] and cache.get_seq_length() == 79
    assert cache.next_position.flatten().tolist() == [79, 24, 28]
    model.cuda_graph = False
    expected_cache = model.new_cache(3)
    expected = model.generate(**batch, max_new_tokens=20, past_key_values=expected_cache, **options)
    assert len(recorded.made) == 1
    assert replayed.equal(expected)
    for ours, theirs in zip(cache.store.pages(0), expected_cache.store.pages(0)):
        assert ours.equal(theirs)


def test_short_answers_are_not_captured(model: Any, recorded: type[RecordedGraph]) -> None:
    batch = batch_of(SHAPE, [Prompt(6, (2,), (6,))])
    model.generate(**batch, max_new_tokens=3)
    assert not recorded.made


def test_rows_that_end_early_and_a_late_reader(
    model: Any, recorded: type[RecordedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_of(SHAPE, [Prompt(6, (2,), (6,)), Prompt(9)])
    free = model.generate(**batch, max_new_tokens=12)
    stops = [int(free[0, 9 + 6]), int(free[1, 9 + 4])]
    options = {"max_new_tokens": 12, "eos_token_id": stops}
    expected = model.generate(**batch, **options)
    monkeypatch.setattr(generation, "_read_delay", lambda device: 1)
    cache = model.new_cache(2)
    assert model.generate(**batch, **options, past_key_values=cache).equal(expected)
    made = [1 + next(i for i, t in enumerate(row[9:].tolist()) if t in stops) for row in free]
    assert cache.lengths.tolist() == [6 + made[0] - 1, 9 + made[1] - 1]


def test_a_failed_capture_warns_and_goes_on(model: Any, recorded: type[RecordedGraph]) -> None:
    batch = batch_of(SHAPE, [Prompt(6, (2,), (6,))])
    expected = model.generate(**batch, max_new_tokens=12)
    model.backend = "reference"  # it reads lengths on the host
    with pytest.warns(UserWarning, match="without a CUDA graph: .*cannot be captured"):
        actual = model.generate(**batch, max_new_tokens=12)
    assert actual.equal(expected)


def test_a_capture_that_fails_at_its_end_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.graph ends the capture before it leaves its stream, so an error there leaves it current."""

    class Stream(FakeStream):
        def __init__(self, device: Any = None) -> None:
            self.device = device

    current = {"cuda:0": Stream("cuda:0"), "cuda:1": Stream("cuda:1")}
    before, device = dict(current), ["cuda:0"]

    def current_stream(where: Any = None) -> Stream:
        return current[device[0] if where is None else "cuda:1"]

    def set_stream(stream: Stream) -> None:
        current[stream.device], device[0] = stream, stream.device

    class BrokenGraph:
        def __init__(self, graph: Any, stream: Stream, **_: Any) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            set_stream(self.stream)

        def __exit__(self, *exception: Any) -> None:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream("cuda:1"))
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    monkeypatch.setattr(torch.cuda, "set_stream", set_stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", BrokenGraph)

    class Rows:
        tokens = torch.zeros(1)

        def logits(self, model: Any, store: Any) -> Tensor:
            return self.tokens

    captured = CapturedStep(Rows())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            captured(None, None)
    assert [str(w.message)[:42] for w in caught] == ["decoding continues without a CUDA graph: o"]
    assert current == before and device == ["cuda:0"]


def test_the_stand_in_notices_a_value_from_the_host(
    model: Any, recorded: type[RecordedGraph]
) -> None:
    """Otherwise the tests above would prove nothing."""

    class Rows:
        tokens, count = torch.zeros(1), 0

        def logits(self, model: Any, store: Any) -> Tensor:
            self.count += 1
            return torch.full((1,), float(self.count))

    run, store = CapturedStep(Rows()), model.new_cache().store
    seen = [run(model, store).item() for _ in range(5)]
    assert seen == [1, 2, 3, 3, 3], "a graph repeats the third step"


def test_capture_is_for_kernels_on_cuda(model: Any) -> None:
    token = torch.zeros(1, dtype=torch.int64)
    assert not generation.captures(model, token)
    on_gpu = type("Tokens", (), {"is_cuda": True})()
    assert generation.captures(model, on_gpu)
    model.backend = "reference"
    assert not generation.captures(model, on_gpu)
    model.backend, model.cuda_graph = "kernels", False
    assert not generation.captures(model, on_gpu)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "top_p": 0.9, "repetition_penalty": 1.1}]
)
def test_captured_graphs_on_the_gpu(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = our_model(SHAPE, hf_model(SHAPE), ("kernels", "cuda"))
    model.generation_config = {"pad_token_id": PAD_TOKEN}
    plain = deepcopy(model)
    plain.cuda_graph = False
    graphs = []
    original = torch.cuda.CUDAGraph
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graphs.append(original()) or graphs[-1])
    settings = options | {"max_new_tokens": 100}
    for seed, prompts in enumerate(SAME_BUCKET):
        batch = to(batch_of(SHAPE, prompts), "cuda")
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a failed capture would only warn
            replayed = model.generate(**batch, **settings, **_seed(options, seed))
        assert replayed.equal(plain.generate(**batch, **settings, **_seed(options, seed)))
        assert len(graphs) == 1
    with torch.no_grad():
        for each in (model, plain):
            each.lm_head.weight.mul_(0.5)
    assert model.generate(**batch, **settings, **_seed(options, 9)).equal(
        plain.generate(**batch, **settings, **_seed(options, 9))
    )
    assert len(graphs) == 1, "the new values are where the old ones were"
    for each in (model, plain):
        each.lm_head.weight = nn.Parameter(-each.lm_head.weight)
    assert model.generate(**batch, **settings, **_seed(options, 9)).equal(
        plain.generate(**batch, **settings, **_seed(options, 9))
    )
    assert len(graphs) == 2, "the weight has moved"
    held = torch.cuda.memory_allocated()
    model.free_idle_caches()
    assert torch.cuda.memory_allocated() < held


def test_all_room_is_made_before_the_first_step(model: Any) -> None:
    """The step reads and writes the same tensors from first to last."""
    batch, pointers = batch_of(SHAPE, [Prompt(60, (2,), (6,))]), set()
    original = model.forward

    def forward(**inputs: Any) -> Any:
        cache = inputs["past_key_values"]
        if inputs["input_ids"].shape[1] == 1:
            assert set(inputs) == {"input_ids", "past_key_values", "logits_to_keep"}
            tensors: tuple[Tensor, ...] = (inputs["input_ids"], cache.page_table, cache.lengths)
            tensors += (
                cache.next_position,
                cache.tile_table,
                *cache.store.pages(0),
                *cache.store.tiles(1),
            )
            pointers.add(tuple(t.data_ptr() for t in tensors))
        assert inputs["logits_to_keep"] == 1
        return original(**inputs)

    model.forward = forward
    model.generate(**batch, max_new_tokens=10)
    assert len(pointers) == 1


# Three rows, up to two images each, 65 to 128 columns with 20 new tokens, and with 100 new ones 129 to
# 256: the calls of one bucket.
SAME_BUCKET = [
    [Prompt(60, (2, 7), (6, 2)), Prompt(5), Prompt(9, (0,), (8,))],
    [Prompt(30), Prompt(47, (1, 9), (1, 7)), Prompt(46, (3,), (4,))],
    [Prompt(50, (4, 5), (5, 5)), Prompt(71, (11, 60), (2, 8)), Prompt(3, (0,), (1,))],
]
NEW = {"max_new_tokens": 20}
SMALL = [Prompt(6, (2,), (6,))]


def kept(model: Any) -> list[CapturedStep]:
    """The captured steps that wait for calls without a cache of their own."""
    store = model.kept_store.store
    return [] if store is None else [step for _, step in model.kept_steps._steps.get(store, ())]


def _seed(options: dict[str, Any], seed: int) -> dict[str, Any]:
    return {"seed": seed} if options.get("do_sample") else {}


def uncaptured(model: Any) -> Any:
    """The same model, that runs every step."""
    plain = deepcopy(model)
    plain.cuda_graph = False
    return plain


def check(model: Any, batch: dict[str, Tensor], **options: Any) -> None:
    options = NEW | options
    assert model.generate(**batch, **options).equal(uncaptured(model).generate(**batch, **options))


@pytest.mark.parametrize("semantics", ["transformers", "meta"])
@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "temperature": 1.5, "repetition_penalty": 1.3}]
)
def test_a_later_call_replays_at_once(
    recorded: type[RecordedGraph], semantics: str, options: dict[str, Any]
) -> None:
    model = our_model(SHAPE, hf_model(SHAPE), ("kernels", "cpu"), semantics)
    model.generation_config = {"pad_token_id": PAD_TOKEN}
    for seed, prompts in enumerate([*SAME_BUCKET, SAME_BUCKET[0]]):
        batch = batch_of(SHAPE, prompts, ["left", "right", "holes"][seed % 3])
        check(model, batch, **options, **_seed(options, seed))
    assert [graph.replays for graph in recorded.made] == [17 + 3 * 19]
    # The prompts are the same, what is shown of the images is not.
    batch["cross_attention_mask"] = batch["cross_attention_mask"].flip(-1)
    check(model, batch, **options, **_seed(options, 9))
    assert len(recorded.made) == len(kept(model)) == 1


def test_text_alone_and_answers_that_end_early(model: Any, recorded: type[RecordedGraph]) -> None:
    batch = batch_of(SHAPE, [Prompt(9), Prompt(4)])
    first = model.generate(**batch, **NEW)
    stops = {"eos_token_id": [int(first[0, 9 + 6]), int(first[1, 9 + 4])]}
    check(model, batch, **stops)
    check(model, batch_of(SHAPE, [Prompt(20), Prompt(25)]))
    check(model, batch)
    assert len(recorded.made) == 1


def test_another_bucket_captures(model: Any, recorded: type[RecordedGraph]) -> None:
    one = batch_of(SHAPE, SMALL)
    calls: list[tuple[dict[str, Tensor], dict[str, Any]]] = [
        (one, {}),
        (batch_of(SHAPE, SMALL * 2), {}),  # rows
        (one, {"max_new_tokens": 60}),  # room
        (batch_of(SHAPE, [Prompt(6, (2, 3), (6, 1))]), {}),  # tiles
        (batch_of(SHAPE, [Prompt(6)]), {}),
    ]
    made = []
    for _ in range(3):
        for batch, options in calls:
            check(model, batch, **options)
        made.append(len(recorded.made))
    assert made[1] == made[2], "the store has room for all, and there is a step for each"
    assert len(kept(model)) == len(calls)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.2},
        {"do_sample": True, "seed": 1},
        {"do_sample": True, "seed": 1, "temperature": 2.0, "top_k": 3, "repetition_penalty": 1.1},
        {"do_sample": True, "seed": 1, "top_p": 0.7, "min_p": 0.02},
    ],
)
def test_options_and_masks_are_data(
    model: Any, recorded: type[RecordedGraph], options: dict[str, Any]
) -> None:
    batch = batch_of(SHAPE, SMALL)
    unmasked = {k: v for k, v in batch.items() if k != "cross_attention_mask"}
    for each in (batch, unmasked):
        for chosen in ({}, options, {}):
            check(model, each, **chosen)
    with torch.inference_mode():
        check(model, batch, **options)
    assert len(recorded.made) == 1


def test_capacity_is_a_power_of_two_pages() -> None:
    pages = [rounded_pages(tokens) for tokens in (1, 64, 65, 128, 129, 300, 131072)]
    assert pages == [1, 1, 2, 2, 4, 8, 2048]


class Doubled(nn.Module):
    """An adapter around a linear layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.scaling = inner, {"default": 2.0}

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scaling["default"]


def _move_weights(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


def _replace_parameter(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(-model.lm_head.weight)


def _assign(model: Any) -> None:
    state = {name: value * 1.5 for name, value in model.state_dict().items()}
    kept = {name: value for name, value in state.items() if "proj." not in name}
    model.load_state_dict(kept, strict=False, assign=True)


def _hook(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda module, inputs, output: -output)


def _pre_hook(model: Any) -> None:
    model.lm_head.register_forward_pre_hook(lambda module, inputs: (-inputs[0],))


def _forward(model: Any) -> None:
    linear = model.lm_head
    linear.forward = lambda x: nn.functional.linear(x, -linear.weight)


def _adapter(model: Any) -> None:
    layer = model.model.language_model.layers[0]
    layer.mlp.down_proj = Doubled(layer.mlp.down_proj)


def _epsilon(model: Any) -> None:
    model.model.language_model.norm.variance_epsilon = 0.7


def _train(model: Any) -> None:
    model.train()


@pytest.mark.parametrize(
    "change",
    [
        _move_weights,
        _replace_parameter,
        _assign,
        _hook,
        _pre_hook,
        _forward,
        _adapter,
        _epsilon,
        _train,
    ],
)
@pytest.mark.parametrize("own_cache", [False, True])
def test_a_changed_model_captures_anew(
    model: Any, recorded: type[RecordedGraph], change: Callable[[Any], None], own_cache: bool
) -> None:
    batch = batch_of(SHAPE, SMALL)
    cache = model.new_cache(max_tokens=64) if own_cache else None

    def generate() -> Tensor:
        if cache is not None:
            cache.reset()
        return model.generate(**batch, **NEW, past_key_values=cache)

    generate()
    change(model)
    for _ in range(2):
        assert generate().equal(uncaptured(model).generate(**batch, **NEW))
        assert len(recorded.made) == 2


def test_a_setting_of_an_adapter_captures_anew(model: Any, recorded: type[RecordedGraph]) -> None:
    _adapter(model)
    batch = batch_of(SHAPE, SMALL)
    check(model, batch)
    model.model.language_model.layers[0].mlp.down_proj.scaling["default"] = -3.0
    check(model, batch)
    assert len(recorded.made) == 2


def test_functions_that_come_and_go_capture_anew(model: Any, recorded: type[RecordedGraph]) -> None:
    """A new function may have the address of one that has gone."""
    batch, weight = batch_of(SHAPE, SMALL), model.lm_head.weight
    for count, factor in enumerate((1.0, -1.0, 0.5, -0.5), 1):
        model.lm_head.forward = lambda x, f=factor: nn.functional.linear(x, weight * f)
        check(model, batch)
        del model.lm_head.forward
        assert len(recorded.made) == count


def test_global_changes_capture_anew(model: Any, recorded: type[RecordedGraph]) -> None:
    batch = batch_of(SHAPE, [Prompt(6)])
    check(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(**batch, **NEW)
    assert len(recorded.made) == 2
    check(model, batch)
    assert len(recorded.made) == 3


def test_a_model_with_something_around_it_is_called(
    model: Any, recorded: type[RecordedGraph]
) -> None:
    batch, seen = batch_of(SHAPE, SMALL), []
    expected = model.generate(**batch, **NEW)
    everywhere = nn.modules.module.register_module_forward_hook

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        seen.append(module)

    for part in (model, model.model, model.model.language_model):
        for register in (part.register_forward_hook, everywhere):
            handle = register(look)
            assert model.generate(**batch, **NEW).equal(expected)
            assert seen.count(part) == 20, "in every step"
            seen.clear()
            handle.remove()
    assert len(recorded.made) == 1


def test_another_backend_is_not_replayed(model: Any, recorded: type[RecordedGraph]) -> None:
    batch = batch_of(SHAPE, SMALL)
    check(model, batch)
    model.backend = "reference"  # it reads lengths on the host
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        model.generate(**batch, **NEW)
    assert model.kept_store.store is None, "without a graph there is nothing to keep"


def test_new_values_in_place_are_replayed(model: Any, recorded: type[RecordedGraph]) -> None:
    batch = batch_of(SHAPE, SAME_BUCKET[0])
    before = model.generate(**batch, **NEW)
    state = {name: value * -1.5 for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    check(model, batch)
    assert len(recorded.made) == 1
    assert not model.generate(**batch, **NEW).equal(before)


def _turns(model: Any, cache: Any) -> list[Tensor]:
    """Two turns about two images, then one with a row's mask closed, and another conversation."""
    torch.manual_seed(7)
    batch = batch_of(SHAPE, [Prompt(20, (2, 7), (6, 2)), Prompt(20, (1, 2), (3, 4))])
    answers = [model.generate(**batch, **NEW, past_key_values=cache)]
    for closed in (False, True):
        batch = second_turn(batch, answers[-1], torch.randint(3, SHAPE.vocab, (2, 4)))
        if closed:
            batch["cross_attention_mask"][1, -4:] = 0
        answers.append(model.generate(**batch, **NEW, past_key_values=cache))
    cache.reset()
    batch = batch_of(SHAPE, [Prompt(33, (4,), (1,)), Prompt(40, (0, 30), (8, 1))])
    answers.append(model.generate(**batch, **NEW, past_key_values=cache))
    return answers


def test_turns_in_a_cache_with_room_replay(model: Any, recorded: type[RecordedGraph]) -> None:
    actual = _turns(model, model.new_cache(2, max_tokens=128))
    assert len(recorded.made) == 1 and model.kept_store.store is None
    plain = uncaptured(model)
    for ours, theirs in zip(actual, _turns(plain, plain.new_cache(2, max_tokens=128))):
        assert ours.equal(theirs)


def test_a_cache_that_has_grown_is_captured_anew(model: Any, recorded: type[RecordedGraph]) -> None:
    plain, batch = uncaptured(model), batch_of(SHAPE, SMALL)
    caches = [each.new_cache() for each in (model, plain)]
    for turn in range(3):
        answers = [
            each.generate(**batch, max_new_tokens=30, past_key_values=cache)
            for each, cache in zip((model, plain), caches)
        ]
        assert answers[0].equal(answers[1])
        batch = second_turn(batch, answers[0], torch.randint(3, SHAPE.vocab, (1, 4)))
        assert len(recorded.made) == [1, 2, 2][turn], "the second turn needs another page"


def test_tiles_that_have_moved_capture_anew(recorded: type[RecordedGraph]) -> None:
    """The number of places is the same, that of tiles is not, and there was no room for more."""
    model = our_model(SHAPE, hf_model(SHAPE), ("kernels", "cpu"), "meta")
    model.generation_config = {"pad_token_id": PAD_TOKEN}
    cache, made = model.new_cache(), []
    for ratio in (1, 6, 1, 6):
        batch = batch_of(SHAPE, [Prompt(6, (2,), (ratio,))])
        cache.reset()
        answer = model.generate(**batch, **NEW, past_key_values=cache)
        assert answer.equal(uncaptured(model).generate(**batch, **NEW))
        made.append(len(recorded.made))
    assert made == [1, 2, 2, 2]
    assert len(model.kept_steps._steps[cache.store]) == 1, "the step of before is not kept"


def test_a_returned_cache_belongs_to_the_caller(model: Any, recorded: type[RecordedGraph]) -> None:
    batch = batch_of(SHAPE, SMALL)
    model.generate(**batch, **NEW)
    result = model.generate(**batch, **NEW, return_dict_in_generate=True)
    cache = result.past_key_values
    assert cache.store is not model.kept_store.store
    before = deepcopy(cache)
    model.generate(**batch_of(SHAPE, [Prompt(9, (4,), (2,))]), **NEW)
    assert cache.lengths.equal(before.lengths)
    assert cache.store.page_values.equal(before.store.page_values)
    assert cache.store.tile_values.equal(before.store.tile_values)
    assert len(recorded.made) == 2
    turn = second_turn(batch, result.sequences, torch.randint(3, SHAPE.vocab, (1, 4)))
    answer = model.generate(**turn, **NEW, past_key_values=cache)
    assert len(recorded.made) == 2, "the returned cache has its graph"
    assert answer.equal(uncaptured(model).generate(**turn, **NEW, past_key_values=before))


def test_inference_mode_may_come_and_go(model: Any, recorded: type[RecordedGraph]) -> None:
    cache, batch = model.new_cache(max_tokens=128), batch_of(SHAPE, SMALL)
    with torch.inference_mode():
        answer = model.generate(**batch, **NEW, past_key_values=cache)
    plain, before = uncaptured(model), deepcopy(cache)
    turn = second_turn(batch, answer, torch.randint(3, SHAPE.vocab, (1, 4)))
    answer = model.generate(**turn, **NEW, past_key_values=cache)
    assert answer.equal(plain.generate(**turn, **NEW, past_key_values=before))
    assert len(recorded.made) == 1


def test_one_cache_and_two_models(model: Any, recorded: type[RecordedGraph]) -> None:
    other, batch = deepcopy(model), batch_of(SHAPE, SMALL)
    with torch.no_grad():
        other.lm_head.weight.neg_()
    cache = model.new_cache(max_tokens=64)
    for each in (model, other, model):
        cache.reset()
        answer = each.generate(**batch, **NEW, past_key_values=cache)
        assert answer.equal(uncaptured(each).generate(**batch, **NEW))
    assert len(recorded.made) == 2, "each has its own"


def test_a_failed_turn_takes_nothing_from_the_cache(
    model: Any, recorded: type[RecordedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has shown of the images is forgotten with it."""
    monkeypatch.setattr(generation, "_read_delay", lambda device: 1)
    plain = uncaptured(model)
    batch = batch_of(SHAPE, [Prompt(20, (2, 7), (6, 2))])
    caches = [each.new_cache(max_tokens=128) for each in (model, plain)]
    answers = [
        each.generate(**batch, **NEW, past_key_values=cache)
        for each, cache in zip((model, plain), caches)
    ]
    turn = second_turn(batch, answers[0], torch.randint(3, SHAPE.vocab, (1, 4)))
    hidden = turn | {"cross_attention_mask": turn["cross_attention_mask"].clone()}
    hidden["cross_attention_mask"][:, -3:] = 0
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: output * torch.nan)
    with pytest.raises(RuntimeError, match="not finite"):
        model.generate(**hidden, **NEW, past_key_values=caches[0])
    hook.remove()
    turn.pop("cross_attention_mask")  # the new tokens see what the last one of the first turn saw
    answers = [
        each.generate(**turn, **NEW, past_key_values=cache)
        for each, cache in zip((model, plain), caches)
    ]
    assert answers[0].equal(answers[1])


def test_two_streams_at_once(model: Any, recorded: type[RecordedGraph]) -> None:
    prompts = [batch_of(SHAPE, [Prompt(length, (1,), (6,))]) for length in (6, 9)]
    options: dict[str, Any] = NEW | {"tokenizer": byte_tokenizer()}
    plain = uncaptured(model)
    expected = ["".join(plain.stream(**batch, **options)) for batch in prompts]
    for count in (2, 3, 3):
        streams, texts = [model.stream(**batch, **options) for batch in prompts], ["", ""]
        for _ in range(20):
            for index, stream in enumerate(streams):
                texts[index] += next(stream, "")
        assert texts == expected
        assert all(next(stream, None) is None for stream in streams)
        assert len(recorded.made) == count, "the second has made a store for both"
    assert len(kept(model)) == 2, "each has its own"


@pytest.mark.parametrize("tokens", [2, 9], ids=["before the capture", "after it"])
def test_a_closed_stream_leaves_its_cache(
    model: Any, recorded: type[RecordedGraph], tokens: int
) -> None:
    batch = batch_of(SHAPE, SMALL)
    model.generate(**batch, **NEW)
    unused = model.stream(**batch, **NEW, tokenizer=byte_tokenizer())
    stream = model.stream(**batch, **NEW, tokenizer=byte_tokenizer())
    for _ in range(tokens):
        next(stream)
    assert not kept(model)
    stream.close()
    assert len(kept(model)) == 1
    del unused
    check(model, batch)
    assert len(recorded.made) == 1


def test_an_interrupt_of_a_streamer_leaves_the_cache(
    model: Any, recorded: type[RecordedGraph]
) -> None:
    batch = batch_of(SHAPE, SMALL)
    model.generate(**batch, **NEW)
    with pytest.raises(KeyboardInterrupt):
        model.generate(**batch, **NEW, streamer=Recorder(interrupt_at=7))
    check(model, batch_of(SHAPE, [Prompt(12, (2,), (3,))]))
    assert len(recorded.made) == len(kept(model)) == 1


@pytest.mark.parametrize("where", ["prompt", "replay"])
def test_an_interrupt_within_a_step_drops_it(
    model: Any, recorded: type[RecordedGraph], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    batch = batch_of(SHAPE, SMALL)
    model.generate(**batch, **NEW)

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "prompt":
            patch.setattr(type(model.model.vision_model), "encode", interrupt)
        else:
            patch.setattr(RecordedGraph, "replay", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.generate(**batch, **NEW)
    is_dropped = where == "replay"
    assert (model.kept_store.store is None) == is_dropped
    check(model, batch)
    assert len(recorded.made) == 1 + is_dropped


def test_a_store_is_as_large_as_calls_need(
    model: Any, recorded: type[RecordedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [batch_of(SHAPE, [Prompt(6)] * rows) for rows in (1, 2, 3)]
    made, last = [], [lambda: None]
    original = borrowing.KeyValueStore

    def store(*args: Any, **options: Any) -> Any:
        assert last[-1]() is None, "the one before goes first"
        made.append(options["num_pages"] - 1)
        new = original(*args, **options)
        last.append(weakref.ref(new))
        return new

    monkeypatch.setattr(borrowing, "KeyValueStore", store)
    for batch in (*batches, *batches):
        check(model, batch)
    assert made == [1, 2, 3] and len(recorded.made) == 5
    monkeypatch.setattr(lending, "_budget", lambda device: 1)
    check(model, batches[1])
    assert made == [1, 2, 3], "it is too large to be kept, but not much larger than this call needs"
    check(model, batches[0])
    assert made == [1, 2, 3, 1]
    check(model, batches[1])
    assert made == [1, 2, 3, 1, 2]


def test_lent_rows_follow_the_work_of_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose calls may have used other streams, and have left steps there that have not run yet."""

    class Stream:
        done: tuple[str, ...] = ()

        def wait_event(self, event: Event) -> None:
            self.done += event.done

    class Event:
        def record(self, stream: Stream) -> None:
            self.done = stream.done

    on_gpu = type("Values", (), {"device": torch.device("cuda", 0)})()
    store = type("Store", (), {"num_pages": 9, "num_slots": 0, "page_values": on_gpu})()
    need = lending.Need(2, 2, 0, 0, torch.float32, on_gpu.device)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    pool, streams, lent = lending._Pool(store), {name: Stream() for name in "abc"}, {}
    for name, gives_back in (("a", False), ("b", False), ("a", True), ("b", True), ("c", False)):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _, name=name: streams[name])
        if gives_back:
            streams[name].done += (name,)
            pool.give_back(lent[name])
        else:
            lent[name] = pool.take(need)
    assert {*streams["c"].done} == {"a", "b"} and pool.num_pages_lent == 4


def test_the_least_recently_used_step_goes_first(
    model: Any, recorded: type[RecordedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "_MOST_KEPT", 2)
    batches = [batch_of(SHAPE, [Prompt(6)] * rows) for rows in (3, 2, 1)]
    for place in (0, 1, 0, 2):
        model.generate(**batches[place], **NEW)
    assert [len(step.rows.tokens) for step in kept(model)] == [3, 1]


def test_freeing(model: Any, recorded: type[RecordedGraph]) -> None:
    batch = batch_of(SHAPE, SMALL)

    def freed_by(action: Callable[[], Any]) -> None:
        model.generate(**batch, **NEW)
        (step,) = kept(model)
        freed = [weakref.ref(model.kept_store.store), weakref.ref(step._graph)]
        del step
        stream = model.stream(**batch, **NEW, tokenizer=byte_tokenizer())
        next(stream)  # uses the store that was kept
        model.generate(**batch, **NEW)
        assert len(kept(model)) == 1
        action()
        assert model.kept_store.store is None
        stream.close()
        assert model.kept_store.store is None, "what was in use is not kept either"
        assert not len(model.kept_steps._steps)
        recorded.made.clear()
        assert [reference() for reference in freed] == [None, None]
        model.cuda_graph = True

    gc.disable()  # no reference cycle may hold the memory
    try:
        freed_by(model.free_idle_caches)
        freed_by(lambda: setattr(model, "cuda_graph", False))
        freed_by(lambda: model.to(torch.float64))
    finally:
        gc.enable()


def test_a_model_and_its_caches_go_with_their_last_reference(recorded: type[RecordedGraph]) -> None:
    model = our_model(SHAPE, hf_model(SHAPE), ("kernels", "cpu"))
    batch = batch_of(SHAPE, SMALL)
    result = model.generate(**batch, **NEW, return_dict_in_generate=True)
    model.generate(**batch, **NEW)
    store = model.kept_store.store
    gone = [weakref.ref(each) for each in (model, store, result.past_key_values)]
    recorded.made.clear()
    gc.collect()
    gc.disable()
    try:
        del model, store, result
        assert [reference() for reference in gone] == [None] * 3
    finally:
        gc.enable()


def test_copies_come_without_graphs(model: Any, recorded: type[RecordedGraph]) -> None:
    names, batch = list(model.state_dict()), batch_of(SHAPE, SMALL)
    result = model.generate(**batch, **NEW, return_dict_in_generate=True)
    expected = model.generate(**batch, **NEW)
    assert list(model.state_dict()) == names
    copies = [deepcopy(model), pickle.loads(pickle.dumps(model))]
    for count, each in enumerate(copies, 3):
        assert each.kept_store.store is None and not len(each.kept_steps._steps)
        assert each.generate(**batch, **NEW).equal(expected)
        assert len(recorded.made) == count
    assert len(kept(model)) == 1
    cache = result.past_key_values
    turn = second_turn(batch, result.sequences, torch.randint(3, SHAPE.vocab, (1, 4)))
    copies = [deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache]
    answers = [model.generate(**turn, **NEW, past_key_values=each) for each in copies]
    assert answers[0].equal(answers[1]) and answers[0].equal(answers[2])


def test_nothing_is_kept_without_cuda(model: Any) -> None:
    model.generate(**batch_of(SHAPE, SMALL), **NEW)
    assert model.kept_store.store is None
