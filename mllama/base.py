"""What all models share: configuration, backend, initialisation, loading and saving."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mllama.backend import Ops
from mllama.cache import MllamaCache
from mllama.checkpoints import weights
from mllama.config import MllamaConfig, MllamaTextConfig, MllamaVisionConfig
from mllama.layers import Recomputing, init_normal
from mllama.semantics import Semantics, SemanticsLike, resolve_semantics

_Model = TypeVar("_Model", bound="MllamaPreTrainedModel")


class MllamaPreTrainedModel(nn.Module):
    """Base of the models.

    Args:
        config: the model's configuration; kept as a copy whose ``semantics`` are settled.
        backend: "auto" (the kernels where there are any for the device), "kernels" or "reference"; or the
            ops of the model that this one is part of.
        semantics: overrides the config's; see :mod:`mllama.semantics`.
    """

    config: Any
    supports_gradient_checkpointing = True

    def __init__(
        self,
        config: MllamaConfig | MllamaTextConfig | MllamaVisionConfig,
        *,
        backend: str | Ops = "auto",
        semantics: SemanticsLike | None = None,
    ) -> None:
        super().__init__()
        self.semantics: Semantics = resolve_semantics(
            config.semantics if semantics is None else semantics
        )
        self.config = dataclasses.replace(config, semantics=self.semantics)
        self._is_part = isinstance(backend, Ops)
        if isinstance(backend, Ops):
            self.ops: Ops = backend
        else:
            self.ops = Ops(backend, torch.get_default_device())

    @property
    def backend(self) -> str:
        """What runs where the model is now, "kernels" or "reference"; assigning "auto", "kernels" or
        "reference" changes the whole model it belongs to."""
        return self.ops.backend_on(self.device)

    @backend.setter
    def backend(self, backend: str) -> None:
        self.ops.select(backend, self.device)

    def _apply(self: _Model, fn: Any, recurse: bool = True) -> _Model:
        """As for every module: here the model may have been moved to where its ops run otherwise."""
        super()._apply(fn, recurse)
        if not self._is_part:
            self.ops.settle(self.device)
        return self

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def get_input_embeddings(self) -> nn.Module:
        """What turns tokens (in the vision tower: pixels) into vectors."""
        for name in ("embed_tokens", "patch_embedding"):
            if hasattr(self, name):
                return getattr(self, name)
        inner = self.model if hasattr(self, "model") else self.language_model
        return inner.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """The head that turns vectors into logits, in the models that have one."""
        return getattr(self, "lm_head", None)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any layers of the model are computed again in the backward pass."""
        return any(stack.recompute_every for stack in self._recomputing())

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """In training mode keep each layer's input alone for the backward pass, and compute the layer again.

        Args, as in `transformers`:
            gradient_checkpointing_kwargs: ``use_reentrant`` can only be False, since the layers read image
                tiles besides their input.
            every_n_layers: of each tower only every so many layers, from the first.
            offload: only False: what is kept stays on the device.
        Raises: ValueError for anything else.
        """
        if dict(gradient_checkpointing_kwargs or {}) not in ({}, {"use_reentrant": False}):
            raise ValueError(
                "gradient_checkpointing_kwargs can be {'use_reentrant': False} or nothing, got "
                f"{gradient_checkpointing_kwargs}"
            )
        if every_n_layers < 1 or offload:
            raise ValueError(
                f"every_n_layers must be at least 1 and offload False, got {every_n_layers} and {offload}"
            )
        for stack in self._recomputing():
            stack.recompute_every = every_n_layers

    def gradient_checkpointing_disable(self) -> None:
        """Keep for the backward pass whatever it reads."""
        for stack in self._recomputing():
            stack.recompute_every = 0

    def _recomputing(self) -> Iterator[Recomputing]:
        return (module for module in self.modules() if isinstance(module, Recomputing))

    @contextmanager
    def no_grad_if_caching(
        self, use_cache: bool | None, cache: MllamaCache | None, labels: Tensor | None = None
    ) -> Iterator[bool]:
        """Settles whether a forward keeps a cache, which holds values and no graph.

        Without a choice of the caller it is the config's, but not in training mode or for a loss.
        """
        if use_cache is None:
            text_config = getattr(self.config, "text_config", self.config)
            use_cache = text_config.use_cache and not self.training and labels is None
        caching = use_cache or cache is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not caching):
            yield caching

    def init_weights(self) -> None:
        """Draw all parameters anew as `transformers` does; a part leaves it to the whole."""
        if self._is_part:
            return
        std = getattr(self.config, "text_config", self.config).initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("gate"):  # gates begin closed, but those of the global vision layers
                nn.init.zeros_(parameter)
            elif name.endswith(
                (".gate_attn", ".gate_ffn", "class_embedding", "embedding.embedding")
            ):
                nn.init.normal_(parameter, std=std)
        for module in self.modules():
            init_normal(module, std)

    @classmethod
    def from_pretrained(
        cls: type[_Model],
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        backend: str = "auto",
        semantics: SemanticsLike = "auto",
    ) -> _Model:
        """Load a checkpoint folder; see :func:`mllama.checkpoints.weights.load_pretrained`."""
        return weights.load_pretrained(
            cls, folder, dtype=dtype, device=device, backend=backend, semantics=semantics
        )

    def save_pretrained(
        self, folder: str | os.PathLike[str], max_shard_size: int | str = "5GB"
    ) -> None:
        """Write a checkpoint folder; see :func:`mllama.checkpoints.weights.save_pretrained`."""
        weights.save_pretrained(self, folder, max_shard_size)
