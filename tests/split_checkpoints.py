"""Checkpoints for models that are split over ranks, and what each rank has of a whole model's weights."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest import mock

import torch
from quantized_weights import same_bits
from torch import Tensor, nn

from mllama import MllamaConfig, MllamaForConditionalGeneration
from mllama.demo import checkpoint_path
from mllama.parallel.ranks import Ranks
from mllama.quantized_modules import Quantized

_LEFT_OUT = ("model.safetensors", "config.json")
_COLUMN = re.compile(
    r"(?:^|\.)(?:([qkv]_proj|gate_proj|up_proj)\.weight|fc1\.(?:weight|bias)|lm_head\.weight)$"
)
_ROW = re.compile(r"\.(?:o_proj|down_proj|fc2)\.weight$")


def write_checkpoint(
    folder: Path,
    *,
    text: Mapping[str, object] = MappingProxyType({}),
    vision: Mapping[str, object] = MappingProxyType({}),
    dtype: torch.dtype = torch.float32,
) -> Path:
    """The demo's with random weights, of a text tower of two layers whose 8 heads share 2 of keys and values,
    and whose rows are two blocks of 256; 4 heads in the vision tower. The rest as in ``text``, ``vision``."""
    entries = copy.deepcopy(json.loads((checkpoint_path() / "config.json").read_text()))
    entries["text_config"] |= {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
    }
    entries["text_config"] |= {"num_attention_heads": 8, "num_key_value_heads": 2}
    entries["text_config"] |= {"cross_attention_layers": [1], **text}
    entries["vision_config"] |= {"attention_heads": 4, "num_hidden_layers": 2, "image_size": 28}
    entries["vision_config"] |= {"intermediate_layers_indices": [0, 1], **vision}
    model = MllamaForConditionalGeneration(MllamaConfig.from_dict(entries))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name.rpartition(".")[2] or name.endswith("gate"):
                parameter.fill_(0.5)  # closed ones would hide the cross-attention
            else:
                parameter.copy_(0.05 * torch.randn(parameter.shape))
    model.to(dtype).save_pretrained(folder)
    for path in checkpoint_path().iterdir():
        if path.name not in _LEFT_OUT:
            shutil.copy(path, folder / path.name)
    return folder


class _Alone(Ranks):
    def gathered(self, value: Any) -> list[Any]:
        """The others are like it."""
        return [value] * self.size

    def on_device(self, device: torch.device) -> Ranks:
        return self


def alone(rank: int, size: int) -> Ranks:
    """One of so many ranks, of which the others do not run: files are read without them."""
    return _Alone(None, rank, size)


def part_of(name: str, whole: Tensor, rank: int, size: int, kv_heads: int) -> Tensor:
    """What a rank has of a weight, by its state-dict name: plain slices, written down a second time."""

    def between(dim: int, repeated: int = 0) -> Tensor:
        parts = min(size, repeated) if repeated else size
        own = rank * parts // size
        each = whole.shape[dim] / parts  # the vocabulary need not divide
        begin, end = int(own * each), int((own + 1) * each)
        return whole.narrow(dim, begin, end - begin)

    if _ROW.search(name):
        return between(1)
    if name.endswith("fc2.bias"):
        return whole if rank == 0 else torch.zeros_like(whole)
    if found := _COLUMN.search(name):
        is_repeated = found[1] in ("k_proj", "v_proj") and "vision_model" not in name
        return between(0, kv_heads if is_repeated else 0)
    return whole


def load(path: Path, ranks: Ranks | None = None, **options: Any) -> Any:
    """The part of a rank, or the whole. Nothing is exchanged meanwhile, so one process loads all of them."""
    with mock.patch.object(Ranks, "of", lambda given: given):
        return MllamaForConditionalGeneration.from_pretrained(
            path, tensor_parallel=ranks, device="cpu", **options
        )


def weights_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Parameters and quantised weights by name."""
    yield from model.named_parameters()
    for name, module in model.named_modules():
        if isinstance(module, Quantized):
            yield f"{name}.weight", module.weight


def check_ranks(path: Path, *sizes: int, **options: Any) -> None:
    """Every rank has the slices of the whole model, bit for bit, in the same encodings."""
    whole = dict(weights_of(load(path, **options)))
    for size in sizes:
        for rank in range(size):
            model = load(path, alone(rank, size), **options)
            own = dict(weights_of(model))
            assert own.keys() == whole.keys()
            kv = model.config.text_config.num_key_value_heads
            for name, weight in own.items():
                expected, plain = whole[name], isinstance(weight, Tensor)
                assert plain or weight.encoding == expected.encoding, name
                values = expected if plain else expected.dequantize()
                values = part_of(name, values, rank, size, kv)
                assert same_bits(weight if plain else weight.dequantize(), values), (name, rank)
