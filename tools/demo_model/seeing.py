"""Dense supervision of the vision tower during training: what each patch shows.

Answers say little about an image (a few bits a row), and the tower would learn to see only after the
text tower has learned to look. A linear head on every vision token, thrown away after training, tells it
directly: the shape that covers the patch, the quarter it lies in, and the background.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllama.config import MllamaConfig
from mllama.demo.shapes import BACKGROUNDS, COLORS, IMAGE_SIZE, KINDS, PLACES, SIZES, Scene, Shape
from mllama.loss import IGNORED
from mllama.tiles import ImageTiles

_PATCH = 14
_SIDE = IMAGE_SIZE // _PATCH
_REACH = 4  # pixels from a shape's square within which a patch's centre counts as covered
# What is known of a patch, and the names it can have; the first three only where a shape covers it.
_ATTRIBUTES = {
    "kind": KINDS,
    "color": tuple(sorted(COLORS)),
    "size": tuple(sorted(SIZES)),
    "place": PLACES,
    "background": tuple(sorted(BACKGROUNDS)),
}


def patch_targets(scene: Scene, max_tiles: int) -> Tensor:
    """(max_tiles, patches, attributes) int64: the index of each attribute, IGNORED where there is none."""
    rows, columns = scene.layout
    scale = columns * IMAGE_SIZE / scene.width
    targets = torch.full((max_tiles, _SIDE * _SIDE, len(_ATTRIBUTES)), IGNORED)
    for tile in range(rows * columns):
        for patch in range(_SIDE * _SIDE):
            x = (tile % columns) * IMAGE_SIZE + (patch % _SIDE + 0.5) * _PATCH
            y = (tile // columns) * IMAGE_SIZE + (patch // _SIDE + 0.5) * _PATCH
            place = 2 * (2 * y >= rows * IMAGE_SIZE) + (2 * x >= columns * IMAGE_SIZE)
            shape = _covering(scene, x / scale, y / scale, _REACH / scale)
            names = {"place": PLACES[place], "background": scene.background}
            if shape is not None:
                names |= {"kind": shape.kind, "color": shape.color, "size": shape.size}
            for index, (attribute, known) in enumerate(_ATTRIBUTES.items()):
                if attribute in names:
                    targets[tile, patch, index] = known.index(names[attribute])
    return targets


def _covering(scene: Scene, x: float, y: float, reach: float) -> Shape | None:
    for shape in scene.shapes:
        across, down = abs(shape.center[0] - x), abs(shape.center[1] - y)
        if max(across, down) < shape.radius + reach:
            return shape
    return None


class PatchHead(nn.Linear):
    """Logits of every attribute from the projected state of a patch."""

    def __init__(self, config: MllamaConfig) -> None:
        super().__init__(config.text_config.hidden_size, sum(map(len, _ATTRIBUTES.values())))

    def loss(self, tiles: ImageTiles, targets: Tensor) -> tuple[Tensor, float]:
        """Mean cross entropy, and the share of covered patches with every attribute right.

        Args:
            tiles: of M images. targets: (M, max_tiles, patches, attributes).
        """
        present = tiles.table >= 0
        states = tiles.states[tiles.table[present].long()][:, 1:].flatten(0, 1)  # no class token
        wanted = targets[present].flatten(0, 1)
        losses, right = [], wanted[:, 0] != IGNORED
        covered = right.sum()
        sizes = [len(names) for names in _ATTRIBUTES.values()]
        for logits, target in zip(self(states).split(sizes, -1), wanted.unbind(-1), strict=True):
            losses.append(F.cross_entropy(logits, target, ignore_index=IGNORED))
            right = right & (logits.argmax(-1) == target)
        return torch.stack(losses).mean(), (right.sum() / covered).item()
