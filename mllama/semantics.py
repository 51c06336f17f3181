"""The behaviours in which published Mllama implementations disagree, as switches.

=================  ===============================  =============================================
switch             "meta" (what Meta trained)       "transformers" (4.56 and later)
=================  ===============================  =============================================
vision_taps        "input": tap i is the residual   "output": the stream after local layer i
                   stream before local layer i
imageless_rows     "zero": a text row that sees no  "leak": it attends to every tile, padded ones
                   image gets nothing from the      included; only the gated MLP branch is zero
                   cross-attention layer
decode_rows        "prompt_only": after a prompt    "repeat_last": a generated token sees what the
                   with two or more images,         last prompt token saw
                   generated tokens see none
=================  ===============================  =============================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from mllama.wording import quoted, shown

VisionTaps = Literal["input", "output"]
ImagelessRows = Literal["zero", "leak"]
DecodeRows = Literal["prompt_only", "repeat_last"]

_SWITCHES = {"vision_taps": VisionTaps, "imageless_rows": ImagelessRows, "decode_rows": DecodeRows}
# The release of transformers that began to tap the output of the vision layers.
_FIRST_OUTPUT_TAPS = (4, 56)


@dataclass(frozen=True)
class Semantics:
    """One choice for every switch; ``Semantics()`` is what Meta's code does."""

    vision_taps: VisionTaps = "input"
    imageless_rows: ImagelessRows = "zero"
    decode_rows: DecodeRows = "prompt_only"

    def __post_init__(self) -> None:
        for name, choices in _SWITCHES.items():
            if getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"semantics: {name} must be one of {list(get_args(choices))}, got "
                    f"{quoted(getattr(self, name))}"
                )

    @property
    def name(self) -> str:
        """The preset's name, or "custom"."""
        return next((name for name, preset in PRESETS.items() if preset == self), "custom")

    def to_json(self) -> str | dict[str, str]:
        """What `config.json` holds under "semantics": a preset's name, else the switches."""
        return asdict(self) if self.name == "custom" else self.name


PRESETS = {
    "meta": Semantics(),
    "transformers": Semantics(
        vision_taps="output", imageless_rows="leak", decode_rows="repeat_last"
    ),
}
SemanticsLike = str | Mapping[str, Any] | Semantics


def resolve_semantics(choice: SemanticsLike) -> Semantics:
    """Turn "auto", a preset's name, a mapping of switches or a `Semantics` into a `Semantics`.

    "auto" means "meta" here: a model made in code has no checkpoint to ask. A mapping changes single
    switches of its "preset" entry ("meta" if absent).

    Raises: ValueError naming the unknown preset, switch or value.
    """
    if isinstance(choice, Semantics):
        return choice
    if isinstance(choice, str):
        if choice == "auto":
            return PRESETS["meta"]
        if choice not in PRESETS:
            raise ValueError(
                f'semantics must be "auto", {", ".join(map(repr, PRESETS))} or switches, '
                f"got {quoted(choice)}"
            )
        return PRESETS[choice]
    if not isinstance(choice, Mapping):
        raise ValueError(
            f"semantics must be a name or a mapping of switches, got {type(choice).__name__}"
        )
    switches = dict(choice)
    preset = switches.pop("preset", "meta")
    if not isinstance(preset, (str, Semantics)):
        raise ValueError(f"semantics: preset must be a name, got {quoted(preset)}")
    preset = resolve_semantics(preset)
    if unknown := sorted(map(str, set(switches) - set(_SWITCHES))):
        raise ValueError(
            f"semantics: unknown switches {quoted(unknown)}, expected some of {list(_SWITCHES)}"
        )
    return replace(preset, **switches)


def semantics_of_checkpoint(
    config: Mapping[str, Any], *, original_layout: bool = False
) -> tuple[Semantics, str]:
    """What the weights of a checkpoint folder were trained with, and the reason in words.

    Args:
        config: the folder's `config.json` (or `params.json`) as read.
        original_layout: True for Meta's `original/` layout.
    """
    if original_layout:
        return PRESETS["meta"], "the folder has Meta's original layout"
    version = config.get("transformers_version")
    if version is None:
        if (recorded := config.get("semantics", "auto")) != "auto":
            return resolve_semantics(recorded), f"config.json records semantics {quoted(recorded)}"
        return PRESETS["meta"], "config.json names no transformers_version"
    # transformers copies our "semantics" entry when it saves a model again, but what it then trained
    # or evaluated was its own graph; our own save_pretrained never writes a transformers_version.
    numbers = re.match(r"(\d{1,6})\.(\d{1,6})", version) if isinstance(version, str) else None
    if numbers is None:
        reason = f"config.json has an unreadable transformers_version {quoted(version)}"
        return PRESETS["meta"], reason
    written = f"written by transformers {shown(version, 40)}"
    if (int(numbers[1]), int(numbers[2])) >= _FIRST_OUTPUT_TAPS:
        return PRESETS["transformers"], f"{written}, which is 4.56 or later"
    return PRESETS["meta"], f"{written}, which is older than 4.56"
