"""What people call on a model of `transformers` besides forward and generate."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mllama.quantized_modules import Quantized


class SurfaceMixin:
    """Methods and attributes of `transformers`' `PreTrainedModel`, with the same answers.

    Attributes:
        name_or_path: where the model was loaded from; "" for one made in code.
    """

    main_input_name = "input_ids"
    input_modalities: tuple[str, ...] = ("image", "text")
    output_modalities = ("text",)
    name_or_path: str = ""
    _input_hooks: tuple[Any, ...] = ()

    @classmethod
    def can_generate(cls) -> bool:
        """Whether the class has ``generate``."""
        return hasattr(cls, "generate")

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many parameters there are, quantised weights by what they stand for: all, those that are
        trained, those outside of any `nn.Embedding`; of a split model those of this rank."""
        module: nn.Module = self  # type: ignore[assignment]
        left_out = {
            f"{name}.weight"
            for name, part in module.named_modules()
            if exclude_embeddings and isinstance(part, nn.Embedding)
        }
        quantized = sum(
            part.weight.shape.numel()
            for name, part in module.named_modules()
            if isinstance(part, Quantized) and not only_trainable
            if f"{name}.weight" not in left_out
        )
        return quantized + sum(
            parameter.numel()
            for name, parameter in module.named_parameters()
            if name not in left_out and (parameter.requires_grad or not only_trainable)
        )

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the parameters and, by default, the buffers."""
        module: nn.Module = self  # type: ignore[assignment]
        buffers = module.buffers() if return_buffers else ()
        return sum(tensor.nbytes for tensor in (*module.parameters(), *buffers))

    def enable_input_require_grads(self) -> None:
        """Let gradients begin at what the token embedding gives, though its weights are frozen."""
        self.disable_input_require_grads()
        embedding: nn.Module = self.get_input_embeddings()  # type: ignore[attr-defined]
        self._input_hooks = (embedding.register_forward_hook(_require_grad),)

    def disable_input_require_grads(self) -> None:
        for hook in self._input_hooks:
            hook.remove()
        self._input_hooks = ()


def _require_grad(module: nn.Module, inputs: Any, output: Tensor) -> None:
    output.requires_grad_(True)
