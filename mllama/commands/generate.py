"""Continue a prompt about images, streamed to stdout; or answer a file of requests, many at once."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from mllama.commands.batch import add_batch_arguments, run_batch
from mllama.commands.common import (
    add_checkpoint_arguments,
    add_escape_argument,
    add_execution_arguments,
    add_length_arguments,
    add_sampling_arguments,
    answer_length,
    as_json,
    chat_inputs,
    check_images,
    checkpoint_of,
    echo,
    load_processor,
    load_weights,
    sampling_options,
    user_turn,
)
from mllama.commands.loading import (
    add_loading_arguments,
    add_weight_path_argument,
    bounded_length,
    source_of,
)
from mllama.commands.usage import UsageError
from mllama.processing.plain_text import from_command_line

_NEW_TOKENS = 512
# What goes with --prompt alone, and with --batch alone.
_OF_PROMPT = (
    *("image", "raw", "json", "stop", "greedy", "temperature", "top_p", "min_p"),
    *("repetition_penalty", "seed"),
)
_OF_BATCH = (
    *("output", "resume", "served_model_name", "max_images", "allow_image_host"),
    *("system_with_images", "max_batch_size", "max_ce_batch_size", "max_batch_tokens"),
    "image_cache_bytes",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompt")
    add_checkpoint_arguments(group)
    group.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="an image; may be repeated"
    )
    asked = group.add_mutually_exclusive_group(required=True)
    asked.add_argument(
        "--prompt",
        type=from_command_line,
        metavar="TEXT",
        help="the question or instruction",
    )
    asked.add_argument(
        "--batch",
        type=Path,
        metavar="FILE",
        help="a file of requests in OpenAI's batch format (JSONL); needs the extra server",
    )
    group.add_argument(
        "--raw",
        action="store_true",
        help="continue the prompt as it is, one <|image|> in it per image, without the chat template "
        "(base models)",
    )
    add_escape_argument(
        group, None, " (default: on without --raw, whose words are a template of your own)"
    )
    group = parser.add_argument_group("answer")
    add_length_arguments(
        group,
        None,
        f"longest answer (default: {_NEW_TOKENS}; with --batch the rest of the context)",
    )
    group.add_argument("--json", action="store_true", help="print one JSON object when done")
    add_sampling_arguments(parser)
    add_batch_arguments(parser.add_argument_group("batch", "With --batch alone."))
    add_loading_arguments(group := parser.add_argument_group("weights"))
    add_weight_path_argument(group)
    add_execution_arguments(parser)
    parser.set_defaults(unset={n: parser.get_default(n) for n in (*_OF_PROMPT, *_OF_BATCH)})


def run(options: argparse.Namespace) -> int:
    _check_asked(options)
    if options.batch is not None:
        return run_batch(options)
    if options.max_new_tokens is None:
        options.max_new_tokens = _NEW_TOKENS
    sampling = sampling_options(options)
    check_images(options.image)
    checkpoint = checkpoint_of(options)
    processor = load_processor(checkpoint, options)
    is_raw = options.raw or processor.chat_template is None
    escape = options.escape_special_tokens
    escape = not is_raw if escape is None else escape
    if is_raw:
        batch = processor(
            images=options.image or None,
            text=options.prompt,
            return_tensors="pt",
            escape_special_tokens=escape,
        )
    else:
        turn = user_turn(options.prompt, options.image)
        batch = chat_inputs(processor, [turn], torch.device("cpu"), escape)
    bounded_length(options, source_of(options, checkpoint))
    sampling["max_new_tokens"] = answer_length(options, batch)
    # Counted before the model is loaded, which is refused where it leaves no room for them.
    tokens = batch["input_ids"].shape[1] + sampling["max_new_tokens"]
    model = load_weights(
        checkpoint, options, options.adapter, context=tokens, images=len(options.image)
    )
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    if not options.json:
        echo(model.stream(**inputs, tokenizer=processor, **sampling))
        return 0
    start = time.perf_counter()
    ids = model.generate(**inputs, tokenizer=processor, num_return_sequences=None, **sampling)
    new = ids[0, inputs["input_ids"].shape[1] :]
    result = {
        "text": processor.decode(new, skip_special_tokens=True),
        "prompt_tokens": inputs["input_ids"].shape[1],
        "new_tokens": len(new),
        "backend": model.backend,
        "seconds": round(time.perf_counter() - start, 3),
    }
    print(as_json(result))
    return 0


def _check_asked(options: argparse.Namespace) -> None:
    """Raises: UsageError for an option that would have no effect."""
    is_batch = options.batch is not None
    names, asked = (_OF_PROMPT, "--batch") if is_batch else (_OF_BATCH, "--prompt")
    instead = ": a request says it itself" if is_batch else ""
    for name in names:
        if getattr(options, name) != options.unset[name]:
            raise UsageError(f"--{name.replace('_', '-')} does not go with {asked}{instead}")
    if is_batch and options.escape_special_tokens is False:
        raise UsageError(
            "--no-escape-special-tokens does not go with --batch: words of a request are plain text"
        )
