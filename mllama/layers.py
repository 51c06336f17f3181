"""Building blocks of both towers: fused projections, norms, and the pending residual."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllama.backend import Ops
from mllama_kernels.skinny_linear import MAX_ROWS


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

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., sum of the outputs)."""
        return F.linear(x, self.weight)

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        """The product (..., sum of the outputs) as one view per projection, in their order."""
        return y.split(self.sizes, dim=-1)

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


def is_plain(linear: nn.Module) -> bool:
    """Whether calling ``linear`` is its weight's product and nothing else: no adapter, bias, hook or
    replaced forward, and no other kind of tensor (quantised, sharded) as the weight."""
    return (
        type(linear) in (nn.Linear, FusedLinear)
        and type(linear.weight) is nn.Parameter
        and getattr(linear, "bias", None) is None
        and not (linear._forward_pre_hooks or linear._forward_hooks)
        and "forward" not in vars(linear)
    )


def _skinny(ops: Ops, linear: nn.Module, x: Tensor, **fused: Any) -> Tensor | None:
    """``linear`` of x (N, in) by ``ops.skinny_linear``, with what else is ``fused`` into it.

    Returns: None where that op is not meant for it: with more rows the library's product is better,
    and a gradient or anything but a plain linear needs the module itself.
    """
    if x.shape[0] > MAX_ROWS or torch.is_grad_enabled() or not is_plain(linear):
        return None
    # No kernel of a forward writes weights, so a product may read them before the one before it ends.
    return ops.skinny_linear(x, linear.weight, weight_is_constant=True, **fused)


def project(ops: Ops, linear: nn.Module, x: Tensor) -> Tensor:
    """``linear`` of x (B, L, in), in the way that is best for the number of rows."""
    y = _skinny(ops, linear, x.flatten(0, 1))
    return linear(x) if y is None else y.unflatten(0, x.shape[:2])


class ResidualStream:
    """The residual stream (N, E): layers read it through a norm and a projection, and add to it.

    With few rows, as in decoding, the products are bound by the reading of the weights, and norm,
    SwiGLU, gate and sum are fused into them. With more, the latest addition waits to be fused with
    the next norm.
    """

    def __init__(self, ops: Ops, x: Tensor) -> None:
        self._ops = ops
        self._x = x
        self._delta: Tensor | None = None
        self._gate: Tensor | None = None
        self._row_mask: Tensor | None = None

    def read(self, norm: RMSNorm, linear: nn.Module, *, swiglu: bool = False) -> Tensor:
        """``linear`` of the normalised stream, (N, out); with ``swiglu`` of its two halves, (N, out / 2)."""
        if self._delta is None:
            y = _skinny(
                self._ops, linear, self._x, norm_weight=norm.weight, eps=norm.eps, swiglu=swiglu
            )
            if y is not None:
                return y
        y = linear(self.norm(norm))
        return self._ops.swiglu(y) if swiglu else y

    def add(
        self,
        linear: nn.Module,
        x: Tensor,
        gate: Tensor | None = None,
        row_mask: Tensor | None = None,
    ) -> None:
        """Add ``linear(x)``, or ``tanh(gate) * row_mask * linear(x)`` if there is a gate."""
        stream = self.value()
        y = _skinny(self._ops, linear, x, residual=stream, gate=gate, row_mask=row_mask)
        if y is not None:
            self._x = y
        else:
            self._delta, self._gate, self._row_mask = linear(x), gate, row_mask

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
