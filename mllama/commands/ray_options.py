"""What the commands on Ray share: how many engines, where they run, and the cluster."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mllama.commands.common import positive
from mllama.commands.engines import check_batching, require_extra
from mllama.commands.loading import dtype_of, overrides_of, source_of
from mllama.commands.usage import UsageError
from mllama.wording import quoted

NAME = "mllama"  # of the application and of its deployment


def add_ray_arguments(group: argparse._ArgumentGroup) -> None:
    """The cluster, and what each engine takes of it."""
    group.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="of a cluster that runs, or auto for that of this machine (default: RAY_ADDRESS of the "
        "environment, else one is started here, and ends with the command)",
    )
    group.add_argument(
        "--dashboard",
        action="store_true",
        help="with a cluster that is started here: Ray's dashboard, on http://127.0.0.1:8265/",
    )
    group.add_argument(
        "--devices-per-replica",
        type=positive,
        default=1,
        metavar="N",
        help="GPUs of each engine, on one node, over which its model is split",
    )
    group.add_argument(
        "--cpus-per-replica",
        type=_cores,
        default=1.0,
        metavar="N",
        help="cores that are set aside for each engine, and threads of its kernels",
    )


def check_ray() -> None:
    """Raises: UsageError naming the extra `ray` where that is not installed."""
    try:
        import ray.data
        import ray.serve  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(
            f"this needs {error.name}: pip install 'mllama-kernels[ray,server]'"
        ) from None


@contextmanager
def cluster(options: argparse.Namespace) -> Iterator[None]:
    """Ray, until the context ends; not started where a program has done so.

    Raises: UsageError for options of a new cluster beside the address of one; ConnectionError.
    """
    import ray

    address = options.address or os.environ.get("RAY_ADDRESS") or "local"
    new = {"include_dashboard": options.dashboard} if address == "local" else {}
    if options.dashboard and not new:
        raise UsageError(
            f"--dashboard is not for the cluster at {quoted(address)}, which runs already"
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    was_started = ray.is_initialized()
    if was_started and options.address:
        raise UsageError(
            f"--address {quoted(options.address)}: this process is in a cluster already"
        )
    if not was_started:
        ray.init(address, **new)
    try:
        yield
    finally:
        if not was_started:
            ray.shutdown()


def check_options(options: argparse.Namespace, num_devices: int) -> None:
    """Raises: UsageError for options that no engine on Ray takes, or that contradict each other."""
    require_extra()
    dtype_of(options)
    overrides_of(options)
    check_batching(options)
    source_of(options, "")
    if options.save_to_serialized_model_path is not None:
        raise UsageError("--save-to-serialized-model-path is not for many: use mllama quantize")
    if options.device not in (None, "cpu", "cuda"):
        named = options.device if isinstance(options.device, str) else ",".join(options.device)
        raise UsageError(f"--device must be cpu or gpu, Ray says which; got {quoted(named)}")
    if num_devices == 1 and options.collective_timeout is not None:
        raise UsageError("--collective-timeout goes with several devices for each engine")


def placed(options: argparse.Namespace, num_devices: int, num_cpus: float) -> dict[str, float]:
    """What Ray sets aside for an engine; the options get the names that its devices have for it.

    Raises: UsageError.
    """
    import ray

    if num_devices < 1 or num_cpus <= 0:
        raise UsageError(f"an engine needs a device and a core; got {num_devices} and {num_cpus}")
    kind = options.device
    if kind is None:
        if not ray.is_initialized():
            raise UsageError("Ray does not run yet: call ray.init(), or say whether cpu or gpu")
        kind = "cuda" if ray.cluster_resources().get("GPU") else "cpu"
    names = ["cpu" if kind == "cpu" else f"cuda:{i}" for i in range(num_devices)]
    options.device = names[0] if num_devices == 1 else tuple(names)
    return {"num_cpus": num_cpus, "num_gpus": num_devices if kind == "cuda" else 0}


def last_line(text: str) -> str:
    """Of a traceback that Ray tells: the error and its words."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else text


def say(line: str) -> None:
    print(f"mllama ray: {line}", file=sys.stderr, flush=True)


def _cores(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above zero, got {text}")
    return value
