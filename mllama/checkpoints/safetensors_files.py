"""Safetensors checkpoints: one file, or shards with an index; headers are checked before data."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mllama.checkpoints.checkpoint import CheckpointError, OwnFiles, TensorInfo, read_json
from mllama.checkpoints.foreign_files import foreign_weights
from mllama.checkpoints.key_layout import canonical_name
from mllama.checkpoints.safetensors_header import (
    MAX_NAME,
    MAX_TENSORS,
    BadHeader,
    Header,
    read_header,
)
from mllama.files import FileRefused, check_regular
from mllama.wording import listed, quoted, reason, shown

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
# The 90B model's index names 1,700 tensors in 37 files, in 150 kB.
MAX_INDEX_BYTES = 8 * 2**20
_MAX_FILES = 2_000


def _read_index(folder: Path) -> tuple[dict[str, set[str]], list[str]]:
    """The usable part of the index, file name to tensor names, and its faults."""
    weight_map = read_json(folder / INDEX, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        return {}, [f"{INDEX} has no weight_map"]
    if len(weight_map) > MAX_TENSORS:
        return {}, [f"{INDEX} names {len(weight_map):,} tensors; at most {MAX_TENSORS:,} are read"]
    good: dict[str, set[str]] = {}
    problems = []
    for name, file in weight_map.items():
        fault = _name_fault(file)
        if len(name) > MAX_NAME:
            fault = f"has a name of {len(name):,} characters, at most {MAX_NAME}"
        if fault is None:
            good.setdefault(file, set()).add(name)
        else:
            problems.append(f"{INDEX}: the entry of {shown(name)} {fault}")
    if len(good) > _MAX_FILES:
        return {}, [f"{INDEX} names {len(good):,} files; at most {_MAX_FILES:,} are read"]
    return good, problems


def _name_fault(file: object) -> str | None:
    """Why an entry of the index names no file beside it; both separators, on every system."""
    if not isinstance(file, str) or not file.strip(".") or len(file) > MAX_NAME:
        return f"is not a file name: {quoted(file)}"
    if "/" in file or "\\" in file or "\0" in file or Path(file).is_absolute():
        return f"leaves the folder: {quoted(file)}"
    if not file.endswith(".safetensors"):
        return f"is not a safetensors file (pickle files are never loaded): {quoted(file)}"
    return None


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
        self._sizes: dict[str, int] = {}
        if (folder / SINGLE).is_file():
            self._add_file(SINGLE, None)
        elif (folder / INDEX).is_file():
            files, problems = _read_index(folder)
            self.problems += problems
            own = OwnFiles()
            for file, indexed in sorted(files.items()):
                if (fault := own.fault(folder / file)) is None:
                    self._add_file(file, indexed)
                else:
                    self._unreadable(indexed, fault)
        else:
            raise CheckpointError(folder, [_no_weights(folder)])

    def _add_file(self, file: str, indexed: set[str] | None) -> None:
        path = self.folder / file
        try:
            header = read_header(path)
        except BadHeader as error:
            self._unreadable(indexed, str(error))
            return
        if len(self.tensors) + len(header.tensors) > MAX_TENSORS:
            self._unreadable(indexed, f"{shown(file)}: more than {MAX_TENSORS:,} tensors in all")
            return
        self._check_data(path, header)
        if indexed is not None:
            where = shown(file)
            self.problems += [
                f"{where} lacks {shown(name)}, which {INDEX} places in it"
                for name in sorted(indexed - header.tensors.keys())
            ]
            self.problems += [
                f"{where} holds {shown(name)}, which {INDEX} does not list"
                for name in sorted(header.tensors.keys() - indexed)
            ]
        for name, (kind, shape) in header.tensors.items():
            self._add_tensor(name, file, kind, shape)

    def _check_data(self, path: Path, header: Header) -> None:
        self._sizes[path.name] = header.size
        if header.problem is not None:
            self.problems.append(header.problem)
            return
        try:  # the library has the last word on what it will be asked to map
            with safe_open(path, framework="pt"):
                pass
        except (MemoryError, OSError) as error:  # says nothing of the file
            self.problems.append(f"{shown(path.name)} cannot be mapped: {reason(error)}")
        except Exception as error:
            self.problems.append(f"{shown(path.name)} is damaged: {reason(error)}")

    def _unreadable(self, indexed: set[str] | None, problem: str) -> None:
        names = {canonical_name(name) for name in indexed or ()}
        self.unreadable |= names
        self.problems.append(problem + (f" ({len(names)} tensors)" if names else ""))

    def _add_tensor(self, name: str, file: str, kind: str, shape: tuple[int, ...]) -> None:
        canonical = canonical_name(name)
        other = self.tensors.get(canonical)
        if other is not None:
            self.problems.append(
                f"{shown(name)} in {shown(file)} and {shown(other.stored_name)} in {shown(other.file)} are "
                "the same parameter"
            )
            return
        self.tensors[canonical] = TensorInfo(name, file, shape, _DTYPES.get(kind), shown(kind))

    def read(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (canonical name, tensor); a tensor keeps its whole file mapped while it lives.

        Raises: CheckpointError for a file that is no longer the one whose header was read. A file that is
            cut while it is mapped ends the process, as a mapping does: nobody may write to a checkpoint
            that is being loaded.
        """
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        for file, members in sorted(by_file.items()):
            self._check_unchanged(file)
            try:
                with safe_open(self.folder / file, framework="pt", device="cpu") as handle:
                    for name in members:
                        yield name, handle.get_tensor(self.tensors[name].stored_name)
            except (SafetensorError, OSError, MemoryError) as error:
                problem = f"{shown(file)} cannot be read: {reason(error)}"
                raise CheckpointError(self.folder, [problem]) from None

    def _check_unchanged(self, file: str) -> None:
        try:
            size = check_regular(self.folder / file)
        except FileRefused as error:
            problem = f"{shown(file)} cannot be read any more: {error}"
            raise CheckpointError(self.folder, [problem]) from None
        if size != self._sizes[file]:
            raise CheckpointError(self.folder, [f"{shown(file)} was changed while it was loaded"])


def _no_weights(folder: Path) -> str:
    if (foreign := foreign_weights(folder)) is not None:
        return foreign
    pickles = sorted(
        path.name
        for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
        for path in folder.glob(pattern)
    )
    if pickles:
        return (
            f"only pickle files hold weights ({listed(pickles)}); loading one can run any code, "
            f"so they are refused: convert them to safetensors"
        )
    return f"no weights: expected {SINGLE}, {INDEX}, or Meta's params.json with consolidated.*.pth"
