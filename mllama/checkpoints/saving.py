"""Saving a model as a folder that this package and `transformers` load."""

from __future__ import annotations

import json
import os
import re
import tempfile
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mllama.checkpoints.durable import flush, save_file
from mllama.checkpoints.key_layout import KeyLayout, class_name
from mllama.checkpoints.safetensors_files import INDEX, SINGLE
from mllama.checkpoints.stored_form import Item, joined_parts, stored_form
from mllama.parallel.ranks import Ranks
from mllama.parallel.states import Gathering
from mllama.quantized_modules import WholeWeights
from mllama.vocabulary import fits
from mllama_kernels.quantized_tensor import QuantizedTensor

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
    write_others: Callable[[Path], object] | None = None,
    writes: bool = True,
) -> None:
    """Write config.json, generation_config.json and the weights under their published names.

    Quantised weights are written as :mod:`mllama.checkpoints.stored_form` says.

    The folder is made if needed; other files in it (tokenizer, processor) stay. Every file is
    written under a temporary name first. Then the weights of an earlier save are removed, the new
    files are renamed, and the file that makes the folder loadable (the index, or the single weights
    file) is renamed last: an interrupted save leaves no folder that passes for complete.

    Of a model that is split over ranks all call this. The first writes, and gathers one file at a time.

    Args:
        model: one of the model classes.
        folder: where to.
        max_shard_size: bytes per file, a number or like "500MB"; a single tensor may exceed it.
        state_dict: the tensors to write, under the names of the model's own, for a model that does not
            hold them whole itself.
        write_others: as for :func:`write_folder`.
        writes: whether this process does, unless it is one of several ranks and not the first.
    Raises: ValueError for an unreadable size, a state_dict of other names or of a split model, or a
        vocabulary that could not be loaded again; TypeError for a model of another class; RuntimeError where
        the first rank could not write.
    """
    layout = KeyLayout(class_name(model))
    limit = _parse_size(max_shard_size)
    state = _whole_state(model, state_dict)
    plain = (t.dtype for t in state.values() if isinstance(t, Tensor) and t.is_floating_point())
    names = {layout.published_name(n): n for n in state}
    weights = {published: state[n] for published, n in names.items()}
    gathering, ranks = None, None
    if model.share is not None:
        ranks = model.share.ranks
        writes = writes and ranks.rank == 0
        gathering = Gathering(model.share, names, keep=writes)
    entry, items = stored_form(weights, model, gathering)
    texts = model_texts(model, next(plain), entry)
    with _taking_turns(items, ranks) as turns:
        if writes:
            write_folder(Path(folder), turns, texts, limit, write_others=write_others)


@contextmanager
def _taking_turns(items: list[Item], ranks: Ranks | None) -> Iterator[list[Item]]:
    """The items for the rank that writes them; afterwards all have made those that were not yet, so that no
    rank waits for another, also where writing fails.

    Raises: RuntimeError where another rank could not write.
    """
    if ranks is None:
        yield items
        return
    pending = deque(items)

    def made() -> Iterable[tuple[str, Tensor]]:
        return pending.popleft().make()

    failure: Exception | None = None
    try:
        yield [Item(item.nbytes, made) for item in items]
    except Exception as error:
        failure = error
    while pending:
        made()
    reason = ranks.agreed(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    if reason is not None:
        raise RuntimeError(f"rank 0 could not write the model: {reason}")


def model_texts(
    model: nn.Module, dtype: torch.dtype, entry: dict[str, Any] | None
) -> dict[str, dict[str, Any]]:
    """The JSON files of a model's folder but the index, for :func:`write_folder`.

    Args:
        dtype: of the plain weights.
        entry: the ``quantization_config``.
    """
    config = _config_json(model, dtype)
    texts = {"config.json": config if entry is None else {**config, "quantization_config": entry}}
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        texts["generation_config.json"] = _fresh(generation.to_dict())
    return texts


def write_folder(
    folder: Path,
    items: Iterable[Item],
    texts: Mapping[str, dict[str, Any]],
    limit: int,
    *,
    write_others: Callable[[Path], object] | None = None,
) -> None:
    """Write weights and JSON files as a checkpoint that is there as a whole or not at all.

    Args:
        items: in the order of the files; each is made when its file is written, and one file at a time is in
            memory.
        texts: names of JSON files to their content, ``config.json`` among them.
        limit: bytes per file; a single item may exceed it.
        write_others: writes what else belongs to the checkpoint, such as the processor's files, into an empty
            folder; called once the weights are written, and its files appear with theirs.
    """
    shards = list(_split(items, limit))
    folder.mkdir(parents=True, exist_ok=True)
    with _Staging(folder) as staging:
        last = SINGLE if len(shards) == 1 else INDEX
        weight_map: dict[str, str] = {}
        total = 0
        for number, shard in enumerate(shards, start=1):
            numbered = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            name = SINGLE if len(shards) == 1 else numbered
            content = {key: t.detach().contiguous() for item in shard for key, t in item.make()}
            save_file(content, staging.path(name))
            weight_map |= dict.fromkeys(content, name)
            total += sum(t.numel() * t.element_size() for t in content.values())
        if last == INDEX:
            staging.write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        for name, text in texts.items():
            staging.write_json(name, text)
        if write_others is not None:
            staging.take_up(write_others)
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

    def take_up(self, write: Callable[[Path], object]) -> None:
        """Let ``write(folder)`` write files, also in folders of its own, and take them."""
        with tempfile.TemporaryDirectory(self._suffix, "", self._folder) as temporary:
            write(Path(temporary))
            for file in [path for path in Path(temporary).rglob("*") if path.is_file()]:
                place = self.path(str(file.relative_to(temporary)))
                place.parent.mkdir(exist_ok=True)
                os.replace(file, place)

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
        for folder in {self._folder, *((self._folder / name).parent for name in self._names)}:
            flush(folder)

    def __enter__(self) -> _Staging:
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._names:
            (self._folder / (name + self._suffix)).unlink(missing_ok=True)


def _whole_state(
    model: nn.Module, given: Mapping[str, Tensor] | None
) -> Mapping[str, Tensor | QuantizedTensor]:
    """The tensors to write: those given, or the model's own, with quantised weights as they are."""
    if given is not None and model.share is not None:
        raise ValueError(
            "a model that is split over ranks (tensor_parallel) gathers its own tensors: leave state_dict out"
        )
    state = model.state_dict(destination=WholeWeights()) if given is None else given
    if given is not None and (odd := sorted(given.keys() ^ model.state_dict().keys())):
        raise ValueError(
            f"state_dict must hold the model's tensors under their names, {len(odd)} are too many or "
            f"missing: {', '.join(odd[:3])}"
        )
    if given is not None:
        state = joined_parts(given)
    embedding, head = (
        next((t.shape[0] for name, t in state.items() if name.endswith(table)), None)
        for table in ("embed_tokens.weight", "lm_head.weight")
    )
    if model.share is not None:
        head = model.share.head_rows
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


def _split(items: Iterable[Item], limit: int) -> Iterator[list[Item]]:
    """In order, cut wherever the next one would not fit any more."""
    shard: list[Item] = []
    used = 0
    for item in items:
        if shard and used + item.nbytes > limit:
            yield shard
            shard, used = [], 0
        shard.append(item)
        used += item.nbytes
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
    return {**config, "architectures": [class_name(model)], "dtype": dtype, "torch_dtype": dtype}
