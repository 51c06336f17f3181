"""LoRA adapters of PEFT on our models: made for training, saved, and loaded into a model that generates."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors import safe_open
from torch import nn

from mllama.adapted import adapter_key
from mllama.checkpoints.checkpoint import read_json

from .options import TrainingOptions

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of PEFT's names, before the model's own
_TEXT = r"model\.language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
_VISION = r"model\.vision_model\..*\.(q_proj|k_proj|v_proj|o_proj|fc1|fc2)"


def require_peft() -> ModuleType:
    """The package peft. Raises: ModuleNotFoundError that says how to get it."""
    try:
        import peft
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "adapters need peft: pip install 'mllama-kernels[train]' (--lora-rank 0 trains without)"
        ) from None
    return peft


def add_adapters(model: nn.Module, options: TrainingOptions, base: str) -> Any:
    """The model wrapped by PEFT, with new adapters as the only parameters that are trained.

    They are float32 whatever the model's dtype is. ``base`` is where the model came from.
    """
    peft = require_peft()
    config = peft.LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.alpha,
        lora_dropout=options.lora_dropout,
        target_modules=f"{_TEXT}|{_VISION}" if options.lora_vision else _TEXT,
    )
    wrapped = peft.get_peft_model(model, config)
    wrapped.peft_config["default"].base_model_name_or_path = base
    return wrapped


def save_adapter(wrapped: Any, folder: Path) -> None:
    """Write the adapter as PEFT does, readable for whoever reads the rest of the folder."""
    wrapped.save_pretrained(folder)
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode & 0o777)


def merge_adapter(model: nn.Module, folder: Path) -> None:
    """Add the adapter in a folder to the weights of the model it was trained on.

    Raises: FileNotFoundError, or ValueError naming what does not fit.
    """
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} holds no adapter: {CONFIG} and {WEIGHTS} are expected")
    kind = read_json(folder / CONFIG).get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{folder} holds an adapter of type {kind!r}; LORA is supported")
    peft = require_peft()
    try:
        wrapped = peft.PeftModel.from_pretrained(model, folder)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"the adapter in {folder} does not fit the model: {error}") from error
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        stored = {_PREFIX + adapter_key(model, name.removeprefix(_PREFIX)) for name in file.keys()}
    unknown = sorted(stored ^ peft.get_peft_model_state_dict(wrapped).keys())
    if unknown:
        raise ValueError(f"the adapter in {folder} does not fit the model: {unknown[0]}")
    wrapped.merge_and_unload(safe_merge=True)
