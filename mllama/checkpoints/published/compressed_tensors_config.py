"""What the quantization_config of compressed-tensors says beyond the stored tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllama.checkpoints.own_format import METHOD, SIGNED
from mllama.checkpoints.published.common import ACTIVATIONS_STAY
from mllama.checkpoints.safetensors_files import SafetensorsCheckpoint
from mllama.wording import quoted

_TOWER = "model.vision_model."
# Of activations, and of the cache of keys and values; fbgemm's `_ub` is a bound of activations.
_ACTIVATIONS = (
    ".input_scale",
    ".input_scale_ub",
    ".input_zero_point",
    ".output_scale",
    ".output_zero_point",
    ".q_scale",
    ".k_scale",
    ".v_scale",
)


def activation_scales(stored: SafetensorsCheckpoint) -> set[str]:
    """The tensors that say how activations are quantised, which they are not here."""
    return {name for name in stored.tensors if name.endswith(_ACTIVATIONS)}


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """What would make the decoded weights those of another model."""
    problems = []
    transforms = config.get("transform_config")
    if isinstance(transforms, Mapping) and transforms.get("config_groups", transforms):
        problems.append(
            "quantization_config has a transform_config: weights that are rotated while the model runs are "
            "not read; load one that was quantised without SpinQuant or QuIP"
        )
    sparsity = config.get("sparsity_config")
    kind = sparsity.get("format", "dense") if isinstance(sparsity, Mapping) else "dense"
    if kind != "dense":
        problems.append(
            f"quantization_config has a sparsity_config of format {quoted(kind)}: compressed sparse weights "
            "are not read; load one that is only quantised"
        )
    return problems


def config_notes(config: Mapping[str, Any], stored: SafetensorsCheckpoint) -> list[str]:
    """What the user should know: who quantises activations, and a vision tower that was not spared."""
    notes = []
    groups = config.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, Mapping) else []
    quantised = any(isinstance(s, Mapping) and s.get("input_activations") for s in schemes)
    if quantised or config.get("activation_scheme") or activation_scales(stored):
        notes.append(ACTIVATIONS_STAY)
    if config.get("kv_cache_scheme"):
        notes.append("other loaders quantise keys and values too; here they keep the model's dtype")
    ignored = config.get("ignore")
    spared = isinstance(ignored, list) and any("vision" in str(entry) for entry in ignored)
    scales = (".weight_scale", ".weight_packed")
    if spared and any(n.startswith(_TOWER) and n.endswith(scales) for n in stored.tensors):
        notes.append(
            "the vision tower is quantised although the folder's ignore list means to spare it: its patterns "
            "are older than the names of `transformers`"
        )
    return notes


def signed_scales(config: Mapping[str, Any]) -> bool:
    """Whether a scale may be negative: AutoRound's are, in whatever format it writes, and also where this
    package wrote the weights anew."""
    ours = config.get(METHOD)
    if isinstance(ours, Mapping) and ours.get(SIGNED) is True:
        return True
    words = (config.get("quant_method"), config.get("provider"))
    return "autoround_version" in config or any(
        isinstance(word, str) and word.removeprefix("intel/") in ("auto-round", "auto_round")
        for word in words
    )
