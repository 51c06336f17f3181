"""Safetensors checkpoints: one file, or shards with an index; headers are checked before data."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mllama.checkpoints.checkpoint import CheckpointError, TensorInfo, read_json
from mllama.checkpoints.key_layout import canonical_name

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
# The format's own limit; a larger announced header is a damaged file, not one to allocate for.
_MAX_HEADER_BYTES = 100_000_000


class _BadHeader(Exception):
    """The header cannot be used; the text says why and names the file."""


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The tensor entries of a safetensors header and the file size they imply."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
            raise _BadHeader(
                f"{path.name} is truncated or not a safetensors file: {size:,} bytes, "
                f"its header would take {length:,}"
            )
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for entry in header.values():
                if not isinstance(entry["dtype"], str) or not all(
                    type(n) is int and n >= 0 for n in (*entry["shape"], *entry["data_offsets"])
                ):
                    raise ValueError
            ends = [entry["data_offsets"][1] for entry in header.values()]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            raise _BadHeader(f"{path.name} has a damaged safetensors header") from None
    return header, 8 + length + max(ends, default=0)


def _data_problem(path: Path, expected: int) -> str | None:
    """Why the data of a file whose header is readable cannot be trusted, or None."""
    size = path.stat().st_size
    if size != expected:
        kind = "truncated" if size < expected else "damaged (bytes after the last tensor)"
        return f"{path.name} is {kind}: {size:,} bytes, its header announces {expected:,}"
    try:  # the library checks the rest: offsets without gaps or overlaps, sizes that fit the shapes
        with safe_open(path, framework="pt"):
            return None
    except (SafetensorError, OSError, ValueError) as error:
        return f"{path.name} is damaged: {error}"


def _read_index(folder: Path) -> tuple[dict[str, str], list[str]]:
    """The usable part of the index (tensor name to file name) and its faults."""
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        return {}, [f"{INDEX} has no weight_map"]
    good: dict[str, str] = {}
    bad: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        # Only plain file names: a path could leave the folder. Both separators, on every system.
        if not isinstance(file, str) or not file.strip("."):
            bad.setdefault(f"is not a file name: {file!r}", []).append(name)
        elif "/" in file or "\\" in file or "\0" in file or Path(file).is_absolute():
            bad.setdefault(f"leaves the folder: {file!r}", []).append(name)
        elif not file.endswith(".safetensors"):
            reason = f"is not a safetensors file (pickle files are never loaded): {file!r}"
            bad.setdefault(reason, []).append(name)
        else:
            good[name] = file
    return good, [
        f"{INDEX}: the entry of {name} {reason}" for reason, names in bad.items() for name in names
    ]


class SafetensorsCheckpoint:
    """A folder with `model.safetensors`, or with an index and the shards it names.

    Construction reads headers only and collects every fault in `problems`; `tensors` maps canonical
    names to what the headers announce. Data is memory-mapped when it is read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self.problems: list[str] = []
        self.unreadable: set[str] = set()
        if (folder / SINGLE).is_file():
            self._add_file(SINGLE, None)
        elif (folder / INDEX).is_file():
            weight_map, problems = _read_index(folder)
            self.problems += problems
            for file in sorted(set(weight_map.values())):
                self._add_file(
                    file, {name for name, held_by in weight_map.items() if held_by == file}
                )
        else:
            raise CheckpointError(folder, [_no_weights(folder)])

    def _add_file(self, file: str, indexed: set[str] | None) -> None:
        path = self.folder / file
        try:
            header, expected = _read_header(path)
        except FileNotFoundError:
            self._unreadable(indexed, f"{file} is missing")
            return
        except (OSError, _BadHeader) as error:
            self._unreadable(indexed, str(error))
            return
        problem = _data_problem(path, expected)
        if problem is not None:
            self.problems.append(problem)
        if indexed is not None:
            absent = sorted(indexed - header.keys())
            self.problems += [f"{file} lacks {name}, which {INDEX} places in it" for name in absent]
            unlisted = sorted(header.keys() - indexed)
            self.problems += [
                f"{file} holds {name}, which {INDEX} does not list" for name in unlisted
            ]
        for name, entry in header.items():
            self._add_tensor(name, file, entry)

    def _unreadable(self, indexed: set[str] | None, problem: str) -> None:
        names = {canonical_name(name) for name in indexed or ()}
        self.unreadable |= names
        self.problems.append(problem + (f" ({len(names)} tensors)" if names else ""))

    def _add_tensor(self, name: str, file: str, entry: dict[str, Any]) -> None:
        canonical = canonical_name(name)
        other = self.tensors.get(canonical)
        if other is not None:
            self.problems.append(
                f"{name} in {file} and {other.stored_name} in {other.file} are the same parameter"
            )
            return
        kind = entry["dtype"]
        shape = tuple(entry["shape"])
        self.tensors[canonical] = TensorInfo(name, file, shape, _DTYPES.get(kind), kind)

    def read(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (canonical name, tensor); a tensor keeps its whole file mapped while it lives."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        for file, members in sorted(by_file.items()):
            with safe_open(self.folder / file, framework="pt", device="cpu") as handle:
                for name in members:
                    yield name, handle.get_tensor(self.tensors[name].stored_name)


def _no_weights(folder: Path) -> str:
    pickles = sorted(
        path.name
        for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
        for path in folder.glob(pattern)
    )
    if pickles:
        return (
            f"only pickle files hold weights ({', '.join(pickles)}); loading one can run any code, "
            f"so they are refused: convert them to safetensors"
        )
    return f"no weights: expected {SINGLE}, {INDEX}, or Meta's params.json with consolidated.*.pth"
