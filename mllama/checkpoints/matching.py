"""A checkpoint folder and the model that it is of: every tensor is given its place before any is read."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mllama.checkpoints.checkpoint import Checkpoint, CheckpointError, read_json
from mllama.checkpoints.expected import Config, check_depth, expected_shapes
from mllama.checkpoints.gguf.checkpoint import GgufCheckpoint
from mllama.checkpoints.gguf.container import is_gguf
from mllama.checkpoints.given_config import ConfigSource, config_source
from mllama.checkpoints.hub import resolve_folder
from mllama.checkpoints.key_layout import HEAD, TEXT, KeyLayout
from mllama.checkpoints.meta_files import MetaCheckpoint, find_meta_folder
from mllama.checkpoints.own_format import find_own
from mllama.checkpoints.published import FINDERS
from mllama.checkpoints.safetensors_files import SafetensorsCheckpoint
from mllama.checkpoints.stored_weights import Finder, Found, StoredWeights
from mllama.config import MllamaConfig, MllamaTextConfig, MllamaVisionConfig
from mllama.config_fields import ConfigError
from mllama.quantization.policy import kind_of
from mllama.semantics import SemanticsLike, resolve_semantics
from mllama.shapes import Shapes
from mllama.vocabulary import fits
from mllama.wording import listed, quoted, shown

logger = logging.getLogger("mllama")

CONFIGS: dict[str, type[Config]] = {
    "MllamaForConditionalGeneration": MllamaConfig,
    "MllamaModel": MllamaConfig,
    "MllamaForCausalLM": MllamaTextConfig,
    "MllamaTextModel": MllamaTextConfig,
    "MllamaVisionModel": MllamaVisionConfig,
}
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_EMBEDDING, _HEAD = TEXT + "embed_tokens.weight", HEAD + "weight"
_FINDERS: tuple[Finder, ...] = (find_own, *FINDERS)


@dataclass(frozen=True)
class MatchedCheckpoint:
    """A checkpoint whose every tensor has been matched to a model that lies on the meta device.

    Attributes:
        raw: the entries of config.json.
        files: what they are: "safetensors", "Meta's original" or "GGUF".
        reason: for the semantics.
        layout: of the model's class.
        shapes: of all parameters, by state-dict name.
        sources: the same names to those in the checkpoint.
        found: the formats of its quantised weights.
    """

    folder: Path
    raw: dict[str, Any]
    checkpoint: Checkpoint
    files: str
    config: Config
    reason: str
    model: Any
    layout: KeyLayout
    shapes: Shapes
    sources: dict[str, str]

    @property
    def found(self) -> list[Found]:
        return getattr(self.checkpoint, "found", [])


def match_checkpoint(
    cls: type[nn.Module],
    name_or_path: str | os.PathLike[str],
    backend: str,
    semantics: SemanticsLike,
    *,
    given: Any = None,
    fields: Mapping[str, Any] = {},
    download: Mapping[str, Any] = {},
    projector: str | os.PathLike[str] | None = None,
) -> MatchedCheckpoint:
    """The checkpoint of a folder, a hub id or a GGUF file, and a model of class ``cls`` for it.

    Args: as for :func:`mllama.checkpoints.weights.load_pretrained`; ``given`` is its ``config``, ``fields``
        the entries that replace those of the configuration, ``download`` how a hub id is fetched.
    Raises: as there.
    """
    file = Path(name_or_path).expanduser()
    if is_gguf(file):
        if any(value not in (None, False) for value in download.values()):
            raise ValueError(
                f"{shown(str(file))} is a file: {listed(sorted(download))} mean nothing"
            )
        folder, layout_name = file, "GGUF"
        with_vision = CONFIGS[cls.__name__] is not MllamaTextConfig
        path = None if projector is None else Path(projector).expanduser()
        checkpoint: Checkpoint = GgufCheckpoint(file, path, with_vision=with_vision)
        raw = checkpoint.config
    elif projector is not None:
        raise ValueError(
            f"projector={quoted(os.fspath(projector))} goes with the text file of a GGUF model; "
            f"{shown(str(file))} is no GGUF file"
        )
    else:
        folder = resolve_folder(name_or_path, **download)
        raw, checkpoint, layout_name = _open(folder, given is not None)
    original = layout_name == "Meta's original"
    source = config_source(given, raw, original_layout=original, download=download)
    if layout_name == "GGUF" and given is None:
        source = replace(source, reason="a GGUF file has Meta's")
    config, reason = _config(cls, folder, source, semantics, fields)
    if isinstance(checkpoint, GgufCheckpoint):
        checkpoint.problems += checkpoint.config_problems(config)
    layout = KeyLayout(cls.__name__)
    check_depth(folder, config, checkpoint)
    expected = expected_shapes(config, layout)
    rows = _stored_rows(config, checkpoint, expected, layout)
    expected |= {name: (count, *expected[name][1:]) for name, count in rows.items()}
    # Before a module is built: a configuration by itself can ask for any number of them.
    sources = _sources_of(folder, source.entries, checkpoint, layout, expected)
    with without_weights():
        model = cls(config, backend=backend)
        _fit_vocabulary(model, rows, layout)
    return MatchedCheckpoint(
        folder, raw, checkpoint, layout_name, config, reason, model, layout, expected, sources
    )


@contextmanager
def without_weights() -> Iterator[None]:
    """Models that are made here lie on the meta device, at once."""
    with torch.device("meta"), _SkipInit():
        yield


class _SkipInit(TorchFunctionMode):
    """Leaves out initialisation: on the meta device it does nothing, in seconds and 80 MB of imports."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def _open(folder: Path, has_config: bool) -> tuple[dict[str, Any], Checkpoint, str]:
    """The folder's configuration, empty where it has none but one is given, its tensors, and what its files
    are."""
    if (folder / "config.json").exists():  # what is no regular file is refused by name
        raw = read_json(folder / "config.json")
        return raw, _with_quantized(SafetensorsCheckpoint(folder), raw), "safetensors"
    meta_folder = find_meta_folder(folder)
    if meta_folder is not None:
        checkpoint = MetaCheckpoint(meta_folder)
        return checkpoint.config, checkpoint, "Meta's original"
    if has_config:
        return {}, _with_quantized(SafetensorsCheckpoint(folder), {}), "safetensors"
    raise CheckpointError(folder, [_no_config(folder)])


def _with_quantized(stored: SafetensorsCheckpoint, raw: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint with the quantised weights that any format has found in it.

    Raises: CheckpointError for a quantization_config that is no mapping.
    """
    entry = raw.get("quantization_config", raw.get("compression_config"))
    config = {} if entry is None else entry
    if not isinstance(config, Mapping):
        problem = f"config.json: quantization_config must be an object, got {quoted(entry)}"
        raise CheckpointError(stored.folder, [*stored.problems, problem])
    found = [one for find in _FINDERS if (one := find(stored, config)) is not None]
    if entry is not None and not found:
        what = quoted(config.get("quant_method", entry))
        stored.problems.append(
            f"config.json has a quantization_config ({what}), but no tensor is stored in a way that is known"
        )
    return StoredWeights(stored, found) if found else stored


def _no_config(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return (
            "it holds an adapter and no model: load the model that it was trained on, and then "
            "peft.PeftModel.from_pretrained(model, folder); the commands take it as --adapter"
        )
    if any(folder.glob("*.safetensors")):
        return (
            "no config.json beside the weights, as in the checkpoints that `transformers`' Trainer writes "
            "of models that are not its own: give config=, a configuration or the folder or id of the "
            "model that was trained, or save with model.save_pretrained()"
        )
    return "no config.json, and no params.json with consolidated.*.pth (Meta's layout) either"


def _stored_rows(
    config: Config, checkpoint: Checkpoint, expected: Shapes, layout: KeyLayout
) -> dict[str, int]:
    """How many tokens embedding and head have in the files, where that differs from the configuration and is
    possible."""
    names = (_EMBEDDING, _HEAD)
    stored, head = (
        info.shape[0] if (info := checkpoint.tensors.get(name)) and len(info.shape) == 2 else None
        for name in names
    )
    vocab_size = getattr(config.get_text_config(), "vocab_size", None)
    if vocab_size is None or stored is None or not fits(vocab_size, stored, head):
        return {}  # the shapes are reported as wrong
    found = {layout.module_name(n): rows for n, rows in zip(names, (stored, head), strict=True)}
    return {
        name: rows
        for name, rows in found.items()
        if name in expected and rows not in (None, expected[name][0])
    }


def _fit_vocabulary(model: Any, rows: dict[str, int], layout: KeyLayout) -> None:
    """Give the model, still without weights, as many tokens as the files have."""
    if stored := rows.get(layout.module_name(_EMBEDDING)):
        embedding = model.get_input_embeddings()
        padding = embedding.padding_idx
        padding = None if padding is None or padding >= stored else padding
        model.set_input_embeddings(nn.Embedding(stored, embedding.embedding_dim, padding))
    if head := rows.get(layout.module_name(_HEAD)):
        in_features = model.get_output_embeddings().in_features
        model.set_output_embeddings(nn.Linear(in_features, head, bias=False))


def _config(
    cls: type[nn.Module],
    folder: Path,
    source: ConfigSource,
    wanted: SemanticsLike,
    fields: Mapping[str, Any],
) -> tuple[Config, str]:
    """The configuration `cls` needs, its semantics settled, logged, and the reason for them."""
    kind = CONFIGS[cls.__name__]
    try:
        entries = kind.entries_of(source.entries)
    except ConfigError as error:
        raise _unusable(folder, error) from None
    if entries is None:
        stored = quoted(source.entries.get("model_type"))
        raise CheckpointError(
            folder,
            [f"{source.name} has model_type {stored}, {cls.__name__} needs {kind.model_type!r}"],
        )
    semantics, reason = source.semantics, source.reason
    if not (isinstance(wanted, str) and wanted == "auto"):
        semantics, reason = resolve_semantics(wanted), "asked for by the caller"
    logger.info("semantics %s for %s: %s", semantics.name, folder, reason)
    try:
        return kind.from_dict(kind.replaced(entries, {**fields, "semantics": semantics})), reason
    except ConfigError as error:
        raise _unusable(folder, error) from None


def _unusable(folder: Path, error: ConfigError) -> CheckpointError:
    problems = [f"the configuration is unusable: {problem}" for problem in error.problems]
    return CheckpointError(folder, problems)


def _sources_of(
    folder: Path,
    raw: dict[str, Any],
    checkpoint: Checkpoint,
    layout: KeyLayout,
    expected: Shapes,
) -> dict[str, str]:
    """Where each parameter (by state-dict name) comes from; every fault in one error."""
    problems = list(checkpoint.problems)
    sources: dict[str, str] = {}
    for canonical, info in checkpoint.tensors.items():
        if layout.is_other_part(canonical):
            continue
        name = layout.module_name(canonical)
        if name not in expected:
            problems.append(
                f"extra: {shown(info.stored_name)} {quoted(info.shape)} in {shown(info.file)}"
            )
            continue
        sources[name] = canonical
        place = f"{shown(info.stored_name)} in {shown(info.file)}"
        wanted = expected[name]
        if info.shape != wanted:
            problems.append(f"wrong shape: {place} is {quoted(info.shape)}, expected {wanted}")
        if info.encoding is not None and kind_of(canonical) is None:
            problems.append(
                f"quantised: {place} is {info.encoding}, but only weights of linears and "
                "the embedding of tokens can be quantised"
            )
        elif info.dtype is None and info.encoding is None:
            problems.append(
                f"wrong dtype: {place} is {info.dtype_name}, expected one of {', '.join(DTYPES)}"
            )
    accounted = set(sources) | {layout.module_name(name) for name in checkpoint.unreadable}
    # Where no header could be read, every tensor would be missing: the file's own fault says it.
    if checkpoint.tensors or not checkpoint.problems:
        for name in expected.keys() - accounted:
            problems.append(f"missing: {layout.published_name(name)} {expected[name]}")
    if problems:
        raise CheckpointError(folder, sorted(problems))
    return sources
