"""What the parts of a quantised weight are called beside the name of the weight: in state dicts and files.

The encoding is appended, so that nobody takes the numbers for a weight: ``X.weight.q4_k`` holds ggml's
blocks, ``X.weight.int8`` and ``X.weight.int8.scale`` integers and their scales.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from mllama_kernels.encodings import ENCODINGS
from mllama_kernels.quantized_tensor import QuantizedTensor


def part_names(encoding: str) -> dict[str, str]:
    """What is appended to the name of a weight, by the part's own name."""
    first, *others = ENCODINGS[encoding].parts
    return {first: f".{encoding}", **{part: f".{encoding}.{part}" for part in others}}


def named_parts(weight: QuantizedTensor) -> dict[str, Tensor]:
    """The parts of a weight by what is appended to its name, none in the memory of another weight: files of
    safetensors hold no tensors that share theirs, as tables do."""
    names, parts = part_names(weight.encoding), weight.parts()
    return {names[p]: tensor.clone() if p == "table" else tensor for p, tensor in parts.items()}


def split_name(name: str) -> tuple[str, str, str] | None:
    """The name of the weight, the encoding and the part of a tensor that is called as here; else None."""
    weight, dot, ending = name.rpartition(".weight.")
    encoding = ending.partition(".")[0]
    if not dot or encoding not in ENCODINGS:
        return None
    for part, appended in part_names(encoding).items():
        if appended == f".{ending}":
            return f"{weight}.weight", encoding, part
    return None


def encodings_in(names: Iterable[str]) -> set[str]:
    """The encodings of which any of the names is."""
    return {found[1] for name in names if (found := split_name(name)) is not None}
