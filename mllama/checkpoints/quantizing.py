"""In which encoding each weight of a checkpoint is loaded: as it is stored, as was asked for, or plain."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch

from mllama.checkpoints.checkpoint import CheckpointError
from mllama.checkpoints.matching import MatchedCheckpoint
from mllama.checkpoints.own_format import METHOD
from mllama.checkpoints.published_call import Wanted
from mllama.parallel.rules import Cut
from mllama.quantization.policy import (
    MODEL_ENCODINGS,
    Quantization,
    assign,
    check_overrides,
    kind_of,
    unknown,
)
from mllama.wording import listed, quoted
from mllama_kernels.encodings import ENCODINGS


@dataclass(frozen=True)
class Choice:
    """How a checkpoint is loaded.

    Attributes:
        encodings: by state-dict name, of the weights that are quantised in the model.
        nbytes: of all parameters then.
        quantization: of the model; None of a plain one.
        notes: what the user should know, a line each.
        stored_nbytes: of all parameters if the quantised ones are loaded as they are stored; None where none
            is stored so.
    """

    encodings: dict[str, str]
    nbytes: int
    quantization: Quantization | None = None
    notes: list[str] = field(default_factory=list)
    stored_nbytes: int | None = None

    def described(self, dtype: torch.dtype) -> list[str]:
        """A line for the whole, one for each encoding, and the notes; ``dtype`` is that of what is plain."""
        quantization = self.quantization
        plain = str(dtype).removeprefix("torch.")
        name = plain if quantization is None else quantization.encoding
        counts = sorted(Counter(self.encodings.values()).items())
        lines = [f"{encoding}: {count} tensors" for encoding, count in counts]
        return [f"{name}, {self.nbytes / 1e9:.3f} GB", *lines, *self.notes]


def choose_encodings(
    matched: MatchedCheckpoint,
    wanted: Wanted,
    overrides: Mapping[str, str] | None,
    *,
    dequantize: bool,
    dtype: torch.dtype,
) -> Choice:
    """The choice for a checkpoint and a call; see :func:`mllama.checkpoints.weights.load_pretrained`.

    Raises: ValueError for arguments that contradict each other or match nothing; CheckpointError for an
        encoding asked for of a folder that has another.
    """
    overrides = check_overrides(overrides)
    encoding = wanted.encoding
    if encoding is None and overrides:
        raise ValueError("quantization_overrides go with quantization=, which names the encoding")
    if dequantize and encoding is not None:
        raise ValueError(
            f"dequantize=True and quantization={quoted(encoding)} contradict each other"
        )
    infos = {name: matched.checkpoint.tensors[at] for name, at in matched.sources.items()}
    stored = {name: i.encoding for name, i in infos.items() if i.encoding is not None}
    notes = [note for found in matched.found for note in found.notes]
    stored_nbytes = _nbytes(matched, stored, dtype) if stored else None
    if dequantize:
        return Choice({}, _nbytes(matched, {}, dtype), None, notes, stored_nbytes)
    quantization = stored_quantization(matched)
    if encoding is None:
        nbytes = _nbytes(matched, stored, dtype)
        return Choice(stored, nbytes, quantization, notes, stored_nbytes)
    if quantization is None:
        chosen, more = _assigned(matched, wanted, overrides, dtype)
        made = Quantization(encoding, overrides)
        return Choice(chosen, _nbytes(matched, chosen, dtype), made, notes + more)
    decoded = {name for name, info in infos.items() if info.is_decoded}
    same = encoding == quantization.encoding or quantization.encoding in wanted.also
    if stored and not same:
        raise CheckpointError(
            matched.folder,
            [
                f"it is quantised, {quantization.encoding} ({quantization.method}), and "
                f"quantization={quoted(encoding)} was asked for: leave that out to load it as it is, or "
                "quantise the original; dequantize=True decodes it"
            ],
        )
    if stored and overrides and overrides != quantization.overrides:
        raise CheckpointError(
            matched.folder,
            [
                f"it is quantised already, with overrides {quoted(quantization.overrides)}; "
                f"quantization_overrides={quoted(overrides)} cannot be met"
            ],
        )
    chosen, more = (stored, [])
    if decoded:
        every, more = _assigned(matched, wanted, overrides, dtype)
        chosen = stored | {name: e for name, e in every.items() if name in decoded}
        if not stored:
            quantization = Quantization(encoding, overrides)
    nbytes = _nbytes(matched, chosen, dtype)
    return Choice(chosen, nbytes, quantization, notes + more, stored_nbytes)


def stored_quantization(matched: MatchedCheckpoint) -> Quantization | None:
    """What the files say of themselves; None where all is plain."""
    if not matched.found:
        return None
    method = ", ".join(found.method for found in matched.found)
    named = matched.raw.get("quantization_config")
    if isinstance(named, Mapping) and named.get("quant_method") == METHOD:
        encoding = named.get("encoding")
        known = tuple(dict.fromkeys((*MODEL_ENCODINGS, *ENCODINGS)))
        try:
            if encoding not in known:
                raise ValueError(unknown("quantization_config.encoding", encoding, known))
            return Quantization(encoding, check_overrides(named.get("overrides")), method)
        except (ValueError, TypeError) as error:
            raise CheckpointError(matched.folder, [f"config.json: {error}"]) from None
    sizes: Counter[str] = Counter()
    for at in matched.sources.values():
        info = matched.checkpoint.tensors[at]
        if info.encoding is not None:
            sizes[info.encoding] += info.nbytes
    main = sizes.most_common(1)[0][0] if sizes else "decoded"
    ours = named.get(METHOD) if isinstance(named, Mapping) else None
    overrides = ours.get("overrides") if isinstance(ours, Mapping) else None
    try:
        return Quantization(main, check_overrides(overrides), method)
    except (ValueError, TypeError) as error:
        raise CheckpointError(matched.folder, [f"config.json: {error}"]) from None


def stored_by_encoding(matched: MatchedCheckpoint, dtype: torch.dtype) -> dict[str, Any]:
    """Of a quantised checkpoint the method, the weights and bytes of each encoding, the weights that fell
    back to another encoding than its own, and the notes."""
    if not matched.found:
        return {}
    counts: dict[str, list[int]] = {}
    for at in matched.sources.values():
        info = matched.checkpoint.tensors[at]
        name = info.encoding or str(info.dtype).removeprefix("torch.")
        if info.is_decoded:
            name += ", decoded"
        entry = counts.setdefault(name, [0, 0])
        entry[0] += 1
        entry[1] += info.nbytes
    return {
        "quantization": ", ".join(found.method for found in matched.found),
        "encoding": stored_quantization(matched).encoding,
        "encodings": {
            name: {"tensors": count, "bytes": nbytes}
            for name, (count, nbytes) in sorted(counts.items())
        },
        "fallbacks": _stored_fallbacks(matched, dtype),
        "notes": [note for found in matched.found for note in found.notes],
    }


def _stored_fallbacks(matched: MatchedCheckpoint, dtype: torch.dtype) -> list[str]:
    """What was said when a folder of our own form was made."""
    quantization, named = stored_quantization(matched), matched.raw.get("quantization_config")
    is_own = isinstance(named, Mapping) and named.get("quant_method") == METHOD
    if not is_own or quantization is None or quantization.encoding not in MODEL_ENCODINGS:
        return []
    name = str(dtype).removeprefix("torch.")
    encoding, overrides = quantization.encoding, quantization.overrides
    try:
        found = assign(matched.config, matched.layout, matched.shapes, encoding, overrides, name)
    except (ValueError, TypeError) as error:  # as of a folder with a part of the model only
        return [f"config.json does not tell which: {error}"]
    return found.fallbacks


def _assigned(
    matched: MatchedCheckpoint, wanted: Wanted, overrides: Mapping[str, str], dtype: torch.dtype
) -> tuple[dict[str, str], list[str]]:
    name = str(dtype).removeprefix("torch.")
    found = assign(matched.config, matched.layout, matched.shapes, wanted.encoding, overrides, name)
    skipped = _skipped(matched, wanted.skipped)
    return {n: e for n, e in found.encodings.items() if n not in skipped}, found.fallbacks


def _skipped(matched: MatchedCheckpoint, modules: Iterable[str]) -> set[str]:
    """The weights of modules, named as a whole or by some of the segments of their names."""
    names: set[str] = set()
    layout = matched.layout
    weights = [n for n in matched.shapes if kind_of(layout.canonical_name(n)) is not None]
    for module in modules:
        own = {
            name
            for name in weights
            for called in (name, layout.canonical_name(name), layout.published_name(name))
            if f".{module}." in f".{called}"
        }
        if not own:
            some = listed(sorted(matched.shapes)[:3])
            raise ValueError(
                f"llm_int8_skip_modules names {quoted(module)}, which is no module of the model with a "
                f"weight that would be quantised; names are like {some}"
            )
        names |= own
    return names


def part_of(
    choice: Choice, matched: MatchedCheckpoint, dtype: torch.dtype, cuts: Mapping[str, Cut]
) -> Choice:
    """The choice of one rank of a model that is split, whose parts these are: its bytes are its own."""
    return replace(choice, nbytes=_nbytes(matched, choice.encodings, dtype, cuts))


def _nbytes(
    matched: MatchedCheckpoint,
    encodings: Mapping[str, str],
    dtype: torch.dtype,
    cuts: Mapping[str, Cut] = MappingProxyType({}),
) -> int:
    total = 0
    for name, shape in matched.shapes.items():
        info = matched.checkpoint.tensors[matched.sources[name]]
        encoding = encodings.get(name)
        if encoding is None:
            nbytes = math.prod(shape) * dtype.itemsize
        elif info.encoding == encoding:
            nbytes = info.nbytes
        else:
            nbytes = ENCODINGS[encoding].nbytes(*shape)
        if (cut := cuts.get(name)) is not None:
            nbytes = nbytes * (cut.end - cut.begin) // shape[cut.dim]
        total += nbytes
    return total
