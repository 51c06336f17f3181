"""Building blocks of both towers: projections and their products, norms, and the pending residual."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils.checkpoint import checkpoint

from mllama.backend import Ops
from mllama.products import product
from mllama_kernels.skinny_linear import MAX_ROWS


class _Rows(torch.autograd.Function):
    """The matrix that some weights are the rows of, without a copy; its gradient is split among them."""

    @staticmethod
    def forward(*weights: Tensor) -> Tensor:
        return _matrix([weight.detach() for weight in weights])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.sizes = [weight.shape[0] for weight in inputs]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient.split(ctx.sizes)


def _matrix(weights: Sequence[Tensor]) -> Tensor:
    """The weights (n, in) as one matrix, which their memory is already."""
    rows, width = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    return weights[0].as_strided((rows, width), (width, 1))


def _are_adjacent(weights: Sequence[Tensor]) -> bool:
    """Whether each weight begins where the one before it ends, in the allocation of the first."""
    end = weights[0].data_ptr()
    for weight in weights:
        if weight.data_ptr() != end or not weight.is_contiguous():
            return False
        end += weight.nbytes
    storage = weights[0].untyped_storage()
    return end <= storage.data_ptr() + storage.nbytes()


class FusedLinear(nn.Module):
    """Bias-free linears of one input as one product, whose weights lie behind each other in memory.

    It owns no parameter. Each linear is an ordinary child of ``owner`` under its published name, which
    optimisers, state dicts and adapters know it by; where one is not plain (see :func:`is_plain`), all
    are called by themselves. So they are where FSDP has the weights, whose memory is its own to free and
    to fill.
    """

    def __init__(self, owner: nn.Module, in_features: int, out_features: Mapping[str, int]) -> None:
        super().__init__()
        self._owner = (owner,)  # in a tuple, so that it does not become a child
        self.names, self.sizes = tuple(out_features), tuple(out_features.values())
        self.in_features = in_features
        for name, size in out_features.items():
            owner.add_module(name, nn.Linear(in_features, size, bias=False))
        self._pack()

    @property
    def linears(self) -> list[nn.Module]:
        """The owner's children, or what has taken their places."""
        children = self._owner[
            0
        ]._modules  # quicker than getattr; decoding asks for them at every product
        return [children[name] for name in self.names]

    @property
    def weight(self) -> Tensor:
        """(sum of the outputs, in), the weights of plain linears in their order."""
        return self.matrix()[0]

    def matrix(self) -> tuple[Tensor, bool]:
        """The weight, and whether it has been written just now."""
        weights = [linear.weight for linear in self.linears]
        if torch.compiler.is_compiling():  # a graph knows its inputs, not where they lie
            return torch.cat(weights), True
        is_new = not _are_adjacent(weights)
        if is_new:  # they were copied or assigned one by one
            self._pack()
        return (_Rows.apply(*weights) if torch.is_grad_enabled() else _matrix(weights)), is_new

    def lay_out(self, whole: Tensor) -> None:
        """Let the weights be the rows of ``whole`` (sum of the outputs, in), whatever is in it."""
        for linear, rows in zip(self.linears, whole.split(self.sizes)):
            linear.weight.data = rows

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., sum of the outputs)."""
        if is_plain(self):
            return product(x, self.weight, None)
        return torch.cat([linear(x) for linear in self.linears], dim=-1)

    def split(self, y: Tensor) -> tuple[Tensor, ...]:
        """The product (..., sum of the outputs) as one view per linear, in their order."""
        return y.split(self.sizes, dim=-1)

    def _pack(self) -> None:
        weights = [linear.weight for linear in self.linears]
        if weights[0].is_meta:  # no memory to lie in, and torch.cat there is 80 MB of imports
            return
        # A tensor of inference mode cannot take over the memory of another kind, nor the reverse.
        with torch.inference_mode(weights[0].is_inference()), torch.no_grad():
            self.lay_out(torch.cat(weights))

    def _apply(self, fn: Any, recurse: bool = True) -> FusedLinear:
        """As for every module: here the linears have just been moved or cast, each on its own."""
        super()._apply(fn, recurse)
        if is_plain(self) and not _are_adjacent([linear.weight for linear in self.linears]):
            self._pack()
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, " + ", ".join(
            f"{name}={size}" for name, size in zip(self.names, self.sizes)
        )


class RMSNorm(nn.Module):
    """The weight and epsilon of an RMSNorm; the residual stream applies it."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def is_plain(linear: nn.Module, *, or_biased: bool = False) -> bool:
    """Whether calling ``linear`` is its weight's product and nothing else: no adapter, hook or replaced
    forward, no bias unless that is allowed, and no other kind of tensor (quantised, sharded) as the
    weight."""
    if linear._forward_pre_hooks or linear._forward_hooks or "forward" in vars(linear):
        return False
    if type(linear) is FusedLinear:
        return not is_fsdp_managed(linear) and all(map(is_plain, linear.linears))
    if type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter:
        return False
    return or_biased or linear.bias is None


def is_fsdp_managed(module: nn.Module) -> bool:
    """Whether parameters of ``module`` are FSDP's: it marks modules so, in both of its versions, for the
    compiler of PyTorch."""
    return "_is_fsdp_managed_module" in vars(module)


def multiply(linear: nn.Module, x: Tensor) -> Tensor:
    """``linear(x)`` for any number of rows."""
    if type(linear) is nn.Linear and is_plain(linear, or_biased=True):
        return product(x, linear.weight, linear.bias)
    return linear(x)


def _are_few(rows: int) -> bool:
    """Whether an op of few rows takes so many; an exported program may be run with more than it was made
    with."""
    if torch.compiler.is_exporting():
        return statically_known_true(rows <= MAX_ROWS)
    return rows <= MAX_ROWS


def _skinny(ops: Ops, linear: nn.Module, x: Tensor, **fused: Any) -> Tensor | None:
    """``linear`` of x (N, in) by ``ops.skinny_linear``, with what else is ``fused`` into it.

    Returns: None where that op is not meant for it: with more rows the library's product is better,
    and a gradient or anything but a plain linear needs the module itself.
    """
    if torch.is_grad_enabled() or not is_plain(linear) or not _are_few(x.shape[0]):
        return None
    # No kernel of a forward writes weights, so a product may read them before the one before it ends; but
    # what makes one matrix of several is a launch that does.
    weight, is_new = linear.matrix() if type(linear) is FusedLinear else (linear.weight, False)
    return ops.skinny_linear(x, weight, weight_is_constant=not is_new, **fused)


def project(ops: Ops, linear: nn.Module, x: Tensor) -> Tensor:
    """``linear`` of x (B, L, in), in the way that is best for the number of rows."""
    y = _skinny(ops, linear, x.flatten(0, 1))
    return multiply(linear, x) if y is None else y.unflatten(0, x.shape[:2])


@dataclass
class ResidualStream:
    """The residual stream (N, E): layers read it through a norm and a projection, and add to it.

    With few rows, as in decoding, the products are bound by the reading of the weights, and norm,
    SwiGLU, gate and sum are fused into them. With more, the latest addition waits to be fused with
    the next norm.

    A module takes a stream, adds to a copy and returns that: activation checkpointing calls a module again
    with what it was given, and FSDP hangs its work on the tensors in what goes in and comes out.

    Attributes:
        x: what has been summed up.
        delta, gate, row_mask: the addition that waits, if one does.
    """

    ops: Ops
    x: Tensor
    delta: Tensor | None = None
    gate: Tensor | None = None
    row_mask: Tensor | None = None

    def copy(self) -> ResidualStream:
        return ResidualStream(self.ops, self.x, self.delta, self.gate, self.row_mask)

    def read(self, norm: RMSNorm, linear: nn.Module, *, swiglu: bool = False) -> Tensor:
        """``linear`` of the normalised stream, (N, out); with ``swiglu`` of its two halves, (N, out / 2)."""
        if self.delta is None:
            y = _skinny(
                self.ops, linear, self.x, norm_weight=norm.weight, eps=norm.eps, swiglu=swiglu
            )
            if y is not None:
                return y
        y = multiply(linear, self.norm(norm))
        return self.ops.swiglu(y) if swiglu else y

    def add(
        self,
        linear: nn.Module,
        x: Tensor,
        gate: Tensor | None = None,
        row_mask: Tensor | None = None,
    ) -> None:
        """Add ``linear(x)``, or ``tanh(gate) * row_mask * linear(x)`` if there is a gate."""
        stream = self.value()
        y = _skinny(self.ops, linear, x, residual=stream, gate=gate, row_mask=row_mask)
        if y is not None:
            self.x = y
        else:
            self.delta, self.gate, self.row_mask = multiply(linear, x), gate, row_mask

    def norm(self, norm: RMSNorm) -> Tensor:
        """The normalised stream."""
        if self.delta is None:
            return self.ops.rms_norm(self.x, norm.weight, norm.eps)
        y, self.x = self.ops.add_rms_norm(
            self.delta, self.x, norm.weight, norm.eps, gate=self.gate, row_mask=self.row_mask
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

    def run_layer(self, index: int, layer: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """``layer(*inputs)``."""
        if self.recomputes(index):
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def recomputes(self, index: int) -> bool:
        """Whether this layer of a forward that runs now is computed again in its backward pass."""
        every = self.recompute_every if self.training and torch.is_grad_enabled() else 0
        return every > 0 and index % every == 0


def init_normal(module: nn.Module, std: float) -> None:
    """Initialise the parameters that ``module`` itself owns as `transformers` does."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
