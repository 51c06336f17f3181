"""What a model takes on a device, and which context fits, before anything is loaded. Without an encoding a
table of all of them."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

import torch

from mllama import MllamaForConditionalGeneration
from mllama.checkpoints.weights import plan_source
from mllama.commands.common import positive
from mllama.commands.devices import add_device_argument
from mllama.commands.loading import (
    add_projector_argument,
    add_quantization_arguments,
    overrides_of,
)
from mllama.commands.usage import UsageError
from mllama.config import MllamaConfig
from mllama.memory import free_bytes
from mllama.parallel.split import CannotSplit
from mllama.quantization.plan import (
    BY_SIZE,
    longest_context,
    named_config,
    plan,
    refusal,
    usable,
)
from mllama.quantization.policy import PLAIN
from mllama.wording import quoted

_UNITS = {"GB": 2**30, "MB": 2**20, "GIB": 2**30, "MIB": 2**20, "B": 1}


def memory(text: str) -> int:
    """An argparse type: the size of a card with its unit, of which GB are of 2^30 bytes."""
    match = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*({'|'.join(_UNITS)})", text.strip().upper())
    value = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if value <= 0:
        raise argparse.ArgumentTypeError(
            f"must be a size of a memory with its unit, such as 24GB, 500MB or 1000000B; got {quoted(text)}"
        )
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is planned")
    group.add_argument(
        "--model",
        required=True,
        metavar="DIR|11b|90b",
        help="checkpoint folder, hub id with the extra hub, GGUF file, or a published size",
    )
    add_projector_argument(group)
    add_quantization_arguments(group)
    group.add_argument(
        "--max-length",
        type=positive,
        metavar="N",
        help="tokens of a prompt and its answer (default: 8192, or what the model takes)",
    )
    group.add_argument(
        "--max-batch-size", type=positive, default=1, metavar="B", help="prompts answered at once"
    )
    group.add_argument(
        "--images", type=int, default=1, metavar="I", help="4-tile images of each prompt"
    )
    group.add_argument(
        "--memory",
        type=memory,
        metavar="SIZE",
        help="of a card, with its unit: 24GB is 24 x 2^30 bytes (default: what is free on this machine's)",
    )
    group.add_argument(
        "--tensor-parallel",
        dest="ranks",
        type=positive,
        default=1,
        metavar="N",
        help="devices that share the model, each with such a memory, or on the CPU with its part of what is "
        "free; the sizes are those of one",
    )
    add_device_argument(group, "whose free memory counts (default: cuda if there is one)")
    group.add_argument("--json", action="store_true", help="print one JSON object, in bytes")


def run(options: argparse.Namespace) -> int:
    overrides = overrides_of(options)
    config, stored, bytes_of_stored, dtype = _source(options, overrides)
    free = _free(options)
    encoding = stored or options.quantization_encoding
    shared: dict[str, Any] = {
        "batch": options.max_batch_size,
        "images": options.images,
        "overrides": overrides or None,
        "tensor_parallel": options.ranks,
        "dtype": dtype,
        "device": _device(options).type if options.memory is None else "cuda",
    }
    most = config.text_config.max_position_embeddings
    context = options.max_length or min(8192, most)
    if encoding is None:
        return _table(options, config, free, shared)
    is_stored = bytes_of_stored is not None
    known = {"weights": bytes_of_stored} if is_stored else {}
    made = plan(config, encoding, context, **shared, **known)
    longest, missing = longest_context(config, encoding, free, **shared, **known)
    fits = made.total <= free
    if options.json:
        result = {"free": free, "fits": fits, "longest_context": longest, "missing": missing}
        print(json.dumps({**made.to_json(), **result}))
        return 0 if fits else 1
    for name in ("weights", "self_kv", "cross_kv", "workspace", "graphs", "total"):
        value = made.total if name == "total" else getattr(made, name)
        print(f"{name:10} {value / 1e9:8.2f} GB")
    print(f"{'free':10} {free / 1e9:8.2f} GB; the longest context that fits is {longest:,}")
    if not fits:
        print(refusal(made, config, free, "the device", is_stored=is_stored, **shared))
    return 0 if fits else 1


def _source(
    options: argparse.Namespace, overrides: dict[str, str]
) -> tuple[MllamaConfig, str | None, int | None, str]:
    """The configuration, the encoding and bytes of what is stored quantised, and the dtype.

    Raises: UsageError for a projector file of a published size; as `from_pretrained` for what it would not
        load.
    """
    config = named_config(options.model)
    if config is None:
        found = plan_source(
            MllamaForConditionalGeneration,
            options.model,
            projector=options.projector,
            quantization=options.quantization_encoding,
            quantization_overrides=overrides or None,
            tensor_parallel=options.ranks,
        )
        nbytes = None if found.stored is None else found.nbytes
        return found.config, found.stored, nbytes, found.dtype
    if options.projector is not None:
        raise UsageError(
            f"--projector goes with the text file of a GGUF model in --model, not with {options.model}"
        )
    return config, None, None, "bfloat16"


def _free(options: argparse.Namespace) -> int:
    if options.memory is not None:
        return usable(options.memory)
    device = _device(options)
    free = free_bytes(device)
    if free is None:
        raise ValueError(f"{device} does not tell what is free: give --memory")
    return free // options.ranks if device.type == "cpu" else free  # ranks share the host's memory


def _device(options: argparse.Namespace) -> torch.device:
    return torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _table(
    options: argparse.Namespace, config: MllamaConfig, free: int, shared: dict[str, Any]
) -> int:
    rows: list[dict[str, Any]] = []
    for encoding in BY_SIZE:
        own = {**shared, "overrides": None} if encoding in PLAIN else shared
        try:
            longest, missing = longest_context(config, encoding, free, **own)
        except CannotSplit as error:
            if encoding in PLAIN:  # then none can be
                raise
            rows.append({"encoding": encoding, "refused": str(error)})
            continue
        weights = plan(config, encoding, 1, **own).weights
        rows.append(
            {
                "encoding": encoding,
                "weights": weights,
                "longest_context": longest,
                "missing": missing,
            }
        )
    if options.json:
        print(json.dumps({"free": free, "encodings": rows}))
        return 0
    print(
        f"{free / 1e9:.2f} GB free, {options.max_batch_size} at once, {options.images} images each"
    )
    print(f"{'encoding':10} {'weights':>11} {'longest context':>16}")
    for row in rows:
        if "refused" in row:
            print(f"{row['encoding']:10} {row['refused']}")
            continue
        fits = f"{row['longest_context']:,}"
        if not row["longest_context"]:
            fits = f"{row['missing'] / 1e9:.1f} GB short"
        print(f"{row['encoding']:10} {row['weights'] / 1e9:8.2f} GB {fits:>16}")
    return 0
