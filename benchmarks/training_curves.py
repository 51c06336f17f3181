"""Loss curves of the demo model trained on each backend, as one small file and a figure.

python -m mllama.demo.train --out DIR --backend BACKEND --seed SEED --log BACKEND-SEED.jsonl    for each
python -m benchmarks.training_curves *.jsonl --output benchmarks/curves/demo.json

The figure is benchmarks/curves/demo.svg.
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

    ``largest_gap`` is the largest difference of two runs of a seed at a point, relative to the higher one.
    """
    seeds: dict[str, Any] = {}
    for log in logs:
        backend, _, seed = log.stem.rpartition("-")
        if not backend:
            raise ValueError(f"{log.name}: expected a name like kernels-0.jsonl, BACKEND-SEED")
        entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        losses = [entry["loss"] for entry in entries if "loss" in entry]
        points = range(0, len(losses), STEPS_PER_POINT)
        seeds.setdefault(seed, {"runs": {}})["runs"][backend] = {
            "loss": [round(_mean(losses[i : i + STEPS_PER_POINT]), 4) for i in points],
            "accuracy": {e["dtype"]: e["accuracy"] for e in entries if "accuracy" in e},
        }
    for seed, result in seeds.items():
        columns = list(zip(*(run["loss"] for run in result["runs"].values()), strict=True))
        gap = max((max(column) - min(column)) / max(column) for column in columns)
        seeds[seed] = {"largest_gap": round(gap, 4), **result}
    return {"steps_per_point": STEPS_PER_POINT, "seeds": seeds}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "mllama-kernels"  # the same file from the same figures
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1,
        len(result["seeds"]),
        figsize=(9, 3.2),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axes, (seed, drawn) in zip(panels[0], result["seeds"].items()):
        for (name, run), color, width in zip(drawn["runs"].items(), COLORS, (4, 1.2)):
            steps = [result["steps_per_point"] * (i + 1) for i in range(len(run["loss"]))]
            right = run["accuracy"].get("torch.float32")
            label = name if right is None else f"{name}: {right:.1%} right"
            axes.plot(steps, run["loss"], label=label, color=color, linewidth=width)
        axes.set_title(f"seed {seed}", fontsize=8)
        axes.set_yscale("log")
        axes.set_xlabel("step", fontsize=8)
        axes.legend(frameon=False, fontsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[0][0].set_ylabel(f"loss, mean of {result['steps_per_point']} steps", fontsize=8)
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
    try:
        result = curves(options.logs)
    except ValueError as error:
        parser.error(str(error))
    options.output.write_text(json.dumps(result) + "\n", encoding="utf-8")
    figure = options.output.with_suffix(".svg")
    draw(result, figure)
    print(f"written to {options.output} and {figure}")
    for seed, told in result["seeds"].items():
        accuracies = "; ".join(f"{name} {run['accuracy']}" for name, run in told["runs"].items())
        print(f"seed {seed}: largest gap {told['largest_gap']:.1%}; accuracy: {accuracies}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
