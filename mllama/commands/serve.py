"""Answer requests of OpenAI's clients about pictures, and show a page to try it, on http://127.0.0.1:8000/."""

from __future__ import annotations

import argparse
import os
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from mllama import MllamaForConditionalGeneration, MllamaProcessor
from mllama.commands.common import (
    add_checkpoint_arguments,
    add_execution_arguments,
    checkpoint_of,
    load_processor,
    load_weights,
    positive,
    what_runs,
)
from mllama.commands.loading import (
    add_loading_arguments,
    add_weight_path_argument,
    dtype_of,
    overrides_of,
)
from mllama.commands.plan import memory
from mllama.commands.usage import UsageError
from mllama.wording import quoted, shown

if TYPE_CHECKING:
    from mllama.server.protocol import Engine
    from mllama.server.settings import Settings

_KEYS = "MLLAMA_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_arguments(group := parser.add_argument_group("model"))
    group.add_argument(
        "--served-model-name",
        action="append",
        default=[],
        metavar="NAME",
        help="the model's name in requests; may be repeated (default: the folder's, or the hub id)",
    )
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="never needed: no code of a checkpoint is run",
    )
    group = parser.add_argument_group("network")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on")
    group.add_argument("--port", type=_port, default=8000, help="0: any that is free")
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help=f"ask for one of these keys; may be repeated (default: {_KEYS} of the environment, else none "
        "is asked for)",
    )
    group.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name under which the server is reached, where no key is asked for; may be repeated",
    )
    group.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        help="an origin whose pages may ask; may be repeated",
    )
    group.add_argument(
        "--drain-timeout",
        type=_seconds,
        default=30.0,
        metavar="S",
        help="seconds in which running answers may finish when the server ends",
    )
    group = parser.add_argument_group("requests")
    group.add_argument(
        "--max-length",
        type=positive,
        metavar="N",
        help="tokens of a prompt and its answer (default: what the model takes)",
    )
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
    group.add_argument(
        "--max-images", type=positive, default=4, metavar="N", help="pictures of a request"
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
    group.add_argument(
        "--max-body", type=memory, default="32MB", metavar="SIZE", help="of a request"
    )
    group = parser.add_argument_group("batching")
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
        help="tokens of a step (default: 512 on a CPU, 2048 on a GPU)",
    )
    group.add_argument(
        "--max-queue",
        type=positive,
        metavar="N",
        help="requests that wait; more are refused with 429 (default: four batches)",
    )
    group.add_argument(
        "--image-cache-bytes",
        type=_bytes,
        metavar="SIZE",
        help="keys and values of pictures that are kept (default: what is left of the memory)",
    )
    add_loading_arguments(group := parser.add_argument_group("weights"))
    add_weight_path_argument(group)
    add_execution_arguments(parser)


def run(options: argparse.Namespace) -> int:
    dtype_of(options)  # contradictions are told before anything is loaded
    overrides_of(options)
    try:
        from mllama.server.app import create_app
        from mllama.server.deferred import Deferred
        from mllama.server.listening import serve
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"serving needs {error.name}: pip install 'mllama-kernels[server]'"
        ) from None
    from mllama.grammar.compiling import GrammarCompiler
    from mllama.grammar.forms import GrammarError
    from mllama.grammar.vocabulary import Vocabulary
    from mllama.processing.templates import chosen_template
    from mllama.server.call_prompts import writes_calls
    from mllama.vocabulary import head_rows

    checkpoint = checkpoint_of(options)
    settings = settings_of(options, checkpoint)
    for line in warnings_of(options, settings):
        _say(line)
    processor = load_processor(checkpoint, options)
    loaded: list[MllamaForConditionalGeneration] = []

    def make() -> Engine:
        model = load_weights(checkpoint, options, options.adapter, context=options.max_length)
        loaded.append(model)
        try:
            compiler.prepare()
        except GrammarError as error:
            _say(f"{error}; response_format and enforced calls are refused")
        return start_engine(model, processor, options)

    def vocabulary() -> Vocabulary:
        (model,) = loaded
        head = head_rows(model.get_output_embeddings(), model.config.get_text_config())
        ends = model.generation_config.eos_token_id
        return Vocabulary(
            processor.tokenizer, head, [ends] if isinstance(ends, int) else ends or ()
        )

    compiler = GrammarCompiler(vocabulary)
    engine = Deferred(make, lambda: _say(f"ready: {what_runs(loaded[0])}"))
    template = processor.chat_template  # a base model has none, and answers no chats
    writes = template is not None and writes_calls(chosen_template(template, None))
    app = create_app(engine, settings, compiler, writes)
    code = serve(app, engine, settings, lambda url: _say(f"listening on {url}; Ctrl-C ends it"))
    if engine.error is not None:
        raise engine.error
    if engine.health() == "loading":
        os._exit(
            code
        )  # the thread that loads cannot be ended, and the interpreter would end under it
    return code


def start_engine(
    model: MllamaForConditionalGeneration, processor: MllamaProcessor, options: argparse.Namespace
) -> Engine:
    """The engine of a loaded model, as the options say."""
    from mllama.engine.engine import Engine as Batching
    from mllama.server.serving import AsyncEngine

    engine = Batching(
        model,
        processor,
        max_batch_size=options.max_batch_size,
        max_ce_batch_size=options.max_ce_batch_size,
        max_batch_tokens=options.max_batch_tokens,
        max_length=options.max_length,
        max_queue=options.max_queue,
        image_cache_bytes=options.image_cache_bytes,
        adapter="" if options.adapter is None else str(options.adapter),
    )
    return AsyncEngine(engine)


def settings_of(options: argparse.Namespace, checkpoint: str) -> Settings:
    """What the server has to know. Raises: UsageError."""
    from mllama.server.body import BodyBounds
    from mllama.server.settings import Settings

    keys = options.api_key or [os.environ.get(_KEYS, "")]
    keys = tuple(key.strip() for key in keys if key.strip())
    if options.api_key and len(keys) != len(options.api_key):
        raise UsageError("--api-key is empty")
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise UsageError("a key must be ASCII without blanks: it is sent in a header")
    for origin in options.allow_origin:
        if not re.fullmatch(r"https?://[^/\s*]+", origin):
            raise UsageError(
                f"--allow-origin must be like https://a.example, without a path; got {quoted(origin)}"
            )
    return Settings(
        models=tuple(options.served_model_name) or (_name(options, checkpoint),),
        version=version("mllama-kernels"),
        api_keys=keys,
        host=options.host,
        port=options.port,
        allowed_hosts=tuple(options.allow_host),
        allowed_origins=tuple(options.allow_origin),
        image_hosts=tuple(options.allow_image_host),
        max_images=options.max_images,
        system_with_images=options.system_with_images,
        max_new_tokens=None if options.max_new_tokens == -1 else options.max_new_tokens,
        top_k=options.top_k,
        body=BodyBounds(max_bytes=options.max_body),
        drain_seconds=options.drain_timeout,
    )


def warnings_of(options: argparse.Namespace, settings: Settings) -> list[str]:
    """What a person should know before anybody asks."""
    from mllama.server.auth import is_loopback

    lines = []
    if options.trust_remote_code:
        lines.append("--trust-remote-code is never needed: no code of a checkpoint is run")
    if not settings.api_keys and not is_loopback(settings.host):
        lines.append(
            f"warning: whoever reaches {shown(settings.host)} may use the model: give --api-key KEY, or set "
            f"{_KEYS}, or leave out --host"
        )
    return lines


def _name(options: argparse.Namespace, checkpoint: str) -> str:
    """The hub id, or the folder's or file's name."""
    if options.model is None and options.serialized_model_path is None:
        return "mllama-demo"
    if options.model is not None and not Path(options.model).expanduser().exists():
        return options.model
    return Path(checkpoint).expanduser().resolve().name


def _say(line: str) -> None:
    print(f"mllama serve: {line}", file=sys.stderr, flush=True)


def _bytes(text: str) -> int:
    return int(text) if text.isdecimal() else memory(text)


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**16:
        raise argparse.ArgumentTypeError(f"must be 0 to 65535, got {text}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {text}")
    return value


def _length(text: str) -> int:
    value = int(text)
    if value < 1 and value != -1:
        raise argparse.ArgumentTypeError(f"must be at least 1, or -1, got {text}")
    return value
