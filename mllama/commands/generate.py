"""Continue a prompt about images, streamed to stdout."""

from __future__ import annotations

import argparse
import time

import torch

from mllama.commands.common import (
    add_checkpoint_arguments,
    add_escape_argument,
    add_execution_arguments,
    add_length_arguments,
    add_sampling_arguments,
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
from mllama.commands.loading import add_loading_arguments, add_weight_path_argument
from mllama.processing.plain_text import from_command_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompt")
    add_checkpoint_arguments(group)
    group.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="an image; may be repeated"
    )
    group.add_argument(
        "--prompt",
        type=from_command_line,
        required=True,
        metavar="TEXT",
        help="the question or instruction",
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
    add_length_arguments(group)
    group.add_argument("--json", action="store_true", help="print one JSON object when done")
    add_sampling_arguments(parser)
    add_loading_arguments(group := parser.add_argument_group("weights"))
    add_weight_path_argument(group)
    add_execution_arguments(parser)


def run(options: argparse.Namespace) -> int:
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
    # Counted before the model is loaded, which is refused where it leaves no room for them.
    tokens = batch["input_ids"].shape[1] + options.max_new_tokens
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
