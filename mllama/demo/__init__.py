"""A tiny real Llama 3.2 Vision model for questions about images of shapes, and those images.

The checkpoint lies in the package; in the source tree ``python -m tools.demo_model.train --out DIR`` makes
it anew.
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
            f"no demo checkpoint in {folder}; install the package again, or make one in its source tree: "
            f"python -m tools.demo_model.train --out {folder}"
        )
    return folder
