"""Versions, kernels and device; with --model also what a checkpoint is and which semantics it gets."""

from __future__ import annotations

import argparse
import json
from typing import Any

import mllama_kernels.info as kernels_info
from mllama import MllamaForConditionalGeneration
from mllama.checkpoints.weights import describe_checkpoint
from mllama.commands.loading import (
    add_loading_arguments,
    check_stored,
    load_model,
    overrides_of,
    source_of,
)
from mllama.commands.usage import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="DIR", help="checkpoint folder, or hub id with the extra hub"
    )
    add_loading_arguments(parser.add_argument_group("how it would be loaded"))
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    # Of a model that --save-to-serialized-model-path loads.
    parser.set_defaults(device="cpu", dtype="auto", backend="auto", semantics="auto")


def run(options: argparse.Namespace) -> int:
    info, encoding = kernels_info.collect(), options.quantization_encoding
    overrides = overrides_of(options)
    stored, written = options.serialized_model_path, options.save_to_serialized_model_path
    if options.model is not None or stored is not None:
        folder = source_of(options, options.model)
        if stored is not None and encoding is not None:
            check_stored(folder, encoding)
        info["model"] = describe_checkpoint(
            MllamaForConditionalGeneration,
            folder,
            options.projector,
            quantization=encoding,
            quantization_overrides=overrides,
        )
        if written is not None:
            load_model(folder, options)
    elif options.projector is not None:
        raise UsageError("--projector goes with the text file of a GGUF model in --model")
    elif encoding is not None:
        raise UsageError("--quantization-encoding goes with a checkpoint in --model")
    elif written is not None:
        raise UsageError("--save-to-serialized-model-path goes with a checkpoint in --model")
    if options.json:
        print(json.dumps(info, indent=2))
        return 0
    print(kernels_info.as_text(info))
    for name, value in info.get("model", {}).items():
        for line in _lines(name, value):
            print(f"{name:24} {line}")
    return 0


def _lines(name: str, value: Any) -> list[str]:
    """One entry of the model, of encodings and notes a line each."""
    if isinstance(value, dict):
        return [
            f"{encoding}: {entry['tensors']} tensors, {entry['bytes'] / 1e9:.3f} GB"
            for encoding, entry in value.items()
        ]
    if name == "ranks":
        return [", ".join(map(str, value))]
    return value if isinstance(value, list) else [str(value)]
