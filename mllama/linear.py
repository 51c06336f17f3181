"""What a projection is: linears of one input under their published names, computed as one product.

The linears are ordinary children of a block, which optimisers, state dicts, adapters and hooks know by
their names; a :class:`Projection` is the block's own view of them and no module. Some or all of them may be
quantised (`quantized_modules.py`): those of one encoding are one product then, of a weight that lies in
memory as one.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from operator import is_not
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mllama.kinds import Asked, Kinds, call_on_rows, is_bare_lora
from mllama.laid_out import (
    can_be_joined,
    in_own_storage,
    joined_matrix,
    joined_rows,
    lay_out,
    rows_of_one,
)
from mllama.parallel.rules import Rule
from mllama.quantized_modules import QuantizedLinear
from mllama.varlen import VarlenBatch
from mllama_kernels.linear import LinearOps, linear_by
from mllama_kernels.quantized_tensor import QuantizedTensor

# FSDP, in both of its versions, sets it on the modules whose parameters it frees and fills.
_FSDP_MARK = "_is_fsdp_managed_module"

# What a projection gives: the outputs side by side, or of several products each by itself.
Product = Tensor | tuple[Tensor, ...]


def side_by_side(y: Product) -> Tensor:
    """The outputs of a projection as one tensor (..., sum of them)."""
    return torch.cat(y, dim=-1) if isinstance(y, tuple) else y


class KernelWeight(NamedTuple):
    """What the product of a projection reads.

    Attributes:
        matrix: (out, in).
        bias: (out,) or None.
        is_constant: whether nothing in this forward has written the matrix.
    """

    matrix: Tensor | QuantizedTensor
    bias: Tensor | None
    is_constant: bool


class Share(NamedTuple):
    """One of several products that a projection is made of.

    Attributes:
        weight: what it reads.
        places: which of the linears it computes, in the order of its rows.
    """

    weight: KernelWeight
    places: tuple[int, ...]


class _Shared(NamedTuple):
    """How quantised weights lie in memory: ``shares`` holds while the linears have just these ``weights``."""

    weights: tuple[QuantizedTensor | None, ...]
    shares: tuple[tuple[QuantizedTensor, tuple[int, ...]], ...]


class _Rows(torch.autograd.Function):
    """A matrix of which some weights are the rows, in the same memory; its gradient is split among them."""

    @staticmethod
    def forward(matrix: Tensor, *weights: Tensor) -> Tensor:
        return matrix.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.sizes = [weight.shape[0] for weight in inputs[1:]]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *gradient.split(ctx.sizes))


class Projection:
    """Linears of one input. Several without bias lie one after another in memory and are one product.

    Args:
        owner: the block; gets each linear as a child.
        in_features: of all of them.
        out_features: by the names of the linears.
        bias: of all of them; only of a single one.
        rule: how it may be split over ranks; None: not at all.

    Attributes:
        is_split: whether the linears are those of one of several ranks (`parallel/split.py`).
        collective: what ranks exchange of the output then; None where each goes on with its own.
    """

    def __init__(
        self,
        owner: nn.Module,
        in_features: int,
        out_features: Mapping[str, int],
        *,
        bias: bool = False,
        rule: Rule | None = None,
    ) -> None:
        self.rule, self.is_split = rule, False
        self.collective: Callable[[Tensor], Tensor] | None = None
        # Not the owner itself, which would wait for the garbage collector then.
        self._children = owner._modules
        self.names, self.sizes = tuple(out_features), tuple(out_features.values())
        self._shared = _Shared((), ())
        for name, size in out_features.items():
            owner.add_module(name, nn.Linear(in_features, size, bias=bias))
        self.pack()

    def kernel_weight(self, kinds: Kinds) -> KernelWeight | None:
        """What a product in place of the linears reads; None: they are to be called, each by itself.

        So it is where one of them is not exactly an `nn.Linear` or a `QuantizedLinear`, and for several also
        where they do not fit together, have several encodings (:meth:`shares`), or their memory is not
        theirs: FSDP's to free and to fill, or part of something else.
        """
        children = self._children
        first = children[self.names[0]]
        if kinds.get(first) is QuantizedLinear:
            if len(self.names) == 1:
                return KernelWeight(first._weight, first._parameters["bias"], True)
            whole = self._whole(kinds)
            if whole is None:
                shares = self.shares(kinds)
                whole = shares[0].weight.matrix if shares and len(shares) == 1 else None
            return None if whole is None else KernelWeight(whole, None, True)
        if len(self.names) == 1:
            linear = first
            own = linear._parameters
            if (
                kinds.get(linear) is not nn.Linear or "bias" not in own or "weight" not in own
            ):  # FSDP1 takes them out
                return None
            return KernelWeight(own["weight"], own["bias"], _FSDP_MARK not in vars(linear))
        weights: list[Tensor] = []
        for name in self.names:
            linear = children[name]
            own = linear._parameters
            if kinds.get(linear) is not nn.Linear or "bias" not in own or "weight" not in own:
                return None
            if own["bias"] is not None or _FSDP_MARK in vars(linear):
                return None
            weights.append(own["weight"])
        if torch.compiler.is_compiling():  # a graph knows its inputs, not where they lie
            self._check_sizes(weights)
            return KernelWeight(torch.cat(weights), None, False)
        matrix = joined_matrix(weights)
        is_packed = matrix is not None
        if not is_packed:  # they were copied or assigned one by one
            self._check_sizes(weights)
            if not can_be_joined(weights):
                return None
            lay_out(weights)
            matrix = joined_matrix(weights)
            if matrix is None:  # another thread has laid them out meanwhile, elsewhere
                return None
        if torch.is_grad_enabled():
            matrix = _Rows.apply(matrix, *weights)
        return KernelWeight(matrix, None, is_packed)

    def _whole(self, kinds: Kinds) -> QuantizedTensor | None:
        """The weight of linears that lie in memory as one, if they are plain and nothing has changed."""
        shared, children = self._shared, self._children
        if len(shared.shares) != 1:
            return None
        for name, weight in zip(self.names, shared.weights):
            linear = children[name]
            if kinds.get(linear) is not QuantizedLinear or linear._weight is not weight:
                return None
            if linear._parameters["bias"] is not None:
                return None
        return shared.shares[0][0]

    def shares(self, kinds: Kinds) -> tuple[Share, ...] | None:
        """The products that linears without bias are made of, where some are quantised: one for each
        encoding, and one for each plain linear. None: no product may take their place."""
        weights: list[QuantizedTensor | None] = []
        for linear in self.linears:
            kind = kinds.get(linear)
            if (
                kind not in (QuantizedLinear, nn.Linear)
                or linear._parameters.get("bias") is not None
            ):
                return None
            weights.append(linear._weight if kind is QuantizedLinear else None)
        shared = self._shared
        if len(shared.weights) != len(weights) or any(map(is_not, shared.weights, weights)):
            shared = self._share(weights)
        if not shared.shares:
            return None
        found = [Share(KernelWeight(whole, None, True), at) for whole, at in shared.shares]
        for place, (name, weight) in enumerate(zip(self.names, weights, strict=True)):
            if weight is None:
                plain = self._children[name]
                is_constant = _FSDP_MARK not in vars(plain)
                found.append(Share(KernelWeight(plain.weight, None, is_constant), (place,)))
        return tuple(found)

    def _share(self, weights: Sequence[QuantizedTensor | None]) -> _Shared:
        """Let the weights of each encoding lie in memory as one, where rows of one can be told apart."""
        places: dict[Any, list[int]] = {}
        for place, weight in enumerate(weights):
            if weight is not None:
                form = (weight.encoding, weight.group, weight.scale_type, weight.zero_type)
                places.setdefault((*form, weight.device), []).append(place)
        own, shares = list(weights), []
        for at in places.values():
            members = [weights[place] for place in at]
            one = None if torch.compiler.is_compiling() else joined_rows(members)
            if one is None:
                shares += [(weight, (place,)) for weight, place in zip(members, at, strict=True)]
                continue
            whole, rows = one
            shares.append((whole, tuple(at)))
            for place, part in zip(at, rows, strict=True):
                own[place] = part
                self._children[self.names[place]].set_quantized(part)
        shared = _Shared(tuple(own), tuple(shares))
        if not torch.compiler.is_compiling():
            self._shared = shared
        return shared

    def together(self, shares: tuple[Share, ...], outputs: Iterable[Tensor]) -> tuple[Tensor, ...]:
        """The output of each linear, in their order, from that of each share."""
        parts: dict[int, Tensor] = {}
        for share, y in zip(shares, outputs, strict=True):
            sizes = [self.sizes[place] for place in share.places]
            parts |= zip(share.places, y.split(sizes, dim=-1), strict=True)
        return tuple(parts[place] for place in range(len(self.names)))

    def __getstate__(self) -> dict[str, Any]:
        """A copy lays its own weights out."""
        return {**vars(self), "_shared": _Shared((), ())}

    def __call__(
        self, ops: LinearOps, x: Tensor, kinds: Kinds = Asked, varlen: VarlenBatch | None = None
    ) -> Product:
        """x (..., in) to (..., sum of the outputs), or where they are several products to each output.

        Args:
            varlen: of x (N, in), for the linears that have to be called.
        Raises: TypeError for those of a split model that nobody has made for a part.
        """
        weight = self.kernel_weight(kinds)
        if weight is None:
            y = self._several(ops, x, kinds, varlen)
        else:
            y = linear_by(ops, x, weight.matrix, weight.bias, weight_is_constant=weight.is_constant)
        return y if self.collective is None else self.collective(y)

    def _several(
        self, ops: LinearOps, x: Tensor, kinds: Kinds, varlen: VarlenBatch | None
    ) -> Product:
        """By several products, or by calling the linears."""
        if len(self.names) > 1 and (shares := self.shares(kinds)) is not None:
            products = (
                linear_by(ops, x, w.matrix, weight_is_constant=w.is_constant) for w, _ in shares
            )
            return self.together(shares, products)
        for linear in self.linears:
            is_known = kinds.get(linear) in (nn.Linear, QuantizedLinear)
            if self.is_split and (not is_known or _FSDP_MARK in vars(linear)):
                if not is_bare_lora(linear):
                    self.require_whole(linear)
        outputs = [
            linear_by(ops, x, linear.weight, linear.bias)
            if kinds.get(linear) is nn.Linear and linear._parameters.keys() >= {"weight", "bias"}
            else call_on_rows(linear, x, varlen)
            for linear in self.linears
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def require_whole(self, module: nn.Module) -> None:
        """Raises: TypeError if the projection is split: then the module, with a hook or a forward of its own,
        would see the features or heads of one rank only, and FSDP take the parts of several for one weight;
        and in an exported program."""
        if not self.is_split:
            return
        if torch.compiler.is_exporting():
            raise TypeError(
                "a model that is split over ranks (tensor_parallel) cannot be exported: a program has no "
                "other ranks"
            )
        own = [name for name in self.names if self._children[name] is module]
        what = f"beside {', '.join(self.names)}" if not own else f"at {own[0]}"
        raise TypeError(
            f"{type(module).__name__} {what} has a hook, a forward of its own or FSDP around it; in a "
            "model that is split over ranks (tensor_parallel) those would see a part of the features: put "
            "them on the attention or MLP as a whole, or load the model without tensor_parallel"
        )

    def split(self, y: Product) -> tuple[Tensor, ...]:
        """The product (..., sum of the outputs) as one view per linear, in their order."""
        return y if isinstance(y, tuple) else y.split(self.sizes, dim=-1)

    @property
    def linears(self) -> list[nn.Module]:
        """The owner's children, or what has taken their places."""
        return [self._children[name] for name in self.names]

    def pack(self) -> None:
        """Let several weights lie one after another, if they can and do not yet."""
        linears = self.linears
        if len(linears) == 1:
            return
        if any(isinstance(linear, QuantizedLinear) for linear in linears):
            self.shares(Asked)
            return
        if any(Asked.get(linear) is not nn.Linear for linear in linears):
            return
        weights = [linear.weight for linear in linears]
        if weights[0].is_meta or any(_FSDP_MARK in vars(linear) for linear in linears):
            return  # there is no memory to lie in, and torch.cat there is 80 MB of imports
        if joined_matrix(weights) is None and can_be_joined(weights):
            lay_out(weights)

    def materialise(
        self, dtype: torch.dtype, device: torch.device, left_out: Container[str] = ()
    ) -> None:
        """Give linears without memory uninitialised weights, but for those left out, by their names."""
        if any(name in left_out for name in self.names):
            return self._materialise_each(dtype, device, left_out)
        weights = [linear.weight for linear in self.linears]
        sizes = [weight.shape[0] for weight in weights]
        whole = torch.empty(sum(sizes), weights[0].shape[1], dtype=dtype, device=device)
        for linear, rows in zip(self.linears, rows_of_one(whole, sizes), strict=True):
            linear.weight = nn.Parameter(rows, linear.weight.requires_grad)

    def _materialise_each(
        self, dtype: torch.dtype, device: torch.device, left_out: Container[str]
    ) -> None:
        for name in self.names:
            if name not in left_out:
                linear = self._children[name]
                empty = torch.empty(linear.weight.shape, dtype=dtype, device=device)
                linear.weight = nn.Parameter(empty, linear.weight.requires_grad)

    def _check_sizes(self, weights: list[Tensor]) -> None:
        """Raises: ValueError for outputs that would be divided elsewhere than where one linear ends, and of a
        split model for those of another rank or the whole."""
        got, expected = [weight.shape[0] for weight in weights], list(self.sizes)
        in_proportion = all(n * expected[0] == got[0] * size for n, size in zip(got, expected))
        if not in_proportion or (self.is_split and got != expected):
            names, or_more = (
                ", ".join(self.names),
                "" if self.is_split else ", or as many in proportion",
            )
            raise ValueError(f"{names} must give {expected} features{or_more}; got {got}")

    def parameter_names(self) -> list[str]:
        """Of all its linears, as :meth:`load_weight` knows them."""
        own = zip(self.names, self.linears, strict=True)
        return [f"{name}.{parameter}" for name, m in own for parameter, _ in m.named_parameters()]

    def load_weight(self, name: str, source: Tensor) -> None:
        """Take over a stored tensor, cast to what is here: ``name`` is that of a linear and its parameter,
        as "q_proj.weight"."""
        linear, parameter = name.split(".", 1)
        self._children[linear].get_parameter(parameter).copy_(source)


def projections_of(module: nn.Module) -> list[Projection]:
    """Those of the linears that are its children, which are attributes of it."""
    return [value for value in vars(module).values() if isinstance(value, Projection)]


class Block(nn.Module):
    """A module with projections of several linears."""

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(_with_own_storages)

    def _apply(self, fn: Any, recurse: bool = True) -> Block:
        """As for every module: here the linears have just been moved or cast, each on its own."""
        super()._apply(fn, recurse)
        for projection in projections_of(self):
            projection.pack()
        return self


def _with_own_storages(
    block: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
) -> None:
    """In a state dict the first of several weights has its rows only: saving a tensor saves its storage."""
    for projection in projections_of(block):
        first = f"{prefix}{projection.names[0]}."
        for name, value in state.items():
            if name.startswith(first) and type(value) is Tensor and not value.is_meta:
                if value.untyped_storage().nbytes() > value.nbytes and value.is_contiguous():
                    state[name] = in_own_storage(value)
