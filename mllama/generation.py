"""Text generation."""

from __future__ import annotations


class GenerationMixin:
    """Adds ``generate`` and ``stream`` to a model with a head."""
