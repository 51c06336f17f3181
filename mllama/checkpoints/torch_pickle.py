"""What a torch archive's pickle builds, found without building it: tensors as numbers, and plain containers.

A pickle is a program. This reads the instructions by which `torch.save` writes state dictionaries, refuses
every other one, and runs them over descriptions only: no name in it is looked up, no memory taken but for
the descriptions, and every tensor must lie within its record. What passes is harmless for `torch.load` with
`weights_only=True` as well, which is left to make the tensors.
"""

from __future__ import annotations

import io
import math
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mllama.checkpoints.torch_records import BadArchive, Record
from mllama.wording import quoted, shown

# 1,700 tensors, those of the 90B model, take 430 kB and 55,000 instructions.
MAX_PICKLE_BYTES = 8 * 2**20
_MAX_INSTRUCTIONS = 500_000
_MAX_ENTRIES = 1_000_000  # of all containers, each counted wherever it is used
_MAX_DEPTH = 12
_MAX_DIMENSIONS = 16
_LARGEST = 2**63 - 1
_STORAGES = {
    f"torch {name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexFloat": torch.complex64,
        "ComplexDouble": torch.complex128,
    }.items()
}


class NotWeights(BadArchive):
    """A pickle that builds other things than tensors and plain containers."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that `torch.load` would make; `stride` is in elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def outline(self) -> torch.Tensor:
        """It on the meta device: without data."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class _Named:
    """A name that stands in the pickle for a class or a function."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """The elements of a record."""

    dtype: torch.dtype
    count: int


class _Ordered(dict):
    """An OrderedDict, which may have the attribute `_metadata` of a module's state."""


class _Mark:
    pass


def read_pickle(data: bytes, records: Mapping[str, Record]) -> Any:
    """The content of an archive, with a `StoredTensor` in the place of every tensor.

    Args:
        data: its record data.pkl.
        records: of the archive, by name; those of storages are called data/KEY.
    Raises: BadArchive; NotWeights for what is no tensor and no plain container.
    """
    try:
        result = _Machine(records).run(data)
        _measure(result, {}, 0)
    except BadArchive:
        raise
    except Exception as error:  # instructions in an order that no writer has
        raise BadArchive(f"its pickle is damaged ({type(error).__name__})") from None
    return result


class _Machine:
    def __init__(self, records: Mapping[str, Record]) -> None:
        self._records = records
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._storages: dict[str, _Storage] = {}

    def run(self, data: bytes) -> Any:
        # torch's reader knows only the second protocol, which torch.save writes.
        for number, (instruction, argument, _) in enumerate(pickletools.genops(io.BytesIO(data))):
            if number >= _MAX_INSTRUCTIONS:
                raise BadArchive(f"its pickle has more than {_MAX_INSTRUCTIONS:,} instructions")
            name = instruction.name
            if name == "STOP":
                break
            if name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name])
            elif name in _VALUES:
                self._stack.append(argument)
            elif name in _METHODS:
                _METHODS[name](self, argument)
            else:
                raise NotWeights(f"its pickle has the instruction {name}")
        (result,) = self._stack
        return result

    def _proto(self, version: int) -> None:
        if version != 2:
            raise BadArchive(f"its pickle has protocol {version}; torch reads the second")

    def _global(self, name: str) -> None:
        if name not in _STORAGES and name not in _CALLS:
            raise NotWeights(f"its pickle names {shown(name.replace(' ', '.'))}")
        self._stack.append(_Named(name))

    def _mark(self, _: None) -> None:
        self._stack.append(_Mark)

    def _to_mark(self) -> list[Any]:
        """What is above the last mark, which goes too."""
        stack = self._stack
        place = len(stack) - 1
        while stack[place] is not _Mark:
            place -= 1
            if place < 0:
                raise BadArchive("its pickle is damaged (no mark)")
        above = stack[place + 1 :]
        del stack[place:]
        return above

    def _put(self, index: int) -> None:
        if self._stack[-1] is _Mark:
            raise BadArchive("its pickle is damaged (a mark is kept)")
        self._memo[index] = self._stack[-1]

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def _new(self, make: Callable[[], Any]) -> None:
        self._stack.append(make())

    def _tuple(self, _: None) -> None:
        self._stack.append(tuple(self._to_mark()))

    def _tuple_of(self, count: int) -> None:
        self._stack.append(tuple(self._top(count)))

    def _top(self, count: int) -> list[Any]:
        """What is on top, which goes."""
        entries = self._stack[-count:]
        if len(entries) != count or any(entry is _Mark for entry in entries):
            raise BadArchive("its pickle is damaged (too little on the stack)")
        del self._stack[-count:]
        return entries

    def _append(self, entries: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise BadArchive("its pickle is damaged (no list)")
        self._stack[-1].extend(entries)

    def _set_items(self, entries: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) not in (dict, _Ordered) or len(entries) % 2:
            raise BadArchive("its pickle is damaged (no dictionary)")
        for key, value in zip(entries[::2], entries[1::2]):
            # Other keys could be chosen to collide, which makes a dictionary slow.
            if type(key) is not str and not (type(key) is int and 0 <= key < 2**31):
                raise NotWeights("its pickle has a key that is neither a name nor an index")
            if key in target:
                raise BadArchive(f"its pickle has the key {quoted(key)} twice")
            target[key] = value

    def _build(self, _: None) -> None:
        (state,) = self._top(1)
        if (
            type(self._stack[-1]) is not _Ordered
            or type(state) is not dict
            or [*state] != ["_metadata"]
        ):
            raise NotWeights("its pickle sets attributes")

    def _reduce(self, _: None) -> None:
        called, arguments = self._top(2)
        if type(called) is not _Named or called.name not in _CALLS or type(arguments) is not tuple:
            raise NotWeights("its pickle calls what is no function of tensors")
        self._stack.append(_CALLS[called.name](*arguments))

    def _storage(self, _: None) -> None:
        (identity,) = self._top(1)
        if type(identity) is not tuple or len(identity) != 5 or identity[0] != "storage":
            raise BadArchive("its pickle has a reference that is no storage")
        _, kind, key, location, count = identity
        if (
            type(kind) is not _Named
            or kind.name not in _STORAGES
            or not type(key) is type(location) is str
        ):
            raise BadArchive("its pickle has a reference that is no storage")
        record = self._records.get(f"data/{key}")
        if record is None:
            raise BadArchive(f"it has no record of the storage {quoted(key)}")
        storage = _Storage(_STORAGES[kind.name], _size(count))
        if storage.count * storage.dtype.itemsize > record.size:
            raise BadArchive(
                f"its storage {quoted(key)} of {count:,} elements is larger than the record of "
                f"{record.size:,} bytes"
            )
        if self._storages.setdefault(key, storage) != storage:
            raise BadArchive(f"its storage {quoted(key)} has two types or sizes")
        self._stack.append(storage)


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise BadArchive(f"its pickle has {quoted(value)} where a size is expected")
    return value


def _tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any, *more: Any
) -> StoredTensor:
    if type(storage) is not _Storage or type(shape) is not tuple or type(stride) is not tuple:
        raise BadArchive("its pickle has a tensor without storage, shape or stride")
    if not _is_plain(requires_grad, hooks) or any(entry is not None for entry in more):
        raise NotWeights("its pickle has a tensor with hooks")
    if len(shape) != len(stride) or len(shape) > _MAX_DIMENSIONS:
        raise BadArchive(
            f"its pickle has a tensor of {len(shape)} dimensions and {len(stride)} strides"
        )
    sizes, steps = [*map(_size, shape)], [*map(_size, stride)]
    last = _size(offset) + sum((n - 1) * step for n, step in zip(sizes, steps))
    if math.prod(max(n, 1) for n in sizes) > _LARGEST or (0 not in sizes and last >= storage.count):
        raise BadArchive(
            f"its pickle has a tensor of shape {quoted(shape)} and stride {quoted(stride)} that leaves its "
            f"storage of {storage.count:,} elements"
        )
    # Strides of zero would let a small file stand for a tensor of any size.
    if math.prod(sizes) > storage.count:
        raise BadArchive(
            f"its pickle has a tensor of shape {quoted(shape)} on a storage of {storage.count:,} elements"
        )
    return StoredTensor(tuple(sizes), tuple(steps), storage.dtype)


def _is_plain(requires_grad: Any, hooks: Any) -> bool:
    return type(requires_grad) is bool and (
        hooks is None or (type(hooks) is _Ordered and not hooks)
    )


def _parameter(tensor: Any, requires_grad: Any, hooks: Any) -> StoredTensor:
    if type(tensor) is not StoredTensor:
        raise BadArchive("its pickle has a parameter that is no tensor")
    if not _is_plain(requires_grad, hooks):
        raise NotWeights("its pickle has a parameter with hooks")
    return tensor


def _ordered() -> _Ordered:
    return _Ordered()


def _measure(value: Any, known: dict[int, tuple[int, int]], depth: int) -> tuple[int, int]:
    """The entries of a container, with those of its containers, and how deep they are nested.

    What is used twice is counted twice: a few instructions could else stand for more than any reader ends
    with. Raises: BadArchive beyond the bounds.
    """
    if not isinstance(value, (dict, list, tuple)):
        if value is not None and type(value) not in _LEAVES:
            raise NotWeights("its pickle keeps what is neither a tensor nor a plain value")
        return 1, 0
    found = known.get(id(value))
    if depth + (found[1] if found else 0) > _MAX_DEPTH:
        raise BadArchive(f"its containers are nested deeper than {_MAX_DEPTH}")
    if found is None:
        entries = value.values() if isinstance(value, dict) else value
        inner = [_measure(entry, known, depth + 1) for entry in entries]
        found = 1 + sum(count for count, _ in inner), 1 + max((d for _, d in inner), default=0)
        if found[0] > _MAX_ENTRIES:
            raise BadArchive(f"its containers have more than {_MAX_ENTRIES:,} entries")
        known[id(value)] = found
    return found


_LEAVES = {StoredTensor, str, int, float, bool}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"}
_CALLS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": _ordered,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
}
_METHODS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine._proto,
    "GLOBAL": _Machine._global,
    "MARK": _Machine._mark,
    "BINPUT": _Machine._put,
    "LONG_BINPUT": _Machine._put,
    "BINGET": _Machine._get,
    "LONG_BINGET": _Machine._get,
    "EMPTY_DICT": lambda machine, _: machine._new(dict),
    "EMPTY_LIST": lambda machine, _: machine._new(list),
    "TUPLE": _Machine._tuple,
    "TUPLE1": lambda machine, _: machine._tuple_of(1),
    "TUPLE2": lambda machine, _: machine._tuple_of(2),
    "TUPLE3": lambda machine, _: machine._tuple_of(3),
    "APPEND": lambda machine, _: machine._append(machine._top(1)),
    "APPENDS": lambda machine, _: machine._append(machine._to_mark()),
    "SETITEM": lambda machine, _: machine._set_items(machine._top(2)),
    "SETITEMS": lambda machine, _: machine._set_items(machine._to_mark()),
    "BUILD": _Machine._build,
    "REDUCE": _Machine._reduce,
    "BINPERSID": _Machine._storage,
}
