"""What the models return: fields by attribute, by name or by place, as in `transformers`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mllama.cache import MllamaCache


class _Output:
    """Access as in `transformers`: places and names skip the fields that are None."""

    def keys(self) -> list[str]:
        return [f.name for f in fields(self) if getattr(self, f.name) is not None]  # type: ignore[arg-type]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.keys())

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            if key not in self.keys():
                raise KeyError(key)
            return getattr(self, key)
        return self.to_tuple()[key]

    def __contains__(self, key: str) -> bool:
        return key in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


@dataclass
class VisionOutput(_Output):
    last_hidden_state: Tensor


@dataclass
class BaseModelOutput(_Output):
    last_hidden_state: Tensor
    past_key_values: MllamaCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class CausalLMOutput(_Output):
    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: MllamaCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class GenerateOutput(_Output):
    """What ``generate`` returns with return_dict_in_generate=True.

    sequences: (B, L + new) int64, prompt and new tokens.
    scores, logits: per new token (B, V) float32, with output_scores and output_logits.
    attentions: None, no attention weights are formed.
    hidden_states: per new token a tuple of (B, columns, E), with output_hidden_states.
    past_key_values: all of it but the last token of each row, ready for the next turn.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    attentions: None = None
    hidden_states: tuple[tuple[Tensor, ...], ...] | None = None
    past_key_values: MllamaCache | None = None


for _output in (VisionOutput, BaseModelOutput, CausalLMOutput):
    torch.export.register_dataclass(_output)  # torch.export and FSDP look for the tensors in them
