"""Talk with a model. A line is a turn; /image PATH adds an image to the next one, /reset forgets everything,
/quit ends."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

from mllama.commands.common import (
    add_checkpoint_arguments,
    add_escape_argument,
    add_execution_arguments,
    add_length_arguments,
    add_sampling_arguments,
    answer_length,
    chat_inputs,
    check_images,
    checkpoint_of,
    echo,
    load,
    sampling_options,
    user_turn,
)
from mllama.commands.loading import (
    add_loading_arguments,
    add_weight_path_argument,
    bounded_length,
    source_of,
)
from mllama.processing.images import ImageOpenError
from mllama.processing.plain_text import from_command_line
from mllama.wording import message, shown

_HELP = "/image PATH   image for the next turn\n/reset        forget everything\n/quit         end"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("conversation")
    add_checkpoint_arguments(group)
    group.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="an image for the first turn; may be repeated",
    )
    group.add_argument(
        "--system",
        type=from_command_line,
        metavar="TEXT",
        help="system message (the template may refuse it)",
    )
    add_escape_argument(group)
    add_length_arguments(parser.add_argument_group("answers"))
    add_sampling_arguments(parser)
    add_loading_arguments(group := parser.add_argument_group("weights"))
    add_weight_path_argument(group)
    add_execution_arguments(parser)


def run(options: argparse.Namespace) -> int:
    sampling = sampling_options(options)
    check_images(options.image)
    folder = checkpoint_of(options)
    length = bounded_length(options, source_of(options, folder))
    # Of a conversation without a bound the first answer is sure; the cache grows with those that follow.
    model, processor = load(
        folder,
        options,
        options.adapter,
        context=length or options.max_new_tokens,
        images=max(1, len(options.image)),
    )
    if processor.chat_template is None:
        raise ValueError(f"{folder} has no chat template; use `mllama generate --raw`")
    opening = [{"role": "system", "content": options.system}] if options.system else []
    messages, images, cache = [*opening], list(options.image), model.new_cache()
    print(_HELP, file=sys.stderr)
    meeting = options.meeting  # of several ranks, the first of which is spoken to
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a path may be of any bytes
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline() if meeting is None else meeting.of_first(sys.stdin.readline)
        if not line or line.strip() == "/quit":
            return 0
        line = line.strip()
        if line == "/reset":
            messages, images, cache = [*opening], [], model.new_cache()
        elif line.startswith("/image "):
            path = line.removeprefix("/image ").strip()
            if not Path(path).exists():
                print(f"no such file: {shown(path)}", file=sys.stderr)
                continue
            try:
                check_images([path])
            except ImageOpenError as error:
                print(message(str(error)), file=sys.stderr)
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
                sampling["max_new_tokens"] = answer_length(options, inputs)
                pieces = model.stream(
                    **inputs, tokenizer=processor, past_key_values=cache, **sampling
                )
                answer, _, _ = echo(pieces)
            except KeyboardInterrupt:  # ends the answer, not the conversation
                if meeting is not None:  # the others are at another token
                    raise
                print("(interrupted)", file=sys.stderr)
                messages.pop()
            except Exception as error:  # a turn that cannot work must not lose the conversation
                if meeting is not None and not isinstance(error, ValueError):  # of this rank alone
                    raise
                print(message(str(error)), file=sys.stderr)
                messages.pop()
                images = []
                cache.truncate(kept)  # else another image here would pass for this turn's
            else:
                messages.append({"role": "assistant", "content": answer})
                images = []
