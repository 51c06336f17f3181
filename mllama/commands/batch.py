"""`mllama generate --batch`: a file of requests through the engine, many at once."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mllama.checkpoints.durable import replace_file
from mllama.commands.common import checkpoint_of, load_processor, load_weights, what_runs
from mllama.commands.engines import (
    add_batching_arguments,
    add_name_argument,
    add_request_arguments,
    application,
    compiler_of,
    follow_engine,
    follows,
    plan_of,
    request_settings,
    require_extra,
    start_engine,
)
from mllama.commands.loading import dtype_of, overrides_of
from mllama.commands.usage import UsageError
from mllama.progress import bar
from mllama.wording import quoted, shown

# Requests that are open, to each that is decoded: pictures of the next are opened meanwhile.
_AHEAD = 2
# Answers that wait are those of requests that are open, of which there are few.
_ANY_NUMBER = 2**31


def add_batch_arguments(group: argparse._ArgumentGroup) -> None:
    """What goes with --batch alone."""
    group.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="where the answers go, a line each as they end (default: stdout)",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="keep what --output has of answers, and ask for the others",
    )
    add_name_argument(group)
    add_request_arguments(group)
    add_batching_arguments(group)


def run_batch(options: argparse.Namespace) -> int:
    """The exit code: 1 where some request was not answered."""
    dtype_of(options)  # contradictions are told before anything is loaded
    overrides_of(options)
    if options.resume and options.output is None:
        raise UsageError("--resume goes on with the file of --output, which is not given")
    if options.output is not None and options.output.exists() and not options.resume:
        raise UsageError(f"{shown(str(options.output))} is there already: --resume goes on with it")
    if options.top_k is not None and options.top_k < 1:
        raise UsageError(f"--top-k must be above zero, got {options.top_k}")
    _check_writable(options.output)
    require_extra()
    from mllama.server.batches import Ask, answer_batch, answered, read_batch
    from mllama.server.serving import AsyncEngine
    from mllama.server.settings import Settings

    checkpoint = checkpoint_of(options)
    settings = Settings(
        **request_settings(options, checkpoint),
        version=version("mllama-kernels"),
        max_new_tokens=options.max_new_tokens,
    )
    kept = answered(options.output) if options.resume and options.output.exists() else {}
    count, ids = 0, set()
    for line in read_batch(options.batch, settings.body.max_bytes):
        count += 1
        ids.add(line.custom_id)
    if others := kept.keys() - ids:
        raise ValueError(
            f"{shown(str(options.output))} answers {quoted(min(others))}, which "
            f"{shown(str(options.batch))} does not ask: it is the output of another file"
        )
    if not count:
        raise ValueError(f"{shown(str(options.batch))} has no request")
    if len(kept) == count:
        _say(f"all of {count:,} requests are answered already")
        return 0
    if follows(options):
        return follow_engine(options, checkpoint)
    processor = load_processor(checkpoint, options)
    plan = plan_of(options, checkpoint, _say)
    model = load_weights(checkpoint, options, options.adapter)
    _say(f"answering {count - len(kept):,} of {count:,} requests: {what_runs(model)}")
    failed = 0
    with (
        start_engine(model, processor, options, plan, _ANY_NUMBER) as engine,
        closing(AsyncEngine(engine)) as served,
        _written(options.output, list(kept.values())) as write,
        bar("requests", count, "request", initial=len(kept)) as progress,
    ):

        def note(line: dict[str, Any]) -> None:
            nonlocal failed
            write(line)
            failed += line["response"] is None or line["response"]["status_code"] != 200
            progress.update()

        app = application(served, settings, processor, compiler_of(processor, lambda: model))
        lines = (
            line
            for line in read_batch(options.batch, settings.body.max_bytes)
            if not (isinstance(line, Ask) and line.custom_id in kept)
        )

        async def answer() -> None:
            try:
                await answer_batch(app, lines, note, _AHEAD * options.max_batch_size)
            finally:
                engine.close()  # here, so that its last news come to a loop that is open

        asyncio.run(answer())
    if failed:
        _say(f"{failed:,} of {count:,} requests were not answered: their lines say why")
    return 1 if failed else 0


def _check_writable(path: Path | None) -> None:
    """Raises: OSError for a file that cannot be written, before anything is loaded."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {shown(str(path.parent))} for --output")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"the folder {shown(str(path.parent))} of --output cannot be written")


@contextmanager
def _written(
    path: Path | None, kept: list[dict[str, Any]]
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function that appends a line to a file, which begins with those that are kept, or to stdout."""
    if path is None:
        yield lambda line: print(_line(line), end="", flush=True)
        return
    replace_file(path, lambda new: new.write_text("".join(map(_line, kept)), encoding="utf-8"))
    with path.open("a", encoding="utf-8") as file:

        def write(line: dict[str, Any]) -> None:
            file.write(_line(line))
            file.flush()

        yield write


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"


def _say(line: str) -> None:
    print(f"mllama generate: {line}", file=sys.stderr, flush=True)
