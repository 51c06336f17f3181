"""Weights that quantisers are tried on."""

from __future__ import annotations

import torch
from torch import Tensor


def distributions(rows: int, columns: int) -> dict[str, Tensor]:
    """Float32 (rows, columns) of the kinds that weights come in, and worse ones."""
    normal = torch.randn(rows, columns)
    uniform = torch.rand(rows, columns)
    laplace = (uniform - 0.5).sign() * (2 * (uniform - 0.5).abs()).clamp(max=0.9999).neg().log1p()
    squares = torch.randn(3, rows, columns).square().mean(0)
    weights = {
        "normal": normal,
        "laplace": laplace,
        "student t": torch.randn(rows, columns) / squares.sqrt(),
        "uniform": 2 * uniform - 1,
        "rows of outliers": normal * torch.where(torch.rand(rows, 1) < 0.1, 50.0, 1.0),
        "outliers": normal * torch.where(torch.rand(rows, columns) < 0.01, 30.0, 1.0),
        "columns of outliers": normal * torch.where(torch.rand(columns) < 0.05, 20.0, 1.0),
        "positive": uniform,
    }
    return {name: weight * 0.02 for name, weight in weights.items()}


def awkward(columns: int) -> Tensor:
    """Float32 (12, columns): zeros, denormals, single outliers, one sign only, constants, huge and tiny."""
    weight = torch.randn(12, columns)
    weight[0] = 0
    weight[1, : columns // 2] = 0
    weight[2] *= 1e-40
    weight[3] *= 1e-9
    weight[4] = 0
    weight[4, columns // 3] = 3
    weight[5, columns // 2] = 1e4
    weight[6] = weight[6].abs()
    weight[7] = -weight[7].abs()
    weight[8] = 0.75
    weight[9] = -0.75
    weight[10] *= 1e5
    weight[11, ::2] = -0.0
    return weight


def relative_error(weight: Tensor, decoded: Tensor, importance: Tensor | None = None) -> float:
    """The 2-norm of the error as a share of the weight's, columns weighted by importance."""
    exact = weight.double()
    share = 1.0 if importance is None else importance.double()
    wrong = (share * (exact - decoded.double()).square()).sum()
    return float((wrong / (share * exact.square()).sum()).sqrt())
