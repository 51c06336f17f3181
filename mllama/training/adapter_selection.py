"""A job of `mllama.confined`: which modules the patterns of an adapter's configuration select.

Patterns are regular expressions that somebody else wrote, and one of a dozen characters can take years. This
file is run by itself, in a process with limits, and imports nothing of this package. What is selected is what
PEFT selects.
"""

from __future__ import annotations

import re
from typing import Any

_LAYER = r".*?\.[^.]*\.(?P<idx>\d+)\."  # PEFT's, where no layers_pattern is given


def answer(request: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What the patterns select among names.

    Args:
        request: ``names`` of all modules and ``adapted``, the places among them of those that the file has
            tensors for; of the configuration ``target_modules``, ``exclude_modules``,
            ``layers_to_transform`` and ``layers_pattern``, and ``rank_pattern`` and ``alpha_pattern`` as
            lists of patterns.
    Returns: ``selected``, places among the names; per pattern list ``rank`` and ``alpha`` the place of the
        first pattern that matches each of the adapted modules, -1 for none, and in ``unused`` the places of
        the patterns that match none; or ``fault``.
    """
    try:
        names = request["names"]
        adapted = [names[place] for place in request["adapted"]]
        selected = [place for place, name in enumerate(names) if _is_selected(request, name)]
        ranks, unused_ranks = _first_matches(request["rank_pattern"], adapted)
        alphas, unused_alphas = _first_matches(request["alpha_pattern"], adapted)
    except re.error as error:
        return {"fault": f"a pattern is no regular expression: {error.msg}"}, ""
    except (RecursionError, OverflowError):
        return {"fault": "a pattern is too large"}, ""
    unused = {"rank": unused_ranks, "alpha": unused_alphas}
    return {"selected": selected, "rank": ranks, "alpha": alphas, "unused": unused}, ""


def _is_selected(request: dict[str, Any], name: str) -> bool:
    targets, excluded = request["target_modules"], request["exclude_modules"]
    if excluded and _names(excluded, name):
        return False
    if not _names(targets, name):
        return False
    layers = request["layers_to_transform"]
    if isinstance(targets, str) or not layers or name in targets:
        return True
    for pattern in request["layers_pattern"] or [None]:
        whole = _LAYER if pattern is None else rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."
        if (match := re.match(whole, name)) is not None:
            return int(match["idx"]) in layers
    return False


def _names(which: str | list[str], name: str) -> bool:
    """Whether a pattern matches a name, or a list has it or an end of it after a dot."""
    if isinstance(which, str):
        return re.fullmatch(which, name) is not None
    segments = name.split(".")
    ends = {".".join(segments[start:]) for start in range(len(segments))}
    return not ends.isdisjoint(which)


def _first_matches(patterns: list[str], names: list[str]) -> tuple[list[int], list[int]]:
    first, unused = [-1] * len(names), []
    for place, pattern in enumerate(patterns):
        compiled = re.compile(rf"(.*\.)?({pattern})$")
        matched = [i for i, name in enumerate(names) if compiled.match(name)]
        if not matched:
            unused.append(place)
        for i in matched:
            first[i] = place if first[i] < 0 else first[i]
    return first, unused
