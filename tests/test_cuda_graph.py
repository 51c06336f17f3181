"""The decode step: it reads nothing on the host, and what it does once it does on every replay.

On a machine without a GPU a stand-in takes the place of the CUDA graph. It records the operations
of one step and repeats them on the very same tensors, as a graph does: a value that the host had
computed for the first step would come out in all of them.
"""

from __future__ import annotations

import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from copy import copy, deepcopy
from typing import Any, ClassVar

import pytest
import torch
from generation_helpers import Recorder, byte_tokenizer, second_turn
from model_helpers import PAD_TOKEN, Prompt, Shape, batch_of, hf_model, our_model, to
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import mllama
import mllama_kernels._library as library
from mllama.generation import generate as generation
from mllama.generation import idle
from mllama.generation.cuda_graph import CapturedStep, DecodeStep
from mllama.generation.idle import rounded_capacity

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

    @torch.inference_mode()  # a graph writes tensors of any mode
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
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph)
    monkeypatch.setattr(generation, "_captures", lambda model, tokens: model.cuda_graph)
    monkeypatch.setattr(idle, "_budget", lambda device: 2**30)
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

    class Step:
        tokens = torch.zeros(1)

        def __call__(self, model: Any, cache: Any) -> None:
            cache.columns += 1

    class Cache:
        columns = 7

        def settle(self) -> None:
            pass

    captured, cache = CapturedStep(Step()), Cache()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            captured(None, cache)
    assert [str(w.message)[:42] for w in caught] == ["decoding continues without a CUDA graph: o"]
    assert cache.columns == 10, "each of the three steps is one column"
    assert current == before and device == ["cuda:0"]


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
            tensors += (cache.next_position, cache.tile_table, *cache.pages(0), *cache.tiles(1))
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
    assert len(recorded.made) == 1 and len(model._idle_caches) == 1


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
        ({k: v for k, v in one.items() if k != "cross_attention_mask"}, {}),
        (one, {"repetition_penalty": 1.2}),
        (one, {"do_sample": True, "seed": 1}),
        (one, {"do_sample": True, "seed": 1, "top_k": 3}),
    ]
    for _ in range(2):
        for batch, options in calls:
            check(model, batch, **options)
        assert len(recorded.made) == len(model._idle_caches) == len(calls)
    with torch.inference_mode():
        check(model, one)
    assert len(recorded.made) == len(calls) + 1


def test_capacity_is_a_power_of_two_pages() -> None:
    capacities = [rounded_capacity(tokens) for tokens in (1, 64, 65, 128, 129, 300, 131072)]
    assert capacities == [64, 64, 128, 128, 256, 512, 131072]


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
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: -output if module is model.lm_head else None
    )
    model.generate(**batch, **NEW)
    assert len(recorded.made) == 2
    handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(**batch, **NEW)
    assert len(recorded.made) == 3
    check(model, batch)
    assert len(recorded.made) == 4


def test_another_backend_is_not_replayed(model: Any, recorded: type[RecordedGraph]) -> None:
    batch = batch_of(SHAPE, SMALL)
    check(model, batch)
    model.backend = "reference"  # it reads lengths on the host
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        model.generate(**batch, **NEW)
    assert not len(model._idle_caches), "without a graph there is nothing to keep"


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
    assert len(recorded.made) == 1 and not len(model._idle_caches)
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


def test_a_returned_cache_belongs_to_the_caller(model: Any, recorded: type[RecordedGraph]) -> None:
    batch = batch_of(SHAPE, SMALL)
    model.generate(**batch, **NEW)
    result = model.generate(**batch, **NEW, return_dict_in_generate=True)
    cache = result.past_key_values
    assert cache not in [kept for _, kept in model._idle_caches._entries]
    before = deepcopy(cache)
    model.generate(**batch_of(SHAPE, [Prompt(9, (4,), (2,))]), **NEW)
    for ours, theirs in zip(cache.step_tensors(), before.step_tensors()):
        assert ours.equal(theirs)
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


def test_one_cache_and_other_options(model: Any, recorded: type[RecordedGraph]) -> None:
    """A cache has the latest step captured on it."""
    plain, cache, batch = uncaptured(model), model.new_cache(max_tokens=64), batch_of(SHAPE, SMALL)
    options: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.4},
        {"do_sample": True, "seed": 2},
    ]
    for count, option in enumerate([*options, options[-1]], 1):
        cache.reset()
        answer = model.generate(**batch, **NEW, **option, past_key_values=cache)
        assert answer.equal(plain.generate(**batch, **NEW, **option))
        assert len(recorded.made) == min(count, 3)


def test_one_cache_and_two_models(model: Any, recorded: type[RecordedGraph]) -> None:
    other, batch = deepcopy(model), batch_of(SHAPE, SMALL)
    with torch.no_grad():
        other.lm_head.weight.neg_()
    cache = model.new_cache(max_tokens=64)
    for each in (model, other, model):
        cache.reset()
        answer = each.generate(**batch, **NEW, past_key_values=cache)
        assert answer.equal(uncaptured(each).generate(**batch, **NEW))
    assert len(recorded.made) == 3


def test_a_failed_turn_takes_nothing_from_the_cache(
    model: Any, recorded: type[RecordedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its new view was moved to the place of the old one, which must come back."""
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
    for _ in range(2):
        streams, texts = [model.stream(**batch, **options) for batch in prompts], ["", ""]
        for _ in range(20):
            for index, stream in enumerate(streams):
                texts[index] += next(stream, "")
        assert texts == expected
        assert all(next(stream, None) is None for stream in streams)
        assert len(recorded.made) == len(model._idle_caches) == 2, "each has its own"


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
    assert not len(model._idle_caches)
    stream.close()
    assert len(model._idle_caches) == 1
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
    assert len(recorded.made) == len(model._idle_caches) == 1


@pytest.mark.parametrize("where", ["prompt", "replay"])
def test_an_interrupt_within_drops_the_cache(
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
    assert not len(model._idle_caches)
    check(model, batch)
    assert len(recorded.made) == 2


def test_the_least_recently_used_goes_first(
    model: Any, recorded: type[RecordedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [batch_of(SHAPE, [Prompt(6)] * rows) for rows in (1, 2, 3)]

    def kept() -> list[int]:
        return [bucket.batch_size for bucket, _ in model._idle_caches._entries]

    for batch in batches:
        model.generate(**batch, **NEW)
    assert kept() == [1, 2, 3]
    model.generate(**batches[0], **NEW)
    assert kept() == [2, 3, 1]
    size = model._idle_caches._entries[-1][1].nbytes
    monkeypatch.setattr(idle, "_budget", lambda device: 4 * size)
    model.generate(**batches[0], **NEW)
    assert kept() == [3, 1], "six sizes do not fit, four do"
    monkeypatch.setattr(idle, "_budget", lambda device: size - 1)
    model.generate(**batches[0], **NEW)
    assert kept() == [1], "one is kept whatever its size"
    model.generate(**batches[0], **NEW)
    assert len(recorded.made) == 3
    during = []
    monkeypatch.setattr(
        model,
        "new_cache",
        lambda *args: during.append(kept()) or type(model).new_cache(model, *args),
    )
    model.generate(**batches[1], **NEW)
    assert during[-1] == [], "one that is too large goes before another cache is made"
    assert kept() == [2]


def test_freeing(model: Any, recorded: type[RecordedGraph]) -> None:
    batch = batch_of(SHAPE, SMALL)

    def freed_by(action: Callable[[], Any]) -> None:
        model.generate(**batch, **NEW)
        cache = model._idle_caches._entries[0][1]
        freed = [weakref.ref(cache), weakref.ref(cache.captured._graph)]
        del cache
        stream = model.stream(**batch, **NEW, tokenizer=byte_tokenizer())
        next(stream)  # uses the cache that was kept
        model.generate(**batch, **NEW)
        assert len(model._idle_caches) == 1
        action()
        assert not len(model._idle_caches)
        stream.close()
        assert not len(model._idle_caches), "what was in use is not kept either"
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
    kept = model._idle_caches._entries[0][1]
    gone = [weakref.ref(each) for each in (model, kept, result.past_key_values)]
    recorded.made.clear()
    gc.collect()
    gc.disable()
    try:
        del model, kept, result
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
        assert not len(each._idle_caches)
        assert each.generate(**batch, **NEW).equal(expected)
        assert len(recorded.made) == count
    assert len(model._idle_caches) == 1
    cache = result.past_key_values
    turn = second_turn(batch, result.sequences, torch.randint(3, SHAPE.vocab, (1, 4)))
    copies = [deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache]
    assert copies[0].captured is copies[1].captured is copy(cache).captured is None
    answers = [model.generate(**turn, **NEW, past_key_values=each) for each in copies]
    assert answers[0].equal(answers[1]) and answers[0].equal(answers[2])


def test_nothing_is_kept_without_cuda(model: Any) -> None:
    model.generate(**batch_of(SHAPE, SMALL), **NEW)
    assert not len(model._idle_caches)
