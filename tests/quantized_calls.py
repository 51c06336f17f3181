"""Calls of quantized_linear for its tests: every fusion, of every encoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import FLOATS, randn
from quantized_weights import KINDS, Kind, columns_of, kind_name, random_weight
from torch import Tensor

from mllama_kernels import QuantizedTensor

# Fusions, and how many roundings to the dtype a result has had: each of the separate ops stores one, and
# swiglu multiplies two columns of the product.
ROUNDINGS = {"product": 1, "bias": 1, "norm": 2, "swiglu": 3}
ROUNDINGS |= {"residual": 2, "gate": 2, "mask": 2, "all": 5}
every_kind = pytest.mark.parametrize("kind", KINDS, ids=kind_name)
every_dtype = pytest.mark.parametrize("dtype", FLOATS)
FEW: list[Kind] = [kind for kind in KINDS if kind[0] in ("q4_k", "int8", "nf4")]
# Fusions, of the kinds that have them: what stands around the product does not know the encoding.
FUSED = [
    pytest.param(
        fusion,
        kind,
        id=f"{fusion}-{kind_name(kind)}",
        marks=[pytest.mark.full] * (kind not in FEW and fusion not in ("product", "all")),
    )
    for fusion in ROUNDINGS
    for kind in KINDS
]


def make(
    kind: Kind, rows: int, n: int, about: int, fusion: str, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[Tensor, QuantizedTensor], dict[str, Any]]:
    """(x, weight) and the keyword arguments that ask for a fusion, for about so many columns."""
    everything, k = fusion == "all", columns_of(kind, about)
    kwargs: dict[str, Any] = {}
    if fusion == "norm" or everything:
        kwargs |= {"norm_weight": randn(k, dtype=dtype, device=device), "eps": 1e-3}
    if fusion == "swiglu" or everything:
        kwargs["swiglu"] = True
    if fusion in ("residual", "gate", "mask") or everything:
        kwargs["residual"] = randn(rows, n, dtype=dtype, device=device)
    if fusion in ("gate", "mask") or everything:
        kwargs["gate"] = randn(1, dtype=dtype, device=device)
    if fusion == "mask" or everything:
        kwargs["row_mask"] = (torch.arange(rows) % 3 != 1).to(device)
    stored = n * (2 if "swiglu" in kwargs else 1)
    if fusion == "bias" or everything:
        kwargs["bias"] = randn(stored, dtype=dtype, device=device)
    x = randn(rows, k, dtype=dtype, device=device)
    return (x, random_weight(kind, stored, k, device)), kwargs


def as_op(weight: QuantizedTensor, x: Tensor, **kwargs: Any) -> tuple[Any, ...]:
    """The arguments of the compiled op."""
    code, n, _, *types = weight.form
    given = {"eps": 1e-5, "swiglu": False, "weight_is_constant": False} | kwargs
    given["int8_activations"] = given.pop("activations", None) is not None
    names = ("bias", "norm_weight", "eps", "residual", "gate", "row_mask", "swiglu")
    names += ("weight_is_constant", "int8_activations")
    return (x, *weight.packed_and_table, code, n, *types, *(given.get(name) for name in names))
