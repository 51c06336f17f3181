"""Adapters that PEFT loads into a model: under the names of every layout, and none that goes nowhere."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from mllama.checkpoints.key_layout import KeyLayout, canonical_name
from mllama.parallel.split import Share
from mllama.parallel.states import take_parts
from mllama.wording import quoted, shown


def adapter_key(model: nn.Module, key: str) -> str:
    """The name in ``model`` of an adapter's tensor that is stored under the name of any layout."""
    return KeyLayout(type(model).__name__).module_name(canonical_name(key))


class AdaptedMixin:
    """Part of a model's ``load_state_dict``, by which PEFT loads adapters.

    PEFT itself takes no offence at tensors that have no place, and the model would run without them. A model
    that is split over ranks takes its part of each tensor.
    """

    _is_part: bool
    share: Share | None

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if not self._is_part:
            _place_adapters(self, state_dict, prefix)  # type: ignore[arg-type]
            if self.share is not None:
                copies = local_metadata.get("assign_to_params_buffers", False)
                error_msgs += take_parts(self, state_dict, prefix, copies=copies)
        super()._load_from_state_dict(  # type: ignore[misc]
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _place_adapters(model: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> None:
    """Give the adapter tensors in ``state_dict`` the names they have in ``model``.

    Raises: ValueError for one without a place, and for a LoRA adapter that is not there as a whole.
    """
    parts = {
        part
        for module in model.modules()
        for part in getattr(module, "adapter_layer_names", ())  # of PEFT's layers
    }
    if not parts:
        return
    # Per adapter what its tensors are called in the file, and in the model.
    places: dict[str, dict[str, str]] = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        before, part, after = _split(name, parts)
        if part:
            adapter, _, rest = after.partition(".")
            places.setdefault(adapter, {})[_join(before, part, rest)] = name
    given: dict[str | None, dict[str, str]] = {}
    for key in [key for key in state_dict if key.startswith(prefix)]:
        before, part, after = _split(key.removeprefix(prefix), parts)
        if part:
            adapter, _, rest = after.partition(".")
            name = _join(before, part, rest if adapter in places else after)
            known = any(name in table for table in places.values())
            name = name if known else adapter_key(model, name)
            given.setdefault(adapter if adapter in places else None, {})[name] = key
    # PEFT puts the adapter only into those names that it finds in the model.
    nameless = given.pop(None, {})
    if nameless:
        adapter = _adapter_of(nameless, {a: t for a, t in places.items() if a not in given})
        given[adapter] = nameless
    for adapter, keys in given.items():
        _check_tensors(keys, places[adapter])
        _check_patterns(getattr(model, "peft_config", {}).get(adapter), keys)
        for name, key in keys.items():
            state_dict[prefix + places[adapter][name]] = state_dict.pop(key)


def _split(name: str, parts: Iterable[str]) -> tuple[str, str, str]:
    """What is before, is, and is after the first of ``parts`` among the segments of a name."""
    segments = name.split(".")
    for place, segment in enumerate(segments):
        if segment in parts:
            return ".".join(segments[:place]), segment, ".".join(segments[place + 1 :])
    return name, "", ""


def _join(*segments: str) -> str:
    return ".".join(filter(None, segments))


def _adapter_of(names: Iterable[str], places: dict[str, dict[str, str]]) -> str:
    """Which adapter of ``places`` tensors without its name are of: the one that has just these."""
    found = [adapter for adapter, table in places.items() if table.keys() == set(names)]
    if len(found) > 1:
        raise ValueError(
            f"the tensors fit the adapters {found}; pass PEFT's load_adapter() "
            "key_mapping=model._checkpoint_conversion_mapping to load this one, which has older names"
        )
    if not found:
        fitting = max(
            places, key=lambda adapter: len(places[adapter].keys() & set(names)), default=""
        )
        _check_tensors(names, places.get(fitting, {}))
        raise AssertionError("a set of names that is another one lacks some or has some too many")
    return found[0]


def homeless(names: Sequence[str]) -> list[str]:
    """What is said of tensors or modules of an adapter that the model has no place for, if any."""
    if not names:
        return []
    return [
        f"{len(names)} tensors of the adapter have no place in the model, such as {shown(names[0])}: it "
        "was made for another model, or its target_modules name other layers"
    ]


def lacking(names: Sequence[str]) -> list[str]:
    """What is said of tensors or modules that an adapter's file should have, if any."""
    if not names:
        return []
    return [
        f"the adapter lacks {len(names)} tensors that its target_modules call for, such as "
        f"{shown(names[0])}"
    ]


def _check_tensors(names: Iterable[str], table: dict[str, str]) -> None:
    problems = homeless([name for name in names if name not in table])
    problems += lacking([name for name in table if name not in names and ".lora_" in name])
    if problems:
        raise ValueError(problems[0])


def _check_patterns(config: Any, names: Iterable[str]) -> None:
    """Raises: ValueError for a layer that has a rank or alpha of its own and is not there."""
    layers = {name.split(".lora_")[0] for name in names}
    for own in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, own, None) or {}:
            if not any(re.match(rf"(.*\.)?({pattern})$", layer) for layer in layers):
                raise ValueError(
                    f"the adapter's {own} names {quoted(pattern)}, which none of its layers is called; names "
                    "of before transformers 4.52 must be written anew there"
                )
