"""Filling a model that lies on the meta device with the parameters of a checkpoint, one at a time."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import mllama_kernels
from mllama.checkpoints.checkpoint import Checkpoint, CheckpointError
from mllama.linear import Projection, projections_of
from mllama.parallel.rules import Cut
from mllama.progress import bar
from mllama.quantized_modules import QuantizedEmbedding, QuantizedLinear, WholeWeights
from mllama.wording import shown
from mllama_kernels.encodings import ENCODINGS
from mllama_kernels.quantized_tensor import QuantizedTensor


def fill(
    model: Any,
    checkpoint: Checkpoint,
    sources: Mapping[str, str],
    *,
    encodings: Mapping[str, str],
    dtype: torch.dtype,
    device: torch.device,
    cuts: Mapping[str, Cut] = {},
) -> None:
    """Give a model its parameters.

    What is stored plain and gets an encoding is quantised on the device as soon as it is read; what is stored
    quantised and gets none is decoded.

    Args:
        sources: state-dict names to names in the checkpoint.
        encodings: by state-dict name, of the weights that are quantised in the model.
        dtype, device: of the others.
        cuts: by state-dict name, the parts that this rank has of those that it has not as a whole; of what is
            mapped only they are read.
    Raises: CheckpointError for weights that cannot be quantised, by name.
    """
    _materialise(model, dtype, device, encodings)
    # state_dict() holds the parameters' own memory: filling it needs no second copy.
    load: dict[str, Callable[[Any], object]] = {
        name: tensor.copy_ for name, tensor in model.state_dict(destination=WholeWeights()).items()
    }
    for path, module in model.named_modules():
        for projection in projections_of(module):
            for name in projection.parameter_names():
                load[_within(path, name)] = functools.partial(projection.load_weight, name)
    installer = _Installer(model, encodings, dtype, device)
    names = {canonical: name for name, canonical in sources.items()}
    total = sum(checkpoint.tensors[canonical].nbytes for canonical in names)
    with torch.no_grad(), bar("loading", total, "B", unit_scale=True) as progress:
        for canonical, tensor in checkpoint.read(names):
            name, info = names[canonical], checkpoint.tensors[canonical]
            cut = cuts.get(name, _whole)
            if name in encodings:
                try:
                    installer.put(name, tensor, cut)
                except (ValueError, RuntimeError) as error:
                    problem = f"{shown(info.stored_name)} in {shown(info.file)}: {error}"
                    raise CheckpointError(checkpoint.folder, [problem]) from None
            elif isinstance(tensor, QuantizedTensor):
                # In whose blocks the part may begin and end anywhere.
                load[name](cut(tensor.to(device).dequantize(dtype)))
            else:
                load[name](cut(tensor))
            progress.update(info.nbytes)


def _whole(weight: Any) -> Any:
    return weight


def _within(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _materialise(
    model: nn.Module, dtype: torch.dtype, device: torch.device, left_out: Container[str]
) -> None:
    """Give a model built on the meta device uninitialised parameters, but for those left out."""
    for path, module in model.named_modules():
        for projection in projections_of(module):
            linears = [n for n in projection.names if _within(path, f"{n}.weight") in left_out]
            projection.materialise(dtype, device, linears)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta and _within(path, name) not in left_out:
                empty = torch.empty(parameter.shape, dtype=dtype, device=device)
                module.register_parameter(name, nn.Parameter(empty, parameter.requires_grad))


class _Installer:
    """Puts quantised modules in the places of plain ones as their weights come."""

    def __init__(
        self, model: Any, encodings: Mapping[str, str], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._ops, self._encodings, self._dtype, self._device = model.ops, encodings, dtype, device
        self._owners: dict[str, nn.Module] = dict(model.named_modules())
        # Of linears that are one product, the projection and what it still waits for.
        self._waiting: dict[str, tuple[Projection, set[str]]] = {}
        for path, module in self._owners.items():
            for projection in projections_of(module):
                whole = {_within(path, f"{name}.weight") for name in projection.names}
                names = whole & encodings.keys()
                self._waiting |= dict.fromkeys(names, (projection, names))

    def put(self, name: str, tensor: Tensor | QuantizedTensor, cut: Callable[[Any], Any]) -> None:
        """The part that ``cut`` gives of a weight by its state-dict name, plain or quantised."""
        weight = self._quantized(name, tensor, cut)
        if weight.device.type == "cpu" and not weight.is_packed:
            weight = copy.deepcopy(weight)  # which is part of a mapped file
        path, _, child = name.removesuffix(".weight").rpartition(".")
        owner = self._owners[path]
        plain = getattr(owner, child)
        if isinstance(plain, nn.Embedding):
            made: nn.Module = QuantizedEmbedding(weight, plain.padding_idx, self._dtype, self._ops)
        else:
            made = QuantizedLinear(weight, plain.bias, self._ops)
        owner.register_module(child, made.train(plain.training))
        if name in self._waiting:
            projection, names = self._waiting[name]
            names.discard(name)
            if not names:
                projection.pack()

    def _quantized(
        self, name: str, tensor: Tensor | QuantizedTensor, cut: Callable[[Any], Any]
    ) -> QuantizedTensor:
        if isinstance(tensor, QuantizedTensor):
            return cut(tensor).to(self._device)
        encoding = self._encodings[name]
        if ENCODINGS[encoding].block > 1:
            return mllama_kernels.quantize(cut(tensor).to(self._device), encoding)
        # Its rows have one scale each, that of the whole row.
        return cut(mllama_kernels.quantize(tensor.to(self._device), encoding))
