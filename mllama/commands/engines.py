"""What the commands share that answer many requests at once: their options, the memory plan, the engine, and
the application that reads requests and shapes answers."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mllama import Engine, MllamaForConditionalGeneration, MllamaProcessor, follow
from mllama.checkpoints.placement import resolve_device
from mllama.commands.common import (
    add_max_length_argument,
    load_processor,
    load_weights,
    positive,
    what_runs,
)
from mllama.commands.loading import check_length, planned_source, source_of
from mllama.commands.plan import memory
from mllama.commands.usage import UsageError
from mllama.engine.pages import PAGE_SIZE
from mllama.engine.sizes import EnginePlan, plan_engine
from mllama.memory import free_bytes
from mllama.parallel.member import Member
from mllama.parallel.ranks import Ranks
from mllama.parallel.room import least_free_bytes, require_rooms
from mllama.stores import KeyValueStore
from mllama.wording import size

if TYPE_CHECKING:
    from fastapi import FastAPI

    from mllama.grammar.compiling import GrammarCompiler
    from mllama.server.protocol import Engine as ServedEngine
    from mllama.server.settings import Settings


def add_name_argument(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--served-model-name",
        action="append",
        default=[],
        metavar="NAME",
        help="the model's name in requests; may be repeated (default: the folder's, or the hub id)",
    )


def add_answer_arguments(group: argparse._ArgumentGroup) -> None:
    """How long answers are, and what requests may bring, where all of it is said for a server."""
    add_max_length_argument(group)
    group.add_argument(
        "--max-new-tokens",
        type=_length,
        default=-1,
        metavar="N",
        help="the longest answer, and the length where a request names none; -1: the rest of the context",
    )
    group.add_argument(
        "--top-k",
        type=positive,
        metavar="K",
        help="for requests that name none; 1 is greedy (default: the checkpoint's)",
    )
    add_request_arguments(group)
    group.add_argument(
        "--max-body", type=memory, default="32MB", metavar="SIZE", help="most bytes of a request"
    )


def add_request_arguments(group: argparse._ArgumentGroup) -> None:
    """What requests may bring."""
    group.add_argument(
        "--max-images", type=positive, default=4, metavar="N", help="most pictures in a request"
    )
    group.add_argument(
        "--allow-image-host",
        action="append",
        default=[],
        metavar="HOST",
        help="fetch pictures from there, and from nowhere else; may be repeated",
    )
    group.add_argument(
        "--system-with-images",
        choices=("fold", "error"),
        default="fold",
        help="a system message beside pictures: put before the user's first text, or left for the template "
        "to refuse",
    )


def add_batching_arguments(group: argparse._ArgumentGroup) -> None:
    """How much is computed together."""
    group.add_argument(
        "--max-batch-size", type=positive, default=32, metavar="N", help="answers decoded together"
    )
    group.add_argument(
        "--max-ce-batch-size",
        type=positive,
        default=32,
        metavar="N",
        help="prompts read together",
    )
    group.add_argument(
        "--max-batch-tokens",
        type=positive,
        metavar="N",
        help="tokens of a step, of answers and prompts together; a longer prompt is read in parts "
        "(default: 512 on a CPU, 2048 on a GPU)",
    )
    group.add_argument(
        "--image-cache-bytes",
        type=_bytes,
        metavar="SIZE",
        help="memory, such as 2GB, for keys and values of pictures that nobody asks about just now "
        "(default: all the tiles planned)",
    )


def check_batching(options: argparse.Namespace) -> None:
    """Raises: UsageError for options of `add_batching_arguments` that contradict each other."""
    if options.max_batch_tokens is not None and options.max_batch_tokens < options.max_batch_size:
        raise UsageError(
            f"--max-batch-tokens {options.max_batch_tokens} is less than --max-batch-size "
            f"{options.max_batch_size}: each of the answers decoded together takes a token of a step"
        )


def plan_of(options: argparse.Namespace, checkpoint: str, say: Callable[[str], None]) -> EnginePlan:
    """What model and engine take, told before anything is loaded.

    Raises: ValueError with the numbers where that is more than is free, unless --force is given; as
        `from_pretrained` for what it would not load.
    """
    check_batching(options)
    source = planned_source(options, source_of(options, checkpoint))
    check_length(options, source.config)
    device = resolve_device(
        options.device or ("cuda" if torch.cuda.is_available() else "cpu"), None
    )
    ranks = Ranks.of(options.tensor_parallel)
    free = free_bytes(device) if ranks is None else least_free_bytes(ranks, device)
    store = KeyValueStore(
        source.config.get_text_config(), dtype=getattr(torch, source.dtype), device="meta"
    )
    plan = plan_engine(
        source.config,
        store,
        free,
        device.type,
        weights=source.nbytes,
        quantized=source.encoding is not None,
        max_batch_size=options.max_batch_size,
        max_batch_tokens=options.max_batch_tokens,
        max_prefills=options.max_ce_batch_size,
        max_length=options.max_length,
        max_images=options.max_images,
    )
    for line in _described(plan, device, free, source.config):
        say(line)
    instead = "--force loads it all the same"
    if not options.force and ranks is not None:
        require_rooms(
            ranks, device, plan.total, lambda free, where: plan.refusal(free, where, instead)
        )
    elif not options.force:
        plan.require_fit(free, str(device), instead)
    return plan


def start_engine(
    model: MllamaForConditionalGeneration,
    processor: MllamaProcessor,
    options: argparse.Namespace,
    plan: EnginePlan,
    max_queue: int | None,
) -> Engine:
    """The engine of a loaded model, as the options say and as large as it was planned."""
    sizes, limits = plan.sizes, plan.sizes.limits
    return Engine(
        model,
        processor,
        max_batch_size=limits.max_batch_size,
        max_ce_batch_size=limits.max_prefills,
        max_batch_tokens=limits.max_batch_tokens,
        max_length=limits.max_length,
        max_images=options.max_images,
        max_queue=max_queue,
        num_pages=sizes.num_pages,
        num_slots=sizes.num_slots,
        image_cache_bytes=options.image_cache_bytes,
        adapter="" if options.adapter is None else str(options.adapter),
        force=True,  # what was free has been looked at
    )


def follows(options: argparse.Namespace) -> bool:
    """Whether this process is a rank that computes along with the engine of the first."""
    ranks = Ranks.of(options.tensor_parallel)
    return ranks is not None and ranks.rank > 0


def follow_engine(options: argparse.Namespace, checkpoint: str) -> int:
    """What such a process does while the first plans, loads and answers. Returns: the exit code."""
    member = Member.of_environment()
    if member is not None and not member.is_ours:
        for number in (
            signal.SIGINT,
            signal.SIGTERM,
        ):  # torchrun tells all; the first ends the others
            signal.signal(number, signal.SIG_IGN)
    plan_of(options, checkpoint, lambda line: None)
    follow(load_weights(checkpoint, options, options.adapter))
    return 0


def require_extra() -> None:
    """Raises: ModuleNotFoundError naming the extra `server` where that is not installed."""
    try:
        import mllama.server.app
        import mllama.server.batches  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"this needs {error.name}: pip install 'mllama-kernels[server]'"
        ) from None


def compiler_of(
    processor: MllamaProcessor, model: Callable[[], MllamaForConditionalGeneration]
) -> GrammarCompiler:
    """The compiler of grammars; ``model`` is called at the first one."""
    from mllama.grammar.compiling import GrammarCompiler
    from mllama.grammar.vocabulary import Vocabulary

    def vocabulary() -> Vocabulary:
        made = model()
        ends = made.generation_config.eos_token_id
        return Vocabulary(
            processor.tokenizer, made.head_rows, [ends] if isinstance(ends, int) else ends or ()
        )

    return GrammarCompiler(vocabulary)


def prepare_forms(compiler: GrammarCompiler, say: Callable[[str], None]) -> None:
    """Make ready what the first answer of a form would wait for; where that cannot be, say so."""
    from mllama.grammar.forms import GrammarError

    try:
        compiler.prepare()
    except GrammarError as error:
        say(f"{error}; response_format and enforced calls are refused")


def application(
    engine: ServedEngine,
    settings: Settings,
    processor: MllamaProcessor,
    compiler: GrammarCompiler,
) -> FastAPI:
    """What reads requests and shapes answers, before an engine."""
    from mllama.processing.templates import chosen_template
    from mllama.server.app import create_app
    from mllama.server.call_prompts import writes_calls

    template = processor.chat_template  # a base model has none, and answers no chats
    writes = template is not None and writes_calls(chosen_template(template, None))
    return create_app(engine, settings, compiler, writes)


@contextmanager
def answering(
    options: argparse.Namespace,
    checkpoint: str,
    settings: Settings,
    max_queue: int | None,
    say: Callable[[str], None],
) -> Iterator[tuple[FastAPI, Engine]]:
    """The application before an engine that is ready, and that engine, which ends with the context.

    Raises: as `plan_of` and `load_weights`.
    """
    from mllama.server.serving import AsyncEngine

    processor = load_processor(checkpoint, options)
    plan = plan_of(options, checkpoint, say)
    model = load_weights(checkpoint, options, options.adapter)
    say(f"ready: {what_runs(model)}")
    compiler = compiler_of(processor, lambda: model)
    prepare_forms(compiler, say)
    with (
        start_engine(model, processor, options, plan, max_queue) as engine,
        closing(AsyncEngine(engine)) as served,
    ):
        yield application(served, settings, processor, compiler), engine


def request_settings(options: argparse.Namespace, checkpoint: str) -> dict[str, Any]:
    """What a server has to know of requests, under the names of its settings."""
    return {
        "models": tuple(options.served_model_name) or (_name(options, checkpoint),),
        "image_hosts": tuple(options.allow_image_host),
        "max_images": options.max_images,
        "system_with_images": options.system_with_images,
        "max_new_tokens": None if options.max_new_tokens == -1 else options.max_new_tokens,
        "top_k": options.top_k,
        "version": version("mllama-kernels"),
    }


def _name(options: argparse.Namespace, checkpoint: str) -> str:
    """The hub id, or the folder's or file's name."""
    if options.model is None and options.serialized_model_path is None:
        return "mllama-demo"
    if options.model is not None and not Path(options.model).expanduser().exists():
        return options.model
    return Path(checkpoint).expanduser().resolve().name


def _described(plan: EnginePlan, device: torch.device, free: int | None, config: Any) -> list[str]:
    """Lines for a person."""
    sizes = plan.sizes
    length, context = sizes.limits.max_length, config.get_text_config().max_position_embeddings
    of_context = "" if length == context else f" of the model's {context:,}"
    known = "an unknown amount" if free is None else size(free)
    return [
        f"memory: weights {size(plan.weights)}, {sizes.num_pages:,} pages of {PAGE_SIZE} tokens "
        f"{size(plan.pages)}, {sizes.num_slots:,} image tiles {size(plan.tiles)}, workspace "
        f"{size(plan.workspace + plan.graphs)}: {size(plan.total)} in all, {known} free on {device}",
        f"context: {length:,} tokens{of_context}, up to {sizes.limits.max_batch_size} answers at once",
    ]


def _bytes(text: str) -> int:
    return int(text) if text.isdecimal() else memory(text)


def _length(text: str) -> int:
    value = int(text)
    if value < 1 and value != -1:
        raise argparse.ArgumentTypeError(f"must be at least 1, or -1, got {text}")
    return value
