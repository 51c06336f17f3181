"""Saving a model as a folder that this package and `transformers` load."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mllama.checkpoints.durable import flush
from mllama.checkpoints.key_layout import KeyLayout
from mllama.checkpoints.safetensors_files import INDEX, SINGLE
from mllama.vocabulary import fits

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
# Entries of a loaded config.json that would no longer be true, or that name code to run.
# Without a transformers_version, a folder says that its recorded semantics are its own.
_STALE = (
    "transformers_version",
    "auto_map",
    "custom_pipelines",
    "quantization_config",
    "_name_or_path",
    "_commit_hash",
)


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    max_shard_size: int | str = "5GB",
    *,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write config.json, generation_config.json and the weights under their published names.

    The folder is made if needed; other files in it (tokenizer, processor) stay. Every file is
    written under a temporary name first. Then the weights of an earlier save are removed, the new
    files are renamed, and the file that makes the folder loadable (the index, or the single weights
    file) is renamed last: an interrupted save leaves no folder that passes for complete.

    Args:
        model: one of the model classes.
        folder: where to.
        max_shard_size: bytes per file, a number or like "500MB"; a single tensor may exceed it.
        state_dict: the tensors to write, under the names of the model's own, for a model that does not
            hold them whole itself.
    Raises: ValueError for an unreadable size, a state_dict of other names, or a vocabulary that could not
        be loaded again; TypeError for a model of another class.
    """
    layout = KeyLayout(type(model).__name__)
    limit = _parse_size(max_shard_size)
    state = _whole_state(model, state_dict)
    tensors = {layout.published_name(name): t for name, t in state.items()}
    shards = list(_split(tensors, limit))
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with _Staging(target) as staging:
        last = SINGLE if len(shards) == 1 else INDEX
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            numbered = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            name = SINGLE if len(shards) == 1 else numbered
            content = {key: tensors[key].detach().contiguous() for key in shard}
            save_file(content, staging.path(name), metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, name)
        if last == INDEX:
            total = sum(t.numel() * t.element_size() for t in tensors.values())
            staging.write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        staging.write_json("config.json", _config_json(model, next(iter(tensors.values())).dtype))
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            staging.write_json("generation_config.json", _fresh(generation.to_dict()))
        staging.commit(last)


class _Staging:
    """Files of one folder under temporary names, renamed together or removed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._suffix = f".{uuid.uuid4().hex[:8]}.partial"
        self._names: list[str] = []

    def path(self, name: str) -> Path:
        """The temporary path of a file that will be called `name`."""
        self._names.append(name)
        return self._folder / (name + self._suffix)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        self.path(name).write_text(text, encoding="utf-8")

    def commit(self, last: str) -> None:
        """Remove the weights that were there, then rename everything, `last` at the end."""
        # safetensors makes files that only their owner reads; the text files have the user's mode.
        mode = (self._folder / ("config.json" + self._suffix)).stat().st_mode & 0o777
        for name in self._names:
            (self._folder / (name + self._suffix)).chmod(mode)
            flush(self._folder / (name + self._suffix))
        for old in self._folder.iterdir():
            if old.name in (SINGLE, INDEX) or _SHARD.fullmatch(old.name):
                old.unlink()
        for name in sorted(self._names, key=lambda name: name == last):
            os.replace(self._folder / (name + self._suffix), self._folder / name)
        flush(self._folder)

    def __enter__(self) -> _Staging:
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._names:
            (self._folder / (name + self._suffix)).unlink(missing_ok=True)


def _whole_state(model: nn.Module, given: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
    """The tensors to write: those given, or the model's own."""
    state = model.state_dict() if given is None else given
    if given is not None and (odd := sorted(given.keys() ^ model.state_dict().keys())):
        raise ValueError(
            f"state_dict must hold the model's tensors under their names, {len(odd)} are too many or "
            f"missing: {', '.join(odd[:3])}"
        )
    embedding, head = (
        next((len(t) for name, t in state.items() if name.endswith(table)), None)
        for table in ("embed_tokens.weight", "lm_head.weight")
    )
    vocabulary = model.config.get_text_config()
    if not fits(getattr(vocabulary, "vocab_size", 0), embedding, head):
        raise ValueError(
            f"such a checkpoint could not be loaded: vocab_size is {vocabulary.vocab_size}, the embedding "
            f"has {embedding} rows and the head {head}; resize_token_embeddings() makes them agree"
        )
    return state


def _parse_size(size: int | str) -> int:
    if isinstance(size, str):
        match = re.fullmatch(r"(\d+)\s*([KMGT]?B)", size.strip().upper())
        size = int(match[1]) * _UNITS[match[2]] if match else 0
    if isinstance(size, bool) or size <= 0:
        raise ValueError('max_shard_size must be a positive number of bytes, or like "5GB"')
    return size


def _split(tensors: dict[str, Tensor], limit: int) -> Iterator[list[str]]:
    """Names in order, cut wherever the next tensor would not fit any more."""
    shard: list[str] = []
    used = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shard and used + size > limit:
            yield shard
            shard, used = [], 0
        shard.append(name)
        used += size
    yield shard


def _fresh(entries: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _fresh(value) if isinstance(value, dict) else value
        for key, value in entries.items()
        if key not in _STALE
    }


def _config_json(model: nn.Module, stored: torch.dtype) -> dict[str, Any]:
    config = _fresh(model.config.to_dict())
    dtype = str(stored).removeprefix("torch.")
    # Each generation of transformers reads one of the two.
    return {**config, "architectures": [type(model).__name__], "dtype": dtype, "torch_dtype": dtype}
