"""Images of one to four shapes, drawn from a seed.

An image is cut into four quarters (top left, top right, bottom left, bottom right); a quarter holds at
most one shape, and the whole shape lies inside it, so every position has one name. The proportions are
those of each of the supported tile grids (1x1 ... 2x2 ... 1x4) equally often, at the grid's own size or
up to four times larger.

To be learned in minutes the world is a tidy one: two sizes of shape, centres about half a patch apart, and
backgrounds darker than every shape.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from mllama.wording import quoted

IMAGE_SIZE = 56  # side of one tile of the demo model, pixels
LAYOUTS = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))  # (tile rows, columns)
KINDS = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (220, 30, 40),
    "green": (30, 160, 60),
    "blue": (40, 80, 225),
    "yellow": (245, 220, 40),
    "purple": (150, 50, 190),
    "orange": (245, 130, 20),
}
SIZES = {"small": (6.0, 7.0), "large": (11.0, 12.5)}  # radius in pixels, likewise
BACKGROUNDS = {"black": (10, 10, 10), "gray": (62, 62, 62), "brown": (80, 45, 10)}
PLACES = ("top left", "top right", "bottom left", "bottom right")  # reading order
_JITTER = 10  # levels by which a drawn colour may differ from its name's
_ENLARGEMENTS = (1, 2, 3, 4)
_STEP, _WOBBLE = 7, 1.0  # of the centres, in pixels before enlargement


@dataclass(frozen=True)
class Shape:
    """One shape: what it is called, and where it was drawn (centre and radius in pixels)."""

    kind: str
    color: str
    size: str
    place: str
    center: tuple[float, float]
    radius: float
    rgb: tuple[int, int, int]


@dataclass(frozen=True)
class Scene:
    """An image before it is drawn; `shapes` are in reading order, one per place at most."""

    width: int
    height: int
    layout: tuple[int, int]
    background: str
    rgb: tuple[int, int, int]
    shapes: tuple[Shape, ...]


def sample_scene(rng: random.Random) -> Scene:
    """Draws a scene: grid, image size, background, and one to four shapes (equal ones included)."""
    layout = rng.choice(LAYOUTS)
    # Of all grids, that of the image's own proportions shrinks it least with the least area; but an
    # image larger than one tile never gets 1x1.
    factor = 1 if layout == (1, 1) else rng.choice(_ENLARGEMENTS)
    width, height = layout[1] * IMAGE_SIZE * factor, layout[0] * IMAGE_SIZE * factor
    background = rng.choice(sorted(BACKGROUNDS))
    places = sorted(rng.sample(range(4), rng.randint(1, 4)))
    names: list[tuple[str, str, str]] = []
    for _ in places:
        if names and rng.random() < 0.25:
            names.append(rng.choice(names))
        else:
            names.append((rng.choice(KINDS), rng.choice(sorted(COLORS)), rng.choice(sorted(SIZES))))
    shapes = tuple(
        _place(name, place, layout, factor, rng) for name, place in zip(names, places, strict=True)
    )
    return Scene(width, height, layout, background, _jitter(BACKGROUNDS[background], rng), shapes)


def draw(scene: Scene) -> Image.Image:
    """Draws a scene as an RGB image."""
    image = Image.new("RGB", (scene.width, scene.height), scene.rgb)
    canvas = ImageDraw.Draw(image)
    for shape in scene.shapes:
        (x, y), r = shape.center, shape.radius
        if shape.kind == "circle":
            canvas.ellipse((x - r, y - r, x + r, y + r), fill=shape.rgb)
        elif shape.kind == "square":
            s = 0.88 * r  # so that the four kinds cover similar areas
            canvas.rectangle((x - s, y - s, x + s, y + s), fill=shape.rgb)
        elif shape.kind == "triangle":
            canvas.polygon(((x, y - r), (x + r, y + r), (x - r, y + r)), fill=shape.rgb)
        elif shape.kind == "cross":
            arm = r / 3
            canvas.rectangle((x - r, y - arm, x + r, y + arm), fill=shape.rgb)
            canvas.rectangle((x - arm, y - r, x + arm, y + r), fill=shape.rgb)
        else:
            raise ValueError(
                f"shape kind must be one of {', '.join(KINDS)}, got {quoted(shape.kind)}"
            )
    return image


def sample_picture(seed: int) -> tuple[Image.Image, Scene]:
    """The image and scene of a seed; the same seed gives the same image everywhere."""
    scene = sample_scene(random.Random(seed))
    return draw(scene), scene


def _place(
    name: tuple[str, str, str], place: int, layout: tuple[int, int], factor: int, rng: random.Random
) -> Shape:
    """A shape in its quarter, at one of the points that lie half a patch apart, give or take a pixel."""
    kind, color, size = name
    radius = rng.uniform(*SIZES[size])
    center = []
    for tiles, half in ((layout[1], place % 2), (layout[0], place // 2)):
        quarter = tiles * IMAGE_SIZE / 2
        steps = int((quarter / 2 - radius - _WOBBLE) // _STEP)
        middle = quarter * (half + 0.5)
        at = middle + _STEP * rng.randint(-steps, steps) + rng.uniform(-_WOBBLE, _WOBBLE)
        center.append(at * factor)
    rgb = _jitter(COLORS[color], rng)
    return Shape(kind, color, size, PLACES[place], (center[0], center[1]), radius * factor, rgb)


def _jitter(rgb: tuple[int, int, int], rng: random.Random) -> tuple[int, int, int]:
    r, g, b = (min(255, max(0, level + rng.randint(-_JITTER, _JITTER))) for level in rgb)
    return r, g, b
