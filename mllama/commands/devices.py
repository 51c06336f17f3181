"""Which device, or devices, a command runs on, under the names of other programs too."""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Callable
from typing import Any

from mllama.wording import quoted

_GPU = re.compile(r"gpu(?:[-:](\d+))?", re.IGNORECASE)
_NUMBERED = re.compile(r"cpu|cuda:\d+")


def add_device_argument(group: argparse._ActionsContainer, help: str, instead: str = "") -> None:
    """--device, and --devices as its other spelling, of a command that runs on one device.

    Args:
        instead: what to do for several.
    """
    _add(group, functools.partial(device_of, instead=instead), help)


def device_of(text: str, instead: str = "") -> str:
    """An argparse type: one device. ``instead``: see :func:`add_device_argument`."""
    if "," in text:
        raise argparse.ArgumentTypeError(
            f"must be one device, such as cpu, gpu, gpu-0 or cuda:1; got {quoted(text)}{instead}"
        )
    return _device(text)


def add_devices_argument(group: argparse._ActionsContainer) -> None:
    """The same of a command whose model may be split over several devices, which are a tuple then, and
    --collective-timeout; `commands/ranks.py` looks at both."""
    _add(
        group,
        _devices,
        "cpu, cuda, cuda:1, gpu, gpu-1; of several, as gpu-0,gpu-1, each holds a part of the model "
        "(default: cuda if there is one)",
    )
    group.add_argument(
        "--collective-timeout",
        type=_seconds,
        metavar="S",
        help="seconds after which a device that does not answer the others ends the command (default: 120)",
    )


def _add(group: argparse._ActionsContainer, parse: Callable[[str], Any], help: str) -> None:
    group.add_argument(
        "--device",
        "--devices",
        dest="device",
        type=parse,
        action=_Same,
        metavar="DEVICE",
        help=help,
    )


def _device(text: str) -> str:
    """The name of a device as torch writes it."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"must name a device, got {quoted(text)}")
    match = _GPU.fullmatch(text.strip())
    if match is None:
        return text
    return "cuda" if match[1] is None else f"cuda:{int(match[1])}"


def _devices(text: str) -> str | tuple[str, ...]:
    """An argparse type: one device, or all of several."""
    if "," not in text:
        return _device(text)
    names = tuple(_device(part).strip() if part.strip() else "" for part in text.split(","))
    for name in names:
        if not _NUMBERED.fullmatch(name):
            raise argparse.ArgumentTypeError(
                f"of several devices each must be cpu or a GPU with its number, such as gpu-0 or cuda:1; got "
                f"{quoted(text)}"
            )
    gpus = [name for name in names if name != "cpu"]
    if gpus and len(gpus) < len(names):
        raise argparse.ArgumentTypeError(
            f"devices that share a model must be of one kind, got {quoted(text)}"
        )
    if twice := {name for name in gpus if gpus.count(name) > 1}:
        raise argparse.ArgumentTypeError(
            f"each device holds a part of the model, and {quoted(text)} names {min(twice)} more than once"
        )
    return names


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 86400:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most a day, got {text}")
    return value


class _Same(argparse.Action):
    """May be given twice, under both spellings, with the same value."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest)
        if before not in (None, values):
            parser.error(
                f"{option_string} {_written(values)} contradicts the {_written(before)} given before it"
            )
        setattr(namespace, self.dest, values)


def _written(devices: str | tuple[str, ...]) -> str:
    return devices if isinstance(devices, str) else ",".join(devices)
