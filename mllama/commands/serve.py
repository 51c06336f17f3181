"""Answer requests of OpenAI's clients about pictures, and show a page to try it, on http://127.0.0.1:8000/."""

from __future__ import annotations

import argparse
import os
import re
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING

from mllama import Engine, MllamaForConditionalGeneration
from mllama.commands.common import (
    add_checkpoint_arguments,
    add_execution_arguments,
    add_max_length_argument,
    checkpoint_of,
    load_processor,
    load_weights,
    positive,
    what_runs,
)
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
    from mllama.server.settings import Settings

_KEYS = "MLLAMA_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_arguments(group := parser.add_argument_group("model"))
    add_name_argument(group)
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="never needed: no code of a checkpoint is run",
    )
    group = parser.add_argument_group("network")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on")
    group.add_argument("--port", type=_port, default=8000, help="to listen on; 0: any that is free")
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
    group = parser.add_argument_group("batching")
    add_batching_arguments(group)
    group.add_argument(
        "--max-queue",
        type=positive,
        metavar="N",
        help="requests that wait; more are refused with 429 (default: 4 times --max-batch-size)",
    )
    add_loading_arguments(group := parser.add_argument_group("weights"))
    add_weight_path_argument(group)
    add_execution_arguments(parser)


def run(options: argparse.Namespace) -> int:
    dtype_of(options)  # contradictions are told before anything is loaded
    overrides_of(options)
    require_extra()
    from mllama.grammar.forms import GrammarError
    from mllama.server.deferred import Deferred
    from mllama.server.listening import bind, serve
    from mllama.server.serving import AsyncEngine

    checkpoint = checkpoint_of(options)
    if follows(options):
        return follow_engine(options, checkpoint)
    settings = settings_of(options, checkpoint)
    for line in warnings_of(options, settings):
        _say(line)
    sockets = bind(settings.host, settings.port)
    processor = load_processor(checkpoint, options)
    plan = plan_of(options, checkpoint, _say)
    loaded: list[MllamaForConditionalGeneration] = []
    started: list[Engine] = []
    compiler = compiler_of(processor, lambda: loaded[0])

    def make() -> AsyncEngine:
        loaded.append(model := load_weights(checkpoint, options, options.adapter))
        try:
            compiler.prepare()
        except GrammarError as error:
            _say(f"{error}; response_format and enforced calls are refused")
        started.append(start_engine(model, processor, options, plan, options.max_queue))
        return AsyncEngine(started[0])

    engine = Deferred(make, lambda: _say(f"ready: {what_runs(loaded[0])}"))
    app = application(engine, settings, processor, compiler)
    code = serve(
        app,
        engine,
        settings,
        sockets,
        lambda url: _say(f"listening on {url}; Ctrl-C ends it"),
    )
    if engine.error is not None:
        raise engine.error
    if engine.health() == "loading":
        # The thread that loads cannot be ended, and the interpreter would end under it.
        os._exit(code)
    for each in started:
        each.close()
        if each.loop.lost is not None:
            raise each.loop.lost
    return code


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
        **request_settings(options, checkpoint),
        version=version("mllama-kernels"),
        api_keys=keys,
        host=options.host,
        port=options.port,
        allowed_hosts=tuple(options.allow_host),
        allowed_origins=tuple(options.allow_origin),
        max_new_tokens=None if options.max_new_tokens == -1 else options.max_new_tokens,
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


def _say(line: str) -> None:
    print(f"mllama serve: {line}", file=sys.stderr, flush=True)


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
