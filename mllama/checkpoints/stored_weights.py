"""Weights that a folder of safetensors holds in parts: quantised, under names of their own or in other types.

What is one weight is found per tensor, from names, shapes and types, by a function for each format. A format
knows nothing of the others and of how tensors are read: :class:`StoredWeights` puts what all of them have
found in the place of the tensors that it is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from mllama.checkpoints.checkpoint import CheckpointError, TensorInfo
from mllama.checkpoints.safetensors_files import SafetensorsCheckpoint
from mllama.wording import shown

if TYPE_CHECKING:
    from mllama_kernels.quantized_tensor import QuantizedTensor


@dataclass(frozen=True)
class StoredWeight:
    """One weight and the tensors that it is made of.

    Attributes:
        info: of the weight: its shape (N, K), and its encoding and packed bytes, or, of one that is decoded
            when it is read, the dtype that it has then. The file is filled in from the parts.
        parts: the tensors, by the names that the :class:`SafetensorsCheckpoint` has for them.
        make: from the tensors, by those names and on the CPU, to the weight.
            Raises: ValueError that says what is wrong with which part.
    """

    info: TensorInfo
    parts: tuple[str, ...]
    make: Callable[[dict[str, Tensor]], Tensor | QuantizedTensor]


@dataclass(frozen=True)
class Found:
    """What a format has found in a folder.

    Attributes:
        method: as people call it, such as "bitsandbytes nf4".
        weights: by the canonical name of the parameter, such as "lm_head.weight".
        other: names of tensors that belong to the format and are read with no weight.
        problems: what makes the folder unusable, a line each.
        notes: what the user should know, a line each: what is decoded and what that costs, which
            activations others would quantise.
    """

    method: str
    weights: dict[str, StoredWeight] = field(default_factory=dict)
    other: frozenset[str] = frozenset()
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Finder(Protocol):
    """The function of a format.

    Args:
        stored: the tensors of the folder, of any type. Names are canonical as far as their beginning:
            "lm_head.weight.q4_k". Only headers have been read; small tensors may be read at once.
        quantization_config: the entry of config.json, {} where there is none.
    Returns: None where nothing of the format is there.
    """

    def __call__(
        self, stored: SafetensorsCheckpoint, quantization_config: Mapping[str, Any], /
    ) -> Found | None: ...


class StoredWeights:
    """A checkpoint (see `checkpoint.Checkpoint`) of what formats have found, and of all tensors beside it."""

    def __init__(self, stored: SafetensorsCheckpoint, found: Iterable[Found]) -> None:
        self.folder, self._stored = stored.folder, stored
        self.found = list(found)
        self.unreadable = set(stored.unreadable)
        self.problems = list(stored.problems)
        self._weights: dict[str, StoredWeight] = {}
        taken: dict[str, str] = {}
        for one in self.found:
            self.problems += one.problems
            for name, weight in one.weights.items():
                if name in self._weights:
                    self.problems.append(
                        f"{self._place(weight)} and {self._place(self._weights[name])} are the same "
                        "parameter, quantised twice"
                    )
                    continue
                self._weights[name] = weight
                taken |= dict.fromkeys(weight.parts, name)
            taken |= dict.fromkeys(one.other, "")
        self.tensors: dict[str, TensorInfo] = {
            name: info for name, info in stored.tensors.items() if name not in taken
        }
        for name, weight in self._weights.items():
            if name in self.tensors:
                plain = self.tensors[name]
                self.problems.append(
                    f"{self._place(weight)} and {shown(plain.stored_name)} in {shown(plain.file)} are the "
                    "same parameter, quantised and plain"
                )
            self.tensors[name] = replace(
                weight.info,
                file=", ".join(self._files(weight)),
                is_decoded=weight.info.encoding is None,
            )

    def _files(self, weight: StoredWeight) -> tuple[str, ...]:
        return tuple(sorted({self._stored.tensors[part].file for part in weight.parts}))

    def _place(self, weight: StoredWeight) -> str:
        return f"{shown(weight.info.stored_name)} in {shown(', '.join(self._files(weight)))}"

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
        """Yields (canonical name, weight), made of its parts as soon as they are read.

        Raises: CheckpointError as :meth:`SafetensorsCheckpoint.read`, and for parts that make no weight.
        """
        by_files: dict[tuple[str, ...], list[str]] = {}
        for name in names:
            weight = self._weights.get(name)
            files = (self._stored.tensors[name].file,) if weight is None else self._files(weight)
            by_files.setdefault(files, []).append(name)
        for files, members in sorted(by_files.items()):
            # The tensors of one file come in the order they are asked for.
            batches = [members] if len(files) == 1 else [[name] for name in members]
            for batch in batches:
                yield from self._read_together(batch)

    def _read_together(self, names: list[str]) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
        parts = {name: self._parts(name) for name in names}
        tensors = self._stored.read([part for name in names for part in parts[name]])
        for name in names:
            # Of a file each it may be the order of the files.
            given = dict(next(tensors) for _ in parts[name])
            weight = self._weights.get(name)
            if weight is None:
                yield name, given[name]
                continue
            try:
                made = weight.make(given)
            except ValueError as error:
                raise CheckpointError(self.folder, [f"{self._place(weight)}: {error}"]) from None
            yield name, made

    def _parts(self, name: str) -> tuple[str, ...]:
        weight = self._weights.get(name)
        return (name,) if weight is None else weight.parts
