"""Reading Meta's `original/` folder: params.json and consolidated.pth or consolidated.NN.pth.

The `.pth` files are pickles, and are opened as `torch_files` says: nothing but tensors comes out of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from mllama.checkpoints.checkpoint import CheckpointError, OwnFiles, TensorInfo, read_json
from mllama.checkpoints.meta_layout import Recipe, recipes
from mllama.checkpoints.meta_params import PARAMS, config_from_params, params_entries
from mllama.checkpoints.torch_files import BadTorchFile, load, outline
from mllama.checkpoints.torch_pickle import StoredTensor
from mllama.config_fields import ConfigError
from mllama.wording import listed, quoted, reason, shown

_CONSOLIDATED = re.compile(r"consolidated(\.(\d\d))?\.pth")
# Made at run time by Meta's code, stored by some of its exports.
_IGNORED = {"text_model.rope.freqs"}
# Stored bytes read before the files are mapped afresh, which bounds the resident pages.
_WINDOW_BYTES = 4 << 30

# Position tables grow with the tile size that params.json names; the file's own size bounds them.
_LARGEST_RESIZE = 64

_Shard = dict[str, Tensor]


def find_meta_folder(folder: Path) -> Path | None:
    """`folder`, or its subfolder `original`, when that holds Meta's layout."""
    for candidate in (folder, folder / "original"):
        if (candidate / PARAMS).is_file() and _shard_files(candidate):
            return candidate
    return None


def _shard_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if _CONSOLIDATED.fullmatch(p.name))


def _checked(path: Path, content: Any, kind: type) -> dict[str, Any]:
    """The dictionary of tensors that a file holds. Raises: BadTorchFile for another content."""
    name = shown(path.name)
    if not isinstance(content, dict):
        raise BadTorchFile(
            f"{name} must hold a dictionary of tensors, not {type(content).__name__}"
        )
    others = [str(key) for key, value in content.items() if not isinstance(value, kind)]
    others += [str(key) for key in content if not isinstance(key, str)]
    if others:
        raise BadTorchFile(f"{name} holds entries that are not tensors: {listed(others)}")
    return content


class MetaCheckpoint:
    """Meta's layout as a checkpoint; `config` is the configuration derived from params.json.

    Construction maps the files and looks at names, shapes and dtypes only.
    Raises: CheckpointError when params.json or a shard cannot be used at all.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self.unreadable: set[str] = set()
        self.problems: list[str] = []
        self._files = _shard_files(folder)
        self._check_numbering()
        shards = self._outlines()
        params = params_entries(read_json(folder / PARAMS))
        class_embedding = shards[0].get("vision_model.vision_encoder.class_embedding")
        if class_embedding is None or class_embedding.dim() != 1:
            reason = "no vision_model.vision_encoder.class_embedding: not a Llama 3.2 Vision model"
            raise CheckpointError(folder, [*self.problems, reason])
        try:
            self.config = config_from_params(params, class_embedding.shape[0])
        except ConfigError as error:
            raise CheckpointError(folder, error.problems) from None
        self._recipes = recipes(self.config)
        self._check_names(shards)
        for name, recipe in self._recipes.items():
            self._describe(name, recipe, shards)

    @property
    def generation_config(self) -> dict[str, Any]:
        """The sampling defaults of Meta's own generator and the special tokens."""
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        tokens = {name: self.config["text_config"][name] for name in names}
        return {**tokens, "do_sample": True, "temperature": 0.6, "top_p": 0.9}

    def _check_numbering(self) -> None:
        numbers = [_CONSOLIDATED.fullmatch(path.name)[2] for path in self._files]
        expected = [f"{i:02d}" for i in range(len(numbers))]
        if numbers not in ([None], expected):
            names = ", ".join(path.name for path in self._files)
            raise CheckpointError(
                self.folder, [f"the shards must be numbered from 00 without gaps, found {names}"]
            )

    def _outlines(self) -> list[_Shard]:
        """Every shard's tensors on the meta device: shapes and dtypes, no data, no mapping."""
        outlines, bad, own = [], [], OwnFiles()
        for path in self._files:
            if (fault := own.fault(path)) is not None:
                bad.append(fault)
                continue
            try:
                shard = _checked(path, outline(path), StoredTensor)
            except BadTorchFile as error:
                bad.append(str(error))
                continue
            outlines.append({name: stored.outline() for name, stored in shard.items()})
        if bad:
            raise CheckpointError(self.folder, bad)
        return outlines

    def _check_names(self, shards: list[_Shard]) -> None:
        wanted = {name for recipe in self._recipes.values() for name, _ in recipe.parts}
        for path, shard in zip(self._files, shards, strict=True):
            self.problems += [f"{path.name} lacks {name}" for name in sorted(wanted - shard.keys())]
            extra = sorted(shard.keys() - wanted - _IGNORED)
            self.problems += [
                f"{path.name} holds {shown(name)}, which is unknown" for name in extra
            ]

    def _describe(self, name: str, recipe: Recipe, shards: list[_Shard]) -> None:
        stored = " + ".join(part for part, _ in recipe.parts)
        if any(part not in shard for part, _ in recipe.parts for shard in shards):
            self.unreadable.add(name)  # reported as lacking by its own name
            return
        dtypes = {shard[part].dtype for part, _ in recipe.parts for shard in shards}
        try:
            made = recipe.outline(shards)
        except (RuntimeError, ValueError) as error:
            shapes = [tuple(shard[part].shape) for part, _ in recipe.parts for shard in shards]
            self.problems.append(f"{stored} has unusable shapes {quoted(shapes)}: {reason(error)}")
            self.unreadable.add(name)
            return
        read = sum(shard[part].numel() for part, _ in recipe.parts for shard in shards)
        if made.numel() > _LARGEST_RESIZE * read:
            self.problems.append(
                f"{stored} would be made {made.numel() // max(read, 1)} times as large as it is stored, at "
                f"most {_LARGEST_RESIZE} times is"
            )
            self.unreadable.add(name)
            return
        floating = all(dtype.is_floating_point and dtype.itemsize > 1 for dtype in dtypes)
        self.tensors[name] = TensorInfo(
            stored_name=stored,
            file=", ".join(path.name for path in self._files),
            shape=tuple(made.shape),
            dtype=made.dtype if floating else None,
            dtype_name=", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)),
        )

    def read(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yields (canonical name, tensor), merged and transformed, mapping a window at a time."""
        window: list[str] = []
        used = 0
        for name in names:
            window.append(name)
            used += self.tensors[name].nbytes
            if used >= _WINDOW_BYTES:
                yield from self._read_window(window)
                window, used = [], 0
        yield from self._read_window(window)

    def _read_window(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        try:
            shards = [_checked(path, load(path), Tensor) for path in self._files] if names else []
        except BadTorchFile as error:
            raise CheckpointError(self.folder, [str(error)]) from None
        for name in names:
            yield name, self._recipes[name].make(shards)
