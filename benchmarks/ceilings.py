"""What this very machine can do at most: copy and read bandwidth, and a large matrix product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import interleave, make_timer, significant

GB, TERA = 1e9, 1e12
PROBE, PRODUCT_SECONDS = 256, 0.25  # a product of this size foretells what a larger one takes


def _best(
    device: torch.device,
    call: Callable[..., Any],
    copies: Sequence[tuple[Any, ...]],
    rounds: int,
    seconds: float = 0.05,
) -> float:
    """Seconds per call in the best round: a ceiling is what was reached once, not what is usual."""
    timer = make_timer(device, call, copies, seconds)
    (times,) = interleave([timer.round], rounds)
    timer.close()
    return min(times)


class Reader:
    """Reads memory that no cache holds, in each of several ways: which is fastest, machines differ."""

    def __init__(self, device: torch.device, source: Tensor | None = None) -> None:
        if source is None:
            source = torch.randn(_size(device) // 4, device=device)
        self._bytes = source.numel() * source.element_size()
        calls: list[Callable[[Tensor], Tensor]] = [torch.sum, torch.amax]
        if device.type == "cpu":
            rows, vector = source.view(-1, 4096), torch.ones(4096)
            calls.append(lambda _: torch.mv(rows, vector))
        self._timers = [make_timer(device, call, [(source,)], 0.05) for call in calls]

    def round(self) -> float:
        """GB/s of the fastest way in one round."""
        return self._bytes / min(timer.round() for timer in self._timers) / GB

    def close(self) -> None:
        for timer in self._timers:
            timer.close()


def _size(device: torch.device) -> int:
    return 2**31 if device.type == "cuda" else 2**29


def bandwidth(device: torch.device, rounds: int) -> dict[str, float]:
    """GB/s of a copy (read plus written) and of reading only, the best rounds."""
    size = _size(device)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    copy = 2 * size / _best(device, torch.Tensor.copy_, [(target, source)], rounds)
    del target
    reader = Reader(device, source)
    read = max(reader.round() for _ in range(rounds))
    reader.close()
    return {"copy_gbps": round(copy / GB, 1), "read_gbps": round(read, 1)}


def matmul(device: torch.device, dtype: torch.dtype, rounds: int) -> float:
    """TFLOP/s of a large square product of random matrices, laid out as layers have them; on a slow CPU of a
    smaller one."""
    n = 8192 if device.type == "cuda" else 2048

    def rate(n: int, rounds: int) -> float:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        return 2 * n**3 / _best(device, F.linear, [(a, b)], rounds)

    if device.type == "cpu":
        while n > PROBE and 2 * n**3 > PRODUCT_SECONDS * rate(PROBE, 1):
            n //= 2
    return significant(rate(n, rounds) / TERA, 3)


def measure(
    device: torch.device, dtypes: Sequence[torch.dtype], rounds: int = 7
) -> dict[str, float]:
    ceilings = bandwidth(device, rounds)
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        ceilings[f"matmul_tflops_{name}"] = matmul(device, dtype, rounds)
    return ceilings


def higher(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    """Of two measurements, before and after the cases, what the machine can do."""
    return {name: max(a[name], b[name]) for name in a}


def computes(dtype: str, ceilings: dict[str, float]) -> float:
    """TFLOP/s that products of a dtype can reach: those of 16 bits also in float32, exactly."""
    rates = [ceilings[f"matmul_tflops_{dtype}"]]
    if dtype in ("bfloat16", "float16"):
        rates.append(ceilings.get("matmul_tflops_float32", 0.0))
    return max(rates)


def floor(
    nbytes: int, flops: int, bound: str, dtype: str, ceilings: dict[str, float]
) -> tuple[float, str]:
    """Seconds that the bytes or the products take at the ceiling, whichever is longer, and which it is."""
    moving = nbytes / (ceilings[f"{bound}_gbps"] * GB)
    computing = flops / (computes(dtype, ceilings) * TERA)
    return (moving, bound) if moving >= computing else (computing, "matmul")
