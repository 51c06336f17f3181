"""A weight of 8, 6 or 4 bits: what it is made of, and the layout that the kernels of its device read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from mllama_kernels import _dispatch, _library
from mllama_kernels._arguments import (
    FLOATS_AND_DOUBLE,
    QuantizedWeight,
    check_dtype,
    peft_asks,
)
from mllama_kernels._quantized_parts import DATA_TYPES, description_of
from mllama_kernels.encodings import (
    CODES,
    ENCODINGS,
    GGML,
    PLANE_TYPES,
    encoding_of,
    joined,
)
from mllama_kernels.quantized_decoding import decode

OPS = (
    "quantized_pack",
    "quantized_unpack",
    "quantized_dequantize",
)  # beside those of the functions


class QuantizedTensor(QuantizedWeight):
    """A weight (N, K) in one of :data:`mllama_kernels.encodings.ENCODINGS`. It does not change.

    It is made of *parts*, which are the same on every device (:class:`mllama_kernels.encodings.Encoding`),
    and lossless: whatever bits they hold come back. It keeps them as the kernels of its device read them, or,
    where none runs, as they are.

    Made by :meth:`from_blocks`, :meth:`from_parts` and `mllama_kernels.quantize`. It has no gradient.

    Attributes:
        encoding: its name.
        shape: (N, K).
        group: columns that share a scale, of int4, nf4 and fp4; 0 for the others.
        planes: what is in memory: packed uint8 (bytes,), for nf4 and fp4 with their table (16,) float32; or,
            where nothing is packed, the parts in their order.
        is_packed: whether the first of them is the layout of a kernel.
        scale_type, zero_type: of int4's planes, places in :data:`mllama_kernels.encodings.PLANE_TYPES`.
    """

    dtype = torch.uint8
    requires_grad = False
    ndim = 2
    encoding: str
    shape: torch.Size
    planes: tuple[Tensor, ...]
    is_packed: bool
    group: int
    scale_type: int
    zero_type: int

    def __init__(
        self,
        encoding: str,
        shape: tuple[int, int],
        planes: tuple[Tensor, ...],
        *,
        is_packed: bool,
        group: int = 0,
        scale_type: int = 0,
        zero_type: int = 0,
    ) -> None:
        put = object.__setattr__
        put(self, "encoding", encoding)
        put(self, "shape", torch.Size(shape))
        put(self, "planes", planes)
        put(self, "is_packed", is_packed)
        put(self, "group", group)
        put(self, "scale_type", scale_type)
        put(self, "zero_type", zero_type)

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises: AttributeError for all but ``requires_grad``, which may be set to what it is."""
        if name != "requires_grad":
            raise AttributeError(
                f"{name} of a QuantizedTensor cannot be set, since it does not change: make another one by "
                "quantize, from_blocks or from_parts"
            )
        self.requires_grad_(value)

    def __delattr__(self, name: str) -> None:
        """Raises: AttributeError."""
        raise AttributeError(
            f"{name} of a QuantizedTensor cannot be deleted, since it does not change"
        )

    @classmethod
    def from_blocks(cls, blocks: Tensor, encoding: str, *, pack: bool = True) -> QuantizedTensor:
        """Of blocks uint8 (N, bytes per row) in ggml's byte order; ``pack`` as for :meth:`from_parts`.

        Raises: ValueError for another encoding than ggml's, or bytes that are no whole blocks.
        """
        if encoding_of(encoding).name not in GGML:
            known = ", ".join(sorted(GGML))
            raise ValueError(f"{encoding} is not made of blocks, as {known} are; use from_parts")
        return cls.from_parts(encoding, {"blocks": blocks}, pack=pack)

    @classmethod
    def from_parts(
        cls, encoding: str, parts: Mapping[str, Tensor], *, pack: bool = True
    ) -> QuantizedTensor:
        """Of the parts by name, all on one device.

        Args:
            pack: as the kernels of the device read them; False keeps the parts, of a weight that goes to
                another device: :meth:`to` packs it there.

        Raises: ValueError naming the part, what it is and what it should be.
        """
        found = encoding_of(encoding)
        described = description_of(found, parts)
        planes = tuple(parts[name].contiguous() for name in found.parts)
        weight = cls(encoding, **described, planes=planes, is_packed=False)
        device = planes[0].device
        if not pack or not _is_packed_on(device):
            return weight
        data, scale, zero = (*weight._stored(), None, None)[:3]
        packed = torch.ops.mllama_kernels.quantized_pack(data, scale, zero, *weight.form)
        return cls(encoding, **described, planes=(packed, *weight._table()), is_packed=True)

    @classmethod
    def cat(cls, weights: Sequence[QuantizedTensor]) -> QuantizedTensor:
        """The rows of several weights one after another, in new memory; of packed ones that are whole tiles
        (16 rows on CPU, 8 on CUDA) without unpacking them.

        Raises: ValueError unless they have one encoding, width, group, device and table; for none.
        """
        if not weights:
            raise ValueError("QuantizedTensor.cat was given no weights to put together")
        first = weights[0]
        for other in weights[1:]:
            for what in ("encoding", "group", "scale_type", "zero_type", "device"):
                expected, got = getattr(first, what), getattr(other, what)
                if got != expected:
                    raise ValueError(
                        f"weights that go together have one {what}, got {expected}, {got}"
                    )
            if other.shape[1] != first.shape[1]:
                raise ValueError(
                    f"weights that go together have equal rows, got {first.shape}, {other.shape}"
                )
            if any(not torch.equal(a, b) for a, b in zip(first._table(), other._table())):
                raise ValueError("weights that go together have one table, got two")
        rows = [weight.shape[0] for weight in weights]
        if all(weight.is_packed for weight in weights) and not any(map(first._rest, rows[:-1])):
            packed = torch.cat([weight.planes[0] for weight in weights])
            return first._with((packed, *first._table()), (sum(rows), first.shape[1]))
        parts = [weight.parts() for weight in weights]
        rows_of_all = {n: joined([p[n] for p in parts]) for n in parts[0] if n != "table"}
        return cls.from_parts(first.encoding, {**parts[0], **rows_of_all})

    @property
    def form(self) -> tuple[int, int, int, int, int, int]:
        """encoding, N, K, group, scale_type, zero_type: how the ops are told what they read."""
        rows, columns = self.shape
        return CODES[self.encoding], rows, columns, self.group, self.scale_type, self.zero_type

    @property
    def device(self) -> torch.device:
        return self.planes[0].device

    @property
    def nbytes(self) -> int:
        """Of memory."""
        return sum(plane.nbytes for plane in self.planes)

    @property
    def data(self) -> Tensor:
        """The numbers (N, K), or (N, K / 2) with two in a byte, of an encoding that is not ggml's.

        Raises: TypeError for PEFT, whose methods that read the weight would compute with the codes.
        """
        if module := peft_asks()[0]:
            raise TypeError(
                f"{module} reads the values of a weight that is quantised ({self.encoding}), whose data are "
                "codes: use a method that runs beside the layer, as LoRA, IA3, LoHa, LoKr and OFT do, or "
                "load the model with dequantize=True"
            )
        return self._part("data")

    @property
    def scale(self) -> Tensor:
        """(N,) of int8 and fp8, (N, K / group) of int4."""
        return self._part("scale")

    def blocks(self) -> Tensor:
        """uint8 (N, bytes per row), in ggml's byte order."""
        return self._part("blocks")

    def dim(self) -> int:
        return self.ndim

    def parts(self) -> dict[str, Tensor]:
        """By name, in their order; of a packed weight in new memory, but for the table."""
        planes = self.planes
        if self.is_packed:
            unpacked = torch.ops.mllama_kernels.quantized_unpack(planes[0], *self.form)
            planes = (*unpacked, *self._table())
        return dict(zip(ENCODINGS[self.encoding].parts, planes, strict=True))

    def decoded(self) -> Tensor:
        """(N, K) float32 by plain PyTorch: what every kernel is measured by."""
        return decode(self.encoding, self.parts())

    def dequantize(
        self, dtype: torch.dtype = torch.float32, begin: int = 0, end: int | None = None
    ) -> Tensor:
        """Rows `begin` to `end` of the weight, decoded in float32 and rounded to the dtype.

        Raises: ValueError for rows that are not there; RuntimeError for a dtype that is no float of 16, 32 or
            64 bits.
        """
        check_dtype("QuantizedTensor.dequantize", "dtype", dtype, FLOATS_AND_DOUBLE)
        end = self._end(begin, end)
        if not self.is_packed:
            return self.rows(begin, end).decoded().to(dtype)
        given = torch.float32 if dtype == torch.float64 else dtype
        values = torch.ops.mllama_kernels.quantized_dequantize(
            *self.packed_and_table, *self.form, begin, end, given
        )
        return values.to(dtype)

    def rows(self, begin: int, end: int | None = None) -> QuantizedTensor:
        """Rows `begin` to `end` as a weight of their own: whole tiles (16 rows on CPU, 8 on CUDA; the last
        may be partial) in the same memory, others packed anew.

        Raises: ValueError for rows that are not there.
        """
        end = self._end(begin, end)
        if (begin, end) == (0, self.shape[0]):
            return self
        shape = end - begin, self.shape[1]
        if (
            self.is_packed
            and not self._rest(begin)
            and (end == self.shape[0] or not self._rest(end))
        ):
            packed, tile = self.planes[0], self._tile_rows
            tiles = -(-self.shape[0] // tile)
            size = packed.numel() // tiles if tiles else 0
            part = packed[begin // tile * size : -(-end // tile) * size]
            return self._with((part, *self._table()), shape)
        parts = self.parts()
        some = {name: part[begin:end] for name, part in parts.items() if name != "table"}
        if self.is_packed:
            return QuantizedTensor.from_parts(self.encoding, {**parts, **some})
        return self._with(tuple({**parts, **some}.values()), shape)

    @property
    def unit(self) -> int:
        """Columns that are stored together, by one scale or in one block: rows are cut at multiples of it."""
        return max(self.group, ENCODINGS[self.encoding].block)

    def columns(self, begin: int, end: int | None = None) -> QuantizedTensor:
        """Columns `begin` to `end` of all rows as a weight of its own, in new memory. Scales of whole rows
        stay as they are, so the values are those of the whole.

        Raises: ValueError for columns that are not there, none, and those that begin or end within a block.
        """
        width, unit = self.shape[1], self.unit
        end = width if end is None else end
        if not 0 <= begin < end <= width:
            raise ValueError(f"columns {begin} to {end} are not among the {width} of this weight")
        if begin % unit or end % unit:
            raise ValueError(
                f"columns {begin} to {end} of {self.encoding} are no whole blocks, of {unit} columns"
            )
        if (begin, end) == (0, width):
            return self
        parts = self.parts()
        some = {
            name: part[:, part.shape[1] * begin // width : part.shape[1] * end // width]
            for name, part in parts.items()
            if part.dim() == 2
        }
        return QuantizedTensor.from_parts(self.encoding, {**parts, **some}, pack=self.is_packed)

    @property
    def packed_and_table(self) -> tuple[Tensor, Tensor | None]:
        """The planes of a packed weight, as the ops take them."""
        return self.planes[0], self.planes[1] if len(self.planes) > 1 else None

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The weight on a device, in the layout of its kernels; itself where it is there already.

        Raises: TypeError for a dtype: the encoding says what the weight is stored as.
        """
        if isinstance(device, torch.dtype):
            raise TypeError(
                f"a QuantizedTensor is moved by to(device) and not cast: dequantize({device}) gives its "
                "values as a tensor"
            )
        device = torch.empty(0, device=device).device  # with its index
        if device == self.device and (self.is_packed or not _is_packed_on(device)):
            return self
        parts = {name: part.to(device) for name, part in self.parts().items()}
        return QuantizedTensor.from_parts(self.encoding, parts)

    def requires_grad_(self, requires_grad: bool = True) -> QuantizedTensor:
        """Raises: RuntimeError where a gradient is asked for."""
        if requires_grad:
            raise RuntimeError(
                "a QuantizedTensor has no gradient: train adapters beside it, or its dequantize()"
            )
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedTensor:
        return self._mapped(lambda plane: _copied(plane, memo))

    def __copy__(self) -> QuantizedTensor:
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "a QuantizedTensor is not pickled: its memory is laid out for the kernels of one device, and "
            "unpickling would run code; save parts(), which are plain tensors, and use from_parts"
        )

    def __repr__(self) -> str:
        rows, columns = self.shape
        return f"QuantizedTensor({self.encoding}, ({rows}, {columns}), {self.device})"

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> QuantizedTensor:
        """The same description of other planes."""
        return self._with(tuple(map(function, self.planes)), self.shape)

    def _with(self, planes: tuple[Tensor, ...], shape: tuple[int, int]) -> QuantizedTensor:
        return QuantizedTensor(
            self.encoding,
            shape,
            planes,
            is_packed=self.is_packed,
            group=self.group,
            scale_type=self.scale_type,
            zero_type=self.zero_type,
        )

    def _stored(self) -> tuple[Tensor, ...]:
        """The planes but for the table."""
        return self.planes[:-1] if "table" in ENCODINGS[self.encoding].parts else self.planes

    def _table(self) -> tuple[Tensor, ...]:
        return self.planes[len(self._stored()) :]

    @property
    def _tile_rows(self) -> int:
        return _library.TILE_ROWS["cuda" if self.device.type == "cuda" else "cpu"]

    def _rest(self, rows: int) -> int:
        """Of a packed weight, the rows beyond whole tiles."""
        return rows % self._tile_rows

    def _part(self, name: str) -> Tensor:
        found = ENCODINGS[self.encoding]
        if name not in found.parts:
            raise AttributeError(f"{found.name} has {', '.join(found.parts)}, no {name}")
        return self.parts()[name]

    def _end(self, begin: int, end: int | None) -> int:
        rows = self.shape[0]
        end = rows if end is None else end
        if not 0 <= begin <= end <= rows:
            raise ValueError(f"rows {begin} to {end} are not among the {rows} of this weight")
        return end


def _is_packed_on(device: torch.device) -> bool:
    return device.type != "meta" and _dispatch.why_not("quantized_linear", device) is None


def _copied(plane: Tensor, memo: dict[int, Any]) -> Tensor:
    if id(plane) not in memo:
        memo[id(plane)] = plane.clone()
    return memo[id(plane)]


def _fake_pack(
    data: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    encoding: int,
    n: int,
    k: int,
    group: int,
    scale_type: int,
    zero_type: int,
) -> Tensor:
    on_cpu = data.device.type != "cuda" and not _library.simulated
    form = (encoding, n, k, group, scale_type, zero_type)
    size = _library.quantized_packed_bytes(on_cpu, tuple(map(int, form)))
    return data.new_empty(size, dtype=torch.uint8)


def _fake_unpack(
    packed: Tensor, encoding: int, n: int, k: int, group: int, scale_type: int, zero_type: int
) -> list[Tensor]:
    found = list(ENCODINGS.values())[encoding]
    width = k // found.block * found.bytes_per_block
    if found.name in ("int8", "fp8"):
        data = packed.new_empty(n, width, dtype=DATA_TYPES[found.name])
        return [data, packed.new_empty(n, dtype=torch.float32)]
    planes = [packed.new_empty(n, width)]
    if found.name == "int4":
        types = [PLANE_TYPES[scale_type], PLANE_TYPES[zero_type]]
    else:
        types = [torch.float32] if "absmax" in found.parts else []
    return planes + [packed.new_empty(n, k // group, dtype=dtype) for dtype in types]


def _fake_dequantize(
    packed: Tensor,
    table: Tensor | None,
    encoding: int,
    n: int,
    k: int,
    group: int,
    scale_type: int,
    zero_type: int,
    begin: int,
    end: int,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(end - begin, k, dtype=dtype)


_dispatch.register("quantized_pack", _fake_pack, kept=(0, 1, 2))
_dispatch.register("quantized_unpack", _fake_unpack)
_dispatch.register("quantized_dequantize", _fake_dequantize, kept=(1,))
