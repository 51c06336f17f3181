"""Which weight of a model gets which encoding: from its place, the shape of its rows, and overrides."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from mllama.checkpoints.key_layout import HEAD, PROJECTOR, TEXT, VISION, KeyLayout
from mllama.shapes import Shapes
from mllama.wording import listed, quoted
from mllama_kernels.encodings import ENCODINGS, MIXES

if TYPE_CHECKING:
    from mllama.checkpoints.expected import Config

PLAIN = ("float32", "bfloat16", "float16")
# What weights can be made into; the others are only read.
MADE = ("q8_0", "q6_k", "q4_k", "q4_0", "int8", "fp8")
# Encodings of whole models.
MODEL_ENCODINGS = (*MADE, *MIXES)

_LINEAR = re.compile(
    r"layers\.(\d+)\.(self_attn|cross_attn|mlp)\.(\w+_proj|fc1|fc2)\.weight$", re.ASCII
)
# Where rows are no whole blocks: the nearest encoding with blocks of 32.
_NARROWER = {"q4_k": "q4_0", "q6_k": "q8_0"}


@dataclass(frozen=True)
class Quantization:
    """How a model is quantised.

    Attributes:
        encoding: of MODEL_ENCODINGS; of a checkpoint made by others the one of most of its bytes, or
            "decoded" where none could stay packed.
        overrides: what was given with it.
        method: by which the checkpoint was stored; "" for weights that were quantised as they were loaded.
    """

    encoding: str
    overrides: Mapping[str, str]
    method: str = ""


@dataclass(frozen=True)
class Kind:
    """What a weight is.

    Attributes:
        name: as a table calls it, such as "self v_proj".
        layer: of a text layer, counted over all; else -1.
    """

    name: str
    layer: int = -1


def kind_of(canonical: str) -> Kind | None:
    """Of a weight that can be quantised, by its canonical name; None for any other tensor."""
    if canonical == HEAD + "weight":
        return Kind("lm_head")
    if canonical == TEXT + "embed_tokens.weight":
        return Kind("embed_tokens")
    if canonical == PROJECTOR + "weight":
        return Kind("projector")
    place = _LINEAR.search(canonical)
    if place is None:
        return None
    layer, block, name = place.groups()
    if canonical.startswith(VISION):
        return Kind(f"vision {name}")
    if canonical.startswith(TEXT):
        tower = {"self_attn": "self ", "cross_attn": "cross ", "mlp": ""}[block]
        return Kind(f"{tower}{name}", int(layer))
    return None


@dataclass(frozen=True)
class Assignment:
    """The encodings of a model's weights.

    Attributes:
        encodings: by state-dict name; what is not in it stays in the model's dtype.
        fallbacks: a line for each kind of row that does not fit what was chosen; empty if all do.
    """

    encodings: dict[str, str]
    fallbacks: list[str]


def assign(
    config: Config,
    layout: KeyLayout,
    shapes: Shapes,
    encoding: str,
    overrides: Mapping[str, str] | None = None,
    dtype: str = "bfloat16",
) -> Assignment:
    """The encoding of each weight.

    Args:
        config: of the model class that ``layout`` is of.
        shapes: of all parameters, by state-dict name.
        encoding: of the model, one of MODEL_ENCODINGS.
        overrides: shell patterns over published names to an encoding, or to the model's dtype for a weight
            that stays as it is; the first that matches counts.
        dtype: the model's, by its name.
    Raises: ValueError for an unknown encoding, and for a pattern that matches no weight.
    """
    if encoding not in MODEL_ENCODINGS:
        raise ValueError(unknown("quantization", encoding, MODEL_ENCODINGS))
    overrides = check_overrides(overrides)
    weights = {}
    for name in shapes:
        canonical = layout.canonical_name(name)
        if (kind := kind_of(canonical)) is not None:
            weights[name] = kind
    _check_matches(overrides, {name: layout.published_name(name) for name in weights}, dtype)
    text = getattr(config, "text_config", config)
    own, moved = {}, Counter()
    for name, kind in weights.items():
        published = layout.published_name(name)
        chosen = next((e for p, e in overrides.items() if fnmatchcase(published, p)), None)
        chosen = _by_policy(kind, encoding, text) if chosen is None else chosen
        if chosen is None or chosen in PLAIN:
            continue
        width = shapes[name][-1]
        fitting = fitting_encoding(chosen, width)
        if fitting != chosen:
            moved[chosen, width, fitting] += 1
        if fitting is not None:
            own[name] = fitting
    return Assignment(own, [_fallback(*key, n, dtype) for key, n in sorted(moved.items(), key=str)])


def check_overrides(overrides: Mapping[str, str] | None) -> dict[str, str]:
    """Raises: ValueError, TypeError for what cannot be overrides, whatever the model is."""
    if overrides is None:
        return {}
    if not isinstance(overrides, Mapping):
        raise TypeError(
            "quantization_overrides must be a mapping of patterns to encodings, got "
            f"{type(overrides).__name__}"
        )
    for pattern, encoding in overrides.items():
        if not isinstance(pattern, str) or not isinstance(encoding, str):
            raise TypeError(
                "quantization_overrides must be a mapping of patterns to encodings, got "
                f"{quoted(pattern)}: {quoted(encoding)}"
            )
        if encoding not in MADE and encoding not in PLAIN:
            what = f"quantization_overrides[{quoted(pattern)}]"
            raise ValueError(unknown(what, encoding, (*MADE, *PLAIN)))
    return dict(overrides)


def fitting_encoding(encoding: str, width: int) -> str | None:
    """The encoding itself if rows of so many columns are whole blocks of it, else the nearest one that has
    such blocks, as llama.cpp chooses; None if none has."""
    for one in (encoding, _NARROWER.get(encoding)):
        if one is not None and width % ENCODINGS[one].block == 0:
            return one
    return None


def _by_policy(kind: Kind, encoding: str, text: object) -> str | None:
    """The encoding of a weight without an override."""
    if kind.name.startswith("vision ") or kind.name == "projector":
        return None if encoding in ("int8", "fp8") else "q8_0"
    if encoding not in ("q4_k", "q4_0", "q4_k_m"):
        return encoding
    four = "q4_0" if encoding == "q4_0" else "q4_k"
    if kind.name in ("lm_head", "cross k_proj", "cross v_proj"):
        return "q6_k"
    if encoding != "q4_k_m":
        return four
    return "q6_k" if _keeps_more_bits(kind, text) else four


def _keeps_more_bits(kind: Kind, text: object) -> bool:
    """Whether a weight is one of those that 4 bits hurt most."""
    if kind.name == "cross o_proj":
        return True
    if kind.name == "down_proj":
        return _is_sensitive(kind.layer, text.num_hidden_layers)
    if kind.name == "self v_proj":
        layers = text.self_attention_layers
        return _is_sensitive(layers.index(kind.layer), len(layers))
    return False


def _is_sensitive(layer: int, layers: int) -> bool:
    """llama.cpp's rule: the first and the last eighth, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _check_matches(overrides: Mapping[str, str], published: Mapping[str, str], dtype: str) -> None:
    names = sorted(published.values())
    for pattern, encoding in overrides.items():
        if not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
            raise ValueError(
                f"quantization_overrides: {quoted(pattern)} matches no weight that can be quantised; near "
                f"names are {listed(near)}"
            )
        if encoding in PLAIN and encoding != dtype:
            raise ValueError(
                f"quantization_overrides[{quoted(pattern)}] is {encoding}, but what is not quantised has the "
                f"model's dtype, {dtype}"
            )


def unknown(what: str, given: object, known: tuple[str, ...]) -> str:
    """What is said of an encoding that is none of those known."""
    read = sorted(ENCODINGS.keys() - set(MADE))
    more = "; it is only read" if given in read else ""
    return f"{what} must be one of {list(known)}, got {quoted(given)}{more}"


def _fallback(encoding: str, width: int, instead: str | None, count: int, dtype: str) -> str:
    weights = f"{count} weight" + ("s" if count != 1 else "")
    return (
        f"{weights} with rows of {width} are no whole blocks of {encoding}: "
        f"{instead or dtype + ' (the dtype of the model)'} instead"
    )
