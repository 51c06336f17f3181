"""What the models return: fields by attribute, by name or by place, as in `transformers`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mllama.cache import MllamaCache


class _Output(dict[str, Any]):
    """A dictionary of the fields that are not None, in their order; trainers ask whether it is one.

    May also be made of one, as libraries do that convert what is in it.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __post_init__(self) -> None:
        given = vars(self)[next(iter(self.__dataclass_fields__))]
        if isinstance(given, dict):
            for name in self.__dataclass_fields__:
                setattr(self, name, given.get(name))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        values, names = vars(self), self.__dataclass_fields__
        if len(values) == len(names):  # else it is being made
            dict.clear(self)
            dict.update(self, {n: values[n] for n in names if values[n] is not None})

    def __reduce__(self) -> Any:
        return type(self), tuple(vars(self)[name] for name in self.__dataclass_fields__)

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self.__dataclass_fields__:
            raise KeyError(key)
        setattr(self, key, value)

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def keys(self) -> list[str]:  # type: ignore[override]
        return list(super().keys())

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())


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
