"""Versions, kernels and device; with --model also what a checkpoint is and which semantics it gets."""

from __future__ import annotations

import argparse
import json

import mllama_kernels.info as kernels_info
from mllama import MllamaForConditionalGeneration
from mllama.checkpoints.weights import describe_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="DIR", help="checkpoint folder, or hub id with the extra hub"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(options: argparse.Namespace) -> int:
    info = kernels_info.collect()
    if options.model is not None:
        info["model"] = describe_checkpoint(MllamaForConditionalGeneration, options.model)
    if options.json:
        print(json.dumps(info, indent=2))
        return 0
    print(kernels_info.as_text(info))
    for name, value in info.get("model", {}).items():
        print(f"{name:24} {value}")
    return 0
