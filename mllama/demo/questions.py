"""Questions about a scene, with the one right answer to each.

Six kinds: describe, count, color, shape, where, yes_no. A question is asked only where the scene has
exactly one answer (`What color is the circle?` only when there is one circle).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from .shapes import BACKGROUNDS, COLORS, KINDS, PLACES, SIZES, Scene, Shape

_COLOR_NAMES, _SIZE_NAMES = tuple(sorted(COLORS)), tuple(sorted(SIZES))
_DESCRIBE = (
    "Describe the picture.",
    "Describe the image.",
    "What is in the picture?",
    "What is in the image?",
    "What do you see?",
    "What does the picture show?",
)


@dataclass(frozen=True)
class Question:
    """A question, its kind (one of QUESTION_KINDS) and its answer."""

    kind: str
    text: str
    answer: str


def sample_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Draws one question of every kind that has an answer (`where` has none if all shapes are alike)."""
    drawn = ((kind, make(scene, rng)) for kind, make in _MAKERS.items())
    return [Question(kind, *pair) for kind, pair in drawn if pair is not None]


def questions_for(scene: Scene, seed: int) -> list[tuple[str, str]]:
    """One (question, answer) of every kind about the scene, drawn from the seed."""
    return [(q.text, q.answer) for q in sample_questions(scene, random.Random(seed))]


def is_right(answer: str, expected: str) -> bool:
    """Whether an answer says what is expected: case, spacing, a final stop and the order of a list aside."""
    return _normalise(answer) == _normalise(expected)


def _normalise(answer: str) -> Counter[str]:
    parts = answer.strip().rstrip(".").lower().split(",")
    return Counter(" ".join(part.split()) for part in parts)


def _with_article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _phrase(shape: Shape) -> str:
    return f"{shape.size} {shape.color} {shape.kind}"


def _describe(scene: Scene, rng: random.Random) -> tuple[str, str]:
    return rng.choice(_DESCRIBE), ", ".join(_with_article(_phrase(s)) for s in scene.shapes)


def _count(scene: Scene, rng: random.Random) -> tuple[str, str]:
    like = rng.choice(scene.shapes)
    present = rng.random() < 0.75
    kind = like.kind if present else rng.choice(KINDS)
    color = like.color if present else rng.choice(_COLOR_NAMES)
    size = like.size if present else rng.choice(_SIZE_NAMES)
    noun, test = rng.choice(
        (
            ("shapes", lambda s: True),
            (f"{color} shapes", lambda s: s.color == color),
            (f"{size} shapes", lambda s: s.size == size),
            (_plural(kind), lambda s: s.kind == kind),
            (f"{color} {_plural(kind)}", lambda s: (s.color, s.kind) == (color, kind)),
        )
    )
    place = rng.choice(("are there", "are in the picture", "do you see"))
    return f"How many {noun} {place}?", str(sum(test(s) for s in scene.shapes))


def _color(scene: Scene, rng: random.Random) -> tuple[str, str]:
    color = rng.choice(("color", "colour"))
    if rng.random() < 0.15:
        return f"What {color} is the background?", scene.background
    shape, name = _unique(scene, rng, (_by_kind, _by_size_and_kind, _by_place))
    return f"What {color} is the {name}?", shape.color


def _shape(scene: Scene, rng: random.Random) -> tuple[str, str]:
    shape, name = _unique(scene, rng, (_by_color, _by_size_and_color, _by_place))
    verb = rng.choice(("What shape is", "Which shape is"))
    where = name.removeprefix("shape ").removesuffix(" shape")
    if name.endswith(" shape") and " " in where:  # "Which shape is small and red?"
        where = where.replace(" ", " and ")
    return f"{verb} {where}?", shape.kind


def _where(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    namers = (_by_kind, _by_color, _by_color_and_kind, _by_size_and_kind)
    single = [pair for name in namers for pair in _singles(scene, name)]
    if not single:
        return None
    shape, name = rng.choice(single)
    return f"Where is the {name}?", shape.place


def _yes_no(scene: Scene, rng: random.Random) -> tuple[str, str]:
    yes = rng.random() < 0.5
    makers = [_exists_kind, _exists_color, _exists_both, _is_colored, _at_place]
    rng.shuffle(makers)
    for make in makers:
        text = make(scene, yes, rng)
        if text is not None:
            return text, "yes" if yes else "no"
    raise AssertionError("no scene holds every pair of colour and kind")


def _exists_kind(scene: Scene, yes: bool, rng: random.Random) -> str | None:
    kind = _choose(KINDS, {s.kind for s in scene.shapes}, yes, rng)
    return kind and f"Is there a {kind}?"


def _exists_color(scene: Scene, yes: bool, rng: random.Random) -> str | None:
    color = _choose(_COLOR_NAMES, {s.color for s in scene.shapes}, yes, rng)
    return color and f"Is there {_with_article(color)} shape?"


def _exists_both(scene: Scene, yes: bool, rng: random.Random) -> str | None:
    """A pair of colour and kind; a pair that is absent keeps a kind or a colour that is there."""
    present = {(s.color, s.kind) for s in scene.shapes}
    colors, kinds = {c for c, _ in present}, {k for _, k in present}
    near = [(c, k) for c in _COLOR_NAMES for k in KINDS if c in colors or k in kinds]
    pair = _choose(near, present, yes, rng)
    return pair and f"Is there {_with_article(' '.join(pair))}?"


def _is_colored(scene: Scene, yes: bool, rng: random.Random) -> str | None:
    single = _singles(scene, _by_kind)
    if not single:
        return None
    shape, name = rng.choice(single)
    others = {s.color for s in scene.shapes} - {shape.color} or set(_COLOR_NAMES) - {shape.color}
    color = shape.color if yes else rng.choice(sorted(others))
    return f"Is the {name} {color}?"


def _at_place(scene: Scene, yes: bool, rng: random.Random) -> str | None:
    place = _choose(PLACES, {s.place for s in scene.shapes}, yes, rng)
    return place and f"Is there a shape in the {place}?"


def _choose(pool, present, yes: bool, rng: random.Random):
    """A member of the pool that is (or is not) present, or None."""
    members = [item for item in pool if (item in present) == yes]
    return rng.choice(members) if members else None


def _plural(kind: str) -> str:
    return f"{kind}es" if kind.endswith("s") else f"{kind}s"


def _by_kind(shape: Shape) -> str:
    return shape.kind


def _by_color(shape: Shape) -> str:
    return f"{shape.color} shape"


def _by_color_and_kind(shape: Shape) -> str:
    return f"{shape.color} {shape.kind}"


def _by_size_and_kind(shape: Shape) -> str:
    return f"{shape.size} {shape.kind}"


def _by_size_and_color(shape: Shape) -> str:
    return f"{shape.size} {shape.color} shape"


def _by_place(shape: Shape) -> str:
    return f"shape in the {shape.place}"


_Namer = Callable[[Shape], str]


def _singles(scene: Scene, name: _Namer) -> list[tuple[Shape, str]]:
    """The shapes that this way of naming tells from all others, with their names."""
    names = Counter(name(s) for s in scene.shapes)
    return [(s, name(s)) for s in scene.shapes if names[name(s)] == 1]


def _unique(scene: Scene, rng: random.Random, namers: tuple[_Namer, ...]) -> tuple[Shape, str]:
    """A shape and a name that fits only it, from a random one of the namers that have such a name."""
    singles = [single for single in (_singles(scene, name) for name in namers) if single]
    return rng.choice(rng.choice(singles))


_MAKERS: dict[str, Callable[[Scene, random.Random], tuple[str, str] | None]] = {
    "describe": _describe,
    "count": _count,
    "color": _color,
    "shape": _shape,
    "where": _where,
    "yes_no": _yes_no,
}
QUESTION_KINDS = tuple(_MAKERS)


def vocabulary_texts() -> list[str]:
    """Texts that hold every word a question or an answer can use, for training the tokenizer."""
    names = [f"{s} {c} {k}" for s in _SIZE_NAMES for c in _COLOR_NAMES for k in KINDS]
    words = [_plural(k) for k in KINDS] + list(BACKGROUNDS) + [f"the {p}" for p in PLACES]
    texts = list(_DESCRIBE) + [", ".join(_with_article(n) for n in names)]
    for word in words + names:
        texts += [f"How many {word} are there?", f"How many {word} are in the picture?"]
        texts += [f"How many {word} do you see?", f"Where is the {word}? {word}"]
        texts += [f"What color is the {word}?", f"What colour is the background? {word}"]
        texts += [f"Which shape is in {word}?", f"What shape is {word}?", f"Is there a {word}?"]
        texts += [f"How many shapes are {word} and {word}? yes no", f"Is the {word}? Is there an"]
    first = [*KINDS, *COLORS, *BACKGROUNDS, *PLACES, "yes", "no", "a large", "a small", "an orange"]
    return texts + first * 2 + [str(n) for n in range(10)]
