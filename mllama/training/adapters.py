"""LoRA adapters of PEFT on our models: made to train, saved, and loaded into a model that generates."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from mllama.checkpoints.checkpoint import read_json
from mllama.checkpoints.safetensors_header import BadHeader, read_header
from mllama.quantized_modules import Quantized, WholeWeights
from mllama.wording import quoted, reason, shown

from .adapter_config import checked_entries
from .adapter_plan import Tensors, lora_options
from .options import TrainingOptions

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TOLD = 20  # faults in one message
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


def use_adapter(model: nn.Module, folder: Path) -> None:
    """Let a model answer with the adapter in a folder: added to its weights, or where any of those that it
    changes are quantised, beside them.

    The folder may be anybody's: configuration and header are checked against each other and the model before
    a tensor is read, and patterns are tried in a process of their own.

    Raises: FileNotFoundError, or ValueError that lists what does not fit.
    """
    if not (folder / CONFIG).exists() or not (folder / WEIGHTS).exists():
        raise FileNotFoundError(f"{folder} holds no adapter: {CONFIG} and {WEIGHTS} are expected")
    stored = read_json(folder / CONFIG)
    if (kind := stored.get("peft_type")) != "LORA":
        raise ValueError(f"{folder} holds an adapter of type {quoted(kind)}; LORA is supported")
    peft = require_peft()
    entries, problems = checked_entries(stored)
    _refuse(folder, problems)
    try:
        tensors = Tensors.from_header(model, read_header(folder / WEIGHTS))
    except BadHeader as error:
        raise ValueError(f"the adapter in {folder} cannot be read: {error}") from None
    options, problems = lora_options(model, entries, tensors)
    _refuse(folder, problems)
    before = dict(model.named_modules())
    try:
        _merge(peft, model, folder, tensors, peft.LoraConfig(**options))
    except (RuntimeError, ValueError, KeyError) as error:
        _restore(model, before)
        raise ValueError(
            f"the adapter in {folder} does not fit the model: {reason(error)}"
        ) from error


def _merge(peft: ModuleType, model: nn.Module, folder: Path, tensors: Tensors, config: Any) -> None:
    wrapped = peft.PeftModel.from_pretrained(model, folder, config=config)
    # By itself PEFT would ask the hub for the base model that the configuration names, to tell whether the
    # embedding that is adapted belongs to the adapter; it is loaded where the file has it.
    own = wrapped.state_dict(destination=WholeWeights())
    state = peft.get_peft_model_state_dict(wrapped, own, save_embedding_layers=False)
    own = {name for name in tensors.names if not name.endswith(".base_layer.weight")}
    if unknown := sorted(own ^ state.keys()):
        raise ValueError(shown(unknown[0]))
    adapted = {
        name.removesuffix(".base_layer")
        for name, module in model.named_modules()
        if isinstance(module, Quantized) and name.endswith(".base_layer")
    }
    if not adapted:
        wrapped.merge_and_unload(safe_merge=True)
        return
    for name, module in list(model.named_modules()):
        if name in adapted or not hasattr(module, "base_layer"):
            continue
        module.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.get_base_layer())


def _restore(model: nn.Module, before: dict[str, nn.Module]) -> None:
    """Take out of a model again what PEFT has put around its modules."""
    vars(model).pop("peft_config", None)
    for name, module in before.items():
        parent, _, child = name.rpartition(".")
        if name and getattr(before[parent], child) is not module:
            setattr(before[parent], child, module)


def _refuse(folder: Path, problems: list[str]) -> None:
    if problems:
        count = f"{len(problems)} problems: " if len(problems) > 1 else ""
        raise ValueError(
            f"the adapter in {folder} does not fit the model: {count}" + "; ".join(problems[:_TOLD])
        )
