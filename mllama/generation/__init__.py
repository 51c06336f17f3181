"""From logits to text: sampling, stopping, streaming, and the loop that joins them."""

from mllama.generation.generate import GenerationMixin
from mllama.outputs import GenerateOutput

__all__ = ["GenerateOutput", "GenerationMixin"]
