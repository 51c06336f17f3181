"""What a forward takes besides weights and caches, and what keeps it from growing with the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mllama.config import MllamaConfig, MllamaTextConfig, MllamaVisionConfig

# Tokens of a prompt that go through the layers together.
PART = 2048
# Bytes of a quantised weight that a GPU decodes at once for a product of the library, which keeps some too.
_SLAB = 64 * 2**20
_LIBRARY = 32 * 2**20
# Of the input of a quantised product, a CPU makes so many bytes an element, of so many rows at once.
_REENCODED, _REENCODED_ROWS = 9, 256
# Replayed decode steps keep the memory that they were captured in.
GRAPHS = 24 * 10**6
_PAD = 8  # tokens of a tile in the vision tower are a multiple of it
_PIXEL = 4  # bytes: a processor gives them in float32


def text_workspace(
    config: MllamaTextConfig,
    tokens: int,
    itemsize: int,
    *,
    quantized: bool,
    on_gpu: bool,
    part: int = PART,
    ranks: int = 1,
) -> int:
    """Bytes while the layers read so many tokens, ``part`` of them together: gate and up beside the stream,
    its norm and the embeddings, and then either what a product makes of its operands or what the activation
    gives. Of ``ranks`` that share the model each has a part of the MLP."""
    width, inner = config.hidden_size, -(-config.intermediate_size // ranks)
    rows = min(tokens, part)
    values = rows * (2 * inner + 3 * width) + logit_copies(ranks) * config.vocab_size
    product = _SLAB if on_gpu else min(rows, _REENCODED_ROWS) * width * _REENCODED
    product = min(product, 2 * inner * width * itemsize) if quantized else 0
    return values * itemsize + max(rows * inner * itemsize, product) + _library(on_gpu)


def logit_copies(ranks: int) -> int:
    """How many there are of logits at once: several ranks gather their parts, and put them side by side."""
    return 1 if ranks == 1 else 3


def projected_bytes(config: MllamaConfig, tiles: int, itemsize: int) -> int:
    """Bytes of what the projector gives for so many tiles, which the layers of the text read."""
    return tiles * config.vision_config.num_patches * config.text_config.hidden_size * itemsize


def pixel_bytes(config: MllamaVisionConfig, images: int) -> int:
    """Bytes of the pixels of so many images, which a call holds until it ends."""
    pixels = config.num_channels * config.image_size**2
    return images * config.max_num_tiles * pixels * _PIXEL


def vision_workspace(
    config: MllamaVisionConfig, images: int, itemsize: int, *, on_gpu: bool, ranks: int = 1
) -> int:
    """Bytes while the vision tower reads so many images at once: their pixels in the model's dtype and the
    taps, beside the taps stacked and joined to the stream, or beside one layer's MLP, of which each of
    ``ranks`` has a part."""
    tokens = -(-config.num_patches // _PAD) * _PAD * config.max_num_tiles * images
    width, taps = config.hidden_size, len(config.intermediate_layers_indices)
    joined = width * (1 + taps) + config.vision_output_dim
    layer = 2 * width + 2 * -(-config.intermediate_size // ranks)
    pixels = 0 if itemsize == _PIXEL else pixel_bytes(config, images) // _PIXEL * itemsize
    return pixels + tokens * (width * taps + max(joined, layer)) * itemsize + _library(on_gpu)


def _library(on_gpu: bool) -> int:
    return _LIBRARY if on_gpu else 0
