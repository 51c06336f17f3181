"""The whole model beside `transformers`: time to the first token, and decoding, through generate().

Both models hold the same random weights of the 11B shape, in the same memory. On a GPU all layers are
there; on a CPU a few of each kind at their true dimensions, so that a run fits into memory and minutes.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import mllama
from benchmarks import ceilings, machine
from benchmarks.case import OURS
from benchmarks.measure import in_words
from benchmarks.shapes import HKV, TILE, TILE_TOKENS, TILES, VISION_WIDTH, VOCAB, D
from benchmarks.timing import Spread, interleave, ratios, significant

PEER = "transformers sdpa"
PAD, ALL_TILES, ROUNDS = 128004, 6, 5
# Of the logits' norm: what summation order and the rounding of activations account for.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-5, torch.float16: 2**-8}


@dataclass(frozen=True)
class Layers:
    """How many layers of each kind; ``cross`` counts among ``text``, ``taps`` among ``local``."""

    text: int
    cross: tuple[int, ...]
    local: int
    global_: int
    taps: tuple[int, ...]

    def configs(self, vocabulary: int = VOCAB) -> dict[str, Any]:
        """Keyword arguments of MllamaConfig, ours or that of `transformers`."""
        rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0}
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"original_max_position_embeddings": 8192}
        vision = {
            "image_size": TILE,
            "num_hidden_layers": self.local,
            "num_global_layers": self.global_,
            "intermediate_layers_indices": list(self.taps),
            "vision_output_dim": VISION_WIDTH * (1 + len(self.taps)),
        }
        text = {
            "num_hidden_layers": self.text,
            "cross_attention_layers": list(self.cross),
            "rope_parameters": rope,
            "vocab_size": vocabulary,
            "pad_token_id": min(PAD, vocabulary - 1),
        }
        return {"vision_config": vision, "text_config": text, "image_token_index": vocabulary}


FULL = Layers(40, (3, 8, 13, 18, 23, 28, 33, 38), 32, 8, (3, 7, 15, 23, 30))
REDUCED = Layers(5, (3,), 1, 1, (0,))


@dataclass(frozen=True)
class Scenario:
    """One picture of four tiles per row, ``prompt`` tokens with it, ``new`` tokens after it."""

    batch: int
    prompt: int
    new: int


def scenarios(device: torch.device, quick: bool) -> list[Scenario]:
    if device.type == "cpu":
        return [Scenario(1, 32, 8)]
    if quick:
        return [Scenario(1, 32, 16), Scenario(1, 1024, 64)]
    many = (Scenario(batch, 1024, 64) for batch in (8, 32))
    return [Scenario(1, 32, 32), Scenario(1, 1024, 128), *many]


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Random weights, made where they lie, under which activations stay near one and gates are open.

    One block of normal numbers is repeated: drawing ten billion would take longer than measuring. Its
    length divides no dimension, so no two rows of a matrix are alike.
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
            fan_in = parameter[0].numel() if parameter.dim() > 1 else parameter.numel()
            scale = 0.5 if "embed" in name else fan_in**-0.5
            values = (block * scale).to(parameter.dtype)
            for piece in parameter.view(-1).split(len(values)):
                piece.copy_(values[: len(piece)])


def build(
    layers: Layers, dtype: torch.dtype, device: torch.device, vocabulary: int = VOCAB
) -> tuple[Any, Any]:
    """Our model and that of `transformers` over the same parameters."""
    import transformers

    with torch.device("meta"):
        mine = mllama.MllamaForConditionalGeneration(
            mllama.MllamaConfig(**layers.configs(vocabulary)),
            backend="kernels",
            semantics="transformers",
        )
        config = transformers.MllamaConfig(**layers.configs(vocabulary))
        config._attn_implementation = "sdpa"
        theirs = transformers.MllamaForConditionalGeneration(config)
    mine = mine.to(dtype).to_empty(device=device).eval()
    fill(mine)
    theirs.load_state_dict(mine.state_dict(), assign=True)
    text = theirs.model.language_model
    text.rotary_emb = type(text.rotary_emb)(config.text_config).to(device)
    theirs.generation_config.eos_token_id = None  # random weights must not stop early
    theirs.generation_config.pad_token_id = PAD
    return mine, theirs.eval()


def inputs_of(scenario: Scenario, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The picture comes first, so that the semantics of both models agree on every row."""
    batch, prompt = scenario.batch, scenario.prompt
    ids = torch.randint(1000, 100000, (batch, prompt))
    ids[:, 0] = VOCAB
    ones = torch.ones(batch, prompt, dtype=torch.int64)
    inputs = {
        "input_ids": ids,
        "attention_mask": ones,
        "aspect_ratio_ids": torch.full((batch, 1), ALL_TILES),
        "aspect_ratio_mask": torch.ones(batch, 1, TILES, dtype=torch.int64),
        "cross_attention_mask": ones[..., None, None].expand(-1, -1, 1, TILES).contiguous(),
    }
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    pixels = torch.randn(batch, 1, TILES, 3, TILE, TILE, device=device, dtype=dtype)
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
    """A model as it is run: ``enter`` puts it into the state it is measured in."""

    name: str
    model: Any
    options: dict[str, Any]
    enter: Callable[[], None]
    unavailable: str | None = None


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
        Contestant(OURS, mine, {"eos_token_id": None, "pad_token_id": PAD}, lambda: None),
        Contestant(PEER, theirs, {}, attention("sdpa")),
        Contestant(
            "transformers eager",
            theirs,
            {},
            attention("eager"),
            "its scores of a picture take 8 GB and more" if on_cpu else None,
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
    """What one decoding step must read: the weights it uses, and the keys and values of every row."""
    text = model.config.text_config
    unused = ("embed_tokens", "cross_attn.k_proj", "cross_attn.v_proj", "cross_attn.k_norm")
    named = [*model.model.language_model.named_parameters(), *model.lm_head.named_parameters()]
    weights = sum(p.numel() for name, p in named if not any(part in name for part in unused))
    context = scenario.prompt + scenario.new // 2
    keys = context * len(text.self_attention_layers)
    keys += TILES * TILE_TOKENS * len(text.cross_attention_layers)
    return (weights + scenario.batch * keys * 2 * HKV * D) * model.dtype.itemsize


@torch.no_grad()
def measure(
    mine: Any, theirs: Any, layers: Layers, scenario: Scenario, quick: bool
) -> dict[str, Any]:
    """The row of a scenario, ready for JSON; the peer comes first, to be compared with."""
    device = mine.device
    before = machine.state(device)
    inputs = inputs_of(scenario, mine.dtype, device)
    records, runs = [], []
    expected: Tensor | None = None
    for contestant in sorted(contestants(mine, theirs, quick), key=lambda c: c.name != PEER):
        record: dict[str, Any] = {"name": contestant.name, "status": "timed"}
        records.append(record)
        if contestant.unavailable:
            record |= {"status": "unavailable", "reason": contestant.unavailable}
            continue
        try:
            contestant.enter()
            logits = contestant.model(**inputs, logits_to_keep=1).logits
            expected = logits if expected is None else expected
            record["difference"] = significant(difference(logits, expected), 3)
            if not record["difference"] <= TOLERANCE[mine.dtype]:
                reason = f"logits differ by {record['difference']} of those of {PEER}"
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
        return generate(contestant, inputs, scenario.new), reader.round()

    rounds = interleave([partial(run, contestant) for _, contestant in runs], ROUNDS)
    reader.close()
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
            "tiles": TILES,
            "text layers": layers.text,
            "vision layers": layers.local + layers.global_,
        },
        "dtype": str(mine.dtype).removeprefix("torch."),
        "bytes_per_step": bytes_per_step(mine, scenario),
        "state": {"before": before, "after": machine.state(device)},
        "impls": records,
    }


def run(
    device: torch.device, dtypes: list[torch.dtype], quick: bool, seed: int
) -> Iterator[dict[str, Any]]:
    """One row per dtype and scenario."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers about its own calls
    layers = REDUCED if device.type == "cpu" else FULL
    for dtype in dtypes:
        torch.manual_seed(seed)
        mine, theirs = build(layers, dtype, device)
        for scenario in scenarios(device, quick):
            yield measure(mine, theirs, layers, scenario, quick)
        del mine, theirs


def line(row: dict[str, Any]) -> str:
    """One row on the terminal."""
    text = f"model {row['shape']} {row['dtype']}"
    for impl in row["impls"]:
        if impl["status"] != "timed":
            text += f"\n  {impl['name']:24}{impl['status']}: {impl['reason']}"
            continue
        text += f"\n  {impl['name']:24}first token {impl['first_token_ms']['median']:9.1f} ms, "
        text += f"then {impl['tokens_per_s']:7.2f} tokens/s"
    return text


def add_floor(row: dict[str, Any]) -> None:
    """The share of the read bandwidth that decoding reaches, each round against the reading after it."""
    for impl in row["impls"]:
        if impl["status"] == "timed":
            rates = impl["read_gbps_rounds"]
            floors_ms = [row["bytes_per_step"] / (rate * ceilings.GB) * 1e3 for rate in rates]
            impl["floor_token_ms"] = significant(median(floors_ms))
            shares = ratios(impl["token_rounds_ms"], floors_ms)
            impl["share_of_floor"] = significant(shares.median, 3)
