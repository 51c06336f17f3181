"""What the commands share: choosing, loading and prompting a model."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from mllama import MllamaForConditionalGeneration, MllamaProcessor
from mllama.backend import BACKENDS
from mllama.processing.images import check_image
from mllama.processing.plain_text import from_command_line
from mllama.semantics import PRESETS

DTYPES = ("auto", "float32", "bfloat16", "float16")


def positive(text: str) -> int:
    """An argparse type: an integer above zero."""
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above zero")
    return value


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--device", default=None, help="cpu, cuda, cuda:1; none: cuda if there is one"
    )
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: the checkpoint's")
    group.add_argument("--backend", choices=BACKENDS, default="auto", help="which ops to run")
    add_semantics_argument(group)


def add_semantics_argument(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--semantics",
        choices=("auto", *PRESETS),
        default="auto",
        help="whose behaviour to follow where implementations disagree; auto: what the weights were "
        "trained with",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    group = parser.add_argument_group("generation (none: the checkpoint's generation_config)")
    group.add_argument(
        "--max-new-tokens", type=positive, default=max_new_tokens, help="at most so many"
    )
    group.add_argument("--greedy", action="store_true", help="take the likeliest token")
    group.add_argument(
        "--temperature", type=float, default=None, help="divides the logits; 0: --greedy"
    )
    group.add_argument("--top-k", type=int, default=None, help="keep the k likeliest tokens")
    group.add_argument("--top-p", type=float, default=None, help="keep the likeliest mass p")
    group.add_argument(
        "--min-p", type=float, default=None, help="drop tokens below p * the likeliest"
    )
    group.add_argument("--repetition-penalty", type=float, default=None, help="above 1 discourages")
    group.add_argument("--seed", type=int, default=None, help="makes sampling repeatable")
    group.add_argument(
        "--stop",
        type=from_command_line,
        action="append",
        default=None,
        help="text to stop at; may be repeated",
    )


def sampling_options(options: argparse.Namespace) -> dict[str, Any]:
    """The generation arguments that were given, under the names `generate` knows."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    chosen = {name: getattr(options, name) for name in names}
    chosen["stop_strings"] = options.stop
    chosen = {name: value for name, value in chosen.items() if value is not None}
    sampled = {"temperature", "top_k", "top_p", "min_p", "seed"} & set(chosen)
    is_cold = options.temperature == 0  # the likeliest token, however the others say to draw
    if options.greedy and (contrary := sampled - ({"temperature"} if is_cold else set())):
        raise ValueError(f"--greedy and --{min(contrary).replace('_', '-')} contradict each other")
    if options.greedy or is_cold:
        chosen = {name: value for name, value in chosen.items() if name not in sampled}
        chosen["do_sample"] = False
    elif sampled:
        chosen["do_sample"] = True
    return {**chosen, "max_new_tokens": options.max_new_tokens}


def add_adapter_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter",
        type=Path,
        default=None,
        help="folder of a LoRA adapter (PEFT) to add to the weights; needs the extra train",
    )


def add_escape_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--escape-special-tokens",
        action="store_true",
        help="read special tokens in the words, such as <|image|>, as plain text",
    )


def check_pictures(paths: Iterable[str | Path]) -> None:
    """Look at pictures before a model is loaded. Raises: ImageOpenError for one that is not there or none."""
    for path in paths:
        check_image(path)


def load(
    folder: str, options: argparse.Namespace, adapter: Path | None = None
) -> tuple[MllamaForConditionalGeneration, MllamaProcessor]:
    """The model and the processor of a checkpoint, as the model arguments say, with the adapter merged."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = MllamaForConditionalGeneration.from_pretrained(
        folder,
        dtype=None if options.dtype == "auto" else options.dtype,
        device=device,
        backend=options.backend,
        semantics=options.semantics,
    )
    if adapter is not None:
        from mllama.training.adapters import merge_adapter

        merge_adapter(model, adapter)
    return model, MllamaProcessor.from_pretrained(folder)


def what_runs(model: MllamaForConditionalGeneration) -> str:
    """The backend where the model is, with the ops that it does not hold for."""
    plain = model.ops.plain_ops(model.device)
    if model.backend == "reference":
        return f"reference on {model.device} ({next(iter(plain.values()))})"
    but = f" (in plain PyTorch: {', '.join(plain)})" if plain else ""
    return f"{model.backend} on {model.device}{but}"


def chat_inputs(
    processor: MllamaProcessor,
    messages: list[dict[str, Any]],
    device: torch.device,
    escape_special_tokens: bool = False,
) -> dict[str, Any]:
    """A conversation as the model's inputs, ready for the assistant's turn."""
    batch = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        escape_special_tokens=escape_special_tokens,
    )
    return {name: value.to(device) for name, value in batch.items()}


def user_turn(text: str, images: list[str]) -> dict[str, Any]:
    """A user's message: the pictures first, as the model was trained."""
    parts: list[dict[str, Any]] = [{"type": "image", "path": path} for path in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def echo(pieces: Iterator[str]) -> tuple[str, int, float]:
    """Writes pieces to stdout as they come; the whole text, their number and the seconds taken."""
    start, text, count = time.perf_counter(), [], 0
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
        text.append(piece)
        count += 1
    sys.stdout.write("\n")
    return "".join(text), count, time.perf_counter() - start
