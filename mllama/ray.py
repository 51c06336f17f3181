"""Replicas of the server behind one address, on Ray Serve: the extra `ray`.

A replica answers with the application of `mllama serve`; where it runs, what replaces it and who gets which
request is Ray's business.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NoReturn

from mllama.commands import serve
from mllama.commands.common import checkpoint_of
from mllama.commands.ranks import ALONE
from mllama.commands.ray_engine import answering_on_ray
from mllama.commands.ray_options import NAME, check_options, placed
from mllama.commands.usage import UsageError
from mllama.engine.engine import QUEUE_PER_ANSWER
from mllama.wording import quoted

if TYPE_CHECKING:
    from ray.serve import Application

    from mllama.server.settings import Settings

_HEALTH_SECONDS = 2.0  # between two looks of Ray at an engine


def serve_app(
    model: str | None = None,
    num_replicas: int | Sequence[int] = 1,
    devices_per_replica: int = 1,
    *,
    cpus_per_replica: float = 1,
    **serve_options: Any,
) -> Application:
    """An application for `ray.serve.run`, each replica of which is what `mllama serve` is.

    Args:
        model: folder, GGUF file or hub id, the same on every node; None: the demo model.
        num_replicas: how many; or the least and the most, between which so many run that `max_batch_size`
            requests are open in each.
        devices_per_replica: GPUs of each, on one node, over which its model is split; with `device="cpu"`
            processes.
        cpus_per_replica: cores that Ray sets aside for each, and threads of its kernels.
        serve_options: those of `mllama serve`, such as `max_batch_size=16`, with a list for what may be
            repeated. `device` is "cpu" or "gpu" (default: "gpu" where the cluster has one). `host` and `port`
            are none of them: Ray listens.
    Raises: ValueError naming an option that is unknown or wrong, before anything runs; ModuleNotFoundError
        naming the extra `server` where that is not installed.
    """
    words = [] if model is None else ["--model", model]
    for name, value in serve_options.items():
        if name in ("host", "port"):
            raise UsageError(
                f"{name} is an option of ray.serve.start: http_options={{{name!r}: ...}}"
            )
        flag = "--" + name.replace("_", "-")
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if one is not None and one is not False:
                words.append(flag if one is True else f"{flag}={one}")
    serve.add_arguments(parser := _Parser(allow_abbrev=False, add_help=False))
    parser.set_defaults(**ALONE)
    options = parser.parse_args(words)
    check_options(options, devices_per_replica)
    checkpoint = checkpoint_of(options)
    settings = serve.settings_of(options, checkpoint)
    resources = placed(options, devices_per_replica, cpus_per_replica)
    return application_of(options, checkpoint, settings, num_replicas, resources)


def app(arguments: Mapping[str, Any]) -> Application:
    """:func:`serve_app`, for `import_path` and `args` of a file of `serve deploy`."""
    return serve_app(**arguments)


def application_of(
    options: argparse.Namespace,
    checkpoint: str,
    settings: Settings,
    num_replicas: int | Sequence[int],
    resources: dict[str, float],
) -> Application:
    """:func:`serve_app`, of options that have been read."""
    from ray import serve as ray_serve

    running = options.max_batch_size
    if options.max_queue is None:
        options.max_queue = QUEUE_PER_ANSWER * running
    deployment = ray_serve.deployment(
        ray_serve.ingress()(Replica),
        name=NAME,
        ray_actor_options=resources,
        max_ongoing_requests=running + options.max_queue,
        max_queued_requests=options.max_queue,  # in each proxy, where every replica has that many
        logging_config={"enable_access_log": False},
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        health_check_period_s=_HEALTH_SECONDS,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        **_scale(num_replicas, running),
    )
    return deployment.bind(options, checkpoint, settings)


class Replica:
    """What Ray Serve runs: an application and its engine."""

    def __init__(self, options: argparse.Namespace, checkpoint: str, settings: Settings) -> None:
        self._open = ExitStack()
        made = answering_on_ray(options, checkpoint, settings, options.max_queue)
        self._app, _, self._check = self._open.enter_context(made)

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    def check_health(self) -> None:
        """Raises: RuntimeError where the engine or a rank has failed, which has Ray replace the replica."""
        self._check()

    def __del__(self) -> None:
        self._open.close()


def _scale(num_replicas: int | Sequence[int], running: int) -> dict[str, Any]:
    """Raises: UsageError."""
    bounds = [num_replicas] * 2 if isinstance(num_replicas, int) else [*num_replicas]
    if len(bounds) != 2 or not 1 <= bounds[0] <= bounds[1]:
        raise UsageError(
            f"replicas must be a number, or the least and the most; got {quoted(num_replicas)}"
        )
    if isinstance(num_replicas, int):
        return {"num_replicas": num_replicas}
    scale = {"min_replicas": bounds[0], "max_replicas": bounds[1]}
    return {"autoscaling_config": {**scale, "target_ongoing_requests": running}}


class _Parser(argparse.ArgumentParser):
    """Of options that a program gives, which is not to end where they are wrong."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)
