"""State dicts of a model that is split over ranks: whole tensors under the names of one process."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mllama.parallel.rules import Cut
from mllama.parallel.split import Share, Split
from mllama.quantization.names import part_names
from mllama.wording import quoted, shown
from mllama_kernels.encodings import ENCODINGS
from mllama_kernels.quantized_tensor import QuantizedTensor

Weight = Tensor | QuantizedTensor

# What PEFT draws new adapters from, without a change of the weights that they are beside.
_DRAWN = (True, False, None, "gaussian")


def gathered(share: Share, name: str, own: Tensor, *, keep: bool) -> Tensor | None:
    """A tensor of a state dict as a whole, on the CPU, where each rank has a part of it; one that is whole
    here as it is. All ranks call it in the same order, with their parts.

    Args:
        name: its name in the state dict of the model.
        keep: whether this rank wants it; the others get None.
    """
    own, cuts = own.detach(), cuts_of(share.split, name, own)
    if cuts is None:
        return own.cpu() if keep else None
    mine = cuts[share.ranks.rank]
    dim, length = mine.dim, mine.end - mine.begin

    def scaled(features: int) -> int:  # to those of the tensor, of which several may be in a byte
        return features * own.shape[dim] // length

    shape = list(own.shape)
    shape[dim] = scaled(cuts[-1].end)
    whole = torch.empty(shape, dtype=own.dtype) if keep else None
    done = 0
    for rank, cut in enumerate(cuts):
        if cut.end <= done:  # a part that ranks share, or a bias that the first adds
            continue
        shape[dim] = scaled(cut.end - cut.begin)
        is_own = rank == share.ranks.rank
        piece = own.contiguous() if is_own else own.new_empty(shape)
        share.ranks.send(piece.view(torch.uint8), rank)
        if whole is not None:
            whole.narrow(dim, scaled(cut.begin), shape[dim]).copy_(piece)
        done = cut.end
    return whole


def outlined(share: Share, name: str, own: Tensor) -> Tensor:
    """A tensor of a state dict as a whole, but on the meta device, without values; as it is where it is whole
    here."""
    cuts = cuts_of(share.split, name, own)
    if cuts is None:
        return own
    mine, shape = cuts[share.ranks.rank], list(own.shape)
    shape[mine.dim] = shape[mine.dim] * cuts[-1].end // (mine.end - mine.begin)
    return torch.empty(shape, dtype=own.dtype, device="meta")


def is_stored_with_adapters(name: str) -> bool:
    """Whether PEFT may store a tensor of a state dict with an adapter: the adapter's own, and the head."""
    segments = name.split(".")
    return segments[0] == "lm_head" or any(segment.startswith("lora_") for segment in segments)


def whole_numel(share: Share, name: str, own: Weight) -> int:
    """How many numbers there are on all ranks of a tensor of a state dict, of which ``own`` is here."""
    cuts = cuts_of(share.split, name, own)
    if cuts is None:
        return own.shape.numel()
    mine = cuts[share.ranks.rank]
    return own.shape.numel() * cuts[-1].end // (mine.end - mine.begin)


@dataclass(frozen=True)
class Gathering:
    """How the weights of a split model become whole, each when all ranks ask for it.

    Attributes:
        share: what is here.
        names: of the weights in the model's state dict, by those that they are asked for by.
        keep: whether this rank wants them.
    """

    share: Share
    names: Mapping[str, str]
    keep: bool

    def __call__(self, name: str, own: Weight) -> Weight | None:
        """The whole of a weight, of which ``own`` is here; None where it is not wanted."""
        place = self.names[name]
        if isinstance(own, Tensor):
            return gathered(self.share, place, own, keep=self.keep)
        ends = part_names(own.encoding)
        parts = {
            part: gathered(self.share, place + ends[part], tensor, keep=self.keep)
            for part, tensor in own.parts().items()
        }
        return QuantizedTensor.from_parts(own.encoding, parts, pack=False) if self.keep else None

    def nbytes(self, name: str, own: int) -> int:
        """Of the whole, by those of what is here."""
        cuts = self.share.split.cuts.get(self.names[name])
        if cuts is None:
            return own
        mine = cuts[self.share.ranks.rank]
        return own * cuts[-1].end // (mine.end - mine.begin)


def take_parts(
    model: Any, state_dict: MutableMapping[str, Tensor], prefix: str, *, copies: bool
) -> list[str]:
    """Put this rank's parts in the places of whole tensors, of a state dict that a model is about to load.

    Args:
        prefix: of the model's names in the state dict.
        copies: whether the parts are memory of their own: the model keeps them, and not the whole.
    Returns: what does not fit, a line each.
    """
    share, problems = model.share, []
    for adapter, config in getattr(model, "peft_config", {}).items():
        if (drawn := getattr(config, "init_lora_weights", None)) not in _DRAWN:
            problems.append(
                f"the adapter {quoted(adapter)} has init_lora_weights={quoted(drawn)}, which changes "
                "weights by the whole of them; in a model that is split over ranks (tensor_parallel) each "
                "rank has a part"
            )
    for key in [key for key in state_dict if key.startswith(prefix)]:
        whole = state_dict[key]
        try:
            part = _part(share, key.removeprefix(prefix), whole)
        except ValueError as error:
            problems.append(str(error))
            continue
        if part is not whole:
            state_dict[key] = part.clone() if copies else part
    return problems


def _part(share: Share, name: str, whole: Tensor) -> Tensor:
    """Raises: ValueError for a tensor that is not whole, or that no rank can have a part of."""
    cuts = cuts_of(share.split, name, whole)
    if cuts is None:
        return whole
    mine, total = cuts[share.ranks.rank], cuts[-1].end
    size = whole.shape[mine.dim]
    if size != total and name.rpartition(".")[2] in ("weight", "bias"):
        raise ValueError(
            f"size mismatch for {shown(name)}: a model that is split over ranks loads whole tensors, of "
            f"{total} in dimension {mine.dim}; got {tuple(whole.shape)}"
        )
    begin, end = mine.begin * size // total, mine.end * size // total
    return Cut(mine.dim, begin, end, mine.is_zero)(whole)


def cuts_of(split: Split, name: str, tensor: Weight) -> tuple[Cut, ...] | None:
    """The part of each rank, in features of the linear, of a tensor of a state dict; None if all have it as
    a whole. Beside parameters there are the parts of quantised weights, and LoRA adapters.

    Args:
        tensor: the whole of it or a part.
    Raises: ValueError for what goes with a linear that is split, and is none of these.
    """
    segments = name.split(".")
    ends = (
        end for end in range(1, len(segments)) if f"{'.'.join(segments[:end])}.weight" in split.cuts
    )
    if (end := next(ends, None)) is None:
        return None
    module, (kind, *rest) = ".".join(segments[:end]), segments[end:]
    if kind == "base_layer" and rest:  # within an adapter's module
        kind, *rest = rest
    cuts = split.cuts[f"{module}.weight"]
    dim = cuts[0].dim
    if kind in ("weight", "bias") and not rest:
        return split.cuts.get(f"{module}.{kind}")
    if kind == "weight" and rest[0] in ENCODINGS:
        is_whole = rest[1:] == ["table"] or tensor.dim() <= dim  # a scale of each row
        return None if is_whole else cuts
    if kind == "lora_A" and rest[-1:] == ["weight"]:
        return cuts if dim == 1 else None
    if kind == "lora_B" and (rest[-1:] == ["weight"] or (rest[-1:] == ["bias"] and dim == 0)):
        return cuts if dim == 0 else None
    raise ValueError(
        f"a model that is split over ranks (tensor_parallel) takes LoRA alone beside what is in parts, "
        f"lora_A and lora_B: not {shown(name)}; merge that in one process"
    )
