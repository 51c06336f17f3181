"""Answer requests of OpenAI's clients with replicas of `mllama serve`, on Ray Serve."""

from __future__ import annotations

import argparse
import re
import signal
import threading
from typing import Any

from mllama.commands import serve
from mllama.commands.common import add_execution_arguments, checkpoint_of
from mllama.commands.loading import add_loading_arguments, add_weight_path_argument
from mllama.commands.ray_options import (
    NAME,
    add_ray_arguments,
    check_options,
    check_ray,
    cluster,
    last_line,
    placed,
    say,
)
from mllama.commands.usage import UsageError
from mllama.wording import quoted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    serve.add_server_arguments(parser)
    group = parser.add_argument_group("replicas")
    group.add_argument(
        "--replicas",
        type=_replicas,
        default=1,
        metavar="N",
        help="how many; or N-M, between which so many run that --max-batch-size requests are open in each",
    )
    add_ray_arguments(group)
    add_loading_arguments(group := parser.add_argument_group("weights"))
    add_weight_path_argument(group)
    add_execution_arguments(parser)


def run(options: argparse.Namespace) -> int:
    check_ray()
    check_options(options, options.devices_per_replica)
    if options.port == 0:
        raise UsageError("--port 0 is not for Ray, which listens on the same port of every node")
    import ray.serve

    from mllama.ray import application_of

    checkpoint = checkpoint_of(options)
    settings = serve.settings_of(options, checkpoint)
    for line in serve.warnings_of(options, settings):
        say(line)
    with cluster(options):
        if ray.serve.status().proxies:
            raise UsageError(
                "Ray Serve runs on this cluster already: `serve deploy` puts another application there, "
                "see docs/scaling.md"
            )
        resources = placed(options, options.devices_per_replica, options.cpus_per_replica)
        application = application_of(options, checkpoint, settings, options.replicas, resources)
        ray.serve.start(http_options={"host": options.host, "port": options.port})
        try:
            _run(application)
            is_over = threading.Event()

            def end(*_: object) -> None:
                is_over.set()
                for number in _SIGNALS:  # the second signal: at once
                    signal.signal(number, signal.SIG_DFL)

            for number in _SIGNALS:
                signal.signal(number, end)
            say(f"listening on http://{options.host}:{options.port}/; Ctrl-C ends it")
            is_over.wait()
            ray.serve.delete(NAME)  # replicas end when their answers have
        finally:
            ray.serve.shutdown()
    return 0


def _run(application: Any) -> None:
    """Raises: RuntimeError with the reason of a replica that could not be made."""
    import ray.serve

    try:
        ray.serve.run(application, name=NAME)
    except RuntimeError as error:
        said = ray.serve.status().applications[NAME].deployments[NAME].message
        raise RuntimeError(f"no replica could be made: {last_line(said) or error}") from None


def _replicas(text: str) -> int | tuple[int, int]:
    match = _RANGE.fullmatch(text)
    if match is None or not 1 <= int(match[1]) <= int(match[2] or match[1]):
        raise argparse.ArgumentTypeError(f"must be like 4 or 2-8, got {quoted(text)}")
    return int(match[1]) if match[2] is None else (int(match[1]), int(match[2]))
