"""Weights of 8, 6 and 4 bits out of plain ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from mllama_kernels import _dispatch, _quantize_torch
from mllama_kernels._arguments import FLOATS, wrong_dtype
from mllama_kernels.encodings import ENCODINGS, Encoding, encoding_of
from mllama_kernels.quantized_tensor import QuantizedTensor

# Those in whose blocks there is a choice to make; the others follow from the largest magnitude.
TAKES_IMPORTANCE = frozenset({"q4_0", "q4_k", "q6_k"})
# Importance below this share of the mean counts as this: such columns get sensible values too.
_LEAST_SHARE = 1e-6


def quantize(weight: Tensor, encoding: str, importance: Tensor | None = None) -> QuantizedTensor:
    """A weight in one of the encodings int8, fp8, q8_0, q6_k, q4_k, q4_0.

    ======== ==============================================================================================
    int8     largest magnitude of the row / 127 is its scale; to nearest even
    fp8      (e4m3fn) likewise by 448, saturating
    q8_0     the bytes of the `gguf` package
    q4_0     the same; with importance, of many scales the one that costs least
    q4_k     per 32 columns a scale and a minimum, from trials and least squares, then refined together with
             the two halves whose multiples they are in a block of 256
    q6_k     per 16 columns a scale, likewise
    ======== ==============================================================================================

    The same bits on any number of threads, any instruction set, and on CUDA. Nothing records a gradient.

    Args:
        weight: (N, K); float32, float16 or bfloat16, on any device that holds values. K is a multiple of 256
            for q6_k and q4_k, of 32 for q8_0 and q4_0.
        encoding: as above.
        importance: (K,), floating, on any device: what the squared error of a column counts in q4_0, q4_k and
            q6_k, as the mean square of what it is multiplied by. Only its proportions matter.
    Returns:
        the quantised weight, on the weight's device.
    Raises:
        TypeError: for what is no tensor.
        ValueError: naming what was given and what is expected; for rows that are not whole blocks with the
            encodings that fit.
        RuntimeError: for a weight that is NaN, infinite or larger than the encoding holds (q8_0 8.3e6, q4_0
            5.2e5, q6_k 1.3e8, q4_k 2.1e6), with its row and column.
    """
    chosen = _check(weight, encoding)
    if importance is not None:
        importance = _shares(importance, weight, encoding)
    weight = weight.detach()
    reason = _dispatch.why_not("quantize", weight.device)
    if reason is None:
        parts = torch.ops.mllama_kernels.quantize_blocks(weight, encoding, importance)
    elif _dispatch.BACKEND == "kernels":
        raise RuntimeError(f"mllama_kernels.quantize cannot run: {reason}")
    else:
        parts = _quantize_torch.parts(weight, encoding, importance)
    return QuantizedTensor.from_parts(encoding, dict(zip(chosen.parts, parts, strict=True)))


def fitting(columns: int) -> list[str]:
    """The encodings that `quantize` makes of rows of so many columns."""
    return [name for name, e in ENCODINGS.items() if e.is_made and e.fits(columns)]


def _check(weight: Any, encoding: str) -> Encoding:
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"mllama_kernels.quantize: weight must be a tensor, got a {type(weight).__name__}"
        )
    chosen = encoding_of(encoding)
    if not chosen.is_made:
        made = ", ".join(name for name, e in ENCODINGS.items() if e.is_made)
        _fail(f"{encoding} is read, not made; the encodings that are made are {made}")
    if weight.dim() != 2:
        _fail(f"weight must be (N, K), got shape {tuple(weight.shape)}")
    if problem := wrong_dtype("weight", weight.dtype, FLOATS):
        _fail(problem)
    if weight.is_meta:
        _fail(f"weight {tuple(weight.shape)} is on the meta device, which holds no values")
    if not chosen.fits(weight.shape[1]):
        fit = ", ".join(fitting(weight.shape[1])) or "none"
        _fail(
            f"{encoding} encodes {chosen.block} columns together, and the rows are {weight.shape[1]} wide; "
            f"what fits: {fit}"
        )
    return chosen


def _shares(importance: Any, weight: Tensor, encoding: str) -> Tensor:
    """Importance (K,) float32 on the weight's device, 1 in the mean, and nowhere 0."""
    if encoding not in TAKES_IMPORTANCE:
        takes = ", ".join(sorted(TAKES_IMPORTANCE))
        _fail(f"importance has no part in {encoding}; {takes} take it")
    if not isinstance(importance, Tensor):
        raise TypeError(
            f"mllama_kernels.quantize: importance must be a tensor, got a {type(importance).__name__}"
        )
    if importance.shape != weight.shape[1:] or not importance.is_floating_point():
        _fail(
            f"importance must be floating, of shape ({weight.shape[1]},), got {importance.dtype} "
            f"{tuple(importance.shape)}"
        )
    if importance.is_meta:
        _fail("importance is on the meta device, which holds no values")
    exact = importance.detach().double()
    if not bool((exact.isfinite() & (exact >= 0)).all()) or not bool(exact.any()):
        _fail("importance must be finite, not negative, and somewhere above zero")
    # By the largest first: a sum of float64 could be infinite, a mean of it zero.
    share = exact / exact.max()
    share = (share / share.mean()).clamp(min=_LEAST_SHARE)
    return share.to(weight.device, torch.float32)


def _fail(text: str) -> NoReturn:
    raise ValueError(f"mllama_kernels.quantize: {text}")


def _fake(weight: Tensor, encoding: str, importance: Tensor | None) -> list[Tensor]:
    chosen, (rows, columns) = ENCODINGS[encoding], weight.shape
    if "blocks" in chosen.parts:
        width = columns // chosen.block * chosen.bytes_per_block
        return [weight.new_empty(rows, width, dtype=torch.uint8)]
    codes = torch.int8 if encoding == "int8" else torch.float8_e4m3fn
    return [
        weight.new_empty(rows, columns, dtype=codes),
        weight.new_empty(rows, dtype=torch.float32),
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    ctx.mark_non_differentiable(*output)


_dispatch.register("quantize_blocks", _fake, setup_context=_setup_context, lowers=False)
