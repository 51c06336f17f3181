"""Talk with a model. A line is a turn; /image PATH adds a picture to the next one, /reset forgets, /quit
ends."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

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
from mllama.processing.images import ImageOpenError
from mllama.processing.plain_text import from_command_line

_HELP = (
    "/image PATH   picture for the next turn\n/reset        forget everything\n/quit         end"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, help="checkpoint folder, or hub id with the extra hub"
    )
    add_adapter_argument(parser)
    parser.add_argument("--image", action="append", default=[], help="a picture for the first turn")
    parser.add_argument(
        "--system",
        type=from_command_line,
        default=None,
        help="system message (the template may refuse it)",
    )
    add_escape_argument(parser)
    add_sampling_arguments(parser, max_new_tokens=512)
    add_model_arguments(parser)


def run(options: argparse.Namespace) -> int:
    sampling = sampling_options(options)
    check_pictures(options.image)
    model, processor = load(options.model, options, options.adapter)
    if processor.chat_template is None:
        raise ValueError(f"{options.model} has no chat template; use `mllama generate --raw`")
    opening = [{"role": "system", "content": options.system}] if options.system else []
    messages, images, cache = [*opening], list(options.image), model.new_cache()
    print(_HELP, file=sys.stderr)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a path may be of any bytes
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return 0
        line = line.strip()
        if line == "/reset":
            messages, images, cache = [*opening], [], model.new_cache()
        elif line.startswith("/image "):
            path = line.removeprefix("/image ").strip()
            if not Path(path).is_file():
                print(f"no such file: {path}", file=sys.stderr)
                continue
            try:
                check_pictures([path])
            except ImageOpenError as error:
                print(f"{error}", file=sys.stderr)
            else:
                images.append(path)
        elif line.startswith("/"):
            print(_HELP, file=sys.stderr)
        elif line:
            messages.append(user_turn(from_command_line(line), images))
            kept = cache.lengths.tolist()
            try:
                escape = options.escape_special_tokens
                inputs = chat_inputs(processor, messages, model.device, escape)
                pieces = model.stream(
                    **inputs, tokenizer=processor, past_key_values=cache, **sampling
                )
                answer, _, _ = echo(pieces)
            except KeyboardInterrupt:  # ends the answer, not the conversation
                print("(interrupted)", file=sys.stderr)
                messages.pop()
            except Exception as error:  # a turn that cannot work must not lose the conversation
                print(f"{error}", file=sys.stderr)
                messages.pop()
                images = []
                cache.truncate(kept)  # else another picture here would pass for this turn's
            else:
                messages.append({"role": "assistant", "content": answer})
                images = []
