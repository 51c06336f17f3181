"""From logits to text: sampling, stopping, streaming, and the loop that joins them."""

from mllama.generation.mixin import GenerateOutput, GenerationMixin

__all__ = ["GenerateOutput", "GenerationMixin"]
