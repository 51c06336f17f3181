"""Answer questions about an image with the tiny Llama 3.2 Vision model in the package. Without --image it
renders one of its own and says where it is."""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from mllama.commands.common import (
    add_execution_arguments,
    chat_inputs,
    load,
    user_turn,
    what_runs,
)
from mllama.commands.loading import load_as_stored
from mllama.demo import checkpoint_path, is_right, questions_for, sample_picture
from mllama.processing.plain_text import from_command_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("image and questions")
    group.add_argument(
        "--image", metavar="FILE", help="an image of your own (the model knows shapes)"
    )
    group.add_argument(
        "--question",
        type=from_command_line,
        action="append",
        metavar="TEXT",
        help="may be repeated (default: some about the rendered image)",
    )
    group.add_argument("--seed", type=int, help="which image to render (default: any)")
    group.add_argument(
        "--out",
        metavar="FILE",
        help="where to write the rendered image (default: in the folder for temporary files)",
    )
    group.add_argument("--json", action="store_true", help="print one JSON object when done")
    add_execution_arguments(parser, several_devices=False)
    load_as_stored(parser)


def run(options: argparse.Namespace) -> int:
    start = time.perf_counter()
    for name in ("seed", "out"):
        if options.image is not None and getattr(options, name) is not None:
            raise ValueError(f"--{name} is for a rendered image, and --image was given")
    asked: list[tuple[str, str | None]] = [(text, None) for text in options.question or []]
    if options.image is None:
        seed = random.randrange(10**6) if options.seed is None else options.seed
        image, scene = sample_picture(seed)
        path = Path(options.out or Path(tempfile.gettempdir()) / f"mllama-demo-{seed}.png")
        image.save(path)
        asked = asked or list(questions_for(scene, seed))
    else:
        path = Path(options.image)
        asked = asked or [("Describe the picture.", None)]
    model, processor = load(str(checkpoint_path()), options)
    # Nothing is printed before it is known that every question can be asked.
    turns = [[user_turn(question, [str(path)])] for question, _ in asked]
    prepared = [chat_inputs(processor, turn, model.device) for turn in turns]
    shown = from_command_line(str(path))
    print(f"picture: {shown}", file=sys.stderr if options.json else sys.stdout)
    answers = []
    for (question, expected), inputs in zip(asked, prepared):
        ids = model.generate(**inputs, max_new_tokens=64, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        answer = processor.decode(new, skip_special_tokens=True).strip()
        right = None if expected is None else is_right(answer, expected)
        answers.append(
            {"question": question, "answer": answer, "expected": expected, "right": right}
        )
        if not options.json:
            note = "" if right is None else "   (right)" if right else f"   (wrong: {expected})"
            print(f"  {question}\n    {answer}{note}")
    seconds = time.perf_counter() - start
    if options.json:
        result = {
            "picture": shown,
            "backend": model.backend,
            "seconds": seconds,
            "answers": answers,
        }
        print(json.dumps(result, ensure_ascii=False))
    else:
        count = sum(p.numel() for p in model.parameters())
        print(f"{count:,} parameters, backend {what_runs(model)}, {seconds:.1f} s")
    return 0
