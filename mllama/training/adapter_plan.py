"""What an adapter does to a model, read from the header of its file before any of it is done.

Which modules are adapted, and with which ranks, the names and shapes in the file say. The configuration must
agree, and its patterns are tried in a process of their own; PEFT is then given names instead of patterns, so
that nothing of the folder decides what it computes or allocates but tensors that are there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from mllama.adapted import adapter_key, homeless, lacking
from mllama.checkpoints.safetensors_header import Header
from mllama.confined import ConfinedError, Workers
from mllama.quantized_modules import Quantized
from mllama.shapes import Shapes
from mllama.training.adapter_config import MAX_RANK
from mllama.wording import quoted, shown

PREFIX = "base_model.model."  # of PEFT's names, before the model's own
_SECONDS, _MEMORY = 5.0, 256 * 2**20
_WORKERS = Workers(Path(__file__).with_name("adapter_selection.py"), list)
_FLOATS = ("F64", "F32", "F16", "BF16")
_PARTS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_MAGNITUDES = {"lora_magnitude_vector", "lora_magnitude_vector.weight"}  # of DoRA
_TOKENS = ".token_adapter.trainable_tokens_delta"


@dataclass
class Tensors:
    """The tensors of an adapter's file under the names of the model.

    Attributes:
        by_module: of each module and part, as "lora_A.weight", their shapes.
        others: shapes by names of what is stored as a whole: modules_to_save, biases, rows of tokens.
        names: all of them as PEFT calls them.
    """

    by_module: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    others: dict[str, tuple[int, ...]] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    @classmethod
    def from_header(cls, model: nn.Module, header: Header) -> Tensors:
        found = cls(problems=[header.problem] if header.problem else [])
        for stored, (dtype, shape) in header.tensors.items():
            name = adapter_key(model, stored.removeprefix(PREFIX))
            if PREFIX + name in found.names:  # one would be loaded, and nobody could say which
                found.problems.append(f"{shown(stored)} is there a second time, under another name")
            found.names.add(PREFIX + name)
            if dtype not in _FLOATS:
                found.problems.append(
                    f"{shown(stored)} is {dtype}, expected one of {', '.join(_FLOATS)}"
                )
            segments = name.split(".")
            place = next((i for i, segment in enumerate(segments) if segment in _PARTS), None)
            if place is None:
                found.others[name] = shape
            else:
                module, part = ".".join(segments[:place]), ".".join(segments[place:])
                found.by_module.setdefault(module, {})[part] = shape
        return found


def lora_options(
    model: nn.Module, entries: dict[str, Any], tensors: Tensors
) -> tuple[dict[str, Any], list[str]]:
    """The arguments of `peft.LoraConfig`, without patterns, and what does not fit the model and the file.

    Args:
        entries: from :func:`mllama.training.adapter_config.checked_entries`, without faults.
    """
    modules = dict(model.named_modules())
    problems = [
        *tensors.problems,
        *_misfits(model, modules, entries, tensors),
        *_strays(model, modules, entries, tensors),
    ]
    names = list(modules)
    adapted = [name for name in names if name in tensors.by_module]
    answer = _selection(names, adapted, entries)
    if "fault" in answer:
        return {}, [*problems, answer["fault"]]
    if entries["target_modules"] != "all-linear":
        kept = tuple(f".{name}." for name in entries["modules_to_save"] or ())
        chosen = {names[place] for place in answer["selected"]}
        chosen = {name for name in chosen if not any(k in f".{name}." for k in kept)}
        problems += lacking([name for name in names if name in chosen - set(adapted)])
        problems += homeless([name for name in adapted if name not in chosen])
    values: dict[str, dict[str, Any]] = {}
    for kind, default in (("rank", "r"), ("alpha", "lora_alpha")):
        patterns = entries[f"{kind}_pattern"] or {}
        given = list(patterns.values())
        places = zip(adapted, answer[kind], strict=True)
        values[kind] = {n: entries[default] if i < 0 else given[i] for n, i in places}
        problems += [
            f"{kind}_pattern names {quoted(list(patterns)[i])}, which none of its layers is called; names of "
            "before transformers 4.52 must be written anew there"
            for i in answer["unused"][kind]
        ]
    for name, rank in values["rank"].items():
        if rank != (stored := _rank(tensors.by_module[name])):
            problems.append(f"{name} has rank {stored} in the file and {rank} in the configuration")
    if problems:
        return {}, problems
    rank, rank_pattern = _grouped(values["rank"], entries["r"])
    alpha, alpha_pattern = _grouped(values["alpha"], entries["lora_alpha"])
    same = (
        "lora_dropout",
        "modules_to_save",
        "trainable_token_indices",
        "bias",
        "init_lora_weights",
    )
    same += ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias")
    return {
        **{name: entries[name] for name in same},
        "target_modules": adapted,
        "r": rank,
        "rank_pattern": rank_pattern,
        "lora_alpha": alpha,
        "alpha_pattern": alpha_pattern,
    }, []


def _selection(names: list[str], adapted: list[str], entries: dict[str, Any]) -> dict[str, Any]:
    """The answer of :mod:`mllama.training.adapter_selection`, or its fault."""
    layers, patterns = entries["layers_to_transform"], entries["layers_pattern"]
    place = {name: i for i, name in enumerate(names)}
    request = {
        "names": names,
        "adapted": [place[name] for name in adapted],
        "target_modules": entries["target_modules"],
        "exclude_modules": entries["exclude_modules"],
        "layers_to_transform": [layers] if isinstance(layers, int) else layers,
        "layers_pattern": [patterns] if isinstance(patterns, str) and patterns else patterns,
        "rank_pattern": list(entries["rank_pattern"] or ()),
        "alpha_pattern": list(entries["alpha_pattern"] or ()),
    }
    try:
        value, _ = _WORKERS.call(request, seconds=_SECONDS, memory=_MEMORY, longest=0)
    except ConfinedError as error:
        return {"fault": f"its patterns (target_modules and others) cannot be tried: {error}"}
    return {"fault": shown(str(value["fault"]))} if "fault" in value else value


def _rank(parts: dict[str, tuple[int, ...]]) -> int | None:
    shape = parts.get("lora_A.weight") or parts.get("lora_embedding_A") or ()
    return shape[0] if shape else None


def _whole_shape(model: Any, name: str, own: Sequence[int]) -> tuple[int, ...]:
    """Of a parameter by what it is here, perhaps a part of it."""
    return tuple(own) if model.share is None else model.share.whole_shape(name, own)


def _expected(
    model: nn.Module, name: str, module: nn.Module, rank: int, entries: dict[str, Any]
) -> Shapes | None:
    """The shapes of an adapter of one module; None for a kind that has none."""
    if isinstance(module, nn.Linear):
        own = module.out_features, module.in_features
        out, width = _whole_shape(model, f"{name}.weight", own)
        shapes = {"A.weight": (rank, width), "B.weight": (out, rank)}
    elif isinstance(module, nn.Embedding):
        out = module.embedding_dim
        shapes = {"embedding_A": (rank, module.num_embeddings), "embedding_B": (out, rank)}
    elif isinstance(module, nn.Conv2d):
        out = module.out_channels
        inner = (module.in_channels // module.groups, *module.kernel_size)
        shapes = {"A.weight": (rank, *inner), "B.weight": (out, rank, 1, 1)}
    else:
        return None
    if entries["lora_bias"]:
        shapes["B.bias"] = (out,)
    return {f"lora_{name}": shape for name, shape in shapes.items()}


def _misfits(
    model: nn.Module, modules: dict[str, nn.Module], entries: dict[str, Any], tensors: Tensors
) -> list[str]:
    """What is wrong with the tensors of the modules."""
    without_place, absent, wrong = [], [], []
    for name, parts in tensors.by_module.items():
        magnitudes = parts.keys() & _MAGNITUDES
        rest = {part: shape for part, shape in parts.items() if part not in magnitudes}
        rank = _rank(parts)
        if entries["use_dora"] and isinstance(modules.get(name), Quantized):
            wrong.append(f"{name} is quantised, and DoRA needs its weight: use dequantize=True")
        module = modules.get(name)
        expected = module and _expected(model, name, module, rank or 1, entries)
        if expected is None:
            without_place += [f"{name}.{part}" for part in parts]
            continue
        if rank is not None and not 0 < rank <= MAX_RANK:
            wrong.append(f"{name} has rank {rank}; it can be 1 to {MAX_RANK}")
        absent += [f"{name}.{part}" for part in expected if part not in rest]
        if entries["use_dora"] and not magnitudes:
            absent.append(f"{name}.lora_magnitude_vector")
        if not entries["use_dora"]:
            without_place += [f"{name}.{part}" for part in sorted(magnitudes)]
        without_place += [f"{name}.{part}" for part in rest if part not in expected]
        wrong += [
            f"size mismatch: {name}.{part} is {quoted(shape)}, expected {expected[part]}"
            for part, shape in rest.items()
            if part in expected and shape != expected[part]
        ]
    return [*homeless(without_place), *lacking(absent), *wrong]


def _strays(
    model: nn.Module, modules: Iterable[str], entries: dict[str, Any], tensors: Tensors
) -> list[str]:
    """What is wrong with the tensors that are stored as a whole."""
    parameters = {n: _whole_shape(model, n, p.shape) for n, p in model.named_parameters()}
    endings = tuple(entries["modules_to_save"] or ())
    saved = tuple(f"{name}." for name in modules if endings and name.endswith(endings))
    absent = [n for n in parameters if n.startswith(saved) and n not in tensors.others and saved]
    indices = entries["trainable_token_indices"] or ()
    if indices and not any(name.endswith(_TOKENS) for name in tensors.others):
        absent.append(f"*{_TOKENS}")
    quantized = {name for name, module in model.named_modules() if isinstance(module, Quantized)}
    problems, without_place = [], []
    for name, shape in tensors.others.items():
        module = name.removesuffix(_TOKENS)
        plain = f"{module}.weight" if module != name else name.replace(".base_layer.", ".")
        if plain.removesuffix(".weight") in quantized:
            problems.append(
                f"{shown(name)} would replace a weight that is quantised: load the model with dequantize=True"
            )
            continue
        is_own = name != plain or (saved and name.startswith(saved))
        is_own = is_own or (entries["bias"] != "none" and name.endswith(".bias"))
        if plain not in parameters or not is_own:
            without_place.append(name)
            continue
        expected = parameters[plain]
        if module != name:
            if not indices or max(indices) >= expected[0]:
                problems.append(f"trainable_token_indices must lie within 0..{expected[0] - 1}")
            expected = (len(indices), *expected[1:])
        if shape != expected:
            problems.append(f"size mismatch: {name} is {quoted(shape)}, expected {expected}")
    return [*homeless(without_place), *lacking(absent), *problems]


def _grouped(values: dict[str, Any], default: Any) -> tuple[Any, dict[str, Any]]:
    """The most common value, and the others by patterns that are lists of names."""
    counted = Counter(values.values()).most_common()
    common = counted[0][0] if counted else default
    groups: dict[Any, list[str]] = {}
    for name, value in values.items():
        if value != common:
            groups.setdefault(value, []).append(re.escape(name))
    return common, {"|".join(names): value for value, names in groups.items()}
