"""A GGUF model as a checkpoint: one file, or a text file and its projector file."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mllama.checkpoints.checkpoint import CheckpointError, TensorInfo
from mllama.checkpoints.expected import Config
from mllama.checkpoints.gguf.container import BadGguf, GgufFile
from mllama.checkpoints.gguf.files import open_files, without_vision
from mllama.checkpoints.gguf.gates import gate_of, position_problem, raw_problem
from mllama.checkpoints.gguf.header import GgufTensor
from mllama.checkpoints.gguf.metadata import (
    IMAGE_TOKEN,
    Vocabulary,
    generation_entries,
    text_entries,
    vision_entries,
)
from mllama.checkpoints.gguf.names import (
    POSITION_GATE,
    ROPE_FREQUENCIES,
    TILE_POSITION_GATE,
    Place,
    place_of,
)
from mllama.checkpoints.gguf.rope_check import rope_problem
from mllama.checkpoints.gguf.types import READ, GgmlType
from mllama.checkpoints.gguf.values import packed, plain
from mllama.checkpoints.stored_weights import Found
from mllama.config import MllamaTextConfig
from mllama.config_fields import ConfigError
from mllama.quantization.policy import kind_of
from mllama.shapes import EXTRA_ROWS
from mllama.wording import listed, shown
from mllama_kernels.quantized_tensor import QuantizedTensor

logger = logging.getLogger("mllama")

_MOST_SMALL = 2**16  # elements of what is read while opening: gates and rotary factors
_NEVER = "norms, gates and biases are never quantised"


@dataclass(frozen=True)
class _Stored:
    """A parameter's tensor: its file, what the file says of it, and where it belongs."""

    file: GgufFile
    tensor: GgufTensor
    place: Place


class GgufCheckpoint:
    """The tensors of a GGUF model under canonical names (see `checkpoint.Checkpoint`).

    Blocks that have a kernel stay as they are, those of others are decoded to float32, and gates are undone
    in float64. Opening reads headers, gates and rotary factors.

    Args:
        path: the whole model, or its text file.
        projector: the file with the vision tower, where ``path`` has none.
        with_vision: whether the model that is wanted has one.
    Attributes:
        folder: ``path``, for errors.
        config: what a `config.json` would say; without `vision_config` of a text file alone.
        generation_config: what a `generation_config.json` would say.
        found: how weights are quantised, for people; empty if none is.
    Raises: CheckpointError for files that cannot be read, are of another architecture, are no two halves of a
        model or lack one, and for metadata that cannot be.
    """

    def __init__(
        self, path: Path, projector: Path | None = None, *, with_vision: bool = True
    ) -> None:
        self.folder = path
        self.tensors: dict[str, TensorInfo] = {}
        self.problems: list[str] = []
        self.unreadable: set[str] = set()
        self._stored: dict[str, _Stored] = {}
        self._files = open_files(path, projector)
        if with_vision and self._files.vision is None:
            raise CheckpointError(path, [without_vision(self._files.text)])
        self._vocabulary = Vocabulary(self._files.text)
        try:
            self.config: dict[str, Any] = self._entries()
            self.generation_config = generation_entries(self._vocabulary)
            for file in self._files.all:
                for tensor in file.tensors.values():
                    self._add(file, tensor)
            self._check_gates()
            self._rope = self._small(self._files.text, ROPE_FREQUENCIES)
        except ConfigError as error:
            raise CheckpointError(path, error.problems) from None
        except BadGguf as error:
            raise CheckpointError(path, [str(error)]) from None
        self.found = self._found()

    def config_problems(self, config: Config) -> list[str]:
        """Why a configuration that a model of these files gets, their own or another, is not theirs: heads,
        by which rows were put into order, or rotary factors."""
        text = config.get_text_config()
        if not isinstance(text, MllamaTextConfig):
            return []
        problems = []
        for name in ("num_attention_heads", "num_key_value_heads"):
            own, given = self.config["text_config"][name], getattr(text, name)
            if given != own:
                problems.append(f"{name} is {given}, {self._files.text.name} has {own}")
        if (problem := rope_problem(self._rope, text)) is not None:
            problems.append(f"{self._files.text.name}: {problem}")
        return problems

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
        """Yields (canonical name, parameter) in the order of the files.

        Raises: CheckpointError for a file that is no longer the one whose header was read.
        """
        chosen = [(name, self._stored[name]) for name in names]
        files = self._files.all
        chosen.sort(key=lambda one: (files.index(one[1].file), one[1].tensor.begin))
        for name, stored in chosen:
            try:
                yield name, self._made(name, stored)
            except BadGguf as error:
                raise CheckpointError(self.folder, [str(error)]) from None

    def _entries(self) -> dict[str, Any]:
        """Raises: ConfigError, BadGguf."""
        text, vision = self._files.text, self._files.vision
        vocab_size = _vocab_size(text)
        image = self._vocabulary.id_of(IMAGE_TOKEN)
        entries: dict[str, Any] = {
            "architectures": ["MllamaForConditionalGeneration"],
            "model_type": "mllama",
            "image_token_index": vocab_size if image is None else image,
            "dtype": "float32" if self._is_float32() else "bfloat16",
            "text_config": text_entries(text, vocab_size, self._vocabulary),
        }
        if vision is not None:
            entries["vision_config"] = vision_entries(vision)
            self._check_widths(entries["text_config"]["hidden_size"], vision)
        return entries

    def _is_float32(self) -> bool:
        """Whether nothing is stored in fewer bits. What is came from bfloat16, whose range float16 lacks."""
        kinds = {t.type.name for file in self._files.all for t in file.tensors.values()}
        return kinds <= {"F32", "F64"}

    def _check_widths(self, width: int, vision: GgufFile) -> None:
        projector = vision.tensors.get("mm.0.weight")
        if projector is not None and projector.shape[0] != width:
            raise ConfigError(
                vision.name,
                [
                    f"{vision.name} projects to a width of {projector.shape[0]}, the text model of "
                    f"{self._files.text.name} has {width}: they are halves of two models"
                ],
            )

    def _add(self, file: GgufFile, tensor: GgufTensor) -> None:
        """Enter a tensor where it belongs, or what is wrong with it."""
        if tensor.name in (ROPE_FREQUENCIES, POSITION_GATE):
            return  # checked, and read no further
        vision = self.config.get("vision_config", {})
        place = place_of(
            tensor.name,
            tensor.shape,
            self._files.dialect,
            vision.get("intermediate_size", 0),
            vision.get("hidden_size", 0),
        )
        kind, stored = tensor.type, shown(tensor.name)
        if place is None:
            place = Place(tensor.name)  # reported as extra
        if (other := self._stored.get(place.name)) is not None:
            self.problems.append(
                f"{stored} in {file.name} and {shown(other.tensor.name)} in {other.file.name} are the same "
                "parameter"
            )
            return
        is_weight = kind_of(place.name) is not None and len(tensor.shape) == 2
        if kind.block > 1 and len(tensor.shape) == 1:
            self.problems.append(f"{stored} in {file.name} is {kind.name}: {_NEVER}")
        elif not kind.is_read:
            self.problems.append(f"{stored} in {file.name} is {kind.name}; {READ} are read")
        elif place.heads is not None and tensor.shape[0] % (2 * self._heads(place)):
            self.problems.append(
                f"wrong shape: {stored} in {file.name} has {tensor.shape[0]} rows, which are no "
                f"{self._heads(place)} heads of pairs"
            )
        else:
            self._stored[place.name] = _Stored(file, tensor, place)
            self.tensors[place.name] = TensorInfo(
                tensor.name,
                file.name,
                tensor.shape,
                *_what_is_read(kind, place, is_weight),
                packed_bytes=tensor.nbytes if is_weight and kind.encoding else 0,
                is_decoded=is_weight and kind.decode is not None,
            )
            return
        self.unreadable.add(place.name)

    def _heads(self, place: Place) -> int:
        """By how many heads the rows of a tensor are interleaved."""
        part, name = {
            "text": ("text_config", "num_attention_heads"),
            "text kv": ("text_config", "num_key_value_heads"),
            "vision": ("vision_config", "attention_heads"),
        }[place.heads]
        return self.config[part][name]

    def _made(self, name: str, stored: _Stored) -> Tensor | QuantizedTensor:
        tensor, place = stored.tensor, stored.place
        data = stored.file.read(tensor)
        heads = None if place.heads is None else self._heads(place)
        if self.tensors[name].encoding is not None:
            return packed(data, tensor.type, tensor.shape, heads)
        values = plain(data, tensor.type, tensor.shape, heads)
        return gate_of(values) if place.is_tanh else values

    def _small(self, file: GgufFile, name: str) -> Tensor | None:
        """The values of a tensor of a few numbers; None where it is missing, or is reported otherwise."""
        tensor = file.tensors.get(name)
        if tensor is None:
            return None
        if tensor.type.dtype is None or math.prod(tensor.shape) > _MOST_SMALL:
            self.problems.append(
                f"{shown(name)} in {file.name} has {math.prod(tensor.shape):,} numbers of "
                f"{tensor.type.name}, expected a few that are not quantised"
            )
            return None
        return plain(file.read(tensor), tensor.type, tensor.shape, None)

    def _check_gates(self) -> None:
        """Whether the vision gates are of tanh, and those of the position tables of one."""
        file = self._files.vision
        if file is None:
            return
        gates = {
            stored.tensor.name: values
            for stored in self._stored.values()
            if stored.place.is_tanh
            and (values := self._small(file, stored.tensor.name)) is not None
        }
        of_layers = {name: values for name, values in gates.items() if not name.endswith(".gate")}
        if problem := raw_problem(of_layers):
            self.problems.append(f"{file.name}: {problem}")
            return
        for name, values in gates.items():
            try:
                gate_of(values)
            except ValueError as error:
                self.problems.append(f"{shown(name)} in {file.name} cannot be read: {error}")
        rest = self._small(file, POSITION_GATE)
        gate = gates.get(TILE_POSITION_GATE)
        if rest is None:
            self.problems.append(f"missing: {POSITION_GATE} in {file.name}")
        elif gate is not None and (problem := position_problem(rest, gate)):
            self.problems.append(f"{file.name}: {problem}")

    def _found(self) -> list[Found]:
        """With what people should know: what is decoded, and what a split file leaves open."""
        notes = []
        if self._files.dialect == "split":
            notes.append(
                "the rows of cross-attention q and k are taken in the published order, which a split file "
                "does not state"
            )
        if not any(info.encoding or info.is_decoded for info in self.tensors.values()):
            for note in notes:
                logger.info("%s: %s", self.folder, note)
            return []
        decoded = [s.tensor for s in self._stored.values() if s.tensor.type.decode is not None]
        if decoded:
            counts = Counter(tensor.type.name for tensor in decoded)
            size = sum(math.prod(tensor.shape) for tensor in decoded) * 2
            notes.append(
                f"decoded to the model's dtype, since there is no kernel for them: "
                f"{listed(f'{count} tensors of {name}' for name, count in counts.items())}; in 16 bits they "
                f"take {size / 1e9:.2f} GB instead of {sum(t.nbytes for t in decoded) / 1e9:.2f}"
            )
        return [Found("GGUF", notes=notes)]


def _vocab_size(text: GgufFile) -> int:
    """Rows of the head, or what those of the embedding leave of them. Raises: ConfigError without either."""
    for name, extra in (("output.weight", 0), ("token_embd.weight", EXTRA_ROWS)):
        if (tensor := text.tensors.get(name)) is not None:
            return tensor.shape[0] - extra
    raise ConfigError(text.name, [f"{text.name} has no output.weight and no token_embd.weight"])


def _what_is_read(
    kind: GgmlType, place: Place, is_weight: bool
) -> tuple[torch.dtype | None, str, str | None]:
    """dtype, its stored name and encoding of a parameter."""
    if is_weight and kind.encoding is not None:
        return None, kind.name, kind.encoding
    if place.is_tanh:
        return torch.float64, kind.name, None
    return kind.dtype or torch.float32, kind.name, None
