"""A linear layer and a token embedding whose weight is quantised, in the places of the plain ones."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mllama.backend import Ops
from mllama.quantization.names import named_parts, part_names, split_name
from mllama_kernels._arguments import peft_asks
from mllama_kernels.linear import linear_by
from mllama_kernels.quantized_tensor import QuantizedTensor

_PLANES = ("packed", "table")


class WholeWeights(OrderedDict[str, Any]):
    """A state dict to fill, ``module.state_dict(destination=WholeWeights())``, that holds each quantised
    weight as it is, under its own name: its parts may be new memory. Of a model that is split over ranks it
    holds what this rank has."""


class Quantized(nn.Module):
    """A module whose ``weight`` is a `QuantizedTensor` and no parameter: it is neither trained nor cast.

    What the kernels read of it are buffers that no state dict holds, since they differ between devices; a
    state dict has the weight's parts, under the names of `quantization.names`. Moving the module to another
    kind of device makes them anew.
    """

    ops: Ops
    bias: nn.Parameter | None

    @property
    def weight(self) -> QuantizedTensor:
        """The weight; it cannot be assigned, :meth:`set_quantized` replaces it.

        Raises: TypeError for PEFT, where it would change the weight.
        """
        if not torch.compiler.is_compiling():
            self._check_asked(*peft_asks())
        return self._weight

    def set_quantized(self, weight: QuantizedTensor) -> None:
        """Put another quantised weight of the same shape in its place."""
        planes = dict.fromkeys(_PLANES)
        planes |= dict(zip(_PLANES, weight.planes))
        for name, plane in planes.items():
            self.register_buffer(name, plane, persistent=False)
        self._weight = weight

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise TypeError(
                f"the weight of {type(self).__name__} is quantised ({self._weight.encoding}) and cannot be "
                "assigned: put an nn module with the new weight in its place, or load the model with "
                "dequantize=True"
            )
        super().__setattr__(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Quantized:
        """As for every module. Raises: TypeError for PEFT's copy of what is to be trained as a whole."""
        if peft_asks() == ("peft.utils.other", "update"):
            raise TypeError(
                f"{self._name} cannot be trained as a whole (modules_to_save): train an adapter on it, or "
                "load the model with dequantize=True"
            )
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(vars(self), memo))
        return copied

    def _check_asked(self, module: str, function: str) -> None:
        if module.startswith("peft.tuners.trainable_tokens"):
            raise TypeError(
                f"{self._name} no rows of it can be trained (trainable_token_indices): train an adapter on "
                "it, or load the model with dequantize=True"
            )
        if module and function in ("merge", "unmerge"):
            raise TypeError(
                f"{self._name} no adapter can be merged into it (merge_and_unload, merge_adapter): use the "
                "adapter beside it as it is, or load the model with dequantize=True and merge there"
            )

    @property
    def _name(self) -> str:
        return f"{type(self).__name__} has a quantised weight ({self._weight.encoding}) and"

    def requires_grad_(self, requires_grad: bool = True) -> Quantized:
        """As for every module, but there is no weight that could be trained.

        Raises: TypeError where gradients are asked for: training would leave the weight as it is.
        """
        if requires_grad:
            raise TypeError(
                f"{type(self).__name__} has a quantised weight ({self._weight.encoding}), which has no "
                "gradient: train an adapter on it, or load the model with dequantize=True"
            )
        return super().requires_grad_(False)

    def _apply(self, fn: Any, recurse: bool = True) -> Quantized:
        """As for every module, without a look at the dtype: a cast does not concern what is quantised."""
        weight, names = self._weight, self._non_persistent_buffers_set
        planes = {name: self._buffers.pop(name) for name in _PLANES}
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers.update(planes)
            names.update(_PLANES)
        moved = fn(torch.empty(0, dtype=torch.uint8, device=weight.device))
        if moved.dtype != torch.uint8:
            raise TypeError(
                f"{type(self).__name__} cannot be cast to {moved.dtype}: its weight is quantised "
                f"({weight.encoding})"
            )
        if moved.device != weight.device:
            self.set_quantized(weight.to(moved.device))
        elif moved.is_shared() and moved.is_cpu:  # with other processes
            for plane in weight.planes:
                fn(plane)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        if isinstance(destination, WholeWeights):
            destination[f"{prefix}weight"] = self._weight
        else:
            for appended, part in named_parts(self._weight).items():
                destination[f"{prefix}weight{appended}"] = part
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        weight = self._weight
        names = {part: f"{prefix}weight{end}" for part, end in part_names(weight.encoding).items()}
        names = {part: name for part, name in names.items() if part in weight.parts()}
        given = {part: state_dict[name] for part, name in names.items() if name in state_dict}
        unexpected: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected, error_msgs
        )
        unexpected_keys += [name for name in unexpected if name not in names.values()]
        if any(split_name(name) or name == f"{prefix}weight" for name in unexpected_keys):
            error_msgs.append(
                f"{prefix}weight is {weight.encoding} here; a state dict with another encoding, or with the "
                "plain weight, is for a model that has that"
            )
        missing = [name for part, name in names.items() if part not in given]
        missing_keys += missing
        if missing:
            return
        try:
            self._take(given)
        except (ValueError, TypeError) as error:
            error_msgs.append(f"{prefix}weight: {error}")

    def _take(self, parts: dict[str, Tensor]) -> None:
        loaded = QuantizedTensor.from_parts(self._weight.encoding, parts, pack=False)
        if loaded.shape != self._weight.shape:
            raise ValueError(
                f"expected {tuple(self._weight.shape)}, got parts of {tuple(loaded.shape)}"
            )
        self.set_quantized(loaded.to(self._weight.device))


class QuantizedLinear(Quantized, nn.Linear):
    """``x @ weight.T + bias`` with a quantised weight (out, in).

    Args:
        weight: the quantised one.
        bias: (out,), in the dtype of the inputs, or None.
        ops: of the model.
    """

    def __init__(self, weight: QuantizedTensor, bias: nn.Parameter | None, ops: Ops) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.ops = ops
        self.register_parameter("bias", bias)
        self.set_quantized(weight)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out) in the dtype of x; gradients are those of x and the bias."""
        return linear_by(self.ops, x, self._weight, self.bias, weight_is_constant=True)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._weight.encoding}"


class QuantizedEmbedding(Quantized, nn.Embedding):
    """Rows of a quantised weight, decoded as they are gathered.

    Args:
        weight: (tokens, width).
        padding_idx: of the plain embedding; it changes no value.
        dtype: of the vectors.
        ops: of the model.
    """

    def __init__(
        self, weight: QuantizedTensor, padding_idx: int | None, dtype: torch.dtype, ops: Ops
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx, self.dtype, self.ops = padding_idx, dtype, ops
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = (
            None,
            2.0,
            False,
            False,
        )
        self.set_quantized(weight)

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedEmbedding:
        """As for every module; the vectors have the dtype that the model is cast to."""
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self._weight.device)).dtype
        return self

    def forward(self, input: Tensor) -> Tensor:
        """ids (...) int64 to (..., width)."""
        return self.ops.quantized_rows(input, self._weight, self.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._weight.encoding}"
