"""The processes that a model is split over, as one of them sees them, and what they exchange in a forward."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mllama.parallel.group import make_default_group
from mllama.parallel.shared_memory import SharedMemory
from mllama.wording import quoted


@dataclass(frozen=True, eq=False)
class Ranks:
    """The ranks of a process group. All of them run the same code on the same inputs.

    Attributes:
        group: of `torch.distributed`.
        rank: of this process within the group.
        size: how many they are.
        memory: what they exchange tensors of the host through in place of the group; None: nothing.
    """

    group: Any
    rank: int
    size: int
    memory: SharedMemory | None = None

    @classmethod
    def of(cls, tensor_parallel: Any) -> Ranks | None:
        """Those of an argument ``tensor_parallel``: True for all of the default process group, which is made
        from the environment of `torchrun` where there is none yet, a process group, or None or False.

        Returns: None for a single process, which needs no group.
        Raises: ValueError for a process group that there is not, or that this process is not part of;
            TypeError for another kind of argument.
        """
        if tensor_parallel is None or tensor_parallel is False:
            return None
        if tensor_parallel is True:
            if not dist.is_available():
                raise ValueError("tensor_parallel=True: this torch was built without distributed")
            if not dist.is_initialized():
                if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
                    raise ValueError(
                        "tensor_parallel=True splits a model over the ranks of a process group, and there is "
                        "none: run under torchrun, or call torch.distributed.init_process_group() first"
                    )
                make_default_group()
            group = dist.group.WORLD
        elif isinstance(tensor_parallel, dist.ProcessGroup):
            group = tensor_parallel
        elif tensor_parallel is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("tensor_parallel: this process is not a member of the process group")
        else:
            raise TypeError(
                f"tensor_parallel must be True, False or a process group, got {quoted(tensor_parallel)}"
            )
        size = dist.get_world_size(group)
        return None if size == 1 else cls(group, dist.get_rank(group), size)

    def summed(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks, in its dtype; x may be overwritten."""
        return _Summed.apply(x, self)

    def side_by_side(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """x (..., own size) of all ranks as (..., sum of sizes), in their order.

        Raises: ValueError for another size than this rank's.
        """
        if x.shape[-1] != sizes[self.rank]:
            raise ValueError(
                f"a product of {x.shape[-1]} features instead of the {sizes[self.rank]} of rank {self.rank}: "
                "a linear of a model that is split over ranks (tensor_parallel) has been replaced by another"
            )
        return _SideBySide.apply(x, self, tuple(sizes))

    def memory_for(self, x: Tensor) -> SharedMemory | None:
        """What x is exchanged through; None: the group, which a graph of `torch.compile` can have in it."""
        return None if torch.compiler.is_compiling() or not x.is_cpu else self.memory

    def send(self, x: Tensor, rank: int) -> None:
        """Make x, contiguous and of one shape and dtype on all ranks, what it is on one of them."""
        dist.broadcast(x, src=dist.get_global_rank(self.group, rank), group=self.group)

    def gathered(self, value: Any) -> list[Any]:
        """What each of them has given, on all of them; it is pickled."""
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, value, group=self.group)
        return every

    def agreed(self, value: Any) -> Any:
        """What the first rank has given, on all of them; it is pickled."""
        box = [value]
        source = dist.get_global_rank(self.group, 0)
        dist.broadcast_object_list(box, src=source, group=self.group)
        return box[0]

    def on_device(self, device: torch.device) -> Ranks:
        """These ranks with what a model on such devices exchanges through: on the CPU of one machine that is
        memory which they have in common. All of them call this together, each with its own device; a GPU is
        made the current one of the process, as exchanging objects by NCCL needs.

        Raises: ValueError on all ranks where two have the same GPU, or not all the same kind of device.
        """
        if device.type == "cuda":
            torch.cuda.set_device(device)
        every = self.gathered((socket.gethostname(), str(device)))
        kinds = sorted({name.partition(":")[0] for _, name in every})
        if len(kinds) > 1:
            raise ValueError(
                f"the ranks of a split model are on {' and '.join(kinds)}: take one kind"
            )
        for rank, place in enumerate(every):
            if kinds == ["cuda"] and (first := every.index(place)) < rank:
                raise ValueError(
                    f"ranks {first} and {rank} of a split model are both on {place[1]} of {place[0]}: give "
                    "each a GPU of its own"
                )
        if kinds != ["cpu"]:
            return self
        seconds = self.timeout(device).total_seconds()
        memory = SharedMemory.of_ranks(self.rank, self.size, seconds, self.gathered)
        return replace(self, memory=memory)

    def timeout(self, device: torch.device) -> timedelta:
        """How long a rank waits for the others in an exchange between such devices."""
        return self.group._get_backend(device).options._timeout

    @property
    def can_be_captured(self) -> bool:
        """Whether a CUDA graph takes in what they exchange: that of NCCL is work of the device, and that of
        gloo goes through the host."""
        return "cuda:nccl" in dist.get_backend_config(self.group)

    def __reduce__(self) -> Any:
        raise TypeError(
            "a model that is split over ranks cannot be pickled or copied: its parts are in other processes"
        )


_NO_GRADIENT = (
    "a model that is split over ranks (tensor_parallel) has no gradients: train with FSDP or data parallel, "
    "as `torchrun -m mllama finetune` does"
)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        if (memory := ranks.memory_for(x)) is not None:
            return memory.summed(x.detach())
        total = x.detach().contiguous()
        dist.all_reduce(total, group=ranks.group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(_NO_GRADIENT)


class _SideBySide(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks, sizes: tuple[int, ...]) -> Tensor:
        if (memory := ranks.memory_for(x)) is not None:
            return memory.side_by_side(x.detach(), sizes)
        widest = max(sizes)  # all ranks give tensors of one size
        own = F.pad(x.detach(), (0, widest - x.shape[-1])).contiguous()
        every = own.new_empty(len(sizes), *own.shape)
        dist.all_gather(list(every.unbind(0)), own, group=ranks.group)
        return torch.cat([part[..., :n] for part, n in zip(every, sizes, strict=True)], dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(_NO_GRADIENT)
