"""Options of a call of the processor: which part each is for, and those of `transformers` not had here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllama.wording import quoted

IMAGE_OPTIONS = (
    "do_convert_rgb",
    "do_resize",
    "size",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_pad",
    "max_image_tiles",
)
# Of from_pretrained, taken for code that was written for transformers: there is one kind of each part, and no
# code of a checkpoint is run.
IDLE_OPTIONS = (
    "use_fast",
    "backend",
    "trust_remote_code",
    "proxies",
    "resume_download",
    "from_slow",
    "legacy",
    "clean_up_tokenization_spaces",
)
_TEXT = (
    "add_special_tokens",
    "padding",
    "truncation",
    "max_length",
    "pad_to_multiple_of",
    "padding_side",
    "return_attention_mask",
    "return_token_type_ids",
    "return_special_tokens_mask",
    "return_offsets_mapping",
    "return_length",
)
_IMAGE = (*IMAGE_OPTIONS, "input_data_format", "device")
_GROUPS = ("text_kwargs", "images_kwargs", "common_kwargs")
# What transformers' processors and tokenizers take as well, and the values that ask for nothing here
# (None always does). `...`: any value, it changes no result.
_FOREIGN: dict[str, tuple[Any, ...]] = {
    "text_pair": (),
    "text_target": (),
    "text_pair_target": (),
    "max_target_length": (),
    "tokenizer_kwargs": ({},),
    "stride": (0,),
    "is_split_into_words": (False,),
    "return_overflowing_tokens": (False,),
    "return_mm_token_type_ids": (False,),
    "return_text_replacement_offsets": (False,),
    "verbose": (...,),
    "default_to_square": (True,),
    "crop_size": (),
    "do_center_crop": (False,),
    "pad_size": (),
    "data_format": ("channels_first",),
    "disable_grouping": (...,),
    "image_seq_length": (),
    "videos": (),
    "videos_kwargs": ({},),
    "audio": (),
    "audio_kwargs": ({},),
    "load_audio_from_video": (False,),
}
_ALL = frozenset((*_TEXT, *_IMAGE, *_GROUPS, *_FOREIGN, "return_tensors"))


@dataclass(frozen=True)
class CallOptions:
    """Options of one call: for the tokenizer, for the image processor, and of the result."""

    text: dict[str, Any]
    images: dict[str, Any]
    return_tensors: str | None


def is_option(name: str) -> bool:
    """Whether a call of the processor takes it."""
    return name in _ALL


def refuse_foreign(
    options: Mapping[str, Any],
    kind: str = "option",
    known: Sequence[str] = (*_TEXT, *_IMAGE, *_GROUPS),
) -> None:
    """Check options that no part here has; `kind` and `known` are for the message.

    Raises: ValueError for one of `transformers` that would change the result; TypeError for an unknown one.
    """
    for name, value in options.items():
        if name not in _FOREIGN:
            raise TypeError(f"unknown {kind} {quoted(name)}; there are {', '.join(known)}")
        neutral = _FOREIGN[name]
        value = getattr(value, "value", value)  # an enumeration's name
        if value is not None and ... not in neutral and value not in neutral:
            only = f"; only {neutral[0]!r} is" if neutral else ""
            raise ValueError(f"{name}={quoted(value)} is not supported here{only}")


def call_options(return_tensors: str | None, options: Mapping[str, Any]) -> CallOptions:
    """Sort the keywords of a call. A keyword goes before `common_kwargs`; None is as if it were not given.

    Raises: TypeError for unknown options and those given twice; ValueError as `refuse_foreign`.
    """
    flat = dict(options)
    given = {name: _group(name, flat.pop(name, None)) for name in _GROUPS}
    common = given["common_kwargs"]
    found = {
        "text": _taken("text_kwargs", _TEXT, given["text_kwargs"], flat, common),
        "images": _taken("images_kwargs", _IMAGE, given["images_kwargs"], flat, common),
    }
    kinds = [
        return_tensors,
        flat.pop("return_tensors", None),
        *(group.get("return_tensors") for group in given.values()),
    ]
    asked = [kind for kind in kinds if kind is not None]
    if any(kind != asked[0] for kind in asked):
        raise TypeError(f"return_tensors was given twice: {', '.join(sorted(map(quoted, asked)))}")
    refuse_foreign(flat)
    for name in common:
        if name not in (*_TEXT, *_IMAGE, "return_tensors"):
            refuse_foreign({name: common[name]})
    return CallOptions(found["text"], found["images"], asked[0] if asked else None)


def _group(name: str, options: Any) -> dict[str, Any]:
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"{name} must be a dict of options, got {quoted(options)}")
    return dict(options or {})


def _taken(
    group: str,
    names: tuple[str, ...],
    given: Mapping[str, Any],
    flat: dict[str, Any],
    common: Mapping[str, Any],
) -> dict[str, Any]:
    """The options of one part; those that were keywords leave `flat`."""
    for name in given:
        if name not in (*names, *_FOREIGN, "return_tensors"):
            raise TypeError(
                f"unknown option {quoted(name)} in {group}; there are {', '.join(names)}"
            )
        if name in flat and flat[name] is not None:
            raise TypeError(f"{name} was given twice, in {group} and as a keyword")
    refuse_foreign({name: value for name, value in given.items() if name in _FOREIGN})
    chosen = {name: common[name] for name in names if name in common}
    chosen |= {name: given[name] for name in names if given.get(name) is not None}
    chosen |= {name: flat.pop(name) for name in list(flat) if name in names}
    return {name: value for name, value in chosen.items() if value is not None}
