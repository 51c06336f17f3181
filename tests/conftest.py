"""Fixtures every test may use: the device an op runs on, and the closing count of where tests ran."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
import shares
import torch

import mllama_kernels._library as library

SIMULATED = library.simulated
DEVICES = ["cpu"] + (
    ["cuda"] if torch.cuda.is_available() and library.has_cuda and not SIMULATED else []
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed",
        type=int,
        default=None,
        help="seed of the random tests; drawn and printed if absent",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--seed") is None:
        config.option.seed = random.randrange(2**31)


def pytest_report_header(config: pytest.Config) -> str:
    where = "the CUDA kernels under simulation" if SIMULATED else " and ".join(DEVICES)
    return f"seed {config.getoption('--seed')}; ops run on {where}; {library.missing or library.path.name}"


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the op runs: the CPU, and a GPU if there is one. On a simulated build: CUDA code on CPU."""
    if library.missing:
        pytest.fail(f"the compiled ops are not there: {library.missing}")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Every test starts with the variables of the run: libraries set some for good, as PEFT's BOFT does."""
    before = dict(os.environ)
    yield
    name = "PYTEST_CURRENT_TEST"  # which says where this is
    if {**os.environ, name: ""} != {**before, name: ""}:
        for key in os.environ.keys() - before.keys() - {name}:
            del os.environ[key]
        os.environ.update({key: value for key, value in before.items() if key != name})


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Every test starts from the run's seed, so that one test can be repeated alone."""
    value = request.config.getoption("--seed")
    torch.manual_seed(value)
    random.seed(value)
    return value


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """`mllama serve` of the demo model, started once: a `server_process.Child`."""
    from server_process import child, steps_that_can_be_held

    log = tmp_path_factory.mktemp("demo_server") / "log"
    with child(log, sabotage=steps_that_can_be_held) as made:
        yield made


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`full` runs only when asked for by -m; gpu tests skip in words where there is no GPU."""
    shares.mark_the_others(items, config.getoption("--seed"))
    if "full" not in (config.getoption("-m") or "") and os.environ.get("MLLAMA_TEST_FULL") != "1":
        kept = [item for item in items if item.get_closest_marker("full") is None]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many of the tests that passed ran their ops on the CPU, under simulation and on a GPU."""
    passed = [
        report for report in terminalreporter.stats.get("passed", []) if report.when == "call"
    ]
    gpu = sum("gpu" in report.keywords for report in passed)
    cpu = len(passed) - gpu
    simulated = cpu if SIMULATED else 0
    terminalreporter.write_line(
        f"tests that ran on CPU: {cpu - simulated}, under simulation: {simulated}, on a GPU: {gpu}"
    )
