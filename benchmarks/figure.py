"""The README's figure, an SVG: how many times faster three things are than their fastest peer."""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape

from benchmarks import goals, tables
from benchmarks.readme import DTYPE, HEADLINES, Found, find
from benchmarks.runs import newest

BARS = 3  # of each kind of device: the first headlines that its runs have
WIDTH, HEADING, ROW, MARGIN = 800, 28, 44, 16  # pixels
LEFT, LONGEST = 330, 190  # where bars begin, and the longest of them
TITLE = "Times faster than the fastest peer (dashed: as fast)"
INK, SOFT, OURS, LINE = "#1f2328", "#656d76", "#3b6ea8", "#d0d7de"


def draw(runs: list[dict[str, Any]]) -> str:
    """The SVG, with a group of bars for each kind of device that has a run."""
    groups = [group for kind in (goals.GPU, goals.CPU) if (group := _group(runs, kind))]
    bars = [found.peers[0][2]["median"] for _, rows in groups for _, found in rows]
    scale = LONGEST / max([1.0, *bars])
    body, top = [_text(MARGIN, MARGIN + 13, TITLE, INK, 14, bold=True)], MARGIN + HEADING
    for machine, rows in groups:
        body.append(_text(MARGIN, top + 13, f"{machine}; {DTYPE}", SOFT, 11))
        top += HEADING
        begin = top
        for what, found in rows:
            body += _row(top, what, found, scale)
            top += ROW
        even = LEFT + scale
        body.append(
            f'<line x1="{even:.1f}" y1="{begin - 4}" x2="{even:.1f}" y2="{top - 8}" stroke="{INK}" '
            'stroke-dasharray="2 3"/>'
        )
    height = top + MARGIN // 2
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}" role="img">',
            f"<title>{TITLE}</title>",
            "<style>text{font-family:-apple-system,'Segoe UI',Helvetica,Arial,sans-serif}</style>",
            f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="6" fill="#ffffff" '
            f'stroke="{LINE}"/>',
            *body,
            "</svg>\n",
        ]
    )


def _group(runs: list[dict[str, Any]], kind: str) -> tuple[str, list[tuple[str, Found]]] | None:
    """The machines in words, and what was found on them."""
    rows, machines = [], []
    for headline in HEADLINES:
        run = newest(runs, kind, goals.part_of(headline.op))
        found = find(headline, run) if run else None
        if found and found.peers and len(rows) < BARS:
            rows.append((headline.what.replace("`", ""), found))
            machines.append(tables.machine_in_words(run).partition("; commit")[0])
    return ("; ".join(dict.fromkeys(machines)), rows) if rows else None


def _row(top: int, what: str, found: Found, scale: float) -> list[str]:
    name, figure, ratio = found.peers[0]
    width = scale * ratio["median"]
    return [
        _text(LEFT - 12, top + 13, what, INK, 13, "end", bold=True),
        _text(LEFT - 12, top + 27, found.shape, SOFT, 9, "end"),
        f'<rect x="{LEFT}" y="{top}" width="{width:.1f}" height="28" rx="2" fill="{OURS}"/>',
        _text(LEFT + width + 8, top + 13, f"{ratio['median']:.2f}x", INK, 13, bold=True),
        _text(LEFT + width + 8, top + 26, f"{found.figure}; {name} {figure}", SOFT, 10),
    ]


def _text(
    x: float, y: float, text: str, color: str, size: int, anchor: str = "start", bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y}" font-size="{size}" fill="{color}" text-anchor="{anchor}"{weight}>'
        f"{escape(text)}</text>"
    )
