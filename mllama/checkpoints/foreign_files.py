"""Folders whose weights are in files of another kind: what it is, and what to load instead."""

from __future__ import annotations

from pathlib import Path

from mllama.wording import listed

_INSTEAD = "load the unquantised model with quantization=, or a GGUF file"
# By the ends of names, the most telling first: a folder of UQFF has safetensors beside it too.
_KINDS = (
    ("*.uqff", f"UQFF is not read; {_INSTEAD}"),
    ("qmodel.pt", f"HQQ is not read, and pickle files are never loaded; {_INSTEAD}"),
    ("*.gguf", "give the path of the GGUF file itself instead of its folder"),
)


def foreign_weights(folder: Path) -> str | None:
    """Why a folder without weights that are read has none; None where there is nothing of a known kind."""
    for pattern, reason in _KINDS:
        if names := sorted(path.name for path in folder.glob(pattern)):
            return f"its weights are in {listed(names, 3)}: {reason}"
    return None
