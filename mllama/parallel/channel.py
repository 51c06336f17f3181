"""What the first rank tells the others outside of a forward: objects and tensors of the host, in order."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mllama.parallel.ranks import Ranks

# Bytes that are sent at once, the first of which say how long a message is: most plans of a step are shorter.
_FRAME, _LENGTH = 16384, 8


class Channel:
    """From the first rank to all others, beside the group that the forward uses. Made by all ranks together.

    A rank that is gone, or does not come for as long as the group of the ranks waits, makes every call raise
    RuntimeError. The objects are pickled: ranks trust each other.

    Args:
        ranks: of a model.
        device: of the model.

    Attributes:
        timeout_seconds: how long a call waits for the others.
    """

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        timeout = ranks.timeout(device)
        self.timeout_seconds = timeout.total_seconds()
        self._group = dist.new_group(
            dist.get_process_group_ranks(ranks.group),
            timeout=timeout,
            backend="gloo",
            use_local_synchronization=True,  # other processes know nothing of it
        )
        self._frame = torch.zeros(_FRAME, dtype=torch.uint8)

    def send(self, message: Any, tensors: Sequence[Tensor] = ()) -> None:
        """Tell all others, who are to receive(); of the first rank."""
        kinds = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        data = pickle.dumps((message, kinds), protocol=pickle.HIGHEST_PROTOCOL)
        head = len(data).to_bytes(_LENGTH, "little") + data[: _FRAME - _LENGTH]
        self._frame[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        self._pass_on(self._frame)
        if rest := data[_FRAME - _LENGTH :]:
            self._pass_on(torch.frombuffer(bytearray(rest), dtype=torch.uint8))
        for tensor in tensors:
            self._pass_on(tensor.contiguous())

    def receive(self) -> tuple[Any, list[Tensor]]:
        """What the first rank sends next."""
        self._pass_on(self._frame)
        head = self._frame.numpy().tobytes()
        length = int.from_bytes(head[:_LENGTH], "little")
        data = head[_LENGTH : _LENGTH + length]
        if len(data) < length:
            rest = torch.empty(length - len(data), dtype=torch.uint8)
            self._pass_on(rest)
            data += rest.numpy().tobytes()
        message, kinds = pickle.loads(data)
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in kinds]
        for tensor in tensors:
            self._pass_on(tensor)
        return message, tensors

    def meet(self) -> None:
        """Wait until all ranks are here: what is sent says nothing of whether it is received."""
        dist.all_reduce(torch.zeros(1), group=self._group)

    def _pass_on(self, tensor: Tensor) -> None:
        if tensor.numel():
            dist.broadcast(tensor.view(-1).view(torch.uint8), group=self._group, group_src=0)
