"""The engine of a replica or an actor on Ray, whose process is the first rank where there are several."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from mllama.commands.engines import answering, follow_engine
from mllama.commands.ray_options import say
from mllama.parallel.group import TIMEOUT, make_default_group
from mllama.parallel.member import Member

if TYPE_CHECKING:
    from fastapi import FastAPI

    from mllama import Engine
    from mllama.server.settings import Settings


@contextmanager
def answering_on_ray(
    options: argparse.Namespace, checkpoint: str, settings: Settings, max_queue: int
) -> Iterator[tuple[FastAPI, Engine, Callable[[], None]]]:
    """As `engines.answering`, on the devices that `ray_options.placed` has named.

    Returns: the application, its engine, and what raises RuntimeError where either that or another of its
        ranks has ended.
    """
    if isinstance(options.device, str):
        with answering(options, checkpoint, settings, max_queue, say) as (app, engine):
            yield app, engine, lambda: _check(engine)
        return
    from mllama.parallel.beside import others_beside

    with others_beside(len(options.device), _follow, options, checkpoint) as others:
        own = _joined(options, 0)
        with answering(own, checkpoint, settings, max_queue, say) as (app, engine):

            def check() -> None:
                others.check()
                _check(engine)

            yield app, engine, check
        if engine.loop.lost is None:  # NCCL waits for all there
            dist.destroy_process_group()


def _check(engine: Engine) -> None:
    if (state := engine.loop.state) != "ready":
        raise RuntimeError(f"the engine is {state}")


def _follow(options: argparse.Namespace, checkpoint: str) -> None:
    """What the other ranks do."""
    member = Member.of_environment()
    assert member is not None
    follow_engine(_joined(options, member.rank), checkpoint)
    dist.destroy_process_group()


def _joined(options: argparse.Namespace, rank: int) -> argparse.Namespace:
    """The options of a rank, which has come to the others."""
    device = options.device[rank]
    if device == "cpu":  # the cores of an engine are those of all its ranks
        torch.set_num_threads(max(1, torch.get_num_threads() // len(options.device)))
    else:
        torch.cuda.set_device(device)
    make_default_group(options.collective_timeout or TIMEOUT, device)
    return argparse.Namespace(**{**vars(options), "device": device, "tensor_parallel": True})
