"""Answer files of requests in OpenAI's batch format with many engines, through Ray Data."""

from __future__ import annotations

import argparse
import asyncio
import io
import logging
import os
import pickle
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllama.commands.batch import AHEAD, ANY_NUMBER, as_line, keep_lines
from mllama.commands.common import (
    add_checkpoint_arguments,
    add_execution_arguments,
    checkpoint_of,
    positive,
)
from mllama.commands.engines import (
    add_answer_arguments,
    add_batching_arguments,
    add_name_argument,
    request_settings,
)
from mllama.commands.loading import add_loading_arguments, add_weight_path_argument
from mllama.commands.ray_engine import answering_on_ray
from mllama.commands.ray_options import (
    add_ray_arguments,
    check_options,
    check_ray,
    cluster,
    last_line,
    placed,
    say,
)
from mllama.commands.usage import UsageError
from mllama.progress import bar
from mllama.wording import quoted, shown

if TYPE_CHECKING:
    from pyarrow import Table
    from pyarrow.fs import FileSystem
    from ray.data import Dataset

    from mllama.server.settings import Settings

# Of lines that are open in an engine: answers of one are written when all of its lines have one.
_BLOCKS = 8
_READERS = 4  # files that are read at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_arguments(group := parser.add_argument_group("model"))
    add_name_argument(group)
    group = parser.add_argument_group("files")
    group.add_argument(
        "--input",
        required=True,
        metavar="PATTERN",
        help="files of requests (JSONL), such as 'asked/*.jsonl' or 's3://bucket/asked/*.jsonl'",
    )
    group.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="DIR",
        help="gets a file of answers for each, of the same name",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="keep what --output has of answers, and ask for the others",
    )
    add_answer_arguments(parser.add_argument_group("requests"))
    add_batching_arguments(parser.add_argument_group("batching"))
    group = parser.add_argument_group("engines")
    group.add_argument("--replicas", type=positive, default=1, metavar="N", help="engines")
    add_ray_arguments(group)
    add_loading_arguments(group := parser.add_argument_group("weights"))
    add_weight_path_argument(group)
    add_execution_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """The exit code: 1 where some request was not answered."""
    check_ray()
    check_options(options, options.devices_per_replica)
    from mllama.server.body import BodyBounds
    from mllama.server.settings import Settings

    paths, system = _found(options.input)
    files = _kept(paths, options)
    checkpoint = checkpoint_of(options)
    bounds = BodyBounds(max_bytes=options.max_body)
    settings = Settings(**request_settings(options, checkpoint), body=bounds)
    with cluster(options), _told():
        _check_cores(options)
        lines = _lines(files, system, options, settings)
        if options.resume and not lines.take(1):
            say("all requests are answered already")
            return 0
        count, failed = _write(_answers(lines, options, checkpoint, settings), options.output)
    if not count:
        raise ValueError(f"{quoted(options.input)} has no request")
    if failed:
        say(f"{failed:,} of {count:,} requests were not answered: their lines say why")
    return 1 if failed else 0


@contextmanager
def _told() -> Iterator[None]:
    """Raises: RuntimeError in the words of an error that a reader or an engine had."""
    from ray.exceptions import RayError, RayTaskError

    try:
        yield
    except RayTaskError as error:
        cause: BaseException = error.cause
        while cause.__cause__ is not None:  # Ray's wrapping of it
            cause = cause.__cause__
        raise RuntimeError(str(cause).split("\n")[0]) from None
    except RayError as error:
        raise RuntimeError(last_line(str(error))) from None


def _check_cores(options: argparse.Namespace) -> None:
    """Raises: ValueError where engines leave no core that reads files, for which they would wait for ever."""
    import ray

    cores, each = ray.cluster_resources().get("CPU", 0), options.cpus_per_replica
    if options.replicas * each + 1 > cores:
        raise ValueError(
            f"{options.replicas} engines of {each:g} cores, and one core that reads, are more than the "
            f"{cores:g} of the cluster: fewer --replicas or --cpus-per-replica leave one"
        )


def _found(pattern: str) -> tuple[list[str], FileSystem]:
    """Files, and where they are.

    Raises: ValueError for a pattern of none, or of two of one name; OSError.
    """
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow.fs import FileSystem, FileType

    system, path = FileSystem.from_uri(
        pattern if "://" in pattern else str(Path(pattern).absolute())
    )
    infos = system.get_file_info(ArrowFSWrapper(system).glob(path))
    paths = sorted(info.path for info in infos if info.type == FileType.File)
    if not paths:
        raise ValueError(f"{quoted(pattern)} is no file, and matches none")
    names: dict[str, str] = {}
    for path in paths:
        if (other := names.setdefault(name := Path(path).name, path)) != path:
            raise ValueError(
                f"{shown(other)} and {shown(path)} would both be answered in a file {shown(name)}"
            )
    return paths, system


def _kept(paths: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Files, with what is answered of each, all of which their outputs keep.

    Raises: UsageError for outputs that are there and not to be gone on with; ValueError for others; OSError.
    """
    from mllama.server.batches import answered

    options.output.mkdir(exist_ok=True)
    outputs = [options.output / Path(path).name for path in paths]
    there = [output for output in outputs if output.exists()]
    if there and not options.resume:
        raise UsageError(f"{shown(str(there[0]))} is there already: --resume goes on with it")
    files = []
    for path, output in zip(paths, outputs):
        kept = answered(output) if output in there else {}
        if output in there:  # without what was cut off, and what is asked again
            keep_lines(output, list(kept.values()))
        files.append({"path": path, "done": list(kept)})
    return files


def _lines(
    files: list[dict[str, Any]],
    system: FileSystem,
    options: argparse.Namespace,
    settings: Settings,
) -> Dataset:
    """Of all files what is not answered yet, a few lines to a block."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    size = max(1, AHEAD * options.max_batch_size // _BLOCKS)
    lines = ray.data.from_items(files, override_num_blocks=len(files)).map_batches(
        _read,
        fn_args=(system, settings.body.max_bytes),
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.TaskPoolStrategy(size=min(_READERS, len(files))),
    )
    return lines.repartition(target_num_rows_per_block=size)


def _read(file: Table, system: FileSystem, max_body: int) -> Iterator[dict[str, list[Any]]]:
    """The lines of a file that are not answered yet. Raises: ValueError where others are."""
    from mllama.server.batches import Wrong, asked_in

    path, done = file["path"][0].as_py(), set(file["done"][0].as_py())
    with io.BufferedReader(system.open_input_stream(path)) as stream:
        for line in asked_in(stream, max_body):
            if isinstance(line, Wrong) or line.custom_id not in done:
                yield {"name": [Path(path).name], "line": [pickle.dumps(line)]}
            else:
                done.remove(line.custom_id)
    if done:
        raise ValueError(
            f"its output answers {quoted(min(done))}, which {shown(path)} does not ask: it is that of another"
        )


def _answers(
    lines: Dataset, options: argparse.Namespace, checkpoint: str, settings: Settings
) -> Dataset:
    import ray.data

    resources = placed(options, options.devices_per_replica, options.cpus_per_replica)
    engines = ray.data.ActorPoolStrategy(
        size=options.replicas, max_concurrent_calls_per_actor=_BLOCKS
    )
    return lines.map_batches(
        Answers,
        fn_constructor_args=(options, checkpoint, settings),
        batch_size=None,
        batch_format="pyarrow",
        compute=engines,
        **resources,
    )


class Answers:
    """What an actor of Ray Data does: an engine that answers blocks of lines, some at a time."""

    def __init__(self, options: argparse.Namespace, checkpoint: str, settings: Settings) -> None:
        self._open = ExitStack()
        made = answering_on_ray(options, checkpoint, settings, ANY_NUMBER)
        self._app, self._engine, _ = self._open.enter_context(made)

    async def __call__(self, block: Table) -> dict[str, list[Any]]:
        from mllama.server.batches import answer_batch, is_answered

        answers: dict[str, list[Any]] = {"name": [], "answer": [], "is_answered": []}

        async def answer(name: str, line: bytes) -> None:
            def note(entry: dict[str, Any]) -> None:
                answers["name"].append(name)
                answers["answer"].append(as_line(entry))
                answers["is_answered"].append(is_answered(entry))

            await answer_batch(self._app, [pickle.loads(line)], note, 1)

        await asyncio.gather(*(answer(row["name"], row["line"]) for row in block.to_pylist()))
        if self._engine.loop.lost is not None:  # with a rank; Ray starts another, and asks again
            os._exit(1)
        return answers

    def __del__(self) -> None:
        self._open.close()


def _write(answers: Dataset, folder: Path) -> tuple[int, int]:
    """Append answers to the files they belong to, as they come. Returns: how many, and how many are none."""
    count, failed = 0, 0
    with bar("requests", None, "request") as progress:
        for block in answers.iter_batches(batch_size=None, batch_format="pyarrow"):
            rows = sorted(block.to_pylist(), key=itemgetter("name"))
            for name, group in groupby(rows, itemgetter("name")):
                with (folder / name).open("a", encoding="utf-8") as file:
                    file.writelines(row["answer"] for row in group)
            count += len(rows)
            failed += sum(not row["is_answered"] for row in rows)
            progress.update(len(rows))
    return count, failed
