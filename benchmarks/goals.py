"""The goals, as data, and what a run says about them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.case import OURS
from benchmarks.training import PASS, trained_ops

GPU, CPU = "cuda", "cpu"

# What a measure is called in a table, and whether more of it is better.
MEASURES = {
    "us": ("{:.4g} us", False),
    "share": ("{:.0%} of floor", True),
    "share_of_reading": ("{:.0%} of reading", True),
    "tflops": ("{:.4g} TFLOP/s", True),
    "ratio": ("{:.3g}x", True),
    "time_of_other": ("{:.2f} of its time", False),
    "tokens_per_s": ("{:.4g} tokens/s", True),
    "first_token_ms": ("{:.4g} ms", False),
    "first_token_ratio": ("{:.3g}x", True),
    "token_ratio": ("{:.3g}x", True),
}


@dataclass(frozen=True)
class Goal:
    """One figure to reach.

    Attributes:
        what: as it stands in the table.
        op: of the row, or "model" or "training".
        shape: sizes by which the row is found; it may have more.
        measure: one of MEASURES. "share" is of the floor made of this machine's own ceilings,
            "share_of_reading" of what was read in the same time right after the row.
        peers: beginnings of the names of the peers that a ratio is against; the fastest of them counts.
        other: for "time_of_other": sizes of the row whose time is the unit.
    """

    what: str
    op: str
    shape: dict[str, Any]
    measure: str
    target: float
    device: str = GPU
    dtype: str = "bfloat16"
    peers: tuple[str, ...] = ()
    other: dict[str, Any] = field(default_factory=dict)


def _prefill(tokens: int, tflops: float) -> list[Goal]:
    shape = {"new": tokens, "context": tokens}
    what, op = f"prefill attention, {tokens} tokens", "rotary_attention_cached"
    return [
        Goal(what, op, shape, "tflops", tflops),
        Goal(
            f"{what}, against cuDNN without RoPE", op, shape, "ratio", 1.08, peers=("sdpa cudnn",)
        ),
        Goal(f"{what}, against default SDPA", op, shape, "ratio", 1.8, peers=("sdpa,",)),
    ]


def _decode(batch: int, context: int, us: float) -> Goal:
    shape = {"batch": batch, "new": 1, "context": context}
    what = f"decode attention, batch {batch}, {context} tokens"
    return Goal(what, "rotary_attention_cached", shape, "us", us)


def _norm(op: str) -> list[Goal]:
    shape = {"rows": 4096}
    return [
        Goal(f"`{op}`, 4096 rows", op, shape, "share", 0.92),
        Goal(f"`{op}`, against torch.compile", op, shape, "ratio", 1.05, peers=("torch.compile",)),
    ]


def _norm_training(op: str) -> list[Goal]:
    shape, peers = {"rows": 16384} | PASS, ("torch.compile", "liger")
    return [
        Goal(f"`{op}`, forward and backward, 16384 rows", op, shape, "share", 0.88),
        Goal(
            f"`{op}`, forward and backward, torch.compile or liger",
            op,
            shape,
            "ratio",
            1.05,
            peers=peers,
        ),
    ]


def _attention_training(tokens: int) -> list[Goal]:
    """A forward at 580 TFLOP/s and a backward at 480, of whose products the forward has two of seven."""
    op, shape = "rotary_attention", {"tokens": tokens} | PASS
    what = f"`{op}`, forward and backward, {tokens} tokens"
    return [
        Goal(what, op, shape, "tflops", 505),
        Goal(f"{what}, SDPA's flash backend", op, shape, "ratio", 1.5, peers=("sdpa flash",)),
    ]


def _at_least_even(dtype: str) -> list[Goal]:
    """Of every op that trains, against the fastest peer."""
    loss = "linear_cross_entropy"  # of which every row has both passes
    rows = [(f"`{op}`, forward and backward", op, PASS) for op in trained_ops() if op != loss]
    for head in ("frozen", "trained"):
        rows.append((f"`{loss}` and gradients, {head} head", loss, {"head": head}))
    anyone = ("",)
    return [
        Goal(f"CPU, {dtype}: {what}, fastest peer", op, shape, "ratio", 1, CPU, dtype, anyone)
        for what, op, shape in rows
    ]


def _step(dtype: str, device: str, targets: dict[str, float]) -> list[Goal]:
    where = f"CPU, {dtype}: " if device == CPU else "11B "
    return [
        Goal(f"{where}training step, {peer}", "training", {}, "ratio", x, device, dtype, (peer,))
        for peer, x in targets.items()
    ]


def _linear(layer: str, share: float) -> list[Goal]:
    one, what = {"layer": layer, "rows": 1}, f"skinny linear {layer}"
    return [
        Goal(f"{what}, 1 row", "skinny_linear", one, "share", share),
        Goal(
            f"{what}, 1 row, against cuBLAS", "skinny_linear", one, "ratio", 1.1, peers=("pytorch",)
        ),
        Goal(
            f"{what}, 8 rows against 1",
            "skinny_linear",
            {"layer": layer, "rows": 8},
            "time_of_other",
            1.08,
            other=one,
        ),
    ]


def _on_cpu(dtype: str) -> list[Goal]:
    def goal(what: str, measure: str, target: float) -> Goal:
        peers = ("transformers",) if measure.endswith("ratio") else ()
        return Goal(what, "model", {"batch": 1}, measure, target, CPU, dtype, peers)

    return [
        goal(f"CPU, {dtype}: decoding, share of read bandwidth", "share", 0.85),
        goal(f"CPU, {dtype}: decoding, against `transformers`", "token_ratio", 1.4),
        goal(f"CPU, {dtype}: prefill with an image", "first_token_ratio", 1.2),
    ]


# By encoding: the share of bandwidth on CPUs with AVX2, and how many times faster than the plain weights a
# decoding step is; the shares of the floor on GPUs, of the larger and of the smaller layers.
_EIGHT, _FOUR = ("q8_0", "int8", "fp8"), ("q4_k", "q4_0", "int4", "nf4", "fp4")
_CPU_SHARE = {**dict.fromkeys(_EIGHT, 0.85), "q6_k": 0.75, **dict.fromkeys(_FOUR, 0.75)}
_CPU_FASTER = {"q8_0": 1.65, "q6_k": 1.9, "q4_k": 2.6}
_GPU_SHARE = {"int8": 0.88, "fp8": 0.88, "q8_0": 0.85, "q6_k": 0.78, **dict.fromkeys(_FOUR, 0.78)}
_SMALL_LAYERS = ("qkv", "o")


def _quantised_on_cpu(encoding: str) -> list[Goal]:
    """Products of one and of eight rows; what four bits are to reach at eight is no ratio."""
    op, one = "quantized_linear", {"model": "11B", "encoding": encoding, "rows": 1}
    found = []
    for layer in ("gate_up", "down"):
        shape, what = one | {"layer": layer}, f"CPU: `{encoding}` {layer}"
        share = _CPU_SHARE[encoding]
        found.append(Goal(f"{what}, 1 row", op, shape, "share_of_reading", share, CPU))
        if encoding not in _FOUR:
            eight = shape | {"rows": 8}
            found.append(
                Goal(f"{what}, 8 rows against 1", op, eight, "time_of_other", 3.5, CPU, other=shape)
            )
    return found


def _quantised_on_gpu(encoding: str) -> list[Goal]:
    op, found = "quantized_linear", []
    for layer in ("gate_up", "down", "lm_head", *_SMALL_LAYERS):
        one = {"model": "11B", "layer": layer, "encoding": encoding, "rows": 1}
        what, small = f"`{encoding}` {layer}", layer in _SMALL_LAYERS
        share = 0.65 if small else _GPU_SHARE[encoding]
        many, prompt = one | {"rows": 16}, one | {"rows": 512}
        found += [
            Goal(f"{what}, 1 row", op, one, "share", share),
            Goal(f"{what}, 16 rows against 1", op, many, "time_of_other", 1.1, other=one),
            Goal(f"{what}, 512 rows, bfloat16", op, prompt, "ratio", 0.85, peers=("pytorch",)),
        ]
    return found


def _quantised_decoding(encoding: str) -> list[Goal]:
    """Of the model on a CPU, and of text layers beside llama.cpp on one with AVX2."""

    def goal(what: str, shape: dict[str, Any], measure: str, target: float, peer: str = "") -> Goal:
        shape = shape | {"encoding": encoding}
        what = f"CPU: `{encoding}` {what}"
        return Goal(what, "model", shape, measure, target, CPU, peers=(peer,) if peer else ())

    model, text = {"text layers": 5}, {"text layers": 4}
    decoded, llama_cpp = "mllama_kernels, decoded", "llama.cpp"
    return [
        goal("decoding, share of read bandwidth", model, "share", _CPU_SHARE[encoding]),
        goal("decoding, plain weights", model, "token_ratio", _CPU_FASTER[encoding], decoded),
        goal("decoding, llama.cpp", text, "token_ratio", 1.4, llama_cpp),
        goal("prompt of 128 tokens, llama.cpp", text, "first_token_ratio", 1, llama_cpp),
    ]


def _quantised_11b(encoding: str, tokens_per_s: float) -> list[Goal]:
    shape = {"encoding": encoding, "batch": 1, "prompt": 1024, "text layers": 40}
    what, peers = f"11B `{encoding}`, batch 1, 1k context", ("mllama_kernels, decoded",)
    return [
        Goal(f"{what}: decoding", "model", shape, "tokens_per_s", tokens_per_s),
        Goal(
            f"{what}: first token, bfloat16", "model", shape, "first_token_ratio", 0.8, peers=peers
        ),
    ]


_VISION = {"tokens": 6432, "tiles": 4}
_CROSS = {"rows": 2048, "visible tiles": 4}
_ONE_TILE = {"rows": 2048, "visible tiles": 1}
_MODEL = {"batch": 1, "prompt": 1024, "text layers": 40}
_FIRST = {"batch": 1, "prompt": 32, "text layers": 40}
_STOCK = ("transformers",)
_MASKED = ("pytorch", "sdpa", "FlexAttention")
_MASKED_CUDNN = ("sdpa cudnn, mask",)

GOALS: tuple[Goal, ...] = (
    *_norm("rms_norm"),
    *_norm("add_rms_norm"),
    *_norm_training("rms_norm"),
    *_norm_training("add_rms_norm"),
    *(goal for size in ((4096, 580), (8192, 610), (16384, 630)) for goal in _prefill(*size)),
    _decode(1, 1024, 7),
    _decode(1, 8192, 12.5),
    _decode(1, 32768, 37),
    _decode(32, 4096, 135),
    Goal("`vision_attention`, four tiles", "vision_attention", _VISION, "us", 424),
    Goal(
        "`vision_attention`, four tiles: best masked peer",
        "vision_attention",
        _VISION,
        "ratio",
        1.35,
        peers=_MASKED,
    ),
    Goal(
        "`vision_attention`, four tiles: `transformers`",
        "vision_attention",
        _VISION,
        "ratio",
        2,
        peers=_STOCK,
    ),
    Goal(
        "`vision_attention`, four tiles: one tile against four",
        "vision_attention",
        {"tokens": 6432, "tiles": 1},
        "time_of_other",
        0.52,
        other=_VISION,
    ),
    Goal("`cross_attention`, 2048 rows, four tiles", "cross_attention", _CROSS, "us", 390),
    Goal(
        "`cross_attention`, 2048 rows, four tiles: masked cuDNN",
        "cross_attention",
        _CROSS,
        "ratio",
        1.5,
        peers=_MASKED_CUDNN,
    ),
    Goal(
        "`cross_attention`, 2048 rows, four tiles: one visible tile against four",
        "cross_attention",
        _ONE_TILE,
        "time_of_other",
        1.15 / 4,
        other=_CROSS,
    ),
    Goal(
        "`cross_attention`, 2048 rows, four tiles: one visible tile, masked cuDNN",
        "cross_attention",
        _ONE_TILE,
        "ratio",
        5,
        peers=_MASKED_CUDNN,
    ),
    Goal("`cross_attention`, decode", "cross_attention", {"rows": 1}, "us", 9),
    Goal("`patch_embed`, four tiles", "patch_embed", {"tiles": 4}, "us", 25),
    Goal(
        "`patch_embed`, four tiles: torch.compile",
        "patch_embed",
        {"tiles": 4},
        "ratio",
        3,
        peers=("torch.compile",),
    ),
    Goal("`swiglu`, 4096 rows", "swiglu", {"rows": 4096}, "share", 0.92),
    *(goal for layer in ("gate_up", "down", "lm_head") for goal in _linear(layer, 0.93)),
    *(goal for layer in ("qkv", "o") for goal in _linear(layer, 0.85)),
    Goal("`sample`, all filters", "sample", {"batch": 1, "choice": "all filters"}, "us", 12),
    Goal("11B decoding, batch 1, 1k context", "model", _MODEL, "tokens_per_s", 205),
    Goal(
        "11B decoding, batch 1, 1k context: share of the bandwidth floor",
        "model",
        _MODEL,
        "share",
        0.89,
    ),
    Goal(
        "11B decoding, batch 1, 1k context: `transformers`",
        "model",
        _MODEL,
        "token_ratio",
        3,
        peers=_STOCK,
    ),
    Goal("11B first token, image and 32 tokens", "model", _FIRST, "first_token_ms", 38),
    Goal(
        "11B first token, image and 32 tokens: `transformers`",
        "model",
        _FIRST,
        "first_token_ratio",
        2.5,
        peers=_STOCK,
    ),
    *_attention_training(4096),
    *_attention_training(16384),
    *_step("bfloat16", GPU, {"transformers sdpa": 1.3, "liger-kernel": 1.15}),
    *_on_cpu("bfloat16"),
    *_on_cpu("float32"),
    *_at_least_even("bfloat16"),
    *_at_least_even("float32"),
    *_step("bfloat16", CPU, {"transformers sdpa": 1}),
    *_step("float32", CPU, {"transformers sdpa": 1}),
    *(goal for encoding in _CPU_SHARE for goal in _quantised_on_cpu(encoding)),
    *(goal for encoding in _CPU_FASTER for goal in _quantised_decoding(encoding)),
    *(goal for encoding in _GPU_SHARE for goal in _quantised_on_gpu(encoding)),
    *_quantised_11b("q8_0", 345),
    *_quantised_11b("q4_k", 520),
)


def part_of(op: str) -> str:
    """The part of a run that an op's rows are in; "model" and "training" are their own."""
    return op if op in ("model", "training") else "ops"


def rows_of(run: dict[str, Any], op: str) -> list[dict[str, Any]]:
    """The rows of an op, or of "model" or "training"."""
    if part_of(op) == "ops":
        return [row for row in run["rows"] if row["op"] == op]
    return run[op]


def find(run: dict[str, Any], goal: Goal, shape: dict[str, Any]) -> dict[str, Any] | None:
    """The row of a run that a goal is about."""
    fits = (
        r
        for r in rows_of(run, goal.op)
        if r["dtype"] == goal.dtype and shape.items() <= r["shape"].items()
    )
    return next(fits, None)


def timed(row: dict[str, Any] | None, name: str = OURS) -> dict[str, Any] | None:
    impls = row["impls"] if row else []
    return next((i for i in impls if i["name"] == name and i["status"] == "timed"), None)


def value_of(goal: Goal, run: dict[str, Any] | None) -> float | None:
    """What the run measured of a goal; None where it did not."""
    if run is None or run["machine"]["kind"] != goal.device:
        return None
    row = find(run, goal, goal.shape)
    mine = timed(row)
    if row is None or mine is None:
        return None
    if goal.measure == "us":
        return mine["us"]["median"]
    if goal.measure in ("share", "share_of_reading", "tflops", "tokens_per_s"):
        return mine.get("share_of_floor" if goal.measure == "share" else goal.measure)
    if goal.measure == "first_token_ms":
        return mine["first_token_ms"]["median"]
    if goal.measure == "time_of_other":
        unit = timed(find(run, goal, goal.other))
        return mine["us"]["median"] / unit["us"]["median"] if unit else None
    which = {"ratio": "ours_is_faster"}.get(goal.measure)
    which = which or f"ours_is_faster_{goal.measure.removesuffix('_ratio')}"
    against = (
        impl[which]["median"]
        for impl in row["impls"]
        if impl["name"].startswith(goal.peers) and which in impl
    )
    return min(against, default=None)


def reached(goal: Goal, value: float) -> bool:
    more_is_better = MEASURES[goal.measure][1]
    return value >= goal.target if more_is_better else value <= goal.target


def in_words(goal: Goal, value: float) -> str:
    return MEASURES[goal.measure][0].format(value)
