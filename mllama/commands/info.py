"""Versions, kernels and device; with --model also what a checkpoint is and which semantics it gets."""

from __future__ import annotations

import argparse
import json
from typing import Any

import mllama_kernels.info as kernels_info
from mllama import MllamaForConditionalGeneration
from mllama.checkpoints.weights import describe_checkpoint
from mllama.commands.loading import add_quantization_arguments, overrides_of
from mllama.commands.usage import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="DIR", help="checkpoint folder, or hub id with the extra hub"
    )
    parser.add_argument("--projector", metavar="FILE", help="of a GGUF model in two files")
    add_quantization_arguments(parser.add_argument_group("how it would be loaded"))
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(options: argparse.Namespace) -> int:
    info, encoding = kernels_info.collect(), options.quantization_encoding
    overrides = overrides_of(options)
    if options.model is not None:
        info["model"] = describe_checkpoint(
            MllamaForConditionalGeneration,
            options.model,
            options.projector,
            quantization=encoding,
            quantization_overrides=overrides,
        )
    elif options.projector is not None:
        raise UsageError("--projector goes with the text file of a GGUF model in --model")
    elif encoding is not None:
        raise UsageError("--quantization-encoding goes with a checkpoint in --model")
    if options.json:
        print(json.dumps(info, indent=2))
        return 0
    print(kernels_info.as_text(info))
    for name, value in info.get("model", {}).items():
        for line in _lines(value):
            print(f"{name:24} {line}")
    return 0


def _lines(value: Any) -> list[str]:
    """One entry of the model, of encodings and notes a line each."""
    if isinstance(value, dict):
        return [
            f"{name}: {entry['tensors']} tensors, {entry['bytes'] / 1e9:.3f} GB"
            for name, entry in value.items()
        ]
    return value if isinstance(value, list) else [str(value)]
