"""The state of a run between two steps: a folder that is there as a whole or not at all.

state-STEP/trainer_state.json            what `transformers`' Trainer has counted
state-STEP/rank-R-of-N.safetensors       what is trained, AdamW's averages, random numbers

Where all ranks have the same weights, those are in the file of the first. Where each has a piece of every
weight, its file has that, and another number of ranks reads the rows it needs from several files. A state
may be somebody else's: it holds tensors and numbers only, and none of them is believed.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mllama.checkpoints.durable import flush, save_file
from mllama.checkpoints.safetensors_header import BadHeader, read_header
from mllama.files import read_text
from mllama.strict_json import parse_json
from mllama.wording import reason, shown

from .ranks import TrainingRanks
from .sharding import local, made_like
from .state_folders import half_written, remove_others

_COUNTS = "trainer_state.json"
_MAX_COUNTS_BYTES = 2**16
_FILE = re.compile(r"rank-0-of-([1-9]\d{0,4})\.safetensors")
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW, by parameter
# How torch's state of random numbers begins: seed, words that are left, whether seeded, the following word.
_TWISTER, _TWISTER_WORDS = struct.Struct("=QiiQ"), 624


@dataclass(frozen=True)
class Learned:
    """What is trained, and by what.

    Attributes:
        model: its trained parameters are those that require a gradient.
        is_sharded: whether a rank holds a piece of each of them.
    """

    model: nn.Module
    optimizer: torch.optim.AdamW
    is_sharded: bool

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}


def save_state(
    folder: Path, step: int, counts: Mapping[str, int], learned: Learned, ranks: TrainingRanks
) -> None:
    """Write everything that the steps after the first ``step`` depend on. All ranks call this together.

    Args:
        folder: of the run, which all ranks see.
        counts: what the Trainer reads again.
    """
    path = folder / f"state-{step}"
    partial = half_written(path)
    if ranks.is_first:
        partial.mkdir()
        (partial / _COUNTS).write_text(json.dumps(counts) + "\n", encoding="utf-8")
        flush(partial / _COUNTS)
    ranks.wait()
    own = partial / f"rank-{ranks.rank}-of-{ranks.size}.safetensors"
    save_file(_tensors(learned, ranks), own)
    flush(own)
    ranks.wait()
    if ranks.is_first:
        flush(partial)
        partial.rename(path)
        flush(folder)
        remove_others(folder, path)


def _tensors(learned: Learned, ranks: TrainingRanks) -> dict[str, Tensor]:
    tensors = {"rng": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        tensors["cuda_rng"] = torch.cuda.get_rng_state(ranks.device)
    if learned.is_sharded or ranks.is_first:
        for name, parameter in learned.parameters.items():
            tensors[f"parameter.{name}"] = _stored(parameter)
            averages = learned.optimizer.state.get(parameter, {})
            tensors |= {f"{moment}.{name}": _stored(t) for moment, t in averages.items()}
    return tensors


def _stored(tensor: Tensor) -> Tensor:
    return local(tensor.detach()).cpu().contiguous()


class State:
    """One that was written, by this number of ranks or by another.

    Args:
        path: of its folder.
        counts: those that the run would write itself, but for ``global_step``.
    Attributes:
        step: how many steps it has taken.
        ranks: how many have written it.
    Raises: ValueError for one that is damaged or of another run.
    """

    def __init__(self, path: Path, counts: Mapping[str, int]) -> None:
        self.path = path
        self._where = shown(str(path))
        try:
            found = parse_json(read_text(path / _COUNTS, _MAX_COUNTS_BYTES))
        except (OSError, ValueError) as error:
            raise ValueError(f"{self._where} is damaged: {_COUNTS}: {reason(error)}") from None
        step = found.get("global_step") if isinstance(found, dict) else None
        if type(step) is not int or not 0 < step <= counts["max_steps"]:
            raise ValueError(f"{self._where} is damaged: it has a step that the run does not have")
        if found != {**counts, "global_step": step} or path.name != f"state-{step}":
            raise ValueError(f"{self._where} is the state of another run; what it counts differs")
        self.step = step
        written = [m for p in path.iterdir() if (m := _FILE.fullmatch(p.name))]
        if len(written) != 1:
            raise ValueError(f"{self._where} is damaged: it has no file of its first rank")
        self.ranks = int(written[0][1])

    def load(self, learned: Learned, ranks: TrainingRanks) -> None:
        """Put it in the place of the present one.

        Where other numbers of ranks have written it, random numbers go on as they are.

        Raises: ValueError when it is damaged, of another model, or of another kind of optimizer.
        """
        try:
            pieces = 1 if self._is_whole() else self.ranks
            files = [_File(self._file(rank)) for rank in range(pieces)]
            averages: dict[str, dict[str, Tensor]] = {}
            for name, parameter in learned.parameters.items():
                averages[name] = self._averages(files, name, parameter)
                value = _read(files, f"parameter.{name}", parameter)
                if not value.isfinite().all():
                    raise ValueError("it has parameters that are not finite")
                local(parameter.detach()).copy_(value)
            extra = set().union(*(f.names for f in files)) - self._expected(learned, averages)
            if extra:
                raise ValueError(f"it is of another model, with {shown(min(extra))}")
            for name, parameter in learned.parameters.items():
                if averages[name]:
                    learned.optimizer.state[parameter] = averages[name]
        except (BadHeader, SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{self._where} cannot be resumed from: {reason(error)}") from None
        if ranks.size == self.ranks:
            self._check_random(ranks)

    def restore_random(self, ranks: TrainingRanks) -> None:
        """Let random numbers go on as they would have. Nothing happens with another number of ranks."""
        if ranks.size != self.ranks:
            return
        with safe_open(self._file(ranks.rank), "pt") as file:
            torch.set_rng_state(file.get_tensor("rng"))
            if ranks.device.type == "cuda":
                torch.cuda.set_rng_state(file.get_tensor("cuda_rng"), ranks.device)

    def _file(self, rank: int) -> Path:
        return self.path / f"rank-{rank}-of-{self.ranks}.safetensors"

    def _is_whole(self) -> bool:
        """Whether the first rank's file has all of what is trained."""
        if self.ranks == 1:
            return True
        names = read_header(self._file(1)).tensors
        return not any(name.startswith("parameter.") for name in names)

    def _expected(self, learned: Learned, averages: dict[str, dict[str, Tensor]]) -> set[str]:
        names = {"rng", "cuda_rng"} | {f"parameter.{name}" for name in learned.parameters}
        return names | {f"{moment}.{name}" for name, own in averages.items() for moment in own}

    def _averages(
        self, files: list[_File], name: str, parameter: nn.Parameter
    ) -> dict[str, Tensor]:
        """AdamW's of one parameter; none where it had no gradient yet."""
        there = {m for m in _MOMENTS for f in files if f"{m}.{name}" in f.names}
        if not there:
            return {}
        if there != set(_MOMENTS):
            raise ValueError("it is of another optimizer")
        step = _read(files, f"step.{name}", torch.zeros(()))
        first, second = (_read(files, f"{m}.{name}", parameter) for m in _MOMENTS[1:])
        finite = all(tensor.isfinite().all() for tensor in (step, first, second))
        if not finite or step < 0 or (second < 0).any():
            raise ValueError("it has averages of gradients that cannot be")
        shaped: list[Callable[[Tensor], Tensor]] = [lambda t: t, *[made_like(parameter)] * 2]
        return {m: f(t) for m, f, t in zip(_MOMENTS, shaped, (step, first, second))}

    def _check_random(self, ranks: TrainingRanks) -> None:
        """Raises: ValueError for random numbers that no run has.

        Torch checks the two numbers that make the place one by one, and reads past the words where their sum
        is too large.
        """
        kinds = {"rng": torch.get_rng_state()}
        if ranks.device.type == "cuda":
            kinds["cuda_rng"] = torch.cuda.get_rng_state(ranks.device)
        try:
            file = _File(self._file(ranks.rank))
            found = {
                name: file.rows(name, tuple(like.shape), like.dtype, 0, len(like))
                for name, like in kinds.items()
            }
        except (BadHeader, SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{self._where} is damaged: {reason(error)}") from None
        _, left, _, following = _TWISTER.unpack_from(found["rng"].numpy().tobytes())
        if left <= 0 or left + following > _TWISTER_WORDS + 1:
            raise ValueError(f"{self._where} is damaged: it has random numbers that no run has")


class _File:
    """The tensors of one rank's file, by its checked header."""

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        if header.problem is not None:
            raise ValueError(header.problem)
        self.names = header.tensors
        self._path = path

    def rows(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, begin: int, end: int
    ) -> Tensor:
        """Rows of a tensor, which has to have this shape and dtype; all of one without dimensions."""
        if name not in self.names:
            raise ValueError(f"{shown(self._path.name)} lacks {shown(name)}")
        with safe_open(self._path, "pt") as file:
            stored = file.get_slice(name)
            if tuple(stored.get_shape()) != shape:
                raise ValueError(f"{shown(name)} has the shape {stored.get_shape()}, not {shape}")
            tensor = stored[begin:end] if shape else file.get_tensor(name)
        if tensor.dtype != dtype:
            raise ValueError(f"{shown(name)} is {tensor.dtype}, not {dtype}")
        return tensor


def _read(files: list[_File], name: str, like: Tensor) -> Tensor:
    """What of a tensor this rank holds, from files of which each has a piece of its rows."""
    whole, dtype = tuple(like.shape), like.dtype
    if not whole:
        return files[0].rows(name, whole, dtype, 0, 0)
    begin, end = rows_of(like)
    parts = []
    for number, file in enumerate(files):
        first, last = piece(whole[0], number, len(files))
        parts.append(
            file.rows(
                name,
                (last - first, *whole[1:]),
                dtype,
                min(max(begin - first, 0), last - first),
                min(max(end - first, 0), last - first),
            )
        )
    return torch.cat(parts)


def piece(rows: int, number: int, of: int) -> tuple[int, int]:
    """Where the rows of a piece of a tensor begin and end, as torch cuts it."""
    size = -(-rows // of)
    return min(number * size, rows), min((number + 1) * size, rows)


def rows_of(tensor: Tensor) -> tuple[int, int]:
    """Where the rows begin and end that this rank holds."""
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return 0, tensor.shape[0]
    return piece(tensor.shape[0], mesh.get_local_rank(), mesh.size())
