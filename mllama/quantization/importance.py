"""How much the columns of a model's weights matter: the mean squares of what they are multiplied by.

Read from llama.cpp's imatrix, in its GGUF form, and from our own safetensors, which hold a vector (K,) under
the published name of each weight (N, K) that they know.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mllama.checkpoints.durable import replace_file, save_file
from mllama.checkpoints.gguf.container import BadGguf, GgufFile, is_gguf
from mllama.checkpoints.gguf.names import dialect_of, place_of
from mllama.checkpoints.gguf.values import plain
from mllama.checkpoints.key_layout import canonical_name
from mllama.checkpoints.safetensors_header import BadHeader, read_header
from mllama.wording import listed, quoted, reason, shown

_FLOATS = ("F64", "F32", "BF16", "F16")
_SUMS, _COUNTS = ".in_sum2", ".counts"  # llama.cpp's, behind the name of a weight
_LISTED = 20


class ImportanceError(ValueError):
    """A file of importance cannot be used; the text names it and lists its faults."""

    def __init__(self, path: Path, problems: list[str]) -> None:
        lines = problems[:_LISTED]
        if more := len(problems) - len(lines):
            lines.append(f"and {more} more")
        text = "".join(f"\n  - {line}" for line in lines)
        super().__init__(f"the importance in {shown(str(path))} cannot be used:{text}")


def read_importance(path: Path, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """The importance of columns in a file.

    Args:
        widths: K of each weight of the model that importance is for, by its canonical name.
    Returns:
        float64 (K,) by canonical name. A weight whose inputs were never seen is not among them.
    Raises: ImportanceError with every fault: a file that cannot be read or is of another kind, names that are
        no weight of the model, vectors of another length, and values that are negative or not finite.
    """
    read = _read_imatrix if is_gguf(path) else _read_own
    vectors, problems = read(path, widths)
    found: dict[str, Tensor] = {}
    for name, (canonical, vector) in vectors.items():
        if not bool((vector.isfinite() & (vector >= 0)).all()):
            problems.append(f"{shown(name)} holds values that are negative or not finite")
        elif bool(vector.any()):
            found[canonical] = vector.double()
    if problems:
        raise ImportanceError(path, problems)
    return found


def write_importance(path: Path, means: Mapping[str, Tensor]) -> None:
    """Put float32 means of squares (K,), by published names, into a file of our own."""
    vectors = {name: mean.float().contiguous() for name, mean in means.items()}
    replace_file(path, lambda temporary: save_file(vectors, temporary))


_Read = tuple[dict[str, tuple[str, Tensor]], list[str]]


class _Places:
    """Which weights the vectors of a file belong to, told before any of them is read."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        self._widths, self._taken = widths, dict[str, str]()
        self.problems: list[str] = []

    def takes(self, name: str, canonical: str, shape: tuple[int, ...]) -> bool:
        """Whether a vector is of a weight of the model that has no other; if not, there is a problem."""
        width = self._widths.get(canonical)
        if width is None:
            self.problems.append(f"{shown(name)} is no weight of the model that importance is for")
        elif shape != (width,):
            self.problems.append(f"{shown(name)} must have {width} columns, got {quoted(shape)}")
        elif (other := self._taken.setdefault(canonical, name)) != name:
            self.problems.append(f"{shown(name)} and {shown(other)} are of the same weight")
        else:
            return True
        return False


def _read_own(path: Path, widths: Mapping[str, int]) -> _Read:
    """Vectors by stored name, with their canonical names, and problems."""
    try:
        header = read_header(path)
        if header.problem is not None:
            raise BadHeader(header.problem)
        odd = [n for n, (kind, shape) in header.tensors.items() if kind not in _FLOATS]
        odd += [n for n, (_, shape) in header.tensors.items() if len(shape) != 1]
        if odd:
            names = listed(sorted(set(odd))[:3])
            raise BadHeader(
                f"importance is a vector of floats for each weight, {names} are something else: expected "
                "llama.cpp's imatrix (GGUF), or what `mllama quantize --calibrate` writes"
            )
        places = _Places(widths)
        names = {
            name: canonical
            for name, (_, shape) in header.tensors.items()
            if places.takes(name, canonical := canonical_name(name), shape)
        }
        with safe_open(path, framework="pt", device="cpu") as file:
            vectors = {n: (canonical, file.get_tensor(n).clone()) for n, canonical in names.items()}
    except (BadHeader, SafetensorError, OSError) as error:
        raise ImportanceError(path, [reason(error)]) from None
    return vectors, places.problems


def _read_imatrix(path: Path, widths: Mapping[str, int]) -> _Read:
    """As :func:`_read_own`: sums of squares are stored, and how many vectors were summed."""
    try:
        file = GgufFile(path)
        kind = file.metadata.get("general.type")
        if kind != "imatrix":
            raise BadGguf(f'general.type must be "imatrix", got {shown(repr(kind))}')
        vectors: dict[str, tuple[str, Tensor]] = {}
        places = _Places(widths)
        dialect = dialect_of(file.tensors)
        of_weights = dict[str, None]()
        for stored in file.tensors:
            end = next((end for end in (_SUMS, _COUNTS) if stored.endswith(end)), None)
            if end is None:
                places.problems.append(f"{shown(stored)} is neither {_SUMS} nor {_COUNTS}")
            else:
                of_weights[stored.removesuffix(end)] = None
        for name in of_weights:
            sums, counts = (file.tensors.get(name + end) for end in (_SUMS, _COUNTS))
            if sums is None or counts is None or {sums.type.name, counts.type.name} != {"F32"}:
                got = " and ".join(t.type.name if t else "nothing" for t in (sums, counts))
                places.problems.append(
                    f"{shown(name)} needs {_SUMS} and {_COUNTS}, both F32, got {got}"
                )
                continue
            if math.prod(counts.shape) != 1:
                places.problems.append(f"{shown(name)} must count the vectors of one matrix")
                continue
            columns = tuple(n for n in sums.shape if n != 1) or (1,)
            place = place_of(name, columns, dialect, 0, 0)
            canonical = name if place is None else place.name
            if not places.takes(name, canonical, columns):
                continue
            summed, count = (plain(file.read(t), t.type, t.shape, None) for t in (sums, counts))
            if not bool(count.isfinite().all() & (count >= 0).all()):
                places.problems.append(f"{shown(name)} must count the vectors of one matrix")
            elif bool(count > 0):
                vectors[name] = canonical, summed.flatten().double() / float(count)
        return vectors, places.problems
    except BadGguf as error:
        raise ImportanceError(path, [reason(error)]) from None
