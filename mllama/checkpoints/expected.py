"""What the files of a checkpoint must hold for a configuration, before a module is built."""

from __future__ import annotations

from pathlib import Path

from mllama.checkpoints.checkpoint import Checkpoint, CheckpointError
from mllama.checkpoints.key_layout import HEAD, PROJECTOR, TEXT, VISION, KeyLayout
from mllama.config import MllamaConfig, MllamaTextConfig, MllamaVisionConfig
from mllama.shapes import (
    Shapes,
    head_shapes,
    layer_tensors,
    projector_shapes,
    text_shapes,
    vision_shapes,
)

Config = MllamaConfig | MllamaTextConfig | MllamaVisionConfig

_FEW_TENSORS = 4000  # a list of so many that are missing is made at once


def check_depth(folder: Path, config: Config, checkpoint: Checkpoint) -> None:
    """Raises: CheckpointError where the files are so far from having all layers that a list of what is
    missing tells nobody anything, and takes long."""
    names = ("text_config", "vision_config")
    towers = [getattr(config, name) for name in names if hasattr(config, name)] or [config]
    asked, there = sum(map(layer_tensors, towers)), len(checkpoint.tensors)
    if asked > 2 * there + _FEW_TENSORS:
        layers = ", ".join(f"{tower.num_hidden_layers} ({tower.part})" for tower in towers)
        reason = f"num_hidden_layers {layers} means {asked} tensors of layers, the files have {there} tensors"
        raise CheckpointError(folder, [*checkpoint.problems, reason])


def expected_shapes(config: Config, layout: KeyLayout) -> dict[str, tuple[int, ...]]:
    """What the files must hold, by the state-dict names of the class."""
    text = getattr(config, "text_config", config)
    vision = getattr(config, "vision_config", config)
    parts: dict[str, Shapes] = {}
    if isinstance(text, MllamaTextConfig):
        parts |= {TEXT: text_shapes(text), HEAD: head_shapes(text)}
    if isinstance(vision, MllamaVisionConfig):
        parts[VISION] = vision_shapes(vision)
    if isinstance(config, MllamaConfig):
        parts[PROJECTOR] = projector_shapes(config)
    return {
        layout.module_name(prefix + name): shape
        for prefix, shapes in parts.items()
        if not layout.is_other_part(prefix)
        for name, shape in shapes.items()
    }
