"""The marker `share(n)`: of a test with many cases, one in n, which the run's seed chooses.

Commits have different seeds, and so other cases. Every value of every parameter is among them, even where
that is more than one in n. The others are `full`.
"""

from __future__ import annotations

import os
import random
from collections.abc import Hashable

import pytest


def drawn(cases: list[set[Hashable]], count: int, chance: random.Random) -> set[int]:
    """Places of one in `count` cases, of which each is the set of its values."""
    found, others, seen = [], [], set()
    for place in chance.sample(range(len(cases)), len(cases)):
        (others if cases[place] <= seen else found).append(place)
        seen |= cases[place]
    return {*found, *others[: max(0, -(-len(cases) // count) - len(found))]}


def _values(case: pytest.Item) -> set[Hashable]:
    """Which value the case has of each list of parameters: not all can be compared, but one is one object."""
    found = set()
    for marker in case.iter_markers("parametrize"):
        given = marker.args[0]
        names = [n.strip() for n in given.split(",")] if isinstance(given, str) else given
        found.add((*names, *(id(case.callspec.params[name]) for name in names)))
    return found


def mark_the_others(items: list[pytest.Item], seed: int) -> None:
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("share") and not item.get_closest_marker("full"):
            tests.setdefault(item.nodeid.split("[")[0], []).append(item)
    device = os.environ.get("CUDASIM_ARCH")  # simulated ones have a share each
    for name, cases in tests.items():
        (count,) = cases[0].get_closest_marker("share").args
        chance = random.Random(f"{seed} {device} {name}")
        kept = drawn([_values(case) for case in cases], count, chance)
        for place, case in enumerate(cases):
            if place not in kept:
                case.add_marker("full")
