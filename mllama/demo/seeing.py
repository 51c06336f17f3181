"""Dense supervision of the vision tower during training: what lies in the quarter that a patch belongs to.

Answers alone say little about a picture (a few bits a row), and the tower would learn to see only after the
text tower has learnt to look. A linear head on every vision token, thrown away after training, tells it directly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mllama.config import MllamaConfig
from mllama.tiles import ImageTiles
from mllama.tiling import size_in_canvas

from .shapes import BACKGROUNDS, COLORS, IMAGE_SIZE, KINDS, PLACES, SIZES, Scene

_IGNORED = -100
_PATCH = 14
_SIDE = IMAGE_SIZE // _PATCH
_NONE = "none"
# What is told of a patch's quarter, and the names it can have.
_ATTRIBUTES = {
    "kind": (_NONE, *KINDS),
    "color": (_NONE, *sorted(COLORS)),
    "size": (_NONE, *sorted(SIZES)),
    "place": PLACES,
    "background": tuple(sorted(BACKGROUNDS)),
}


def patch_targets(scene: Scene, max_tiles: int) -> Tensor:
    """(max_tiles, patches, attributes) int64: per patch the index of each attribute of its quarter.

    Patches of absent tiles, and those whose centre lies beside the picture, are ignored.
    """
    rows, columns = scene.layout
    height, width = size_in_canvas(
        scene.height, scene.width, rows * IMAGE_SIZE, columns * IMAGE_SIZE, IMAGE_SIZE
    )
    shapes = {shape.place: shape for shape in scene.shapes}
    targets = torch.full((max_tiles, _SIDE * _SIDE, len(_ATTRIBUTES)), _IGNORED)
    for tile in range(rows * columns):
        for patch in range(_SIDE * _SIDE):
            x = (tile % columns) * IMAGE_SIZE + (patch % _SIDE + 0.5) * _PATCH
            y = (tile // columns) * IMAGE_SIZE + (patch // _SIDE + 0.5) * _PATCH
            if x >= width or y >= height:
                continue
            place = PLACES[2 * (y >= height / 2) + (x >= width / 2)]
            shape = shapes.get(place)
            named = {"place": place, "background": scene.background}
            for index, (attribute, names) in enumerate(_ATTRIBUTES.items()):
                name = named.get(attribute) or getattr(shape, attribute, _NONE)
                targets[tile, patch, index] = names.index(name)
    return targets


class PatchHead(nn.Linear):
    """Logits of every attribute from the projected state of a patch."""

    def __init__(self, config: MllamaConfig) -> None:
        super().__init__(config.text_config.hidden_size, sum(map(len, _ATTRIBUTES.values())))

    def loss(self, tiles: ImageTiles, targets: Tensor) -> tuple[Tensor, float]:
        """Mean cross entropy, and the share of patches with every attribute right.

        Args:
            tiles: of M pictures. targets: (M, max_tiles, patches, attributes).
        """
        present = tiles.table >= 0
        states = tiles.states[tiles.table[present].long()][:, 1:]  # without the class token
        wanted = targets[present]
        losses, right = [], torch.ones(wanted.shape[:2], dtype=torch.bool)
        sizes = [len(names) for names in _ATTRIBUTES.values()]
        for index, logits in enumerate(self(states).split(sizes, -1)):
            target = wanted[..., index]
            losses.append(F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=_IGNORED))
            right &= logits.argmax(-1) == target
        seen = wanted[..., 0] != _IGNORED
        return torch.stack(losses).mean(), right[seen].float().mean().item()
