"""A run in words and as Markdown tables."""

from __future__ import annotations

from typing import Any

from benchmarks.tables import machine_in_words, table, times


def line(row: dict[str, Any]) -> str:
    """A row of two contenders on the terminal."""
    text = f"{row['workload']}, {row['streams']} streams"
    for one in row["contenders"]:
        text += f"\n  {one['name']:24}" + ", ".join(
            f"{unit} {cell}" for unit, cell in zip(_UNITS, _cells(one), strict=True)
        )
    return text


def page(run: dict[str, Any]) -> str:
    """All of a run."""
    equal = [
        f"{count} of {found['answers']} answers of {name} were those of the server"
        for found in run["agreement"].values()
        for name, count in found["equal"].items()
    ]
    return f"""# Figures of the server

{machine_in_words(run)}. The demo model in {run["dtype"]}; each server and the engine computes on \
{run["server_threads"]} of the threads, the client on another. Made by `{run["command"]}` into \
[`serve.json`](serve.json), which has every round.{_load(run)}

Before anything was timed, {" and ".join(equal) or "nothing was compared"}.

## Goals

{goal_table(run)}

## Beside `transformers serve`

Per request: medians of interleaved rounds; times: how many times more the peer takes.

{_rows(run["peers"])}

## Beside the engine in-process

{_rows(run["engine"])}

## While prompts and pictures arrive

{_arrivals(run["arrivals"])}

## Text layers of 11B width

The engine in-process, tokens/s while all streams decode.

{_wide(run["wide"])}
"""


def goal_table(run: dict[str, Any]) -> str:
    """The goals for which there is a figure."""
    cells = [
        [row["goal"], row["target"], f"{row['measured']:.3g}", "yes" if row["reached"] else "no"]
        for row in run["goals"]
    ]
    return table(["goal", "target", "measured", "reached"], cells)


_UNITS = ("processor time", "wall", "first token", "token", "tokens/s")


def _cells(one: dict[str, Any]) -> list[str]:
    milliseconds = [
        f"{1e3 * one[name]['median']:.3g} ms"
        for name in ("cpu_s", "wall_s", "first_token_s", "token_s")
    ]
    return [*milliseconds, f"{one['tokens_per_s']['median']:.3g}"]


def _rows(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "Not part of this run."
    cells = []
    for row in rows:
        for one in row["contenders"]:
            ratios = [
                times(one[f"{name}_times_ours"]) if f"{name}_times_ours" in one else ""
                for name in ("cpu_s", "wall_s")
            ]
            head = [f"{row['workload']}, {row['streams']} streams", one["name"]]
            cells.append([*head, *_cells(one), *ratios])
    header = ["requests", "who", *_UNITS, "times, processor", "times, wall"]
    return table(header, cells, text=2)


def _arrivals(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "Not part of this run."
    return "\n\n".join(
        f"{row['streams']} streams, inter-token time: alone {_spread(row['alone_ms'])}; while a new picture "
        f"of the most tiles comes every {row['pause_s']:g} s, and a new prompt of {row['prompt_tokens']} "
        f"tokens every {row['prompt_pause_s']:g} s, {_spread(row['arriving_ms'])}. Alone a full chunk of a "
        f"prompt takes {row['chunk_ms']:.3g} ms and a picture through the tower {row['picture_ms']:.3g} ms."
        for row in rows
    )


def _spread(found: dict[str, float]) -> str:
    return f"median {found['median']:.3g} ms, 99th percentile {found['p99']:.3g} ms"


def _wide(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "Not part of this run."
    cells = []
    for row in rows:
        one, many = row["tokens_per_s"].items()
        kept = " (all that was used)" if row["is_kept_to_avx2"] else ""
        cells.append(
            [
                f"{row['dtype']}, {row['layers']} layers, {row['threads']} threads",
                f"{row['instruction_set']}{kept}",
                f"{one[1]['median']:.3g}",
                f"{many[1]['median']:.3g}",
                times(row["times_one_stream"]),
            ]
        )
    header = ["layers", "instructions", "1 stream", f"{many[0]} streams", "times"]
    return table(header, cells, text=2)


def _load(run: dict[str, Any]) -> str:
    states = [row["state"] for part in ("peers", "engine") for row in run[part]]
    loads = [one["load"] for state in states for one in state.values() if "load" in one]
    if not loads:
        return ""
    cores = run["machine"]["cores"]
    return f" The load average was {min(loads):.1f} to {max(loads):.1f} on {cores} cores."
