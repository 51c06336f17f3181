"""The whole model beside `transformers`: time to the first token, and decoding, through generate().

Both models hold the same random weights of the 11B shape, in the same memory. On a GPU all layers are
there; on a CPU a few of each kind at their true dimensions, so that a run fits into memory and minutes.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

import mllama
from benchmarks import ceilings, machine
from benchmarks.budget import Budget
from benchmarks.case import OURS
from benchmarks.measure import in_words
from benchmarks.scenario import (
    FULL,
    PAD,
    REDUCED,
    SMALL_VOCABULARY,
    Layers,
    Scenario,
    fitting,
    products,
    scenarios,
)
from benchmarks.shapes import TILE, TILES, VOCAB
from benchmarks.timing import Spread, interleave, ratios, significant
from mllama.parallel.rules import Cut
from mllama.quantized_modules import Quantized

PEER = "transformers sdpa"
LEFT_OUT = "no time was left, or the run was interrupted"
ALL_TILES, ROUNDS = 6, 5
# Of the logits' norm: what summation order and the rounding of activations account for.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-5, torch.float16: 2**-8}


@torch.no_grad()
def fill(model: nn.Module, wholes: Mapping[str, tuple[Tensor, Cut]] = MappingProxyType({})) -> None:
    """Random weights, made where they lie, under which activations stay near one and gates are open.

    One block of normal numbers is repeated: drawing ten billion would take longer than measuring. Its
    length divides no dimension, so no two rows of a matrix are alike.

    Args:
        wholes: by name, of parameters of which a model that is split over ranks has a part: the whole one, as
            a tensor on the meta device, and which part it is.
    """
    first = next(model.parameters())
    block = torch.randn(2**22 - 3, device=first.device)
    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if "norm" in name:
            parameter.fill_(1.0 if last == "weight" else 0.0)
        elif "gate" in last:
            parameter.fill_(0.5)
        else:
            whole, cut = wholes.get(name, (parameter, Cut(0, 0, 0)))
            fan_in = whole[0].numel() if whole.dim() > 1 else whole.numel()
            scale = 0.5 if "embed" in name else fan_in**-0.5
            values = (block * scale).to(parameter.dtype)
            if cut.dim == 0:  # one piece of the whole
                _repeat(values, parameter, cut.begin * whole[0].numel())
            else:
                values = _repeat(values, parameter.new_empty(whole.shape))
                parameter.copy_(cut(values))


def _repeat(values: Tensor, target: Tensor, begin: int = 0) -> Tensor:
    """The endless repetition of the values from ``begin`` on, in a contiguous target."""
    flat, at = target.view(-1), 0
    while at < len(flat):
        piece = values[(begin + at) % len(values) :][: len(flat) - at]
        flat[at : at + len(piece)] = piece
        at += len(piece)
    return target


def build(
    layers: Layers,
    dtype: torch.dtype,
    device: torch.device,
    vocabulary: int = VOCAB,
    tile: int = TILE,
) -> tuple[Any, Any]:
    """Our model and that of `transformers` over the same parameters."""
    import transformers

    with torch.device("meta"):
        mine = mllama.MllamaForConditionalGeneration(
            mllama.MllamaConfig(**layers.configs(vocabulary, tile)),
            backend="kernels",
            semantics="transformers",
        )
        config = transformers.MllamaConfig(**layers.configs(vocabulary, tile))
        config._attn_implementation = "sdpa"
        theirs = transformers.MllamaForConditionalGeneration(config)
    mine = mine.to(dtype).to_empty(device=device).eval()
    fill(mine)
    theirs.load_state_dict(mine.state_dict(), assign=True)
    text = theirs.model.language_model
    text.rotary_emb = type(text.rotary_emb)(config.text_config).to(device)
    theirs.generation_config.eos_token_id = None  # random weights must not stop early
    theirs.generation_config.pad_token_id = min(PAD, vocabulary - 1)
    return mine, theirs.eval()


def inputs_of(
    scenario: Scenario, dtype: torch.dtype, device: torch.device, vocabulary: int = VOCAB
) -> dict[str, Tensor]:
    """The image comes first, so that the semantics of both models agree on every row."""
    batch, prompt, tile = scenario.batch, scenario.prompt, scenario.tile
    ids = torch.randint(1000, vocabulary * 3 // 4, (batch, prompt))
    ids[:, 0] = vocabulary
    ones = torch.ones(batch, prompt, dtype=torch.int64)
    inputs = {
        "input_ids": ids,
        "attention_mask": ones,
        "aspect_ratio_ids": torch.full((batch, 1), ALL_TILES),
        "aspect_ratio_mask": torch.ones(batch, 1, TILES, dtype=torch.int64),
        "cross_attention_mask": ones[..., None, None].expand(-1, -1, 1, TILES).contiguous(),
    }
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    pixels = torch.randn(batch, 1, TILES, 3, tile, tile, device=device, dtype=dtype)
    return inputs | {"pixel_values": pixels}


class Stopwatch:
    """A streamer that notes when each token reaches the host."""

    def __init__(self) -> None:
        self._times = [time.perf_counter()]

    def put(self, tokens: Tensor) -> None:
        self._times.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def first_token(self) -> float:
        """Seconds from the call to the first token; the prompt is put before it."""
        return self._times[2] - self._times[0]

    @property
    def token(self) -> float:
        """Seconds per token after the first."""
        return (self._times[-1] - self._times[2]) / (len(self._times) - 3)


@dataclass
class Contestant:
    """A model as it is run.

    Attributes:
        options: of ``generate``.
        enter: puts it into the state it is measured in.
        unavailable: why it cannot run here.
        tolerance: of the logits' norm; None: what the dtype allows.
        bytes_per_step: what a decoding step of it reads; None: what one of ours reads.
    """

    name: str
    model: Any
    options: dict[str, Any]
    enter: Callable[[], None] = lambda: None
    unavailable: str | None = None
    tolerance: float | None = None
    bytes_per_step: int | None = None


def contestants(mine: Any, theirs: Any, quick: bool) -> list[Contestant]:
    text, vision = theirs.model.language_model, theirs.model.vision_model
    compiled: dict[Any, Any] = {}

    def attention(name: str) -> Callable[[], None]:
        def enter() -> None:
            theirs.set_attn_implementation(name)
            text._compiled_call_impl = vision._compiled_call_impl = None

        return enter

    def compile_towers() -> None:
        """Each tower as a whole; the cache grows, so lengths are dynamic."""
        attention("sdpa")()
        if not compiled:
            vision.compile(dynamic=False)
            text.compile(dynamic=True)
            compiled.update({m: m._compiled_call_impl for m in (text, vision)})
        for module, call in compiled.items():
            module._compiled_call_impl = call

    on_cpu = mine.device.type == "cpu"
    no_time = "compiling takes longer than all the rest of this run" if on_cpu or quick else None
    return [
        Contestant(
            OURS,
            mine,
            {"eos_token_id": None, "pad_token_id": theirs.generation_config.pad_token_id},
        ),
        Contestant(PEER, theirs, {}, attention("sdpa")),
        Contestant(
            "transformers eager",
            theirs,
            {},
            attention("eager"),
            "its scores of an image take 8 GB and more" if on_cpu else None,
        ),
        Contestant(
            "transformers compiled",
            theirs,
            {},
            compile_towers,
            no_time,
        ),
    ]


def generate(contestant: Contestant, inputs: dict[str, Tensor], new: int) -> Stopwatch:
    contestant.enter()
    if inputs["input_ids"].is_cuda:
        torch.cuda.synchronize()
    watch = Stopwatch()
    contestant.model.generate(
        **inputs, max_new_tokens=new, do_sample=False, streamer=watch, **contestant.options
    )
    return watch


def difference(actual: Tensor, expected: Tensor) -> float:
    """Euclidean distance of logits relative to the expected ones."""
    a, e = actual.double(), expected.double()
    return (torch.linalg.vector_norm(a - e) / torch.linalg.vector_norm(e)).item()


def bytes_per_step(model: Any, scenario: Scenario) -> int:
    """What one decoding step must read: the weights it uses, and the keys and values of every row; of a model
    that is split over ranks what this one reads."""
    text = getattr(model.config, "text_config", model.config)
    tower = getattr(model.model, "language_model", model.model)
    unused = ("embed_tokens", "cross_attn.k_proj", "cross_attn.v_proj", "cross_attn.k_norm")
    used = [
        module
        for part in (tower, model.lm_head)
        for name, module in part.named_modules()
        if not any(one in name for one in unused)
    ]
    weights = sum(p.nbytes for module in used for p in module.parameters(recurse=False))
    weights += sum(module.weight.nbytes for module in used if isinstance(module, Quantized))
    context = scenario.prompt + scenario.new // 2
    keys = context * len(text.self_attention_layers)
    keys += scenario.image_tokens * len(text.cross_attention_layers)
    return (
        weights
        + scenario.batch
        * keys
        * 2
        * text.local_key_value_heads
        * text.head_dim
        * model.dtype.itemsize
    )


def runs_flops(model: Any, scenario: Scenario) -> int:
    """Of comparing both models and of one round, two forwards each; and as much beside products."""
    return 2 * 2 * 2 * 2 * sum(products(model, scenario))


@torch.no_grad()
def measure(
    found: list[Contestant],
    reference: str,
    inputs: dict[str, Tensor],
    scenario: Scenario,
    sizes: dict[str, Any],
    budget: Budget,
) -> dict[str, Any]:
    """The row of a scenario, ready for JSON.

    Args:
        found: ours and its peers.
        reference: the name of the one with which logits are compared.
        inputs: of all of them.
        sizes: what the row says beside batch, prompt and new tokens.
    """
    mine = next(contestant.model for contestant in found if contestant.name == OURS)
    device = mine.device
    before = machine.state(device)
    dtype_name = str(mine.dtype).removeprefix("torch.")
    records, runs = [], []
    expected: Tensor | None = None
    for contestant in sorted(found, key=lambda c: c.name != reference):
        record: dict[str, Any] = {"name": contestant.name, "status": "timed"}
        if contestant.bytes_per_step is not None:
            record["bytes_per_step"] = contestant.bytes_per_step
        records.append(record)
        if contestant.unavailable:
            record |= {"status": "unavailable", "reason": contestant.unavailable}
            continue
        if budget.interrupted or (budget.over and contestant.name not in (OURS, reference)):
            record |= {"status": "left out", "reason": LEFT_OUT}
            continue
        budget.say(f"model, {dtype_name}, batch {scenario.batch}: {contestant.name} is compared")
        try:
            contestant.enter()
            logits = contestant.model(**inputs, logits_to_keep=1).logits
            expected = logits if expected is None else expected
            record["difference"] = significant(difference(logits, expected), 3)
            if not record["difference"] <= (contestant.tolerance or TOLERANCE[mine.dtype]):
                reason = f"logits differ by {record['difference']} of those of {reference}"
                record |= {"status": "wrong", "reason": reason}
                continue
            if device.type == "cuda":  # graphs, recompilations; and how much memory it takes
                torch.cuda.reset_peak_memory_stats()
                generate(contestant, inputs, 8)
                record["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        except Exception as error:  # out of memory, a peer that does not compile
            record |= {"status": "failed", "reason": in_words(error)}
            if device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        runs.append((record, contestant))
    reader = ceilings.Reader(device)  # not before: what it reads would count as peak memory

    def run(contestant: Contestant) -> tuple[Stopwatch, float]:
        """And right after it GB/s of reading: on a shared machine that changes within seconds."""
        budget.say(f"model, {dtype_name}, batch {scenario.batch}: {contestant.name} generates")
        return generate(contestant, inputs, scenario.new), reader.round()

    rounds = interleave([partial(run, contestant) for _, contestant in runs], ROUNDS, budget)
    reader.close()
    if not all(rounds):
        for record, _ in runs:
            record |= {"status": "left out", "reason": LEFT_OUT}
        runs = []
    times = {
        record["name"]: {
            "first_token": [watch.first_token for watch, _ in row],
            "token": [watch.token for watch, _ in row],
        }
        for (record, _), row in zip(runs, rounds)
    }
    for (record, _), row in zip(runs, rounds):
        record["read_gbps_rounds"] = [significant(rate) for _, rate in row]
        for what, seconds in times[record["name"]].items():
            record[f"{what}_ms"] = Spread.of([s * 1e3 for s in seconds]).to_json()
            record[f"{what}_rounds_ms"] = [significant(s * 1e3, 5) for s in seconds]
            if OURS in times and record["name"] != OURS:
                faster = ratios(times[OURS][what], seconds)
                record[f"ours_is_faster_{what}"] = faster.to_json()
        record["tokens_per_s"] = significant(1e3 * scenario.batch / record["token_ms"]["median"])
    records.sort(key=lambda record: record["name"] != OURS)
    return {
        "shape": {
            "batch": scenario.batch,
            "prompt": scenario.prompt,
            "new": scenario.new,
            **sizes,
        },
        "dtype": dtype_name,
        "bytes_per_step": bytes_per_step(mine, scenario),
        "state": {"before": before, "after": machine.state(device)},
        "impls": records,
    }


def run(
    device: torch.device,
    dtypes: list[torch.dtype],
    quick: bool,
    seed: int,
    budget: Budget,
    tflops: Mapping[torch.dtype, float],
) -> Iterator[dict[str, Any]]:
    """One row per dtype and scenario; a quick run on a CPU has smaller images where that one is slow."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers about its own calls
    on_cpu = device.type == "cpu"
    layers = REDUCED if on_cpu else FULL
    vocabulary = SMALL_VOCABULARY if on_cpu and quick else VOCAB
    for number, dtype in enumerate(dtypes):
        if budget.interrupted:
            return
        torch.manual_seed(seed)
        chosen = scenarios(device, quick)
        with budget.share(1 / (len(dtypes) - number)):
            if on_cpu and quick:
                seconds = budget.left
                chosen = [fitting(layers, s, runs_flops, seconds, tflops[dtype]) for s in chosen]
            built: tuple[int, Any, Any] | None = None
            for place, scenario in enumerate(chosen):
                if budget.interrupted:
                    return
                if built is None or built[0] != scenario.tile:
                    budget.say(f"model, {dtype}: weights; rows to come: {len(chosen) - place}")
                    built = None  # before the next ones are made
                    built = (
                        scenario.tile,
                        *build(layers, dtype, device, vocabulary, scenario.tile),
                    )
                inputs = inputs_of(scenario, dtype, device, vocabulary)
                with budget.share(1 / (len(chosen) - place)):
                    yield measure(
                        contestants(*built[1:], quick),
                        PEER,
                        inputs,
                        scenario,
                        scenario.sizes(layers),
                        budget,
                    )


def line(row: dict[str, Any]) -> str:
    """One row on the terminal."""
    text = f"model {row['shape']} {row['dtype']}"
    for impl in row["impls"]:
        if impl["status"] != "timed":
            text += f"\n  {impl['name']:34}{impl['status']}: {impl['reason']}"
            continue
        text += f"\n  {impl['name']:34}first token {impl['first_token_ms']['median']:9.1f} ms, "
        text += f"then {impl['tokens_per_s']:7.2f} tokens/s"
    return text


def add_floor(row: dict[str, Any]) -> None:
    """The share of the read bandwidth that decoding reaches, each round against the reading after it."""
    for impl in row["impls"]:
        if impl["status"] == "timed":
            rates = impl["read_gbps_rounds"]
            nbytes = impl.get("bytes_per_step", row["bytes_per_step"])
            floors_ms = [nbytes / (rate * ceilings.GB) * 1e3 for rate in rates]
            impl["floor_token_ms"] = significant(median(floors_ms))
            shares = ratios(impl["token_rounds_ms"], floors_ms)
            impl["share_of_floor"] = significant(shares.median, 3)
