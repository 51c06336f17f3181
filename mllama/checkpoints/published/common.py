"""What the formats share: headers compared with what a format says, scales, and words of packed integers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor

from mllama.checkpoints.checkpoint import CheckpointError, TensorInfo
from mllama.checkpoints.safetensors_files import SafetensorsCheckpoint
from mllama.checkpoints.stored_weights import StoredWeight
from mllama.wording import quoted, shown
from mllama_kernels.quantized_tensor import QuantizedTensor

Parts = dict[str, Tensor]
Shape = tuple[int, ...]

FLOATS = ("F32", "F16", "BF16")
ACTIVATIONS_STAY = "other loaders quantise activations too; here they keep the model's dtype"
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1}
_BYTES |= {"F8_E4M3": 1, "BOOL": 1}
# What no format quantises on purpose: a checkpoint that has them so holds something else.
_NEVER = ("norm", "embedding")
# Groups along a row that the kernels know, widest first: a wider one is several with the same scale.
_GROUPS = (128, 64, 32)
# How many of a weight are decoded together.
VALUES_AT_ONCE = 2**22


def stored_bytes(info: TensorInfo) -> int:
    """Bytes of a stored tensor of any type that a format reads, 0 for others."""
    return math.prod(info.shape) * _BYTES.get(info.dtype_name, 0)


def kernel_group(group: int) -> int | None:
    """The group of int4 that stands for groups of this length without loss; None where there is none."""
    return next((own for own in _GROUPS if group % own == 0), None)


class Checks:
    """Compares what headers announce with what a format says, and collects the differences."""

    def __init__(self, stored: SafetensorsCheckpoint) -> None:
        self.stored = stored
        self.problems: list[str] = []

    def place(self, name: str) -> str:
        """A tensor and its file, for messages."""
        info = self.stored.tensors[name]
        return f"{shown(info.stored_name)} in {shown(info.file)}"

    def add(self, name: str, problem: str) -> None:
        self.problems.append(f"{self.place(name)} {problem}")

    def fits(self, name: str, kinds: Collection[str], *shapes: Shape) -> bool:
        """Whether a tensor that is there has one of these types and, where any are given, shapes."""
        info = self.stored.tensors[name]
        if info.dtype_name in kinds and (not shapes or info.shape in shapes):
            return True
        wanted = " or ".join(map(str, shapes))
        self.add(
            name,
            f"is {info.dtype_name} {quoted(info.shape)}, expected {' or '.join(kinds)} {wanted}".rstrip(),
        )
        return False

    def has(self, of: str, name: str, kinds: Collection[str], *shapes: Shape) -> bool:
        """Whether the part of a weight is there, and :meth:`fits`."""
        if name in self.stored.tensors:
            return self.fits(name, kinds, *shapes)
        self.add(of, f"has no {shown(name)} beside it")
        return False

    def may_be_quantised(self, weight: str, of: str) -> bool:
        """False, and a problem, for the name of a norm, a gate, a bias or a table."""
        kind = weight.rpartition(".layers.")[2]
        if weight.endswith(".weight") and not any(word in kind for word in _NEVER):
            return True
        self.add(of, f"quantises {shown(weight)}: norms, gates, biases and tables never are")
        return False

    def read(self, names: Iterable[str], most: int) -> Parts:
        """The tensors among these that have at most so many bytes each, read at once.

        Raises: CheckpointError with the faults of the files alone, where they have any: without these tensors
            every weight would be one more.
        """
        small = []
        for name in names:
            if stored_bytes(self.stored.tensors[name]) > most:
                self.add(name, f"has more than the {most:,} bytes that are read of its kind")
            else:
                small.append(name)
        if small and self.stored.problems:
            raise CheckpointError(self.stored.folder, self.stored.problems)
        return dict(self.stored.read(small))


def encoded(
    stored: SafetensorsCheckpoint,
    named_by: str,
    encoding: str,
    shape: Shape,
    nbytes: int,
    parts: tuple[str, ...],
    make: Callable[[Parts], Parts],
    group: int = 0,
) -> StoredWeight:
    """A weight that keeps its bits: ``make`` turns the stored tensors into the encoding's parts; ``group`` is
    that of int4."""

    def weight(tensors: Parts) -> QuantizedTensor:
        return QuantizedTensor.from_parts(encoding, make(tensors), pack=False)

    name, kind = stored.tensors[named_by].stored_name, stored.tensors[named_by].dtype_name
    info = TensorInfo(name, "", shape, None, kind, encoding, nbytes, group)
    return StoredWeight(info, parts, weight)


def decoded(
    stored: SafetensorsCheckpoint,
    named_by: str,
    shape: Shape,
    parts: tuple[str, ...],
    make: Callable[[Parts], Tensor],
) -> StoredWeight:
    """A weight that no kernel reads as it is: ``make`` gives it in float32."""
    name, kind = stored.tensors[named_by].stored_name, stored.tensors[named_by].dtype_name
    return StoredWeight(TensorInfo(name, "", shape, torch.float32, kind), parts, make)


class DecodedNotes:
    """Counts what is decoded, by reason."""

    def __init__(self) -> None:
        self._sizes: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)

    def add(self, reason: str, shape: Shape, stored: int) -> None:
        self._sizes[reason].append((math.prod(shape), stored))

    def lines(self) -> list[str]:
        """One for each reason, with what it costs in a dtype of 16 bits."""
        return [
            f"{len(sizes)} weight{'s are' if len(sizes) > 1 else ' is'} decoded ({reason}): "
            f"{2 * sum(n for n, _ in sizes) / 1e9:.3g} GB in 16 bits "
            f"instead of {sum(b for _, b in sizes) / 1e9:.3g}"
            for reason, sizes in self._sizes.items()
        ]


def checked_scales(scales: Tensor, part: str, *, signed: bool = False) -> Tensor:
    """Scales as they are. Raises: ValueError for one that is NaN, infinite, or negative unless ``signed``."""
    finite = scales.isfinite()
    good = finite if signed else finite & (scales >= 0)
    if not good.all():
        place = tuple(int(i) for i in (~good).nonzero()[0])
        value = float(scales[place] if place else scales)
        wanted = "finite numbers" if signed else "finite numbers that are not negative"
        raise ValueError(f"{shown(part)} holds {value} at {place}, expected {wanted}")
    return scales


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Unsigned integers of 4 or 8 bits, the first in the lowest bits of each word.

    Args:
        words: (rows, n) int32, contiguous.
    Returns: (rows, n * 32 / bits) uint8.
    """
    numbers = words.view(torch.uint8)
    if bits == 4:
        numbers = torch.stack((numbers & 15, numbers >> 4), dim=-1).flatten(1)
    return numbers


def int4_bytes(shape: Shape, group: int, scale: Tensor | str) -> int:
    """Bytes of the parts of an int4 weight whose zeros are integers; ``scale``: its stored type."""
    width = scale.element_size() if isinstance(scale, Tensor) else _BYTES[scale]
    numel = math.prod(shape)
    return numel // 2 + numel // group * (width + 1)


def widened(groups: Tensor, columns: int, group: int) -> Tensor:
    """Values for each of the equal groups of a row, (rows, G), for each ``group`` columns instead."""
    return groups.repeat_interleave(columns // groups.shape[1] // group, dim=1).contiguous()


def grouped_values(
    numbers: Tensor, zeros: Tensor | int, scales: Tensor, group_of: Tensor | None
) -> Tensor:
    """(numbers - zeros) * scales in float32, a few rows at a time: of one weight there may be gigabytes.

    Args:
        numbers: (N, K) of 8 bits.
        zeros: (N, G) integers, or one for all.
        scales: (N, G) of a floating-point type.
        group_of: (K,) int64, the group of each column; None: equal groups in order.
    """
    rows, columns = numbers.shape
    groups = scales.shape[1]
    values = torch.empty(rows, columns)
    step = max(1, VALUES_AT_ONCE // columns)
    for begin in range(0, rows, step):
        part = slice(begin, begin + step)
        found, scale = numbers[part].float(), scales[part].float()
        zero = zeros[part].float() if isinstance(zeros, Tensor) else torch.full_like(scale, zeros)
        if group_of is None:
            grouped = found.view(len(found), groups, columns // groups)
            found = (grouped - zero.unsqueeze(2)) * scale.unsqueeze(2)
        else:
            found = (found - zero.index_select(1, group_of)) * scale.index_select(1, group_of)
        values[part] = found.view(-1, columns)
    return values


def column_groups(g_idx: Tensor, groups: int) -> Tensor | None:
    """The group of each column where the columns are not in order, else None.

    A tensor that is -1 everywhere was never filled: its groups are in order.

    Raises: ValueError for a group that does not exist.
    """
    if bool((g_idx == -1).all()):
        return None
    if g_idx.numel() and not bool(((g_idx >= 0) & (g_idx < groups)).all()):
        lowest, highest = int(g_idx.min()), int(g_idx.max())
        raise ValueError(f"names groups from {lowest} to {highest}, there are 0 to {groups - 1}")
    in_order = torch.arange(g_idx.numel()) // (g_idx.numel() // groups)
    return None if torch.equal(g_idx.long(), in_order) else g_idx.long()
