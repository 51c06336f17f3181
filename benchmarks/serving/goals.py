"""What a server is to reach, as data, and what a run says about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.serving.requests import LONGEST
from benchmarks.serving.wide import LAYERS


@dataclass(frozen=True)
class Goal:
    """One figure to reach.

    Attributes:
        what: as it stands in the table.
        target: the least, of a figure of which more is better.
        value: of a run; None where it was not measured.
        is_most: whether the target is the most instead.
    """

    what: str
    target: float
    value: Callable[[dict[str, Any]], float | None]
    is_most: bool = False

    def reached(self, value: float) -> bool:
        return value <= self.target if self.is_most else value >= self.target


def _times(workload: str, streams: int, name: str) -> Callable[[dict[str, Any]], float | None]:
    """How many times more the peer takes, the median of rounds."""

    def value(run: dict[str, Any]) -> float | None:
        for row in run["peers"]:
            if (row["workload"], row["streams"]) == (workload, streams):
                return row["contenders"][-1][f"{name}_times_ours"]["median"]
        return None

    return value


def _peer(workload: str, streams: int, target: float) -> list[Goal]:
    what = f"{workload}, {streams} streams, against `transformers serve`"
    return [
        Goal(f"{what}: {unit}", target, _times(workload, streams, name))
        for name, unit in (("cpu_s", "processor time"), ("wall_s", "requests in a time"))
    ]


def _alone(workload: str) -> list[Goal]:
    what = f"{workload}, 1 stream, against `transformers serve`"
    return [
        Goal(f"{what}: {unit}", 1, _times(workload, 1, name))
        for name, unit in (("first_token_s", "first token"), ("token_s", "inter-token time"))
    ]


def _engine_share(run: dict[str, Any]) -> float | None:
    """How many times less the server takes than the engine: the share of its throughput."""
    for row in run["engine"]:
        return row["contenders"][-1]["wall_s_times_ours"]["median"]
    return None


def _late(run: dict[str, Any]) -> float | None:
    for row in run["arrivals"]:
        return row["p99_of_bound"]
    return None


def _wide(**wanted: Any) -> Callable[[dict[str, Any]], float | None]:
    """Of a row with all the layers; a quick run has fewer."""

    def value(run: dict[str, Any]) -> float | None:
        for row in run["wide"]:
            if {"layers": LAYERS, **wanted}.items() <= row.items():
                return row["times_one_stream"]["median"]
        return None

    return value


_WIDE = f"{LAYERS} text layers of 11B width, 8 streams against one, tokens/s"
GOALS: tuple[Goal, ...] = (
    *_peer(f"{LONGEST} tokens", 8, 5),
    *_peer(f"{LONGEST} tokens", 32, 7),
    *_peer(f"{LONGEST} tokens, ignore_eos", 8, 5),
    *_peer(f"{LONGEST} tokens, ignore_eos", 32, 7),
    *_peer("short answers", 32, 1.5),
    *_peer("the same picture", 32, 3),
    *_alone(f"{LONGEST} tokens"),
    *_alone("short answers"),
    Goal("throughput of the engine called in-process that the server has", 0.85, _engine_share),
    Goal(
        "99th percentile of inter-token time while prompts and pictures arrive, of its median, a full chunk "
        "and a picture",
        1.2,
        _late,
        is_most=True,
    ),
    Goal(f"{_WIDE}: float32, AVX2", 4, _wide(dtype="float32", is_kept_to_avx2=True)),
    Goal(f"{_WIDE}: bfloat16, AVX2", 2.2, _wide(dtype="bfloat16", is_kept_to_avx2=True)),
    Goal(
        f"{_WIDE}: bfloat16, multiplied by the CPU",
        5,
        _wide(dtype="bfloat16", is_kept_to_avx2=False, multiplies_bfloat16=True),
    ),
)


def judged(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each goal that was measured what it is, and whether it is reached."""
    rows = []
    for goal in GOALS:
        value = goal.value(run)
        if value is not None:
            rows.append(
                {
                    "goal": goal.what,
                    "target": f"{'<=' if goal.is_most else '>='} {goal.target:g}",
                    "measured": float(f"{value:.4g}"),
                    "reached": goal.reached(value),
                }
            )
    return rows
