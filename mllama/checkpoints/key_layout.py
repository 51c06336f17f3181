"""Tensor names: the published on-disk layouts and the names the modules use.

Three layouts are met in the wild (`{}` stands for the rest of the name):

    part        canonical (in memory)        published on disk          text-only folder
    text        model.language_model.{}      language_model.model.{}    model.{}
    head        lm_head.{}                   language_model.lm_head.{}  lm_head.{}
    vision      model.vision_model.{}        vision_model.{}            -
    projector   model.multi_modal_projector.{}  multi_modal_projector.{}  -

A folder that holds only one tower (`MllamaTextModel`, `MllamaVisionModel`) has bare names, `{}`.
Third-party tools that dump an in-memory state dict write the canonical names; `transformers` (4 and
5) and `save_pretrained` here write the published ones. Every name is first made canonical, then
translated to the model class that is being loaded.
"""

from __future__ import annotations

import re

TEXT = "model.language_model."
HEAD = "lm_head."
VISION = "model.vision_model."
PROJECTOR = "model.multi_modal_projector."
_TEXT_MEMBERS = ("embed_tokens.", "layers.", "norm.")
_VISION_MEMBERS = (
    "class_embedding",
    "patch_embedding.",
    "gated_positional_embedding.",
    "pre_tile_positional_embedding.",
    "post_tile_positional_embedding.",
    "layernorm_pre.",
    "layernorm_post.",
    "transformer.",
    "global_transformer.",
)

# First match wins: the longer prefixes of a family come first.
_TO_CANONICAL: tuple[tuple[str, str], ...] = (
    ("language_model.model.", TEXT),
    ("language_model.lm_head.", HEAD),
    ("vision_model.", VISION),
    ("multi_modal_projector.", PROJECTOR),
    *((f"model.{member}", TEXT + member) for member in _TEXT_MEMBERS),
    *((member, TEXT + member) for member in _TEXT_MEMBERS),
    *((member, VISION + member) for member in _VISION_MEMBERS),
)
_TO_PUBLISHED: tuple[tuple[str, str], ...] = (
    (TEXT, "language_model.model."),
    (HEAD, "language_model.lm_head."),
    (VISION, "vision_model."),
    (PROJECTOR, "multi_modal_projector."),
)
# The published names as regular expressions, with the whole model's names: PEFT applies them to an adapter
# that was saved when modules were called so in memory too (transformers before 4.52).
OLDER_NAMES = {f"^{re.escape(published)}": own for own, published in _TO_PUBLISHED}
# Per model class: what each canonical prefix is called in the class's own state dict. A part that
# is not listed does not exist in the class, and its tensors in a checkpoint are left alone.
_CLASS_PREFIXES: dict[str, tuple[tuple[str, str], ...]] = {
    "MllamaForConditionalGeneration": tuple((p, p) for p in (TEXT, HEAD, VISION, PROJECTOR)),
    "MllamaModel": tuple((p, p.removeprefix("model.")) for p in (TEXT, VISION, PROJECTOR)),
    "MllamaForCausalLM": ((TEXT, "model."), (HEAD, HEAD)),
    "MllamaTextModel": ((TEXT, ""),),
    "MllamaVisionModel": ((VISION, ""),),
}
# Classes whose own names are also the names on disk.
_BARE = ("MllamaForCausalLM", "MllamaTextModel", "MllamaVisionModel")


def _replace(name: str, rules: tuple[tuple[str, str], ...]) -> str | None:
    for prefix, replacement in rules:
        if name.startswith(prefix):
            return replacement + name[len(prefix) :]
    return None


def class_name(model: object) -> str:
    """The class of a model, without the one that `fully_shard` puts before it."""
    kind = type(model)
    sharded, *own = kind.__bases__
    return own[0].__name__ if sharded.__name__ == "FSDPModule" and own else kind.__name__


def canonical_name(name: str) -> str:
    """The in-memory name (of the whole model) of a tensor stored under any known layout.

    Names that belong to no layout come back unchanged, so that they are reported as extra.
    """
    if name.startswith((TEXT, HEAD, VISION, PROJECTOR)):
        return name
    return _replace(name, _TO_CANONICAL) or name


class KeyLayout:
    """Translates canonical names to the names of one model class and to those it is saved under."""

    def __init__(self, class_name: str) -> None:
        if class_name not in _CLASS_PREFIXES:
            raise TypeError(
                f"{class_name} cannot be loaded or saved; expected one of {sorted(_CLASS_PREFIXES)}"
            )
        self._rules = _CLASS_PREFIXES[class_name]
        self._inverse = tuple((own, canonical) for canonical, own in self._rules)
        self._bare = class_name in _BARE

    def is_other_part(self, canonical: str) -> bool:
        """True for a tensor of a part (vision tower, head, ...) that the class does not have."""
        owned = tuple(prefix for prefix, _ in self._rules)
        parts = (TEXT, HEAD, VISION, PROJECTOR)
        return canonical.startswith(parts) and not canonical.startswith(owned)

    def module_name(self, canonical: str) -> str:
        """The state-dict name in the class; unknown names come back unchanged."""
        translated = _replace(canonical, self._rules)
        return canonical if translated is None else translated

    def canonical_name(self, module_name: str) -> str:
        """The in-memory name, in the whole model, of a tensor of the class."""
        canonical = _replace(module_name, self._inverse)
        if canonical is None:
            raise KeyError(f"{module_name} is not a tensor name of this class")
        return canonical

    def published_name(self, module_name: str) -> str:
        """The on-disk name that `transformers` gives a tensor of the class."""
        if self._bare:
            return module_name
        canonical = self.canonical_name(module_name)
        return _replace(canonical, _TO_PUBLISHED) or canonical
