"""A pytest plugin that runs the tests of `transformers` on accelerated models; see
check_transformers_suite.sh, which runs them with it and without, and compares by this module.

The tiny models of those tests have activations and head dimensions that no kernel takes, so both runs
change them: SiLU, and heads of 8. In the accelerated run every model is accelerated as it is made.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

RESULTS = "SUITE_RESULTS"  # where to write them
ACCELERATED = "SUITE_ACCELERATED"

_outcomes: dict[str, str] = {}
_calls: Counter[str] = Counter()
_changed: set[type] = set()


def pytest_configure() -> None:
    if os.environ.get(ACCELERATED):
        _accelerate_every_model()


def pytest_collection_modifyitems(items: list[Any]) -> None:
    for module in {item.module for item in items}:
        for value in vars(module).values():
            if isinstance(value, type) and value.__name__.endswith("Tester"):
                for cls in value.__mro__:
                    _change_sizes(cls)


def pytest_runtest_logreport(report: Any) -> None:
    if report.when != "call" and report.outcome == "passed":
        return
    if _outcomes.get(report.nodeid) != "failed":  # subtests report under the name of their test
        _outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish() -> None:
    results = {"outcomes": _outcomes, "calls": _calls}
    Path(os.environ[RESULTS]).write_text(json.dumps(results, indent=1))


def _change_sizes(cls: type) -> None:
    """The sizes of a model tester are the defaults of its parameters, single or in dicts."""
    function = vars(cls).get("__init__")
    if cls in _changed or not inspect.isfunction(function):
        return
    _changed.add(cls)
    names = list(inspect.signature(function).parameters)
    defaults = list(function.__defaults__ or ())
    for place, name in enumerate(names[len(names) - len(defaults) :]):
        if name == "hidden_act":
            defaults[place] = "silu"
        elif name == "text_config" and isinstance(defaults[place], dict):
            defaults[place]["hidden_act"] = "silu"
        elif name == "vision_config" and isinstance(defaults[place], dict):
            _widen(defaults[place])
    function.__defaults__ = tuple(defaults)


def _widen(vision: dict[str, Any]) -> None:
    heads = vision.get("num_attention_heads", 4)
    if "vision_output_dim" in vision:  # Mllama's
        vision["attention_heads"] = heads
        vision["vision_output_dim"] = 8 * heads * (1 + len(vision["intermediate_layers_indices"]))
    vision["hidden_size"] = 8 * heads


def _accelerate_every_model() -> None:
    import transformers

    import mllama_kernels
    from mllama_kernels import _library
    from mllama_kernels.transformers import accelerate
    from mllama_kernels.transformers.accelerate import _FAMILIES

    def counted(name: str, op: Any) -> Any:
        @functools.wraps(op)
        def counting(*args: Any, **kwargs: Any) -> Any:
            _calls[name] += 1
            return op(*args, **kwargs)

        return counting

    for name in _library.OPS:
        setattr(mllama_kernels, name, counted(name, getattr(mllama_kernels, name)))
    finish = transformers.PreTrainedModel.post_init

    def post_init(model: Any) -> None:
        finish(model)
        if isinstance(model, _FAMILIES):
            accelerate(model)

    transformers.PreTrainedModel.post_init = post_init


def compare(plain: Path, accelerated: Path, failures: Path) -> int:
    """Print the counts, and write the tests that pass only without the kernels. Returns their number."""
    results = [json.loads(path.read_text()) for path in (plain, accelerated)]
    without, with_kernels = (result["outcomes"] for result in results)
    for name, outcomes in (("plain", without), ("accelerated", with_kernels)):
        counts = Counter(outcomes.values())
        print(f"{name:12}" + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))
    calls = results[1]["calls"]
    print("kernels     " + ", ".join(f"{name} {n}" for name, n in sorted(calls.items())))
    if not calls:
        print("no kernel ran")
        return 1
    lost = [n for n, outcome in without.items() if outcome == "passed" != with_kernels.get(n)]
    failures.write_text("\n".join(lost))
    print(f"{len(lost)} pass plain and not accelerated")
    for name in lost:
        print(f"  {name}")
    return len(lost)


if __name__ == "__main__":
    sys.exit(min(compare(*map(Path, sys.argv[1:])), 1))
