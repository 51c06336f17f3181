"""Where a command runs: in this process, as one of several ranks, or in those that it starts."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import torch

from mllama.commands.usage import UsageError
from mllama.parallel.group import TIMEOUT, Meeting
from mllama.parallel.member import Member

# A command that makes its own group of ranks.
_TRAINS = "finetune"
# A command whose engines are processes elsewhere, each with ranks of its own.
_PLACES = "ray"
# What a command finds in its options where it is one process.
ALONE: dict[str, Any] = {"tensor_parallel": False, "meeting": None}


class RanksFailed(RuntimeError):
    """Ranks that were started have failed, and this process is not one of them.

    Attributes:
        code: to exit with.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def run(options: argparse.Namespace, member: Member | None, arguments: Sequence[str] | None) -> int:
    """Run a command and give its exit code.

    Args:
        member: this process, where it is one of several ranks.
        arguments: of the command line; None: those of the process.
    Raises: RanksFailed; UsageError for devices that cannot be; as the command.
    """
    # `devices.add_devices_argument`
    is_split = hasattr(options, "collective_timeout") and options.command != _PLACES
    if member is None:
        if is_split and isinstance(options.device, tuple):
            return _started(options, arguments)
        if is_split and options.collective_timeout is not None:
            raise UsageError("--collective-timeout goes with several --devices, or with torchrun")
        return options.run(options)
    if options.command == _TRAINS:
        return options.run(options)
    if not is_split:  # it needs no more than one
        return options.run(options) if member.rank == 0 else 0
    options.device = device_of(member, options.device)
    if options.device != "cpu":
        torch.cuda.set_device(options.device)
    options.tensor_parallel = True
    options.meeting = Meeting(options.collective_timeout or TIMEOUT, options.device)
    code = options.run(options)
    options.meeting.leave()
    return code


def device_of(member: Member, named: str | tuple[str, ...] | None) -> str:
    """That of a rank, of what the command line names.

    Raises: UsageError for devices that contradict how the ranks were started, or that are not there.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if isinstance(named, tuple):
        if not member.is_ours:
            raise UsageError(
                f"--devices {','.join(named)} starts ranks by itself, and torchrun has started "
                f"{member.size}: leave one of them out"
            )
        return named[member.local_rank]
    if named is not None and named not in ("cpu", "cuda"):
        raise UsageError(
            f"--device {named} is one device, and torchrun has started {member.size} ranks: leave it out, "
            "and each takes the GPU of its number, or name cpu or gpu"
        )
    if named == "cpu" or (named is None and not gpus):
        return "cpu"
    _require_devices([f"cuda:{rank}" for rank in range(member.local_size)], gpus)
    return f"cuda:{member.local_rank}"


def _require_devices(names: Sequence[str], gpus: int) -> None:
    """Raises: UsageError with a table where some are not there."""
    absent = [name for name in names if name != "cpu" and int(name.removeprefix("cuda:")) >= gpus]
    if not absent:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    limited = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
    lines = [
        f"{rank:4}  {name:8}  {'is not there' if name in absent else 'is there'}"
        for rank, name in enumerate(names)
    ]
    raise UsageError(
        "\n".join(
            [
                f"{len(names)} ranks need a GPU each, and there are {gpus}{limited}",
                "rank  device",
                *lines,
            ]
        )
    )


def _started(options: argparse.Namespace, arguments: Sequence[str] | None) -> int:
    """The same command line in a process for each of several devices; the code of all of them together."""
    from mllama.parallel.launch import launch

    _require_devices(options.device, torch.cuda.device_count() if torch.cuda.is_available() else 0)
    own = sys.orig_argv[1:] if arguments is None else ["-m", "mllama", *arguments]
    outcome = launch(
        [sys.executable, *own], len(options.device), options.collective_timeout or TIMEOUT
    )
    if outcome.code < 0:
        signal.raise_signal(-outcome.code)  # what ended the first rank was meant for this process
    if outcome.reason:
        raise RanksFailed(outcome.code, outcome.reason)
    return abs(outcome.code)
