"""What the commands share: choosing, loading and prompting a model."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from mllama import MllamaForConditionalGeneration, MllamaProcessor
from mllama.backend import BACKENDS
from mllama.checkpoints.hub import resolve_folder
from mllama.commands.devices import add_device_argument, add_devices_argument
from mllama.commands.loading import load_model, source_of
from mllama.demo import checkpoint_path
from mllama.processing.images import check_image
from mllama.processing.plain_text import from_command_line
from mllama.semantics import PRESETS

DTYPES = ("auto", "float32", "bfloat16", "float16")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def positive(text: str) -> int:
    """An argparse type: an integer above zero."""
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above zero")
    return value


def add_model_argument(group: argparse._ArgumentGroup) -> None:
    """A checkpoint, for :func:`checkpoint_of`."""
    group.add_argument(
        "--model",
        "--model-path",
        metavar="DIR",
        help="checkpoint folder, GGUF file, or hub id with the extra hub (default: the demo model)",
    )
    group.add_argument(
        "--force-download", action="store_true", help="download a hub id anew, not from the cache"
    )


def add_checkpoint_arguments(group: argparse._ArgumentGroup) -> None:
    """Which weights: a checkpoint, the demo model without one, and an adapter on top."""
    add_model_argument(group)
    group.add_argument(
        "--adapter",
        type=Path,
        metavar="DIR",
        help="folder of a LoRA adapter (PEFT) to add to the weights; needs the extra train",
    )


def add_execution_arguments(
    parser: argparse.ArgumentParser,
    dtypes: Iterable[str] = DTYPES,
    dtype_help: str = "auto: the checkpoint's",
    *,
    several_devices: bool = True,
) -> None:
    """How a model runs.

    Args:
        several_devices: whether it may be split over them.
    """
    group = parser.add_argument_group("execution")
    if several_devices:
        add_devices_argument(group)
    else:
        add_device_argument(group, "cpu, cuda, cuda:1, gpu, gpu-1 (default: cuda if there is one)")
    group.add_argument("--dtype", choices=dtypes, default="auto", help=dtype_help)
    group.add_argument("--backend", choices=BACKENDS, default="auto", help="which ops to run")
    group.add_argument(
        "--semantics",
        choices=("auto", *PRESETS),
        default="auto",
        help="whose behaviour to follow where implementations disagree; auto: what the weights were "
        "trained with",
    )


def add_max_length_argument(
    group: argparse._ArgumentGroup, help: str = "tokens of a prompt and its answer"
) -> None:
    group.add_argument(
        "--max-length", type=positive, metavar="N", help=f"{help} (default: what the model takes)"
    )


def add_length_arguments(
    group: argparse._ArgumentGroup, default: int | None = 512, help: str = "longest answer"
) -> None:
    group.add_argument("--max-new-tokens", type=positive, default=default, metavar="N", help=help)
    add_max_length_argument(group)
    group.add_argument(
        "--stop",
        type=from_command_line,
        action="append",
        metavar="TEXT",
        help="text to stop at; may be repeated",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling", "Default: the checkpoint's generation_config.")
    group.add_argument("--greedy", action="store_true", help="take the likeliest token")
    group.add_argument(
        "--temperature", type=float, metavar="T", help="divides the logits; 0: --greedy"
    )
    group.add_argument("--top-k", type=int, metavar="K", help="keep the K likeliest tokens")
    group.add_argument("--top-p", type=float, metavar="P", help="keep the likeliest mass P")
    group.add_argument(
        "--min-p", type=float, metavar="P", help="drop tokens below P times the likeliest"
    )
    group.add_argument("--repetition-penalty", type=float, metavar="X", help="above 1 discourages")
    group.add_argument("--seed", type=int, help="makes sampling repeatable")


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


def add_escape_argument(
    group: argparse._ArgumentGroup, default: bool | None = True, note: str = ""
) -> None:
    group.add_argument(
        "--escape-special-tokens",
        action=argparse.BooleanOptionalAction,
        default=default,
        help="read special tokens in the words, such as <|image|>, as plain text" + note,
    )


def check_images(paths: Iterable[str | Path]) -> None:
    """Look at images before a model is loaded. Raises: ImageOpenError for one that cannot be read."""
    for path in paths:
        check_image(path)


def checkpoint_of(options: argparse.Namespace) -> str:
    """The checkpoint of --model; without it that of the demo model, and a line on stderr that says so. Hub
    ids, that of --weight-path too, are downloaded anew where --force-download says so."""
    if (weights := getattr(options, "weight_path", None)) is not None:
        options.weight_path = _downloaded(weights, options)
    if options.model is not None:
        return _downloaded(options.model, options)
    if options.serialized_model_path is not None:
        return str(options.serialized_model_path)
    print("no --model: using the demo model, which knows only shapes", file=sys.stderr)
    return str(checkpoint_path())


def _downloaded(name: str, options: argparse.Namespace) -> str:
    """The folder of a hub id that is to be downloaded anew, which the first of several ranks does; any other
    name as it is."""
    if not options.force_download or Path(name).expanduser().exists():
        return name

    def download() -> str:
        return str(resolve_folder(name, force_download=True))

    return download() if options.meeting is None else options.meeting.of_first(download)


def load(
    checkpoint: str, options: argparse.Namespace, adapter: Path | None = None, **planned: int
) -> tuple[MllamaForConditionalGeneration, MllamaProcessor]:
    """The model and the processor of a checkpoint; see :func:`load_weights`."""
    model = load_weights(checkpoint, options, adapter, **planned)
    return model, load_processor(checkpoint, options)


def load_weights(
    checkpoint: str, options: argparse.Namespace, adapter: Path | None = None, **planned: int
) -> MllamaForConditionalGeneration:
    """The model of a checkpoint, as the model arguments say, with the adapter merged, or beside weights that
    are quantised. ``planned`` are the context and images of `from_pretrained`."""
    model = load_model(source_of(options, checkpoint), options, **planned)
    if adapter is not None:
        from mllama.training.adapters import use_adapter

        use_adapter(model, adapter)
    return model


def load_processor(checkpoint: str, options: argparse.Namespace) -> MllamaProcessor:
    """The processor of a checkpoint: by itself where a prompt is counted before the model is loaded."""
    folder = source_of(options, checkpoint)
    return MllamaProcessor.from_pretrained(folder, projector=options.projector)


def what_runs(model: MllamaForConditionalGeneration) -> str:
    """The backend on the model's device, with the ops that run in plain PyTorch there."""
    plain = model.ops.plain_ops(model.device)
    if model.backend == "reference":
        return f"reference on {model.device} ({next(iter(plain.values()))})"
    but = f" (in plain PyTorch: {', '.join(plain)})" if plain else ""
    return f"{model.backend} on {model.device}{but}"


def chat_inputs(
    processor: MllamaProcessor,
    messages: list[dict[str, Any]],
    device: torch.device,
    escape_special_tokens: bool = True,
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


def answer_length(options: argparse.Namespace, inputs: dict[str, Any]) -> int:
    """The tokens that an answer may have. Raises: ValueError where --max-length leaves none."""
    if options.max_length is None:
        return options.max_new_tokens
    count = inputs["input_ids"].shape[1]
    if count >= options.max_length:
        raise ValueError(
            f"the prompt has {count} tokens, --max-length is {options.max_length}: no room for an answer"
        )
    return min(options.max_new_tokens, options.max_length - count)


def user_turn(text: str, images: list[str]) -> dict[str, Any]:
    """A user's message: the images first, as the model was trained."""
    parts: list[dict[str, Any]] = [{"type": "image", "path": path} for path in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def as_json(result: dict[str, Any]) -> str:
    """One line of JSON in which no character is a control character."""
    text = json.dumps(result, ensure_ascii=False)
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _write_escaped(text: str) -> None:
    sys.stdout.write(_CONTROL.sub(lambda match: repr(match[0])[1:-1], text))


def echo(pieces: Iterator[str]) -> tuple[str, int, float]:
    """Writes pieces to stdout as they come; the whole text, their number and the seconds taken.

    A terminal gets no control characters but line feeds and tabs: a checkpoint decides what is in the text. A
    file or a pipe gets it as it is.
    """
    start, text, count = time.perf_counter(), [], 0
    write = _write_escaped if sys.stdout.isatty() else sys.stdout.write
    for piece in pieces:
        write(piece)
        sys.stdout.flush()
        text.append(piece)
        count += 1
    sys.stdout.write("\n")
    return "".join(text), count, time.perf_counter() - start
