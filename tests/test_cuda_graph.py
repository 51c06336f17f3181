"""The decode step: it reads nothing on the host, and what it does once it does on every replay.

On a machine without a GPU a stand-in takes the place of the CUDA graph. It records the operations
of one step and repeats them on the very same tensors, as a graph does: a value that the host had
computed for the first step would come out in all of them.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
import torch
from model_helpers import PAD_TOKEN, Prompt, Shape, batch_of, hf_model, our_model, to
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import mllama
import mllama_kernels._library as library
from mllama.generation import mixin as generation
from mllama.generation.cuda_graph import CapturedStep, DecodeStep

pytestmark = [
    pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated"),
    pytest.mark.skipif(
        library.missing is not None, reason=f"the compiled ops are not there: {library.missing}"
    ),
]

SHAPE = Shape(head_dim=64, vision_head_dim=64, intermediate=96, tile_side=28)

# What makes the host wait for the device, or the shape of a result depend on values there.
OPERATIONS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}
OPERATIONS |= {"_unique2", "unique_dim", "repeat_interleave", "bincount"}
METHODS = {"tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"}


class NoHostReads(TorchFunctionMode):
    """Refuses the methods that read CPU memory without an operation."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in METHODS:
            raise RuntimeError(f"{func.__name__}() cannot be captured: it reads the device")
        return func(*args, **(kwargs or {}))


class RecordedGraph(TorchDispatchMode):
    """Has the interface of torch.cuda.CUDAGraph as far as CapturedStep uses it."""

    made: ClassVar[list[RecordedGraph]] = []

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple, dict, Any]] = []
        self._guard = NoHostReads()
        self.replays = 0
        self.made.append(self)

    def __enter__(self) -> RecordedGraph:
        self._guard.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._guard.__exit__(*exception)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func.overloadpacket.__name__ in OPERATIONS:
            raise RuntimeError(f"{func} cannot be captured: it reads the device")
        out = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        self.replays += 1
        if self.replays == 1:
            return  # unlike a capture, the recording has run the step
        for func, args, kwargs, recorded in self._calls:
            given = {t.data_ptr() for t in tree_flatten((args, kwargs))[0] if torch.is_tensor(t)}
            results = tree_flatten(func(*args, **kwargs))[0]
            for old, new in zip(tree_flatten(recorded)[0], results):
                if torch.is_tensor(old) and old.data_ptr() not in given:
                    if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                        old.copy_(new)


class FakeStream:
    cuda_stream = 0

    def __init__(self, *_: Any) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> type[RecordedGraph]:
    """Let generation capture on the CPU."""
    monkeypatch.setattr(RecordedGraph, "made", [])
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph)
    monkeypatch.setattr(generation, "_captures", lambda model, tokens: model.cuda_graph)
    return RecordedGraph


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
    for ours, theirs in zip(cache.pages(0), expected_cache.pages(0)):
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


def test_the_stand_in_notices_a_value_from_the_host(
    model: Any, recorded: type[RecordedGraph]
) -> None:
    """Otherwise the tests above would prove nothing."""

    class Step(DecodeStep):
        def __init__(self) -> None:
            self.tokens, self.count = torch.zeros(1), 0

        def __call__(self, model: Any, cache: Any) -> None:
            self.count += 1
            self.tokens.copy_(torch.full((1,), float(self.count)))

    step = Step()
    run, seen = CapturedStep(step), []
    for _ in range(5):
        run(model, model.new_cache())
        seen.append(step.tokens.item())
    assert seen == [1, 2, 3, 3, 3], "a graph repeats the third step"


def test_capture_is_for_kernels_on_cuda(model: Any) -> None:
    token = torch.zeros(1, dtype=torch.int64)
    assert not generation._captures(model, token)
    on_gpu = type("Tokens", (), {"is_cuda": True})()
    assert generation._captures(model, on_gpu)
    model.backend = "reference"
    assert not generation._captures(model, on_gpu)
    model.backend, model.cuda_graph = "kernels", False
    assert not generation._captures(model, on_gpu)


@pytest.mark.gpu
def test_a_captured_graph_on_the_gpu() -> None:
    model = our_model(SHAPE, hf_model(SHAPE), ("kernels", "cuda"))
    model.generation_config = {"pad_token_id": PAD_TOKEN}
    batch = to(batch_of(SHAPE, [Prompt(60, (2, 7), (6, 2)), Prompt(5)]), "cuda")
    for options in ({}, {"do_sample": True, "seed": 3, "top_p": 0.9, "repetition_penalty": 1.1}):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a failed capture would only warn
            replayed = model.generate(**batch, max_new_tokens=100, **options)
        model.cuda_graph = False
        assert replayed.equal(model.generate(**batch, max_new_tokens=100, **options))
        model.cuda_graph = True


def test_all_room_is_made_before_the_first_step(model: Any) -> None:
    """The step reads and writes the same tensors from first to last."""
    batch, pointers = batch_of(SHAPE, [Prompt(60, (2,), (6,))]), set()
    original = model.forward

    def forward(**inputs: Any) -> Any:
        cache = inputs["past_key_values"]
        if inputs["input_ids"].shape[1] == 1:
            assert set(inputs) == {"input_ids", "past_key_values", "logits_to_keep"}
            tensors: tuple[Tensor, ...] = (inputs["input_ids"], cache.page_table, cache.lengths)
            tensors += (cache.next_position, cache.tile_table, *cache.pages(0), *cache.tiles(1))
            pointers.add(tuple(t.data_ptr() for t in tensors))
        assert inputs["logits_to_keep"] == 1
        return original(**inputs)

    model.forward = forward
    model.generate(**batch, max_new_tokens=10)
    assert len(pointers) == 1
