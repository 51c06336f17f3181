"""The figure of a run, from its result file.

python -m benchmarks.plot RESULT.json [--output FIGURE.svg|.png]
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from benchmarks import goals
from benchmarks.case import PLAIN
from benchmarks.tables import best_peer, machine_in_words, sizes

PLAIN_COLOR, BEST_COLOR, EVEN_COLOR = "#9dbbdb", "#3b6ea8", "#666666"


def bars(run: dict[str, Any], dtype: str) -> list[tuple[str, dict[str, float], dict[str, float]]]:
    """Label, ratio against plain PyTorch and against the fastest peer, of every row of one dtype."""
    found = []
    for row in run["rows"]:
        plain, best = goals.timed(row, PLAIN), best_peer(row)
        if row["dtype"] == dtype and plain and best and "ours_is_faster" in plain:
            label = f"{row['op']}  {sizes(row['shape'])}"
            found.append((label, plain["ours_is_faster"], best["ours_is_faster"]))
    return found


def draw(run: dict[str, Any], path: Path, dtype: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "mllama-kernels"  # the same file from the same figures
    from matplotlib import pyplot

    rows = bars(run, dtype)
    figure, axes = pyplot.subplots(figsize=(9, 1.4 + 0.42 * len(rows)), layout="constrained")
    for number, (_, *pair) in enumerate(reversed(rows)):
        for offset, ratio, color in zip((0.18, -0.18), pair, (PLAIN_COLOR, BEST_COLOR)):
            middle, place = ratio["median"], number + offset
            axes.barh(place, middle - 1, left=1, height=0.34, color=color)
            axes.plot([ratio["min"], ratio["max"]], [place, place], color=EVEN_COLOR, linewidth=1)
    axes.set_yticks(range(len(rows)), [label for label, *_ in reversed(rows)], fontsize=8)
    axes.set_xscale("log", base=2)
    medians = [ratio["median"] for _, *pair in rows for ratio in pair]
    axes.set_xlim(min([0.7, *medians]) / 1.2, max([2.0, *medians]) * 1.5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.axvline(1, color=EVEN_COLOR, linewidth=1)
    axes.set_xlabel(
        "times faster than plain PyTorch (light) and than the fastest peer (dark); "
        "lines: range over rounds",
        fontsize=8,
    )
    caption = f"{dtype}; {machine_in_words(run)}"
    figure.suptitle("\n".join(textwrap.wrap(caption, 130)), fontsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, metadata=metadata, dpi=150)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot", description=__doc__.splitlines()[0]
    )
    parser.add_argument("result", type=Path)
    parser.add_argument("--output", type=Path, help="default: RESULT.svg")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args(arguments)
    path = options.output or options.result.with_suffix(".svg")
    draw(json.loads(options.result.read_text()), path, options.dtype)
    print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
