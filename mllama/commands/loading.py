"""Choosing how a model's weights are loaded, for the commands: dtype or encoding, and serialised folders."""

from __future__ import annotations

import argparse
import functools
import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from mllama import MllamaForConditionalGeneration, MllamaProcessor
from mllama.checkpoints.checkpoint import read_json
from mllama.checkpoints.gguf.container import is_gguf
from mllama.checkpoints.hub import resolve_folder
from mllama.checkpoints.safetensors_files import INDEX, SINGLE
from mllama.checkpoints.saving import save_pretrained
from mllama.checkpoints.weights import PlanSource, describe_checkpoint, plan_source
from mllama.commands.usage import UsageError
from mllama.parallel.ranks import Ranks
from mllama.quantization.policy import MODEL_ENCODINGS, PLAIN
from mllama.wording import quoted, shown

logger = logging.getLogger("mllama")


def add_quantization_arguments(group: argparse._ArgumentGroup) -> None:
    """The encoding of the weights, and overrides."""
    group.add_argument(
        "--quantization-encoding",
        choices=(*MODEL_ENCODINGS, *PLAIN),
        help="quantise the weights as they are loaded; a dtype means --dtype (default: as stored)",
    )
    group.add_argument(
        "--quantization-override",
        action="append",
        default=[],
        metavar="PATTERN=E",
        help="another encoding for the weights whose published names match a shell pattern, the first that "
        "does; may be repeated",
    )


def add_projector_argument(group: argparse._ArgumentGroup) -> None:
    """The second file of a GGUF model."""
    group.add_argument(
        "--projector",
        metavar="FILE",
        help="GGUF file with the vision tower, where --model is the text file of a GGUF model",
    )


def add_loading_arguments(group: argparse._ArgumentGroup) -> None:
    """How weights are loaded, besides device and dtype."""
    add_quantization_arguments(group)
    add_projector_argument(group)
    group.add_argument(
        "--save-to-serialized-model-path",
        type=Path,
        metavar="DIR",
        help="also write the loaded model there, as it is in memory",
    )
    group.add_argument(
        "--serialized-model-path",
        type=Path,
        metavar="DIR",
        help="load the model that was written there, in place of --model",
    )
    group.add_argument(
        "--force", action="store_true", help="load also where the memory plan says it does not fit"
    )


def add_weight_path_argument(group: argparse._ArgumentGroup) -> None:
    """Weights that do not lie with their configuration."""
    group.add_argument(
        "--weight-path",
        metavar="DIR",
        help="weights from this folder or hub id, configuration and processor from --model",
    )


def load_as_stored(parser: argparse.ArgumentParser) -> None:
    """For a command without the options of :func:`add_loading_arguments`: as if none were given."""
    parser.set_defaults(
        quantization_encoding=None,
        quantization_override=[],
        projector=None,
        save_to_serialized_model_path=None,
        serialized_model_path=None,
        force=False,
    )


def overrides_of(options: argparse.Namespace) -> dict[str, str]:
    """Raises: UsageError for an override that is none."""
    overrides: dict[str, str] = {}
    for given in options.quantization_override:
        pattern, equals, encoding = given.rpartition("=")
        if not equals or not pattern or not encoding:
            raise UsageError(
                f"--quantization-override must be PATTERN=ENCODING, got {quoted(given)}"
            )
        if overrides.setdefault(pattern, encoding) != encoding:
            raise UsageError(f"--quantization-override gives {quoted(pattern)} two encodings")
    if overrides and options.quantization_encoding in (None, *PLAIN):
        raise UsageError(
            "--quantization-override goes with a --quantization-encoding that quantises"
        )
    return overrides


def dtype_of(options: argparse.Namespace) -> str | None:
    """What --dtype and --quantization-encoding say of the dtype; None: the checkpoint's.

    Raises: UsageError where they differ.
    """
    dtype = None if options.dtype == "auto" else options.dtype
    encoding = options.quantization_encoding
    if encoding not in PLAIN or encoding == dtype:
        return dtype
    if dtype is not None:
        raise UsageError(
            f"--dtype {dtype} and --quantization-encoding {encoding} contradict each other"
        )
    return encoding


def source_of(options: argparse.Namespace, checkpoint: str) -> str:
    """The folder or file to load, ``checkpoint`` unless a serialised folder is given.

    Raises: UsageError for serialised folders that cannot be.
    """
    stored, written = options.serialized_model_path, options.save_to_serialized_model_path
    if stored is not None and written is not None:
        raise UsageError(
            "--serialized-model-path and --save-to-serialized-model-path contradict each other"
        )
    if written is not None and any((written / name).exists() for name in (SINGLE, INDEX)):
        raise UsageError(f"{shown(str(written))} holds a model already")
    if written is not None and getattr(options, "adapter", None) is not None:
        raise UsageError(
            "--save-to-serialized-model-path writes the model without an adapter: leave out --adapter"
        )
    if stored is not None and getattr(options, "weight_path", None) is not None:
        raise UsageError("--serialized-model-path and --weight-path contradict each other")
    if stored is not None and options.projector is not None:
        raise UsageError("--projector goes with the text file of a GGUF model in --model")
    return checkpoint if stored is None else str(stored)


def load_model(
    folder: str,
    options: argparse.Namespace,
    *,
    context: int | None = None,
    images: int | None = None,
) -> MllamaForConditionalGeneration:
    """The model of :func:`source_of`, as the options say; also written where they say so.

    ``context`` and ``images`` are those of `from_pretrained`.

    Raises: UsageError for options that contradict each other or what is stored.
    """
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    encoding = options.quantization_encoding
    quantization = None if encoding in PLAIN else encoding
    overrides = overrides_of(options)
    _check_serialized(options, folder)
    weights, described = weights_of(options, folder)
    model = MllamaForConditionalGeneration.from_pretrained(
        weights,
        **described,
        dtype=dtype_of(options),
        device=device,
        backend=options.backend,
        semantics=options.semantics,
        quantization=quantization,
        quantization_overrides=overrides or None,
        projector=options.projector,
        context=context,
        images=images,
        force=options.force,
        tensor_parallel=options.tensor_parallel,
    )
    if options.save_to_serialized_model_path is not None:
        _write(model, folder, options.projector, options.save_to_serialized_model_path)
    return model


def weights_of(options: argparse.Namespace, folder: str) -> tuple[str, dict[str, Any]]:
    """Where the weights of :func:`source_of` are, and what `from_pretrained` takes from elsewhere."""
    weights = getattr(options, "weight_path", None)
    if weights is None:
        return folder, {}
    path = resolve_folder(folder) / "generation_config.json"
    stored = {"generation_config": read_json(path)} if path.is_file() else {}
    return weights, {"config": folder, **stored}


def planned_source(options: argparse.Namespace, folder: str) -> PlanSource:
    """What a plan of :func:`load_model`'s model starts from, before that is loaded. Raises: as there."""
    _check_serialized(options, folder)
    weights, described = weights_of(options, folder)
    return plan_source(
        MllamaForConditionalGeneration,
        weights,
        options.projector,
        config=described.get("config"),
        dtype=dtype_of(options),
        quantization=options.quantization_encoding,
        quantization_overrides=overrides_of(options) or None,
        ranks=Ranks.of(options.tensor_parallel),
    )


def bounded_length(options: argparse.Namespace, folder: str) -> int | None:
    """The tokens of --max-length. Raises: ValueError for more than the model takes."""
    if options.max_length is not None:
        check_length(options, planned_source(options, folder).config)
    return options.max_length


def check_length(options: argparse.Namespace, config: Any) -> None:
    """Raises: ValueError for a --max-length of more tokens than a model takes."""
    most = config.get_text_config().max_position_embeddings
    if options.max_length is not None and options.max_length > most:
        raise ValueError(f"--max-length {options.max_length} is beyond the model's context, {most}")


def _check_serialized(options: argparse.Namespace, folder: str) -> None:
    if options.serialized_model_path is not None and options.quantization_encoding is not None:
        check_stored(folder, options.quantization_encoding)


def check_stored(folder: str, asked: str) -> None:
    """Raises: UsageError where a serialised folder holds another encoding than was asked for."""
    stored = describe_checkpoint(MllamaForConditionalGeneration, folder)
    found = stored.get("encoding", stored["dtype"])
    is_cast = asked in PLAIN and found in PLAIN  # as --dtype does
    if found != asked and not is_cast:
        raise UsageError(
            f"--serialized-model-path {shown(folder)} holds {found}, --quantization-encoding asks for {asked}"
        )


def _write(model: Any, source: str, projector: str | None, target: Path) -> None:
    """The model, with the tokenizer and processor files of where it came from."""
    if is_gguf(Path(source)):
        write_others = MllamaProcessor.from_pretrained(source, projector=projector).save_pretrained
    else:
        write_others = functools.partial(copy_other_files, resolve_folder(source))
    save_pretrained(model, target, write_others=write_others)
    logger.warning("written to %s", shown(str(target)))


# Of a checkpoint's folder what is neither weights nor written with them.
_OTHERS = (
    *("*.json", "*.jinja", "additional_chat_templates/*.jinja", "*.model", "*.txt"),
    *("LICENSE*", "USE_POLICY*", "README.md"),
)
_WRITTEN = ("config.json", "generation_config.json", INDEX)
# What others say of weights that are stored otherwise now.
_STALE = ("quantize_config.json", "quantization_config.json")


def copy_other_files(source: Path, target: Path) -> None:
    """Copy the tokenizer, processor and text files of a checkpoint beside weights that are written anew."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted({path for pattern in _OTHERS for path in source.glob(pattern)}):
        if path.is_file() and path.name not in (*_WRITTEN, *_STALE):
            copy = target / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
