"""What the commands share that answer many requests at once: their options, the memory plan, the engine, and
the application that reads requests and shapes answers."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mllama import Engine, MllamaForConditionalGeneration, MllamaProcessor, follow
from mllama.checkpoints.placement import resolve_device
from mllama.commands.common import load_weights, positive
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


def plan_of(options: argparse.Namespace, checkpoint: str, say: Callable[[str], None]) -> EnginePlan:
    """What model and engine take, told before anything is loaded.

    Raises: ValueError with the numbers where that is more than is free, unless --force is given; as
        `from_pretrained` for what it would not load.
    """
    if options.max_batch_tokens is not None and options.max_batch_tokens < options.max_batch_size:
        raise UsageError(
            f"--max-batch-tokens {options.max_batch_tokens} is less than --max-batch-size "
            f"{options.max_batch_size}: each of the answers decoded together takes a token of a step"
        )
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


def request_settings(options: argparse.Namespace, checkpoint: str) -> dict[str, Any]:
    """What a server has to know of requests, under the names of its settings."""
    return {
        "models": tuple(options.served_model_name) or (_name(options, checkpoint),),
        "image_hosts": tuple(options.allow_image_host),
        "max_images": options.max_images,
        "system_with_images": options.system_with_images,
        "top_k": options.top_k,
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
