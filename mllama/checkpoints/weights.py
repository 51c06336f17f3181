"""Loading a model from a checkpoint folder, one file at a time. Saving is in `saving.py`."""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mllama.checkpoints.checkpoint import Checkpoint, CheckpointError, read_json
from mllama.checkpoints.expected import check_depth, expected_shapes
from mllama.checkpoints.given_config import ConfigSource, config_source
from mllama.checkpoints.hub import DOWNLOAD_OPTIONS, resolve_folder
from mllama.checkpoints.key_layout import HEAD, TEXT, KeyLayout
from mllama.checkpoints.meta_files import MetaCheckpoint, find_meta_folder
from mllama.checkpoints.placement import check_room
from mllama.checkpoints.published_call import check_other_arguments
from mllama.checkpoints.safetensors_files import SafetensorsCheckpoint
from mllama.checkpoints.saving import save_pretrained
from mllama.config import MllamaConfig, MllamaTextConfig, MllamaVisionConfig
from mllama.config_fields import ConfigError
from mllama.generation.config import GenerationConfig
from mllama.linear import projections_of
from mllama.progress import bar
from mllama.semantics import SemanticsLike, resolve_semantics
from mllama.shapes import Shapes
from mllama.vocabulary import fits
from mllama.wording import quoted, shown

__all__ = ["CheckpointError", "load_pretrained", "save_pretrained"]

logger = logging.getLogger("mllama")

_Model = TypeVar("_Model", bound=nn.Module)
_Config = MllamaConfig | MllamaTextConfig | MllamaVisionConfig
_CONFIGS: dict[str, type[_Config]] = {
    "MllamaForConditionalGeneration": MllamaConfig,
    "MllamaModel": MllamaConfig,
    "MllamaForCausalLM": MllamaTextConfig,
    "MllamaTextModel": MllamaTextConfig,
    "MllamaVisionModel": MllamaVisionConfig,
}
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

_EMBEDDING, _HEAD = TEXT + "embed_tokens.weight", HEAD + "weight"


def load_pretrained(
    cls: type[_Model],
    name_or_path: str | os.PathLike[str],
    *,
    config: Any = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device,
    backend: str = "auto",
    semantics: SemanticsLike = "auto",
    generation_config: Any = None,
    **options: Any,
) -> _Model:
    """A model of class `cls` with the weights of a folder or hub id, in evaluation mode.

    Files are memory-mapped and copied tensor by tensor into parameters that already lie on the
    target device, so host memory peaks at one mapped file above what the model itself takes there
    (for a CPU target: the model and one mapped file). Nothing stays mapped afterwards. Nothing that
    a configuration names is imported or executed.

    Args:
        cls: the model class; a class that is part of the stored model (`MllamaForCausalLM` of a
            vision model) takes its part and leaves the rest.
        name_or_path: folder with config.json and safetensors (single, or sharded with an index), or
            Meta's `original/` layout, or a hub id.
        config: instead of the folder's config.json, or where it has none, as a checkpoint of
            `transformers`' Trainer: a configuration, also one of `transformers`, its entries, or the
            folder or hub id of another one.
        dtype: dtype of the parameters; None or "auto": the one the folder's config.json names, else the
            one most of the stored bytes have.
        device: where the parameters go.
        backend: "auto", "kernels" or "reference".
        semantics: see `mllama.semantics`; "auto": read from the folder. The choice and its reason are
            logged, and the reason kept as `model.semantics_reason`.
        generation_config: defaults of generate() instead of the folder's, a mapping or a `GenerationConfig`
            of `transformers`.
        options: fields of the configuration, and the other arguments of `transformers`; see
            :meth:`mllama.base.MllamaPreTrainedModel.from_pretrained`.
    Raises:
        CheckpointError: one error that lists every fault of the files and tensors.
        FileNotFoundError, ModuleNotFoundError: see `mllama.checkpoints.hub.resolve_folder`.
        ValueError: an unknown dtype, backend or semantics, an impossible configuration, an argument that
            cannot be met, or a GPU without the room.
        TypeError: an argument that is unknown.
        RuntimeError: backend "kernels" where none can run, with the reason.
    """
    requested = None if dtype in (None, "auto") else _parse_dtype(dtype)
    kind = _CONFIGS[cls.__name__]
    download = {key: options.pop(key) for key in options.keys() & DOWNLOAD_OPTIONS}
    fields = {key: options.pop(key) for key in options.keys() & kind.option_names()}
    check_other_arguments(options)
    matched = _match_checkpoint(
        cls, name_or_path, backend, semantics, given=config, fields=fields, download=download
    )
    model = matched.model
    chosen = requested or _stored_dtype(
        matched.folder, matched.raw, matched.checkpoint, matched.sources.values()
    )
    check_room(device, sum(p.numel() for p in model.parameters()) * chosen.itemsize)
    model.ops.settle(device)
    # Whatever the caller is inside of: a default device is not where files are read to.
    with torch.inference_mode(False), torch.device("cpu"):
        _materialise(model, chosen, device)
        _fill(model, matched.checkpoint, matched.sources)
    model.semantics_reason = matched.reason
    model.name_or_path = model.config.name_or_path = os.fspath(name_or_path)
    if generation_config is None:
        generation_config = _generation_config(matched.folder, matched.config, matched.checkpoint)
    elif not isinstance(generation_config, Mapping):
        generation_config = generation_config.to_diff_dict()  # without all that is a mere default
    model.generation_config = generation_config
    return model.eval()


def one_dtype(dtype: torch.dtype | str | None, older: torch.dtype | str | None) -> Any:
    """What ``dtype`` and its older name ``torch_dtype`` ask for. Raises: ValueError if that is two things."""
    if dtype is None or older is None:
        return older if dtype is None else dtype
    if str(dtype).removeprefix("torch.") != str(older).removeprefix("torch."):
        raise ValueError(
            f"dtype={quoted(dtype)} and torch_dtype={quoted(older)} contradict each other"
        )
    return dtype


def describe_checkpoint(
    cls: type[nn.Module], name_or_path: str | os.PathLike[str]
) -> dict[str, str | int]:
    """What `load_pretrained` would load, from the headers of the files only: the folder, its layout,
    parameters, bytes, dtype, and the semantics with their reason.

    Raises: as :func:`load_pretrained`.
    """
    matched = _match_checkpoint(cls, name_or_path, "auto", "auto")
    stored = [matched.checkpoint.tensors[name] for name in matched.sources.values()]
    dtype = _stored_dtype(matched.folder, matched.raw, matched.checkpoint, matched.sources.values())
    return {
        "folder": str(matched.folder),
        "layout": "Meta's original" if matched.original else "safetensors",
        "parameters": sum(p.numel() for p in matched.model.parameters()),
        "bytes": sum(tensor.nbytes for tensor in stored),
        "dtype": str(dtype).removeprefix("torch."),
        "semantics": matched.model.semantics.name,
        "semantics_reason": matched.reason,
    }


@dataclass(frozen=True)
class _MatchedCheckpoint:
    """A checkpoint whose every tensor has been matched to a model that lies on the meta device."""

    folder: Path
    raw: dict[str, Any]
    checkpoint: Checkpoint
    original: bool
    config: _Config
    reason: str
    model: Any
    sources: dict[str, str]


def _match_checkpoint(
    cls: type[nn.Module],
    name_or_path: str | os.PathLike[str],
    backend: str,
    semantics: SemanticsLike,
    *,
    given: Any = None,
    fields: Mapping[str, Any] = {},
    download: Mapping[str, Any] = {},
) -> _MatchedCheckpoint:
    folder = resolve_folder(name_or_path, **download)
    raw, checkpoint, original = _open(folder, given is not None)
    source = config_source(given, raw, original_layout=original, download=download)
    config, reason = _config(cls, folder, source, semantics, fields)
    layout = KeyLayout(cls.__name__)
    check_depth(folder, config, checkpoint)
    expected = expected_shapes(config, layout)
    rows = _stored_rows(config, checkpoint, expected, layout)
    expected |= {name: (count, *expected[name][1:]) for name, count in rows.items()}
    # Before a module is built: a configuration by itself can ask for any number of them.
    sources = _sources_of(folder, source.entries, checkpoint, layout, expected)
    with torch.device("meta"), _SkipInit():
        model = cls(config, backend=backend)
        _fit_vocabulary(model, rows, layout)
    return _MatchedCheckpoint(folder, raw, checkpoint, original, config, reason, model, sources)


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


def _open(folder: Path, has_config: bool) -> tuple[dict[str, Any], Checkpoint, bool]:
    """The folder's configuration, empty where it has none but one is given, its tensors, and whether it is
    Meta's layout."""
    if (folder / "config.json").exists():  # what is no regular file is refused by name
        return read_json(folder / "config.json"), SafetensorsCheckpoint(folder), False
    meta_folder = find_meta_folder(folder)
    if meta_folder is not None:
        checkpoint = MetaCheckpoint(meta_folder)
        return checkpoint.config, checkpoint, True
    if has_config:
        return {}, SafetensorsCheckpoint(folder), False
    raise CheckpointError(folder, [_no_config(folder)])


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
    config: _Config, checkpoint: Checkpoint, expected: Shapes, layout: KeyLayout
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
) -> tuple[_Config, str]:
    """The configuration `cls` needs, its semantics settled, logged, and the reason for them."""
    kind = _CONFIGS[cls.__name__]
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
    if raw.get("quantization_config") is not None:
        problems.append(
            "config.json has a quantization_config; quantised weights are not supported"
        )
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
        wanted = expected[name]
        if info.shape != wanted:
            problems.append(
                f"wrong shape: {shown(info.stored_name)} is {quoted(info.shape)}, expected {wanted}"
            )
        if info.dtype is None:
            problems.append(
                f"wrong dtype: {shown(info.stored_name)} is {info.dtype_name}, "
                f"expected one of {', '.join(_DTYPES)}"
            )
    accounted = set(sources) | {layout.module_name(name) for name in checkpoint.unreadable}
    # Where no header could be read, every tensor would be missing: the file's own fault says it.
    if checkpoint.tensors or not checkpoint.problems:
        for name in expected.keys() - accounted:
            problems.append(f"missing: {layout.published_name(name)} {expected[name]}")
    if problems:
        raise CheckpointError(folder, sorted(problems))
    return sources


def _parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, (str, torch.dtype)) else ""
    if name not in _DTYPES:
        raise ValueError(f"dtype must be one of {list(_DTYPES)} or 'auto', got {quoted(dtype)}")
    return _DTYPES[name]


def _stored_dtype(
    folder: Path, raw: dict[str, Any], checkpoint: Checkpoint, names: Iterable[str]
) -> torch.dtype:
    parts = (raw.get(kind.part) for kind in _CONFIGS.values() if kind.part)
    for entries in (raw, *(part for part in parts if isinstance(part, Mapping))):
        named = entries.get("dtype")
        named = entries.get("torch_dtype") if named is None else named
        if named is not None:
            try:
                return _parse_dtype(named)
            except ValueError as error:
                raise CheckpointError(folder, [f"config.json: {error}"]) from None
    sizes: Counter[torch.dtype] = Counter()
    for name in names:
        info = checkpoint.tensors[name]
        sizes[info.dtype] += info.nbytes
    return sizes.most_common(1)[0][0]


def _materialise(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Give a model built on the meta device uninitialised parameters on `device`."""
    for module in model.modules():
        for projection in projections_of(module):
            projection.materialise(dtype, device)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                empty = torch.empty(parameter.shape, dtype=dtype, device=device)
                module.register_parameter(name, nn.Parameter(empty, parameter.requires_grad))


def _fill(model: nn.Module, checkpoint: Checkpoint, sources: dict[str, str]) -> None:
    # state_dict() holds the parameters' own memory: filling it needs no second copy.
    load = {name: tensor.copy_ for name, tensor in model.state_dict().items()}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for projection in projections_of(module):
            for name in projection.parameter_names():
                load[prefix + name] = functools.partial(projection.load_weight, name)
    targets = {canonical: load[name] for name, canonical in sources.items()}
    total = sum(checkpoint.tensors[name].nbytes for name in targets)
    with torch.no_grad(), bar("loading", total, "B", unit_scale=True) as progress:
        for name, tensor in checkpoint.read(targets):
            targets[name](tensor)
            progress.update(checkpoint.tensors[name].nbytes)


def _generation_config(folder: Path, config: _Config, checkpoint: Checkpoint) -> GenerationConfig:
    """The folder's defaults; without generation_config.json, the configuration's tokens."""
    path = folder / "generation_config.json"
    if isinstance(checkpoint, MetaCheckpoint):
        entries = checkpoint.generation_config
    elif path.exists():
        entries = read_json(path)
    else:
        text = getattr(config, "text_config", config)
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        entries = {name: getattr(text, name, None) for name in names}
    return GenerationConfig.from_dict(entries)
