"""Building blocks of both towers: fused projections, norms, and the pending residual."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllama.backend import Ops


class FusedLinear(nn.Module):
    """Several bias-free projections of one input as one matrix: (sum of the outputs, in).

    It has one parameter and no entry in the state dict; the :class:`Projection` children that its
    owner makes with :meth:`add_projections` save and load its rows under the published names.
    """

    def __init__(self, in_features: int, out_features: Mapping[str, int]) -> None:
        super().__init__()
        self.sizes = tuple(out_features.values())
        self.names = tuple(out_features)
        self.weight = nn.Parameter(torch.empty(sum(self.sizes), in_features))

    def add_projections(self, owner: nn.Module) -> None:
        """Give ``owner`` one child per projection, named as in published checkpoints."""
        begin = 0
        for name, size in zip(self.names, self.sizes):
            owner.add_module(name, Projection(self, begin, size))
            begin += size

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (..., in) to one (..., out) view per projection, in the order of construction."""
        return F.linear(x, self.weight).split(self.sizes, dim=-1)

    def joined(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., sum of the outputs)."""
        return F.linear(x, self.weight)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """The projections save the rows."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """The projections load the rows."""


class Projection(nn.Module):
    """A named range of rows of a :class:`FusedLinear`; owns no parameter."""

    def __init__(self, fused: FusedLinear, begin: int, size: int) -> None:
        super().__init__()
        self._fused = (fused,)  # in a tuple, so that it does not become a child
        self.begin, self.size = begin, size

    @property
    def weight(self) -> Tensor:
        """(out, in), a view into the fused matrix."""
        return self._fused[0].weight.narrow(0, self.begin, self.size)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name, target = prefix + "weight", self.weight.detach()
        if strict:
            mine = (key for key in state_dict if key.startswith(prefix) and key != name)
            unexpected_keys.extend(mine)
        if name not in state_dict:
            missing_keys.append(name)
        elif state_dict[name].shape != target.shape:
            error_msgs.append(
                f"size mismatch for {name}: copying a param with shape {tuple(state_dict[name].shape)} "
                f"from checkpoint, the shape in current model is {tuple(target.shape)}."
            )
        else:
            target.copy_(state_dict[name])

    def extra_repr(self) -> str:
        return f"rows {self.begin}..{self.begin + self.size - 1}"


class RMSNorm(nn.Module):
    """The weight and epsilon of an RMSNorm; the residual stream applies it."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class ResidualStream:
    """The residual stream (N, E), whose latest addition waits to be fused with the next norm."""

    def __init__(self, ops: Ops, x: Tensor) -> None:
        self._ops = ops
        self._x = x
        self._delta: Tensor | None = None
        self._gate: Tensor | None = None
        self._row_mask: Tensor | None = None

    def add(
        self, delta: Tensor, gate: Tensor | None = None, row_mask: Tensor | None = None
    ) -> None:
        """Add ``delta``, or ``tanh(gate) * row_mask * delta`` if there is a gate."""
        self.value()
        self._delta, self._gate, self._row_mask = delta, gate, row_mask

    def norm(self, norm: RMSNorm) -> Tensor:
        """The normalised stream."""
        if self._delta is None:
            return self._ops.rms_norm(self._x, norm.weight, norm.eps)
        y, self._x = self._ops.add_rms_norm(
            self._delta, self._x, norm.weight, norm.eps, gate=self._gate, row_mask=self._row_mask
        )
        self._delta = self._gate = self._row_mask = None
        return y

    def value(self) -> Tensor:
        """The stream itself, with nothing pending."""
        if self._delta is not None:
            if self._gate is None:
                self._x = self._x + self._delta
            else:
                self._x = self._ops.gated_residual(self._delta, self._x, self._gate, self._row_mask)
            self._delta = self._gate = self._row_mask = None
        return self._x


def init_normal(module: nn.Module, std: float) -> None:
    """Initialise the parameters that ``module`` itself owns as `transformers` does."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding, FusedLinear)):
        nn.init.normal_(module.weight, std=std)
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
