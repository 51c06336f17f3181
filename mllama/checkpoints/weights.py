"""Loading a model from a checkpoint folder, one file at a time. Saving is in `saving.py`."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from mllama.checkpoints.checkpoint import Checkpoint, CheckpointError, read_json
from mllama.checkpoints.expected import Config
from mllama.checkpoints.filling import fill
from mllama.checkpoints.gguf.checkpoint import GgufCheckpoint
from mllama.checkpoints.hub import DOWNLOAD_OPTIONS
from mllama.checkpoints.matching import CONFIGS, DTYPES, match_checkpoint
from mllama.checkpoints.meta_files import MetaCheckpoint
from mllama.checkpoints.planning import require_fit
from mllama.checkpoints.published_call import Wanted, check_other_arguments, quantization_of_call
from mllama.checkpoints.quantizing import (
    choice_of_rank,
    choose_encodings,
    columns_together,
    stored_by_encoding,
)
from mllama.checkpoints.saving import save_pretrained
from mllama.generation.config import GenerationConfig
from mllama.parallel.ranks import Ranks
from mllama.parallel.sameness import digest, require_same
from mllama.parallel.sizes import possible_sizes
from mllama.parallel.split import Share, Split
from mllama.quantization.policy import PLAIN
from mllama.semantics import SemanticsLike
from mllama.wording import quoted

__all__ = ["CheckpointError", "load_pretrained", "save_pretrained"]

logger = logging.getLogger("mllama")

_Model = TypeVar("_Model", bound=nn.Module)


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
    quantization: str | None = None,
    quantization_overrides: Mapping[str, str] | None = None,
    dequantize: bool = False,
    projector: str | os.PathLike[str] | None = None,
    context: int | None = None,
    images: int | None = None,
    force: bool = False,
    tensor_parallel: Any = False,
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
            Meta's `original/` layout, or a hub id, or a GGUF file.
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
        quantization: the encoding that the weights are brought to as they are read, one of
            `mllama.quantization.policy.MODEL_ENCODINGS`; None: as they are stored. What is stored quantised
            stays in its encoding, which another one here contradicts. A dtype's name means that dtype.
        quantization_overrides: shell patterns over published names to encodings, or to the model's dtype for
            weights that stay plain; the first that matches counts.
        dequantize: decode what is stored quantised, so that the model is plain.
        projector: the GGUF file with the vision tower, of a model whose text file is ``name_or_path``.
        context: tokens of a prompt and its answer for which there has to be room on the device beside the
            weights, as `mllama.plan` reckons; None: the fewest. More than the model takes: what it takes.
        images: of that prompt; None: one.
        force: load also where the memory plan says that the model does not fit.
        tensor_parallel: True to split the model over the ranks of torch.distributed's default process group,
            which under torchrun is made where there is none, or a process group. Each rank calls this with
            the same arguments but its own device, and reads only its part; so is every later call made by
            all of them, with the same inputs.
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
    ranks = Ranks.of(tensor_parallel)
    if ranks is not None:
        ranks = ranks.on_device(device)
    wanted = quantization_of_call(options, quantization)
    if wanted.encoding in PLAIN:
        dtype, wanted = one_dtype(dtype, wanted.encoding, "quantization"), Wanted()
    requested = None if dtype in (None, "auto") else _parse_dtype(dtype)
    kind = CONFIGS[cls.__name__]
    download = {key: options.pop(key) for key in options.keys() & DOWNLOAD_OPTIONS}
    fields = {key: options.pop(key) for key in options.keys() & kind.option_names()}
    check_other_arguments(options)
    matched = match_checkpoint(
        cls,
        name_or_path,
        backend,
        semantics,
        given=config,
        fields=fields,
        download=download,
        projector=projector,
    )
    model = matched.model
    chosen = requested or stored_dtype(
        matched.folder, matched.raw, matched.checkpoint, matched.sources.values()
    )
    choice = choose_encodings(
        matched, wanted, quantization_overrides, dequantize=dequantize, dtype=chosen
    )
    for line in choice.notes:
        logger.warning("%s: %s", matched.folder, line)
    share = None
    model.ops.settle(device)
    if ranks is not None:
        require_same(ranks.gathered(_common(model, chosen, choice.encodings)))
        share = Share(ranks, Split(model, ranks.size, columns_together(matched, choice.encodings)))
        share.take(model)
        choice = choice_of_rank(choice, matched, chosen, share.split, ranks.rank)
    require_fit(
        matched,
        choice,
        chosen,
        device,
        context=context,
        images=images,
        force=force,
        ranks=ranks,
    )
    # Whatever the caller is inside of: a default device is not where files are read to.
    with torch.inference_mode(False), torch.device("cpu"):
        fill(
            model,
            matched.checkpoint,
            matched.sources,
            encodings=choice.encodings,
            dtype=chosen,
            device=device,
            cuts=share.cuts if share is not None else {},
        )
    if share is not None:
        require_same(share.ranks.gathered(_norms(model, share)))
    model.quantization = choice.quantization
    model.semantics_reason = matched.reason
    model.name_or_path = model.config.name_or_path = os.fspath(name_or_path)
    if generation_config is None:
        generation_config = stored_generation_config(
            matched.folder, matched.config, matched.checkpoint
        )
    elif not isinstance(generation_config, Mapping):
        generation_config = generation_config.to_diff_dict()  # without all that is a mere default
    model.generation_config = generation_config
    return model.eval()


def _common(model: Any, dtype: torch.dtype, encodings: Mapping[str, str]) -> dict[str, Any]:
    """What ranks must have in common before they load, lest they fail in a collective, or compute parts of
    different models."""
    return {
        "semantics": str(model.semantics),
        "the configuration": model.config.to_dict(),
        "dtype": str(dtype),
        "the encoding of the weights": dict(encodings),
        "backend": sorted(model.ops.plain_ops(model.ops.device)),
    }


def _norms(model: nn.Module, share: Share) -> dict[str, Any]:
    """Of what each rank holds as a whole that which is small: other weights have other norms."""
    whole = (item for item in model.named_parameters() if item[0] not in share.cuts)
    norms = {name: digest(parameter) for name, parameter in whole if parameter.dim() == 1}
    return {"the weights of norms in the checkpoint": norms}


def one_dtype(
    dtype: torch.dtype | str | None, older: torch.dtype | str | None, name: str = "torch_dtype"
) -> Any:
    """What ``dtype`` and another argument for it, by default its older name, ask for.

    Raises: ValueError if that is two things.
    """
    if dtype is None or older is None:
        return older if dtype is None else dtype
    if str(dtype).removeprefix("torch.") != str(older).removeprefix("torch."):
        raise ValueError(f"dtype={quoted(dtype)} and {name}={quoted(older)} contradict each other")
    return dtype


def describe_checkpoint(
    cls: type[nn.Module],
    name_or_path: str | os.PathLike[str],
    projector: str | os.PathLike[str] | None = None,
    *,
    quantization: str | None = None,
    quantization_overrides: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What `load_pretrained` would load, from the headers of the files only: the folder, its layout,
    parameters, bytes, dtype, the semantics with their reason, and of a quantised one the method, the weights
    and bytes by encoding, and what there is to know about them. With ``quantization``, an encoding or a
    dtype, also what the model would be ("loaded"). "ranks" are the numbers of them that can share it.

    Raises: as :func:`load_pretrained`.
    """
    matched = match_checkpoint(cls, name_or_path, "auto", "auto", projector=projector)
    stored = [matched.checkpoint.tensors[name] for name in matched.sources.values()]
    dtype = stored_dtype(matched.folder, matched.raw, matched.checkpoint, matched.sources.values())
    is_plain = quantization in PLAIN
    into = _parse_dtype(quantization) if is_plain else dtype
    choice = choose_encodings(
        matched,
        Wanted(None if is_plain else quantization),
        quantization_overrides,
        dequantize=False,
        dtype=into,
    )
    is_asked = quantization is not None or quantization_overrides
    loaded = {"loaded": choice.described(into)} if is_asked else {}
    return {
        "folder": str(matched.folder),
        "layout": matched.files,
        "parameters": sum(p.numel() for p in matched.model.parameters()),
        "bytes": sum(tensor.nbytes for tensor in stored),
        "dtype": str(dtype).removeprefix("torch."),
        "semantics": matched.model.semantics.name,
        "semantics_reason": matched.reason,
        "ranks": possible_sizes(matched.model, columns_together(matched, choice.encodings)),
        **stored_by_encoding(matched, dtype),
        **loaded,
    }


def _parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, (str, torch.dtype)) else ""
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {list(DTYPES)} or 'auto', got {quoted(dtype)}")
    return DTYPES[name]


def stored_dtype(
    folder: Path, raw: dict[str, Any], checkpoint: Checkpoint, names: Iterable[str]
) -> torch.dtype:
    """The dtype that a checkpoint's config.json names, else the one most of its bytes have.

    Raises: CheckpointError for a name that is no dtype.
    """
    parts = (raw.get(kind.part) for kind in CONFIGS.values() if kind.part)
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
        if info.dtype is not None and not info.is_decoded:
            sizes[info.dtype] += info.nbytes
    return sizes.most_common(1)[0][0]


@dataclass(frozen=True)
class PlanSource:
    """A model that is still to be loaded.

    Attributes:
        config: of the model; of a rank's part it says over how many the model is split.
        dtype: of activations, caches, and what is not quantised.
        nbytes: of all weights, of several ranks that share them on the one that has most.
        encoding: of the quantised ones; None if there is none.
        stored: the same where they are stored so already; else None.
    """

    config: Any
    dtype: str
    nbytes: int
    encoding: str | None
    stored: str | None


def plan_source(
    cls: type[nn.Module],
    name_or_path: str | os.PathLike[str],
    projector: str | os.PathLike[str] | None = None,
    *,
    config: Any = None,
    dtype: str | None = None,
    quantization: str | None = None,
    quantization_overrides: Mapping[str, str] | None = None,
    tensor_parallel: int = 1,
) -> PlanSource:
    """What a memory plan of a checkpoint starts from, from the headers of the files only, as it is loaded
    with these arguments.

    Args:
        tensor_parallel: how many ranks share the model; its configuration says so then.
    Raises: as :func:`load_pretrained`.
    """
    matched = match_checkpoint(cls, name_or_path, "auto", "auto", given=config, projector=projector)
    if quantization in PLAIN:
        dtype, quantization = one_dtype(dtype, quantization, "quantization"), None
    places = matched.sources.values()
    chosen = (
        stored_dtype(matched.folder, matched.raw, matched.checkpoint, places)
        if dtype is None
        else _parse_dtype(dtype)
    )
    choice = choose_encodings(
        matched, Wanted(quantization), quantization_overrides, dequantize=False, dtype=chosen
    )
    nbytes = choice.nbytes
    if tensor_parallel > 1:
        units = columns_together(matched, choice.encodings)
        split = Split(matched.model, tensor_parallel, units)
        every = (choice_of_rank(choice, matched, chosen, split, r) for r in range(tensor_parallel))
        nbytes = max(own.nbytes for own in every)
        matched.model.config.get_text_config().tensor_parallel_size = tensor_parallel
    encoding = None if choice.quantization is None else choice.quantization.encoding
    return PlanSource(
        matched.model.config,
        str(chosen).removeprefix("torch."),
        nbytes,
        encoding,
        encoding if matched.found else None,
    )


def stored_generation_config(
    folder: Path, config: Config, checkpoint: Checkpoint
) -> GenerationConfig:
    """The folder's defaults; without generation_config.json, the configuration's tokens."""
    path = folder / "generation_config.json"
    if isinstance(checkpoint, (MetaCheckpoint, GgufCheckpoint)):
        entries = checkpoint.generation_config
    elif path.exists():
        entries = read_json(path)
    else:
        text = getattr(config, "text_config", config)
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        entries = {name: getattr(text, name, None) for name in names}
    return GenerationConfig.from_dict(entries)
