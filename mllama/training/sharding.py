"""Weights in pieces on all ranks (FSDP2), while they are trained and when they are saved.

`accelerate` has FSDP2 for GPUs only: on a CPU it would wrap the whole model in DDP without a word. So torch's
`fully_shard` is called here, in one way for every device, before the model is given to the Trainer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from mllama.checkpoints.key_layout import KeyLayout, class_name
from mllama.checkpoints.saving import model_texts, write_folder
from mllama.checkpoints.stored_form import Item
from mllama.text import MllamaCrossAttentionDecoderLayer, MllamaSelfAttentionDecoderLayer
from mllama.vision import MllamaVisionEncoderLayer

from .ranks import TrainingRanks

_LAYERS = (
    MllamaSelfAttentionDecoderLayer,
    MllamaCrossAttentionDecoderLayer,
    MllamaVisionEncoderLayer,
)
_FILE_BYTES = 5 * 10**9


def shard(model: nn.Module, ranks: TrainingRanks, dtype: torch.dtype | None) -> None:
    """Leave of each weight this rank's rows, in float32 on its device, in place.

    A layer at a time is made float32, moved and cut; until then the model may be on the host.

    Args:
        dtype: that whole layers are in while they compute; None: float32. Autocast would keep a copy of each
            in it until the backward pass.
    """
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    layers = [m for m in model.modules() if isinstance(m, _LAYERS)]
    # What is read and not called has to stay with the rest: the head, for a loss without logits.
    for module in [*layers, model.get_input_embeddings()]:
        fully_shard(module.float(), mesh=mesh, mp_policy=policy)
    for parameter in model.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.float()
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model._is_accelerate_prepared = True  # or accelerate would wrap it in DDP, and refuse to


def local(tensor: Tensor) -> Tensor:
    """The rows that this rank holds, sharing memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def made_like(parameter: Tensor) -> Callable[[Tensor], Tensor]:
    """What makes of this rank's rows a tensor that lies as the parameter does."""
    if not isinstance(parameter, DTensor):
        return lambda rows: rows.to(parameter.device)
    mesh, placements = parameter.device_mesh, parameter.placements
    shape, stride = parameter.shape, parameter.stride()
    return lambda rows: DTensor.from_local(
        rows.to(parameter.device), mesh, placements, shape=shape, stride=stride
    )


def save_whole(
    model: nn.Module,
    folder: Path,
    dtype: torch.dtype,
    ranks: TrainingRanks,
    write_others: Callable[[Path], object],
) -> None:
    """Write a model as `save_pretrained` does, in a dtype: the first rank writes, and all give it their rows
    of one weight after another."""
    layout = KeyLayout(class_name(model))
    items = list(_items(model, dtype, layout))
    if not ranks.is_first:
        for item in items:
            item.make()
        return
    texts = model_texts(model, dtype, None)
    write_folder(folder, items, texts, _FILE_BYTES, write_others=write_others)


def _items(model: nn.Module, dtype: torch.dtype, layout: KeyLayout) -> Iterator[Item]:
    for name, tensor in model.state_dict().items():
        make = functools.partial(_whole, layout.published_name(name), tensor, dtype)
        yield Item(tensor.numel() * dtype.itemsize, make)


def _whole(name: str, tensor: Tensor, dtype: torch.dtype) -> list[tuple[str, Tensor]]:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return [(name, whole.to(dtype).cpu())]
