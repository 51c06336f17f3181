"""What all models share: configuration, backend, initialisation, loading and saving."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mllama.adapted import AdaptedMixin
from mllama.backend import Ops
from mllama.cache import MllamaCache
from mllama.checkpoints import weights
from mllama.checkpoints.placement import resolve_device
from mllama.checkpoints.published_call import check_save_arguments
from mllama.config import MllamaConfig, MllamaTextConfig, MllamaVisionConfig
from mllama.layers import Recomputing, init_normal
from mllama.parallel.split import Share, require_whole
from mllama.parallel.states import gathered, is_stored_with_adapters, outlined
from mllama.quantization.policy import Quantization
from mllama.quantized_modules import Quantized, WholeWeights
from mllama.semantics import Semantics, SemanticsLike, resolve_semantics
from mllama.surface import SurfaceMixin
from mllama.vocabulary import VocabularyMixin

_Model = TypeVar("_Model", bound="MllamaPreTrainedModel")


def _execution_device(model: nn.Module) -> torch.device | None:
    """That of the first module of which a hook of `accelerate` names one."""
    for module in model.modules():
        hook = vars(module).get("_hf_hook")
        for one in getattr(hook, "hooks", (hook,)):
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.empty(0, device=device).device  # an index or a name, too
    return None


class MllamaPreTrainedModel(AdaptedMixin, VocabularyMixin, SurfaceMixin, nn.Module):
    """Base of the models.

    Args:
        config: the model's configuration; kept as a copy whose ``semantics`` are settled, which the
            parts of the model share.
        backend: "auto" (the kernels where there are any for the device), "kernels" or "reference"; or the
            ops of the model that this one is part of.
        semantics: overrides the config's; see :mod:`mllama.semantics`.
    """

    config: Any
    quantization: Quantization | None = None  # of a model that was loaded so
    share: Share | None = None  # of a model that is split over ranks, the part that is here
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
        self._is_part = isinstance(backend, Ops)
        self.config = (
            config if self._is_part else dataclasses.replace(config, semantics=self.semantics)
        )
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
        """Where the model computes; of weights that `accelerate` has offloaded, where it will bring them."""
        device = next(self.parameters()).device
        return (_execution_device(self) or device) if device.type == "meta" else device

    @property
    def base_model(self) -> nn.Module:
        """The model without its head; one that has none is its own."""
        return getattr(self, "model", self)

    def add_model_tags(self, tags: Sequence[str] | str) -> None:
        """Keep words for a model card in ``model_tags``, as trainers ask; nothing here writes cards."""
        given = [tags] if isinstance(tags, str) else tags
        self.model_tags = list(dict.fromkeys([*getattr(self, "model_tags", ()), *given]))

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
        """In training mode keep only each layer's input for the backward pass, and compute the layer again.

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

        Without a choice of the caller it is the config's, but not in training mode, for a loss or in an
        exported program. Raises: ValueError for a cache in an exported program.
        """
        exporting = torch.compiler.is_exporting()
        if use_cache is None:
            text_config = getattr(self.config, "text_config", self.config)
            use_cache = (
                text_config.use_cache and not (self.training or exporting) and labels is None
            )
        caching = use_cache or cache is not None
        if caching and exporting:
            raise ValueError(
                "an exported program keeps no cache: give use_cache=False and no past_key_values"
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not caching):
            yield caching

    def wants_hidden_states(self, asked: bool | None) -> bool:
        """Whether a forward returns them: as asked for, else as either configuration of text says."""
        if asked is not None:
            return asked
        text_config = self.config.get_text_config()
        return self.config.output_hidden_states or text_config.output_hidden_states

    def init_weights(self) -> None:
        """Draw all parameters anew as `transformers` does; a part leaves it to the whole.

        Raises: TypeError for a model with quantised weights, which hold what was loaded, and for one that
            is split over ranks, which would draw other numbers.
        """
        if self._is_part:
            return
        require_whole(self, "init_weights()")
        if any(isinstance(module, Quantized) for module in self.modules()):
            raise TypeError("quantised weights cannot be drawn anew: load with dequantize=True")
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

    def state_dict(
        self,
        *args: Any,
        destination: Any = None,
        prefix: str = "",
        keep_vars: bool = False,
    ) -> Any:
        """As for every module. Of a model that is split over ranks whole tensors under the same names, on
        the CPU of each rank, gathered one after another: all ranks call it.

        Where PEFT's model around it is asked, which it is for every adapter that is loaded, only adapters and
        head are gathered: a process may not hold all weights. The other tensors that are split are on the
        meta device then, without values.

        Raises: ValueError for a part of a split model, and for its parameters themselves (keep_vars).
        """
        own = functools.partial(super().state_dict, *args, prefix=prefix, keep_vars=keep_vars)
        is_within = self._is_part and destination is not None
        if self.share is None or is_within or isinstance(destination, WholeWeights):
            return own(destination=destination)
        if self._is_part or keep_vars or args:
            raise ValueError(
                "a model that is split over ranks (tensor_parallel) gives a state dict as a whole only, of "
                "no parameters: model.state_dict()"
            )
        state = own()
        for name, tensor in state.items():
            own_name = name.removeprefix(prefix)
            if destination is None or is_stored_with_adapters(own_name):
                state[name] = gathered(self.share, own_name, tensor, keep=True)
            else:
                state[name] = outlined(self.share, own_name, tensor)
        if destination is None:
            return state
        destination.update(state)
        getattr(destination, "_metadata", {}).update(state._metadata)
        return destination

    @classmethod
    def from_pretrained(
        cls: type[_Model],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: Any = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device: torch.device | str | int | None = None,
        device_map: Any = None,
        backend: str = "auto",
        semantics: SemanticsLike = "auto",
        generation_config: Any = None,
        quantization: str | None = None,
        quantization_overrides: Mapping[str, str] | None = None,
        dequantize: bool = False,
        projector: str | os.PathLike[str] | None = None,
        context: int | None = None,
        images: int | None = None,
        force: bool = False,
        tensor_parallel: Any = False,
        **options: Any,
    ) -> _Model:
        """Load a checkpoint of a folder or hub id, in evaluation mode.

        Args:
            torch_dtype: the older name of ``dtype``.
            device_map: another way to name the device: "auto" (the current GPU if there is one, else the
                CPU), a device, an index, or a dictionary whose values are all the same device.
            options: the other arguments that `transformers` takes. For an id token, revision, cache_dir,
                local_files_only, force_download; for both subfolder. Fields of the configuration, as
                ``output_hidden_states``, replace the stored ones. ``attn_implementation``,
                ``low_cpu_mem_usage``, ``trust_remote_code`` and the like have no meaning here and are
                accepted. ``load_in_4bit``, ``load_in_8bit`` and a `BitsAndBytesConfig` as
                ``quantization_config`` mean ``quantization="q4_k"`` and ``"int8"``. What cannot be met, as
                other files than safetensors, is refused.
            others: see :func:`mllama.checkpoints.weights.load_pretrained`.
        Raises: ValueError for what cannot be met, saying what to do instead; TypeError naming unknown
            arguments; and as `load_pretrained`.
        """
        return weights.load_pretrained(
            cls,
            pretrained_model_name_or_path,
            config=config,
            dtype=weights.one_dtype(dtype, torch_dtype),
            device=resolve_device(device, device_map, of_rank=bool(tensor_parallel)),
            backend=backend,
            semantics=semantics,
            generation_config=generation_config,
            quantization=quantization,
            quantization_overrides=quantization_overrides,
            dequantize=dequantize,
            projector=projector,
            context=context,
            images=images,
            force=force,
            tensor_parallel=tensor_parallel,
            **options,
        )

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        max_shard_size: int | str = "5GB",
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        is_main_process: bool = True,
        **options: Any,
    ) -> None:
        """Write a checkpoint folder; see :func:`mllama.checkpoints.saving.save_pretrained`.

        Args:
            is_main_process: whether this process writes; of a model that is split over ranks all call this,
                and the first alone does.
            options: others that `transformers` takes: ``safe_serialization`` can only be True, and
                ``push_to_hub`` and ``variant`` cannot be met.
        """
        check_save_arguments(options)
        if is_main_process or self.share is not None:
            weights.save_pretrained(
                self,
                save_directory,
                max_shard_size,
                state_dict=state_dict,
                writes=is_main_process,
            )
