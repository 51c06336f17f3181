"""Loss curves of the demo model trained on each backend, as one small file and a figure.

python -m mllama.demo.train --out DIR --backend BACKEND --log BACKEND.jsonl    once per backend
python -m benchmarks.training_curves reference.jsonl kernels.jsonl --output benchmarks/curves/demo.json

A run is called by the name of its log. The figure is benchmarks/curves/demo.svg.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

STEPS_PER_POINT = 20
COLORS = ("#9dbbdb", "#3b6ea8")


def curves(logs: list[Path]) -> dict[str, Any]:
    """Mean losses of so many steps each, the accuracies at the end, and how far apart the curves come.

    ``largest_gap`` is the largest difference of two runs at a point, relative to the higher one.
    """
    runs = {}
    for log in logs:
        entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        losses = [entry["loss"] for entry in entries if "loss" in entry]
        points = range(0, len(losses), STEPS_PER_POINT)
        runs[log.stem] = {
            "loss": [round(_mean(losses[i : i + STEPS_PER_POINT]), 4) for i in points],
            "accuracy": {e["dtype"]: e["accuracy"] for e in entries if "accuracy" in e},
        }
    columns = zip(*(run["loss"] for run in runs.values()), strict=True)
    gap = max((max(column) - min(column)) / max(column) for column in columns)
    return {"steps_per_point": STEPS_PER_POINT, "largest_gap": round(gap, 4), "runs": runs}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "mllama-kernels"  # the same file from the same figures
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 3.2), layout="constrained")
    for (name, run), color, width in zip(result["runs"].items(), COLORS, (4, 1.2)):
        steps = [result["steps_per_point"] * (i + 1) for i in range(len(run["loss"]))]
        axes.plot(steps, run["loss"], label=name, color=color, linewidth=width)
    axes.set_yscale("log")
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel(f"loss, mean of {result['steps_per_point']} steps", fontsize=8)
    axes.legend(frameon=False, fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, metadata=metadata, dpi=150)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_curves", description=__doc__.splitlines()[0]
    )
    parser.add_argument("logs", type=Path, nargs="+", help="of python -m mllama.demo.train --log")
    parser.add_argument("--output", type=Path, required=True, help="RESULT.json")
    options = parser.parse_args(arguments)
    result = curves(options.logs)
    options.output.write_text(json.dumps(result) + "\n", encoding="utf-8")
    figure = options.output.with_suffix(".svg")
    draw(result, figure)
    accuracies = "; ".join(f"{name} {run['accuracy']}" for name, run in result["runs"].items())
    print(f"written to {options.output} and {figure}")
    print(f"largest gap {result['largest_gap']:.1%}; accuracy: {accuracies}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
