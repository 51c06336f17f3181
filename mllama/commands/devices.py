"""Which device a command runs on, under the names of other programs too."""

from __future__ import annotations

import argparse
import re
from typing import Any

from mllama.wording import quoted

_GPU = re.compile(r"gpu(?:[-:](\d+))?", re.IGNORECASE)


def add_device_argument(group: argparse._ActionsContainer, help: str) -> None:
    """--device, and --devices as its other spelling."""
    group.add_argument(
        "--device",
        "--devices",
        dest="device",
        type=device_of,
        action=_Same,
        metavar="DEVICE",
        help=help,
    )


def device_of(text: str) -> str:
    """An argparse type: the name of a device as torch writes it."""
    if "," in text:
        raise argparse.ArgumentTypeError(
            f"must be one device, such as cpu, gpu, gpu-0 or cuda:1; got {quoted(text)}"
        )
    match = _GPU.fullmatch(text.strip())
    if match is None:
        return text
    return "cuda" if match[1] is None else f"cuda:{int(match[1])}"


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
            parser.error(f"{option_string} {values} contradicts the {before} given before it")
        setattr(namespace, self.dest, values)
