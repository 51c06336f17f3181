"""What a forward takes besides weights and caches, and what keeps it from growing with the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mllama.config import MllamaTextConfig, MllamaVisionConfig

# Tokens of a prompt that go through the layers together.
PART = 2048
# Bytes of a quantised weight that are decoded at once for the library's product, and what the library keeps.
_SLAB = 64 * 2**20
_LIBRARY = 32 * 2**20
# Replayed decode steps keep the memory that they were captured in.
GRAPHS = 24 * 10**6
_PAD = 8  # tokens of a tile in the vision tower are a multiple of it


def text_workspace(config: MllamaTextConfig, tokens: int, itemsize: int, quantized: bool) -> int:
    """Bytes while the layers read so many tokens: gate, up and their product beside the stream, its norm and
    the embeddings."""
    width, inner = config.hidden_size, config.intermediate_size
    rows = min(tokens, PART)
    values = rows * (3 * inner + 3 * width) + config.vocab_size
    return values * itemsize + _LIBRARY + (_SLAB if quantized else 0)


def vision_workspace(config: MllamaVisionConfig, images: int, itemsize: int) -> int:
    """Bytes while the vision tower reads so many images at once: the taps, stacked and joined to what they
    are given beside, and one layer's MLP."""
    tokens = -(-config.num_patches // _PAD) * _PAD * config.max_num_tiles * images
    width, taps = config.hidden_size, len(config.intermediate_layers_indices)
    joined = width * taps + config.vision_output_dim
    layer = 2 * width + 2 * config.intermediate_size
    return tokens * (width * taps + max(joined, layer)) * itemsize + _LIBRARY
