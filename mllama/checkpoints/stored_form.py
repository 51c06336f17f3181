"""How weights are written: plain ones as they are, quantised ones in parts.

A model whose quantised weights are all int8, or all fp8, is written as compressed-tensors, which
`transformers` and others read. Any other is written in our own form (`own_format.py`), ggml's blocks byte for
byte.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mllama.checkpoints.key_layout import canonical_name
from mllama.checkpoints.own_format import METHOD, SIGNED, VERSION
from mllama.parallel.states import Gathering
from mllama.quantization.names import named_parts, split_name
from mllama.quantization.policy import Quantization
from mllama_kernels.quantized_tensor import QuantizedTensor

# What compressed-tensors calls a folder of one of our encodings, and the numbers in it.
_COMPRESSED = {"int8": ("int-quantized", "int"), "fp8": ("float-quantized", "float")}


@dataclass(frozen=True)
class Item:
    """A weight to be written.

    Attributes:
        nbytes: of its tensors together, at most.
        make: the tensors by name, made anew by every call.
    """

    nbytes: int
    make: Callable[[], Iterable[tuple[str, Tensor]]]


def stored_form(
    weights: Mapping[str, Tensor | QuantizedTensor],
    model: Any,
    gathering: Gathering | None = None,
) -> tuple[dict[str, Any] | None, list[Item]]:
    """The ``quantization_config`` of weights by their published names, None where all are plain, and the
    items to write. ``model`` says what it was quantised to; of one that is split over ranks the weights are
    those of this rank, and ``gathering`` makes them whole: all ranks make the items, in their order."""
    encodings = {n: w.encoding for n, w in weights.items() if isinstance(w, QuantizedTensor)}
    signed = _has_negative_scales(weights.values())
    if gathering is not None:
        signed = any(gathering.share.ranks.gathered(signed))
    entry, write = chosen_form(encodings, weights, model.quantization, signed=signed)
    items = []
    for name, weight in weights.items():
        is_quantized = isinstance(weight, QuantizedTensor)
        size = weight.nbytes if is_quantized else weight.numel() * weight.element_size()
        tensors: Callable[..., list[tuple[str, Tensor]]] = write if is_quantized else _plain
        if gathering is None:
            items.append(Item(size, functools.partial(tensors, name, weight)))
        else:
            make = functools.partial(_gathered, gathering, tensors, name, weight)
            items.append(Item(gathering.nbytes(name, size), make))
    return entry, items


def _gathered(
    gathering: Gathering,
    tensors: Callable[..., list[tuple[str, Tensor]]],
    name: str,
    own: Tensor | QuantizedTensor,
) -> list[tuple[str, Tensor]]:
    whole = gathering(name, own)
    return [] if whole is None else tensors(name, whole)


def chosen_form(
    encodings: Mapping[str, str],
    names: Iterable[str],
    quantization: Quantization | None,
    *,
    signed: bool = False,
) -> tuple[dict[str, Any] | None, Callable[[str, QuantizedTensor], list[tuple[str, Tensor]]]]:
    """The ``quantization_config`` of a folder, None of a plain one, and what makes the tensors of a weight.

    Args:
        encodings: of its quantised weights, by their published names.
        names: of all its weights.
        quantization: what it was quantised to.
        signed: whether scales of int8 or fp8 are negative, which no quantiser of this package makes.
    """
    used = set(encodings.values())
    if len(used) == 1 and (only := next(iter(used))) in _COMPRESSED:
        plain = [name for name in names if name not in encodings]
        entry = compressed_tensors_entry(only, plain)
        own: dict[str, Any] = {SIGNED: True} if signed else {}
        if quantization is not None and quantization.overrides:
            own["overrides"] = dict(quantization.overrides)
        return {
            **entry,
            **({METHOD: own} if own else {}),
        }, compressed_tensors_parts  # others pass over it
    if signed and quantization is None:  # of a part of a model, which does not know
        quantization = Quantization(Counter(encodings.values()).most_common(1)[0][0], {})
    if not used or quantization is None:
        return None, own_parts
    entry = own_entry(quantization.encoding, quantization.overrides)
    return {**entry, **({SIGNED: True} if signed else {})}, own_parts


def _has_negative_scales(weights: Iterable[Tensor | QuantizedTensor]) -> bool:
    """Whether a reader would take any of them for damaged, unless the folder says that they are not."""
    return any(
        bool((weight.parts()["scale"] < 0).any())
        for weight in weights
        if isinstance(weight, QuantizedTensor) and weight.encoding in _COMPRESSED
    )


def own_entry(encoding: str, overrides: Mapping[str, str]) -> dict[str, Any]:
    """The ``quantization_config`` of our own form."""
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "encoding": encoding,
        "overrides": dict(overrides),
    }


def own_parts(name: str, weight: QuantizedTensor) -> list[tuple[str, Tensor]]:
    """The tensors of a weight in our own form."""
    return [(name + appended, part) for appended, part in named_parts(weight).items()]


def compressed_tensors_entry(encoding: str, plain: Iterable[str]) -> dict[str, Any]:
    """The ``quantization_config`` of a folder of int8 or fp8 weights; ``plain`` are the names of the others,
    of which the modules are listed as ignored, each by its full names: the stored one, and the one that
    `transformers` gives the module since 4.52 and by which it asks."""
    form, numbers = _COMPRESSED[encoding]
    weights = {
        "num_bits": 8,
        "type": numbers,
        "symmetric": True,
        "strategy": "channel",
        "dynamic": False,
        "group_size": None,
        "block_structure": None,
        "observer": "minmax",
    }
    # With a format of its own, since weights of integers alone are else taken for packed ones.
    group = {"targets": ["Linear", "Embedding"], "weights": weights, "format": form}
    modules = {n.removesuffix(".weight") for n in plain if n.endswith(".weight")}
    modules |= {canonical_name(f"{name}.weight").removesuffix(".weight") for name in modules}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {**group, "input_activations": None, "output_activations": None}
        },
        "ignore": sorted(modules),
        "kv_cache_scheme": None,
    }


def compressed_tensors_parts(name: str, weight: QuantizedTensor) -> list[tuple[str, Tensor]]:
    """The tensors of an int8 or fp8 weight as compressed-tensors has them."""
    parts = weight.parts()
    return [(name, parts["data"]), (f"{name}_scale", parts["scale"].unsqueeze(1))]


def joined_parts(state: Mapping[str, Tensor]) -> dict[str, Tensor | QuantizedTensor]:
    """A state dict with each quantised weight in the place of its parts."""
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}
    joined: dict[str, Tensor | QuantizedTensor] = {}
    for key, tensor in state.items():
        if (place := split_name(key)) is None:
            joined[key] = tensor
        else:
            name, encoding, part = place
            parts.setdefault((name, encoding), {})[part] = tensor
    weights = {n: QuantizedTensor.from_parts(e, own, pack=False) for (n, e), own in parts.items()}
    return joined | weights


def _plain(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    return [(name, tensor)]
