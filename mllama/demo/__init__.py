"""A tiny real Llama 3.2 Vision model for questions about pictures of shapes, and those pictures.

The checkpoint lies in the package; ``python -m mllama.demo.train --out DIR`` makes it anew.
"""

from __future__ import annotations

from pathlib import Path

from .questions import is_right, questions_for
from .shapes import Scene, Shape, sample_picture

__all__ = ["Scene", "Shape", "checkpoint_path", "is_right", "questions_for", "sample_picture"]


def checkpoint_path() -> Path:
    """The folder of the shipped checkpoint, in the published format.

    Raises: FileNotFoundError when the package was installed without it.
    """
    folder = Path(__file__).parent / "checkpoint"
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"no demo checkpoint in {folder}; make one: python -m mllama.demo.train --out {folder}"
        )
    return folder
