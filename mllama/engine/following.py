"""An engine over the ranks of a split model: the first plans and chooses, the others compute with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mllama.engine.forward import Forward, store_of
from mllama.engine.plan import Plan, places_of
from mllama.engine.prompts import PreparedPicture
from mllama.engine.sizes import Sizes
from mllama.parallel.channel import Channel
from mllama.parallel.room import least_free_bytes

# Between two words to those who wait: a rank that has gone is missed no later, and nobody waits too long.
_IDLE_SECONDS = 5.0


class OutOfStep(RuntimeError):
    """The ranks do not compute the same any longer: one has gone, hangs, or has failed in a step."""


@dataclass(frozen=True)
class Begin:
    """What the ranks make before the first step.

    Attributes:
        sizes: of the store.
        most_rows: sequences that decode together.
    """

    sizes: Sizes
    most_rows: int


@dataclass(frozen=True)
class Step:
    """A step that all compute; the pixels of its new pictures come beside it.

    Attributes:
        plan: of the step.
        shapes: of the pictures that it encodes, the aspect-ratio ids and tile masks.
    """

    plan: Plan
    shapes: tuple[tuple[int, tuple[int, ...]], ...]

    @classmethod
    def of(cls, plan: Plan, pictures: Sequence[PreparedPicture]) -> Step:
        return cls(plan, tuple((p.aspect_ratio_id, tuple(p.tile_mask.tolist())) for p in pictures))

    def pictures(self, pixels: Sequence[Tensor]) -> list[PreparedPicture]:
        return [
            PreparedPicture(encode.key, own, ratio, torch.tensor(mask))
            for encode, own, (ratio, mask) in zip(
                self.plan.encodes, pixels, self.shapes, strict=True
            )
        ]


@dataclass(frozen=True)
class Stay:
    """There is nothing to compute; the first rank is still there."""


@dataclass(frozen=True)
class End:
    """The engine is closed, or, where there is a reason, was not made."""

    reason: str | None = None


class Followers:
    """The other ranks, as the first one sees them, from where they call follow(). Of one thread.

    Args:
        model: that is split.
    Raises: ValueError on another rank than the first; OutOfStep.

    Attributes:
        free: bytes that the rank with the fewest has left; None where some system does not tell.
        idle_seconds: after which stay() is to be called where nothing else is.
    """

    def __init__(self, model: Any) -> None:
        self._ranks = model.share.ranks
        if self._ranks.rank:
            raise ValueError(
                f"this is rank {self._ranks.rank} of {self._ranks.size}: the first has the engine, the "
                "others call mllama.follow(model)"
            )
        self._is_open = True
        with self._together():
            self._channel = Channel(self._ranks, model.device)
            self.free = least_free_bytes(self._ranks, model.device)
        self.idle_seconds = min(_IDLE_SECONDS, self._channel.timeout_seconds / 4)

    @classmethod
    def of(cls, model: Any) -> Followers | None:
        """Those of a model; None where it is not split."""
        return None if model.share is None else cls(model)

    @contextmanager
    def preparing(self, sizes: Sizes, most_rows: int) -> Iterator[None]:
        """They make stores of these sizes, and prepare, while this is done here. Raises: OutOfStep."""
        with self._together():
            self._channel.send(Begin(sizes, most_rows))
            yield

    @contextmanager
    def computing(
        self, plan: Plan, pictures: Sequence[PreparedPicture], sampled: Tensor | None
    ) -> Iterator[None]:
        """They compute a step while it is computed here. Raises: OutOfStep.

        Args:
            pictures: that it encodes.
            sampled: the tokens of the step before, on the device.
        """
        with self._together():
            self._channel.send(Step.of(plan, pictures), [picture.pixels for picture in pictures])
            if plan.has_pending:
                dist.broadcast(sampled, group=self._ranks.group, group_src=0)
            yield

    def stay(self) -> None:
        """Say that there is nothing to compute, and see that they are there. Raises: OutOfStep."""
        with self._together():
            self._channel.send(Stay())
            self._channel.meet()

    def end(self, reason: str | None = None) -> None:
        """Let them go, unless one is gone, or nobody knows what it is at: that they see by themselves."""
        if self._is_open:
            with suppress(OutOfStep), self._together():
                self._channel.send(End(reason))
                self._channel.meet()  # a connection that is closed takes along what is not read yet
        self._is_open = False

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._is_open = False
            if isinstance(error, Exception):
                raise OutOfStep(f"the ranks do not compute together any longer: {error}") from error
            raise


@torch.no_grad()
def follow(model: Any) -> None:
    """Compute what the engine of the first rank plans, until it is closed: on every rank but the first, where
    that calls `mllama.Engine(model, ...)`.

    Args:
        model: that is split over the ranks, with a language head.
    Raises: ValueError on the first rank, or for a model that is not split; RuntimeError where the engine
        could not be made, or another rank is gone; what a step raises.
    """
    if model.share is None:
        raise ValueError("follow() is for a model that is split over ranks (tensor_parallel)")
    ranks = model.share.ranks
    if not ranks.rank:
        raise ValueError("this is the first rank, which has the engine: mllama.Engine(model, ...)")
    channel = Channel(ranks, model.device)
    least_free_bytes(ranks, model.device)
    forward: Forward | None = None
    places: dict[int, int] = {}
    while True:
        try:
            message, tensors = channel.receive()
        except RuntimeError as error:
            raise OutOfStep(
                f"the first rank does not say any longer what to do: {error}"
            ) from error
        if isinstance(message, End):
            with suppress(RuntimeError):  # the first rank has seen that all are here, and goes
                channel.meet()
            break
        if isinstance(message, Stay):
            channel.meet()
        elif isinstance(message, Begin):
            forward = Forward(model, store_of(model, message.sizes))
            forward.prepare(message.most_rows)
        elif isinstance(message, Step):
            assert forward is not None
            sampled = None
            if message.plan.has_pending:
                sampled = torch.empty(len(places), dtype=torch.int64, device=model.device)
                dist.broadcast(sampled, group=ranks.group, group_src=0)
            forward.run(message.plan, message.pictures(tensors), sampled, places)
            places = places_of(message.plan)
    if message.reason is not None:
        raise RuntimeError(f"the engine of the first rank was not made: {message.reason}")
