"""The tables of docs/quantisation.md: sizes, what fits which card, and quality from benchmarks/quality.json.

    python -m benchmarks.quality_tables [--check]

Nothing is measured here. --check writes nothing and fails if a table is not what the plan and the file say.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.quality import ENCODINGS, OUTPUT, PLAIN
from benchmarks.readme import replaced
from benchmarks.tables import table
from mllama.quantization.plan import longest_context, named_config, usable, weight_bytes

PAGE = ROOT / "docs" / "quantisation.md"
# GiB of cards on which a model of that size is run, if at all.
CARDS = {"11b": (8, 12, 16, 24, 48), "90b": (48, 80, 96, 141)}


def sizes() -> str:
    """GB of all weights of the published models."""
    configs = [named_config(name) for name in CARDS]
    rows = [
        [f"`{encoding}`", *(f"{weight_bytes(config, encoding) / 1e9:.2f}" for config in configs)]
        for encoding in ENCODINGS
    ]
    return table(["encoding", "11B, GB", "90B, GB"], rows)


def fits(name: str) -> str:
    """The longest context of one prompt with one image of four tiles, by encoding and card."""
    config = named_config(name)
    rows = []
    for encoding in ENCODINGS:
        weights = weight_bytes(config, encoding)
        cells = [
            _context(*longest_context(config, encoding, usable(card * 2**30), weights=weights))
            for card in CARDS[name]
        ]
        rows.append([f"`{encoding}`", *cells])
    return table([name.upper(), *(f"{card} GB" for card in CARDS[name])], rows)


def _context(tokens: int, missing: int) -> str:
    if not tokens:
        return f"{missing / 1e9:.1f} GB short"
    return f"{tokens / 1000:.1f}k" if tokens < 10_000 else f"{tokens // 1000}k"


def quality(document: Mapping[str, Any]) -> str:
    """One row per encoding: answers of the demo models, logits of the random stack, and speed."""
    parts = [document[part] for part in ("demo", "wide") if part in document]
    stack, speed = document["stack"], document["speed"]
    header, rows = ["encoding"], []
    for part in parts:
        header += [f"accuracy, width {part['width']}", "same answers"]
    header += ["KL, image", "KL, text", "same token, image", "same token, text"]
    header += ["decoding", "prompt"]
    for encoding in ENCODINGS:
        cells = [f"`{encoding}`"]
        for part in parts:
            row = part["encodings"][encoding]
            cells += [_percent(row["accuracy"]), _percent(row.get("agreement", 1.0))]
        row = stack["encodings"][encoding]
        cells += [f"{row[case]['kl']:.1e}" for case in ("image", "text")]
        cells += [_percent(row[case]["top1"]) for case in ("image", "text")]
        if encoding == PLAIN:
            cells += ["1x", "1x"]
        else:
            row = speed["encodings"][encoding]
            cells += [f"{row[name]['median']:.2f}x" for name in ("faster_token", "faster_prompt")]
        rows.append(cells)
    words = [_stack_in_words(stack), _speed_in_words(speed)]
    return "\n\n".join([*(_demo_in_words(part) for part in parts), *words, table(header, rows)])


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _demo_in_words(part: Mapping[str, Any]) -> str:
    return (
        f"Demo model of width {part['width']}: {part['questions']} questions about {part['images']} new "
        f"images, in bfloat16, on {_where(part)}."
    )


def _stack_in_words(stack: Mapping[str, Any]) -> str:
    narrower = " (a quarter of the 11B's width)" if stack["narrower"] else ""
    return (
        f"Random stack: {stack['layers']} text layers of width {stack['width']}{narrower}, normal weights, "
        f"{stack['tokens']} tokens, activations in float32 against the plain weights in float32; the row "
        f"of `{PLAIN}` has 16-bit activations. KL in nats. On {_where(stack)}."
    )


def _speed_in_words(speed: Mapping[str, Any]) -> str:
    return (
        f"Speed: {speed['layers']} text layers of width {speed['width']}, {speed['new']} tokens after a "
        f"prompt of {speed['prompt']}, against the same weights in `{PLAIN}` in the same run. On "
        f"{_where(speed)}, {speed['machine']['threads']} threads."
    )


def _where(part: Mapping[str, Any]) -> str:
    machine = part["machine"]
    name = machine.get("gpu") or f"an {machine['cpu']} ({machine['cpu_capability']})"
    return f"{name}, {part['started'][:10]}"


def errors(document: Mapping[str, Any]) -> str:
    """The relative error of each kind of weight, of the wide demo model, whose rows fit all encodings."""
    part = document["wide"] if "wide" in document else document["demo"]
    quantising = [encoding for encoding in ENCODINGS if encoding != PLAIN]
    cells: dict[str, dict[str, list[str]]] = {}
    for encoding in quantising:
        for row in part["encodings"][encoding]["errors"]:
            found = cells.setdefault(row["kind"], {}).setdefault(encoding, [])
            found.append(f"{row['relative_error']:.4f}")
    rows = [
        [kind, *(" / ".join(by_encoding.get(encoding, [])) for encoding in quantising)]
        for kind, by_encoding in sorted(cells.items())
    ]
    return table(["weights", *(f"`{encoding}`" for encoding in quantising)], rows)


def page(text: str, document: Mapping[str, Any]) -> str:
    """The page with its tables made anew."""
    made = {
        "sizes": sizes(),
        "what fits": f"{fits('11b')}\n\n{fits('90b')}",
        "quality": quality(document),
        "errors": errors(document),
    }
    for name, section in made.items():
        text = replaced(text, name, section, by="benchmarks.quality_tables")
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality_tables", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing, fail if a table is old"
    )
    options = parser.parse_args(arguments)
    old = PAGE.read_text()
    new = page(old, json.loads(OUTPUT.read_text()))
    if new == old:
        return 0
    print(f"{PAGE.relative_to(ROOT)} {'is out of date' if options.check else 'written'}")
    if not options.check:
        PAGE.write_text(new)
    return 1 if options.check else 0


if __name__ == "__main__":
    sys.exit(main())
