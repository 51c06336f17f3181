"""How far quantised weights are from the plain ones, by kind of weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mllama_kernels.quantized_tensor import QuantizedTensor

_AT_ONCE = 1 << 22  # weights that are decoded at once


@dataclass
class _Sums:
    tensors: int = 0
    nbytes: int = 0
    wrong: float = 0.0
    whole: float = 0.0
    weighted_wrong: float = 0.0
    weighted_whole: float = 0.0


class ErrorTable:
    """Sums of squares over the weights of a kind in an encoding."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, str], _Sums] = {}

    def add(
        self, kind: str, plain: Tensor, quantized: QuantizedTensor, importance: Tensor | None
    ) -> None:
        """Count a weight (N, K), of both forms on one device; importance (K,) as `quantize` was given it."""
        sums = self._sums.setdefault((kind, quantized.encoding), _Sums())
        sums.tensors += 1
        sums.nbytes += quantized.nbytes
        rows = max(1, _AT_ONCE // max(1, plain.shape[1]))
        share = None
        if importance is not None:
            share = (importance.double() / importance.double().mean()).to(plain.device)
        for begin in range(0, plain.shape[0], rows):
            end = min(begin + rows, plain.shape[0])
            exact = plain[begin:end].float()
            wrong = (quantized.dequantize(begin=begin, end=end) - exact).square().sum(0).double()
            whole = exact.square().sum(0).double()
            sums.wrong += float(wrong.sum())
            sums.whole += float(whole.sum())
            if share is not None:
                sums.weighted_wrong += float((share * wrong).sum())
                sums.weighted_whole += float((share * whole).sum())

    def rows(self) -> list[dict[str, Any]]:
        """One per kind and encoding, by their names: how many tensors, their bytes, the 2-norm of the error
        as a share of the weights', and the same by importance where that was known."""
        return [
            {
                "kind": kind,
                "encoding": encoding,
                "tensors": sums.tensors,
                "bytes": sums.nbytes,
                "relative_error": _share(sums.wrong, sums.whole),
                "weighted_error": _share(sums.weighted_wrong, sums.weighted_whole),
            }
            for (kind, encoding), sums in sorted(self._sums.items())
        ]

    def lines(self) -> Iterator[str]:
        """The rows as text, under their headings."""
        rows = self.rows()
        is_weighted = any(row["weighted_error"] is not None for row in rows)
        weighted = "  weighted" if is_weighted else ""
        yield f"{'weights':20} {'encoding':8} {'tensors':>7} {'MB':>9} {'relative error':>15}{weighted}"
        for row in rows:
            line = f"{row['kind']:20} {row['encoding']:8} {row['tensors']:7} {row['bytes'] / 1e6:9.1f} "
            line += f"{_shown(row['relative_error']):>15}"
            yield line + (f"{_shown(row['weighted_error']):>10}" if is_weighted else "")


def _share(wrong: float, whole: float) -> float | None:
    return (wrong / whole) ** 0.5 if whole > 0 else None


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.5f}"
