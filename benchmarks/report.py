"""Tables from committed result files: one beside each file, their index, and what the README shows.

    python -m benchmarks.report [--check]

Nothing is measured here. --check writes nothing and fails if a table is not what the files say, or if a
later run of the same machine has all that a file has.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks import figure, goals, readme, tables
from benchmarks.machine import ROOT
from benchmarks.runs import RESULTS, committed, newest, read, superseded

README, FIGURE = ROOT / "README.md", ROOT / "docs" / "speed.svg"


def goal_table(runs: list[dict[str, Any]]) -> str:
    """The goals for which there is a figure."""
    rows = []
    for goal in goals.GOALS:
        value = goals.value_of(goal, newest(runs, goal.device, goals.part_of(goal.op)))
        if value is not None:
            sign = ">=" if goals.MEASURES[goal.measure][1] else "<="
            target = f"{sign} {goals.in_words(goal, goal.target)}"
            reached = "yes" if goals.reached(goal, value) else "no"
            rows.append([goal.what, target, goals.in_words(goal, value), reached])
    return tables.table(["goal", "target", "measured", "reached"], rows)


def index(runs: list[dict[str, Any]]) -> str:
    """What the results are of, and the goals."""
    files = [f"- [{_name(run)}]({_name(run)}.md): {tables.machine_in_words(run)}" for run in runs]
    return f"""# Results

Of each machine and instruction set the newest.

{chr(10).join(files)}

## Goals

Those that have a figure; all are in [`goals.py`](../goals.py). A floor is made of what the same machine did
at most in the same run.

{goal_table(runs)}
"""


def _name(run: dict[str, Any]) -> str:
    return run["file"].removesuffix(".json")


def outputs(runs: list[dict[str, Any]]) -> dict[Path, str]:
    """Every file that is made here, and what it should hold."""
    made = {RESULTS / f"{_name(run)}.md": tables.run_page(run) for run in runs}
    text = readme.replaced(README.read_text(), "ops", readme.ops())
    text = readme.replaced(text, "speed", readme.speed(runs))
    return made | {RESULTS / "README.md": index(runs), README: text, FIGURE: figure.draw(runs)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a file is old")
    options = parser.parse_args(arguments)
    runs = read(committed())
    made = outputs(runs)
    old = [p for p, text in made.items() if not p.exists() or p.read_text() != text]
    for path in old:
        print(f"{path.relative_to(ROOT)} {'is out of date' if options.check else 'written'}")
        if not options.check:
            path.write_text(made[path])
    surplus = superseded(runs)
    for name in surplus:
        print(f"{name}: later runs of the same machine have all of it; delete it")
    return 1 if options.check and (old or surplus) else 0


if __name__ == "__main__":
    sys.exit(main())
