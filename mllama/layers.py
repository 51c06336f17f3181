"""Building blocks of both towers: norms, the pending residual, and layers that are computed again."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mllama.backend import Ops
from mllama.kinds import Asked, Kinds, call_on_rows
from mllama.linear import Product, Projection, side_by_side
from mllama.varlen import VarlenBatch
from mllama_kernels.linear import fuses, linear_by


class RMSNorm(nn.Module):
    """An RMSNorm of the text tower; where nobody has changed it, the residual stream applies it."""

    def __init__(self, width: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon, self.ops = eps, ops

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.variance_epsilon}"


@dataclass
class ResidualStream:
    """The residual stream (N, E): layers read it through a norm and a projection, and add to it.

    With few rows, as in decoding, the products are bound by the reading of the weights, and norm,
    SwiGLU, gate and sum are fused into them. With more, the latest addition waits to be fused with
    the next norm. A norm or linear that is not exactly the plain thing is called, with nothing fused into it.

    Attributes:
        x: what has been summed up.
        varlen: how the N tokens form sequences; modules that are called see them so.
        kinds: what may be read in place of being called.
        delta, gate, row_mask: the addition that waits, if one does.
        is_fused: whether norms and sums are part of the products.
    """

    ops: Ops
    x: Tensor
    varlen: VarlenBatch
    kinds: Kinds = Asked
    delta: Tensor | None = None
    gate: Tensor | None = None
    row_mask: Tensor | None = None
    is_fused: bool = field(init=False)

    def __post_init__(self) -> None:
        self.is_fused = fuses(self.x.shape[0])

    def read(self, norm: nn.Module, projection: Projection, *, swiglu: bool = False) -> Product:
        """The projection (N, out) of the normalised stream; with ``swiglu`` of its halves, (N, out / 2)."""
        weight = shares = None
        if self.is_fused:
            weight = projection.kernel_weight(self.kinds)
            if weight is None:
                shares = projection.shares(self.kinds)
        if shares is None and (weight is None or weight.bias is not None):
            y = projection(self.ops, self.norm(norm), self.kinds, self.varlen)
            return self.ops.swiglu(side_by_side(y)) if swiglu else y
        x, normed = self.x, {}
        if self.delta is None and self.kinds.get(norm) is RMSNorm:
            normed = {"norm_weight": norm.weight, "eps": norm.variance_epsilon}
        else:
            x = self.norm(norm)
        if weight is not None:
            return linear_by(
                self.ops,
                x,
                weight.matrix,
                **normed,
                swiglu=swiglu,
                weight_is_constant=weight.is_constant,
                is_fused=True,
            )
        outputs = (
            linear_by(
                self.ops,
                x,
                share.matrix,
                **normed,
                weight_is_constant=share.is_constant,
                is_fused=True,
            )
            for share, _ in shares
        )
        y = projection.together(shares, outputs)
        return self.ops.swiglu(side_by_side(y)) if swiglu else y

    def add(
        self,
        projection: Projection,
        x: Tensor,
        gate: Tensor | None = None,
        row_mask: Tensor | None = None,
    ) -> None:
        """Add the projection of x, as :meth:`put` adds."""
        is_product = self.is_fused and projection.collective is None  # before the sum over ranks
        weight = projection.kernel_weight(self.kinds) if is_product else None
        if weight is None or weight.bias is not None:
            self.put(projection(self.ops, x, self.kinds, self.varlen), gate, row_mask)
            return
        self.x = linear_by(
            self.ops,
            x,
            weight.matrix,
            residual=self.x if self.delta is None else self.value(),
            gate=gate,
            row_mask=row_mask,
            weight_is_constant=weight.is_constant,
            is_fused=True,
        )

    def put(
        self, delta: Tensor, gate: Tensor | None = None, row_mask: Tensor | None = None
    ) -> None:
        """Add ``delta`` (N, E), or ``tanh(gate) * row_mask * delta`` if there is a gate."""
        self.x = self.value()
        self.delta, self.gate, self.row_mask = delta, gate, row_mask

    def norm(self, norm: nn.Module) -> Tensor:
        """The normalised stream."""
        if self.kinds.get(norm) is not RMSNorm:
            return call_on_rows(norm, self.value(), self.varlen)
        if self.delta is None:
            return self.ops.rms_norm(self.x, norm.weight, norm.variance_epsilon)
        y, self.x = self.ops.add_rms_norm(
            self.delta,
            self.x,
            norm.weight,
            norm.variance_epsilon,
            gate=self.gate,
            row_mask=self.row_mask,
        )
        self.delta = self.gate = self.row_mask = None
        return y

    def value(self) -> Tensor:
        """The stream itself, with nothing pending."""
        if self.delta is not None:
            if self.gate is None:
                self.x = self.x + self.delta
            else:
                self.x = self.ops.gated_residual(self.delta, self.x, self.gate, self.row_mask)
            self.delta = self.gate = self.row_mask = None
        return self.x


class Recomputing:
    """For a stack of layers that may keep only their inputs for the backward pass and compute the rest again.

    Attributes:
        recompute_every: which layers do so in training mode: every so many, from the first; 0: none.
    """

    recompute_every = 0
    training: bool

    def recomputed(self, layers: int) -> Container[int]:
        """Which of so many layers a forward that runs now computes again in its backward pass."""
        every = self.recompute_every if self.training and torch.is_grad_enabled() else 0
        return range(0, layers, every) if every else range(0)


def recomputing(layer: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """``layer(*inputs)``, of which only the inputs are kept for the backward pass."""
    return checkpoint(layer, *inputs, use_reentrant=False)


def init_normal(module: nn.Module, std: float) -> None:
    """Initialise the parameters that ``module`` itself owns as `transformers` does."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
