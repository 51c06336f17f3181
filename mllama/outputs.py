"""What the models return: fields by attribute, by name or by place, as in `transformers`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

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
