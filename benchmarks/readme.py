"""The parts of the README that are made: the table of ops, and a few figures of speed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mllama_kernels
from benchmarks import goals, tables
from benchmarks.case import ACCELERATED, OURS, PLAIN
from benchmarks.runs import newest

DTYPE = "bfloat16"


@dataclass(frozen=True)
class Headline:
    """A row of the README's table of speed.

    Attributes:
        what: as it stands in the table.
        op: of the row, or "model" or "training".
        shape: sizes by which it is found; of several rows it is the last, which is the largest.
        figure: of the model, "first_token" or "token".
    """

    what: str
    op: str
    shape: dict[str, Any] = field(default_factory=dict)
    figure: str = ""


# At most six: there is a table for CPUs and one for GPUs.
HEADLINES = (
    Headline("model, first token", "model", {"batch": 1}, "first_token"),
    Headline("model, decoding", "model", {"batch": 1}, "token"),
    Headline("training step", "training"),
    Headline("`rotary_attention_cached`", "rotary_attention_cached", {"batch": 1, "new": 1}),
    Headline("`cross_attention`", "cross_attention", {"rows": 1}),
    Headline("`vision_attention`", "vision_attention", {"tiles": 4}),
)


def replaced(text: str, name: str, section: str, by: str = "benchmarks.report") -> str:
    """A text with the section between the two markers of that name, which say what module makes it.

    Raises: ValueError where the text does not have them once each.
    """
    begin, end = (
        f"<!-- {name}: made by `python -m {by}` -->",
        f"<!-- end of {name} -->",
    )
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"expected {begin} and {end} once each, around what is made")
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n\n{section}\n\n{end}{after}"


def ops() -> str:
    """A line per function of mllama_kernels, from its docstring."""
    found = (getattr(mllama_kernels, name) for name in mllama_kernels.__all__)
    functions = [function for function in found if inspect.isfunction(function)]
    return tables.table(
        ["op", "what it does", "gradient"],
        [[f"`{f.__name__}`", summary(f), "yes" if has_gradient(f) else ""] for f in functions],
        text=3,
    )


def summary(function: Callable[..., Any]) -> str:
    """The first line of a docstring, as Markdown."""
    line = inspect.getdoc(function).splitlines()[0].removesuffix(".")
    return re.sub(r":\w+:(`[^`]+`)", r"\1", line).replace("``", "`").replace("|", r"\|")


def has_backward(function: Callable[..., Any]) -> bool:
    """Whether its gradient is a kernel of its own."""
    return "\nBackward:\n" in inspect.getdoc(function)


def has_gradient(function: Callable[..., Any]) -> bool:
    """Whether it has one, be it made of other ops."""
    return has_backward(function) or "\nGradients:\n" in inspect.getdoc(function)


def speed(runs: list[dict[str, Any]]) -> str:
    """A table of the headlines for each kind of device that has a run."""
    texts = [
        "How many times faster ours is: the median of interleaved rounds and their range. "
        "[All results](benchmarks/results/README.md)."
    ]
    for kind in (goals.GPU, goals.CPU):
        rows, sources = [], {}
        for headline in HEADLINES:
            run = newest(runs, kind, goals.part_of(headline.op))
            if cells := run and _cells(headline, run):
                rows.append(cells)
                sources[run["file"]] = tables.machine_in_words(run)
        if rows:
            texts += ["; ".join(sources.values()) + ":"]
            texts += [tables.table(["", "ours", "plain PyTorch", "fastest peer"], rows)]
    return "\n\n".join(texts)


@dataclass(frozen=True)
class Found:
    """What a run has for a headline.

    Attributes:
        shape: of the row.
        figure: ours, in words.
        peers: name, figure and ratio of those timed beside it, the fastest first.
    """

    shape: str
    figure: str
    peers: list[tuple[str, str, dict[str, float]]]


def find(headline: Headline, run: dict[str, Any]) -> Found | None:
    rows = [
        row
        for row in goals.rows_of(run, headline.op)
        if row["dtype"] == DTYPE
        and headline.shape.items() <= row["shape"].items()
        and not {"pass", "encoding"} & row["shape"].keys()
        and goals.timed(row)
    ]
    if not rows:
        return None
    row, unit = rows[-1], f"_{headline.figure}" if headline.figure else ""
    ratio = f"ours_is_faster{unit}"
    peers = [i for i in row["impls"] if i["name"] not in (OURS, ACCELERATED) and ratio in i]
    return Found(
        tables.sizes(row["shape"]),
        _figure(headline, goals.timed(row)),
        [
            (impl["name"], _figure(headline, impl), impl[ratio])
            for impl in sorted(peers, key=lambda impl: impl[ratio]["median"])
        ],
    )


def _figure(headline: Headline, impl: dict[str, Any]) -> str:
    if headline.figure == "token":
        return f"{impl['tokens_per_s']:.4g} tokens/s"
    if headline.figure == "first_token":
        return tables.time_of(1e3 * impl["first_token_ms"]["median"])
    return tables.time_of(impl["us"]["median"])


def _cells(headline: Headline, run: dict[str, Any]) -> list[str] | None:
    if (found := find(headline, run)) is None:
        return None
    plain = next((ratio for name, _, ratio in found.peers if name == PLAIN), None)
    best = [f"{tables.times(ratio)} {name}" for name, _, ratio in found.peers[:1]]
    return [
        f"{headline.what}, {found.shape}",
        found.figure,
        tables.times(plain) if plain else "",
        *(best or [""]),
    ]
