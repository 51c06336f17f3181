"""Llama 3.2 Vision on its own kernels, with the names of `transformers`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mllama.cache import MllamaCache as MllamaCache
    from mllama.config import MllamaConfig as MllamaConfig
    from mllama.config import MllamaTextConfig as MllamaTextConfig
    from mllama.config import MllamaVisionConfig as MllamaVisionConfig
    from mllama.engine.engine import Engine as Engine
    from mllama.engine.following import follow as follow
    from mllama.engine.interface import Options as Options
    from mllama.generation.config import GenerationConfig as GenerationConfig
    from mllama.generation.streaming import TextStreamer as TextStreamer
    from mllama.model import MllamaForCausalLM as MllamaForCausalLM
    from mllama.model import MllamaForConditionalGeneration as MllamaForConditionalGeneration
    from mllama.model import MllamaModel as MllamaModel
    from mllama.processing.image_processor import MllamaImageProcessor as MllamaImageProcessor
    from mllama.processing.processor import MllamaProcessor as MllamaProcessor
    from mllama.quantization.plan import plan as plan
    from mllama.semantics import Semantics as Semantics
    from mllama.text import MllamaTextModel as MllamaTextModel
    from mllama.vision import MllamaVisionModel as MllamaVisionModel

# What the imports above are to type checkers; a module is imported on first use, so that a processor
# needs no model, a configuration no torch ops.
_MODULES = {
    "Engine": "mllama.engine.engine",
    "GenerationConfig": "mllama.generation.config",
    "MllamaCache": "mllama.cache",
    "MllamaConfig": "mllama.config",
    "MllamaForCausalLM": "mllama.model",
    "MllamaForConditionalGeneration": "mllama.model",
    "MllamaImageProcessor": "mllama.processing.image_processor",
    "MllamaModel": "mllama.model",
    "MllamaProcessor": "mllama.processing.processor",
    "MllamaTextConfig": "mllama.config",
    "MllamaTextModel": "mllama.text",
    "MllamaVisionConfig": "mllama.config",
    "MllamaVisionModel": "mllama.vision",
    "Options": "mllama.engine.interface",
    "Semantics": "mllama.semantics",
    "TextStreamer": "mllama.generation.streaming",
    "follow": "mllama.engine.following",
    "plan": "mllama.quantization.plan",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
