"""Questions about pictures that the demo model answers right, as requests send them."""

from __future__ import annotations

import base64
import io
from typing import Any

from mllama.demo import sample_picture

MODEL = "mllama-demo"
SEEDS = (186, 254, 199, 396)  # of the page's samples
QUESTION = "Describe the picture."


def picture(seed: int) -> bytes:
    """The file of a picture."""
    file = io.BytesIO()
    sample_picture(seed)[0].save(file, "PNG")
    return file.getvalue()


def about(seed: int) -> list[dict[str, Any]]:
    """A conversation that asks what a picture shows."""
    url = "data:image/png;base64," + base64.b64encode(picture(seed)).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": QUESTION},
    ]
    return [{"role": "user", "content": parts}]


def describes(text: str, seed: int) -> bool:
    """Whether an answer names every shape of a picture."""
    _, scene = sample_picture(seed)
    return all(f"{shape.size} {shape.color} {shape.kind}" in text for shape in scene.shapes)
