"""Continue a prompt about pictures, streamed to stdout."""

from __future__ import annotations

import argparse
import json
import time

from mllama.commands.common import (
    add_adapter_argument,
    add_escape_argument,
    add_model_arguments,
    add_sampling_arguments,
    chat_inputs,
    check_pictures,
    echo,
    load,
    sampling_options,
    user_turn,
)
from mllama.processing.plain_text import from_command_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, help="checkpoint folder, or hub id with the extra hub"
    )
    add_adapter_argument(parser)
    parser.add_argument("--image", action="append", default=[], help="a picture; may be repeated")
    parser.add_argument(
        "--prompt", type=from_command_line, required=True, help="the question or instruction"
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="continue the prompt as it is, one <|image|> in it per picture, without the chat template "
        "(base models)",
    )
    add_escape_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object when done")
    add_sampling_arguments(parser, max_new_tokens=512)
    add_model_arguments(parser)


def run(options: argparse.Namespace) -> int:
    sampling = sampling_options(options)
    check_pictures(options.image)
    model, processor = load(options.model, options, options.adapter)
    escape = options.escape_special_tokens
    if options.raw or processor.chat_template is None:
        batch = processor(
            images=options.image or None,
            text=options.prompt,
            return_tensors="pt",
            escape_special_tokens=escape,
        )
        inputs = {name: value.to(model.device) for name, value in batch.items()}
    else:
        turn = user_turn(options.prompt, options.image)
        inputs = chat_inputs(processor, [turn], model.device, escape)
    if not options.json:
        echo(model.stream(**inputs, tokenizer=processor, **sampling))
        return 0
    start = time.perf_counter()
    ids = model.generate(**inputs, tokenizer=processor, **sampling)
    new = ids[0, inputs["input_ids"].shape[1] :]
    result = {
        "text": processor.decode(new, skip_special_tokens=True),
        "prompt_tokens": inputs["input_ids"].shape[1],
        "new_tokens": len(new),
        "backend": model.backend,
        "seconds": round(time.perf_counter() - start, 3),
    }
    print(json.dumps(result, ensure_ascii=False))
    return 0
