"""Times every op on the CPU beside the plain PyTorch line it replaces, at the checkpoint's shapes.

    python benchmarks/cpu_ops.py [--ops NAME ...] [--dtypes bfloat16 float32] [--threads 2] [--save]

Both sides run alternately on the same tensors, so that a busy machine slows both; the table shows the
median of each and the median of the paired ratios. --save writes benchmarks/results/cpu-<date>.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

import mllama_kernels as ours
from mllama_kernels import reference

E, INTERMEDIATE, HQ, HKV, D = 4096, 14336, 32, 8, 128
VISION_WIDTH, VISION_HEADS, VISION_DIM, PATCH, TILE = 1280, 16, 80, 14, 560
TILES, TILE_TOKENS = 4, 1601


@dataclass
class Case:
    """One row of the table: two callables that do the same work."""

    op: str
    shape: str
    ours: Callable[[], object]
    plain: Callable[[], object]


@dataclass
class Result:
    op: str
    shape: str
    dtype: str
    ours_ms: float
    plain_ms: float
    ratio: float  # plain / ours, median over pairs


def elementwise(dtype: torch.dtype) -> Iterator[Case]:
    weight = torch.randn(E, dtype=dtype)
    gate = torch.full((1,), 0.3, dtype=dtype)
    for rows in (1, 512, 2048):
        x, residual = torch.randn(rows, E, dtype=dtype), torch.randn(rows, E, dtype=dtype)
        gate_up = torch.randn(rows, 2 * INTERMEDIATE, dtype=dtype)

        def plain_add(x: Tensor = x, residual: Tensor = residual) -> tuple[Tensor, Tensor]:
            total = residual + x
            return F.rms_norm(total, (E,), weight, 1e-5), total

        def plain_swiglu(gate_up: Tensor = gate_up) -> Tensor:
            g, up = gate_up.chunk(2, -1)
            return F.silu(g) * up

        shape = f"{rows}x{E}"
        yield Case(
            "rms_norm",
            shape,
            lambda x=x: ours.rms_norm(x, weight),
            lambda x=x: F.rms_norm(x, (E,), weight, 1e-5),
        )
        yield Case(
            "add_rms_norm",
            shape,
            lambda x=x, r=residual: ours.add_rms_norm(x, r, weight),
            plain_add,
        )
        yield Case(
            "gated_residual",
            shape,
            lambda x=x, r=residual: ours.gated_residual(x, r, gate),
            lambda x=x, r=residual: r + gate.tanh() * x,
        )
        yield Case(
            "swiglu", f"{rows}x{INTERMEDIATE}", lambda g=gate_up: ours.swiglu(g), plain_swiglu
        )


def linear(dtype: torch.dtype) -> Iterator[Case]:
    """The projections of a decode step. Weights rotate where one alone would stay in the cache."""
    shapes = {
        "qkv": (6144, E),
        "o": (E, E),
        "gate_up": (2 * INTERMEDIATE, E),
        "down": (E, INTERMEDIATE),
        "lm_head": (128256, E),
    }
    for name, (n, k) in shapes.items():
        copies = max(1, (1 << 29) // (n * k * dtype.itemsize))
        weights = torch.randn(copies, n, k, dtype=dtype)
        for rows in (1, 4, 16):
            x = torch.randn(rows, k, dtype=dtype)
            mine, theirs = itertools.cycle(weights), itertools.cycle(weights)
            yield Case(
                "skinny_linear",
                f"{name} {rows}x{k} to {n}",
                lambda x=x, w=mine: ours.skinny_linear(x, next(w)),
                lambda x=x, w=theirs: F.linear(x, next(w)),
            )


def sdpa(q: Tensor, k: Tensor, v: Tensor, **kwargs: object) -> Tensor:
    """F.scaled_dot_product_attention on (B, S, H, D)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(
        q, k, v, enable_gqa=q.shape[1] != k.shape[1], **kwargs
    ).transpose(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """transformers' rotation of (B, L, H, D) by cos, sin (1, L, 1, D)."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def angles(length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angle = torch.arange(length).unsqueeze(-1) * 500000.0 ** (-torch.arange(0, D, 2) / D)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def doubled(table: Tensor) -> Tensor:
    return torch.cat([table, table], -1)[None, :, None]


def self_attention(dtype: torch.dtype) -> Iterator[Case]:
    for length in (512, 2048):
        q = torch.randn(1, length, HQ, D, dtype=dtype)
        k, v = (torch.randn(1, length, HKV, D, dtype=dtype) for _ in range(2))
        cos, sin = angles(length, dtype)
        wide_cos, wide_sin = doubled(cos), doubled(sin)
        yield Case(
            "rotary_attention",
            f"prefill {length}",
            lambda q=q, k=k, v=v, c=cos, s=sin: ours.rotary_attention(q, k, v, c[None], s[None]),
            lambda q=q, k=k, v=v, c=wide_cos, s=wide_sin: sdpa(
                rotate(q, c, s), rotate(k, c, s), v, is_causal=True
            ),
        )
    for context in (1024, 8192):
        yield decode_case(context, dtype)


def decode_case(context: int, dtype: torch.dtype) -> Case:
    """One new token after context - 1: ours on 64-token pages, PyTorch on a contiguous static cache."""
    page = 64
    pages = context // page
    q = torch.randn(1, HQ, D, dtype=dtype)
    k, v = (torch.randn(1, HKV, D, dtype=dtype) for _ in range(2))
    k_cache, v_cache = (torch.randn(pages, HKV, page, D, dtype=dtype) for _ in range(2))
    table = torch.randperm(pages).int()[None]
    bounds, lens = torch.tensor([0, 1]).int(), torch.tensor([context - 1]).int()
    cos, sin = (t[-1:] for t in angles(context, dtype))
    static_k, static_v = (torch.randn(1, HKV, context, D, dtype=dtype) for _ in range(2))
    wide_cos, wide_sin = doubled(cos), doubled(sin)
    position = torch.tensor([context - 1])

    def plain() -> Tensor:
        roped_q = rotate(q[None], wide_cos, wide_sin).transpose(1, 2)
        static_k.index_copy_(2, position, rotate(k[None], wide_cos, wide_sin).transpose(1, 2))
        static_v.index_copy_(2, position, v[None].transpose(1, 2))
        return F.scaled_dot_product_attention(roped_q, static_k, static_v, enable_gqa=True)

    def mine() -> Tensor:
        return ours.rotary_attention_cached(
            q, k, v, cos, sin, k_cache, v_cache, table, bounds, lens, max_seqlen=1
        )

    return Case("rotary_attention_cached", f"decode at {context}", mine, plain)


def cross_attention(dtype: torch.dtype) -> Iterator[Case]:
    keys = TILES * TILE_TOKENS
    k, v = (torch.randn(1, TILES, TILE_TOKENS, HKV, D, dtype=dtype) for _ in range(2))
    flat_k, flat_v = k.flatten(1, 2), v.flatten(1, 2)
    for rows in (1, 512):
        q = torch.randn(1, rows, HQ, D, dtype=dtype)
        mask = torch.ones(1, rows, TILES, dtype=torch.bool)
        dense = mask.repeat_interleave(TILE_TOKENS, -1)[:, None]
        yield Case(
            "cross_attention",
            f"{rows} rows, {keys} keys",
            lambda q=q, m=mask: ours.cross_attention(q, k, v, m),
            lambda q=q, m=dense: sdpa(q, flat_k, flat_v, attn_mask=m),
        )


def vision(dtype: torch.dtype) -> Iterator[Case]:
    for tokens, absent in ((1032, 0), (6432, 0), (6432, 2)):
        q, k, v = (torch.randn(1, tokens, VISION_HEADS, VISION_DIM, dtype=dtype) for _ in range(3))
        tile = tokens // TILES if tokens > 2000 else tokens
        padding = (torch.arange(tokens) % tile >= tile - 7)[None].clone()
        padding[:, tokens - absent * tile :] = True
        dense = ~(padding.unsqueeze(-1) & padding.unsqueeze(-2))[:, None]
        yield Case(
            "vision_attention",
            f"{tokens} tokens, {absent} tiles absent",
            lambda q=q, k=k, v=v, p=padding: ours.vision_attention(q, k, v, p),
            lambda q=q, k=k, v=v, m=dense: sdpa(q, k, v, attn_mask=m),
        )
    grid = TILE // PATCH
    tokens = grid * grid + 1
    tensors = [
        torch.randn(1, TILES, 3, TILE, TILE, dtype=dtype),
        torch.tensor([6]),
        *(
            torch.randn(shape, dtype=dtype) * 0.02
            for shape in (
                (VISION_WIDTH, 3, PATCH, PATCH),
                (VISION_WIDTH,),
                (tokens, VISION_WIDTH),
                (1,),
                (9, TILES * tokens * VISION_WIDTH),
                (9, TILES * VISION_WIDTH),
                (1,),
                (VISION_WIDTH,),
                (VISION_WIDTH,),
            )
        ),
    ]
    yield Case(
        "patch_embed",
        f"{TILES} tiles of {TILE}",
        lambda: ours.patch_embed(*tensors),
        lambda: reference.patch_embed(*tensors),
    )


def seconds(f: Callable[[], object], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        f()
    return (time.perf_counter() - begin) / calls


@torch.inference_mode()
def measure(case: Case, dtype: torch.dtype, budget: float) -> Result:
    case.ours(), case.plain()
    once = seconds(case.ours, 1) + seconds(case.plain, 1)
    calls = max(1, int(0.002 / once))  # short calls are timed in bursts
    pairs = max(3, min(100, int(budget / (once * calls))))
    times = [(seconds(case.ours, calls), seconds(case.plain, calls)) for _ in range(pairs)]
    return Result(
        case.op,
        case.shape,
        str(dtype).removeprefix("torch."),
        round(median(mine for mine, _ in times) * 1e3, 4),
        round(median(plain for _, plain in times) * 1e3, 4),
        round(median(plain / mine for mine, plain in times), 2),
    )


def save(results: list[Result], threads: int) -> Path:
    root = Path(__file__).resolve().parent
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(": ")[1] for x in lines if x.startswith("model name")), cpu)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True
    )
    document = {
        "machine": {
            "cpu": cpu,
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": threads,
        },
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "commit": commit.stdout.strip(),
        "rows": [asdict(result) for result in results],
    }
    path = root / "results" / f"cpu-{datetime.now(timezone.utc):%Y-%m-%d}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="*", help="only ops whose name contains one of these")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for each row")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    results = []
    print(f"{'op':24}{'shape':28}{'dtype':10}{'ours ms':>10}{'plain ms':>10}{'ratio':>7}")
    for name in args.dtypes:
        dtype = getattr(torch, name)
        for source in (elementwise, linear, self_attention, cross_attention, vision):
            for case in source(dtype):
                if args.ops and not any(op in case.op for op in args.ops):
                    continue
                r = measure(case, dtype, args.budget)
                results.append(r)
                print(
                    f"{r.op:24}{r.shape:28}{r.dtype:10}{r.ours_ms:10.3f}{r.plain_ms:10.3f}{r.ratio:7.2f}",
                    flush=True,
                )
    if args.save:
        print(f"written to {save(results, args.threads)}")


if __name__ == "__main__":
    main()
