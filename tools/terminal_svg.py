"""Draw the README's terminal, docs/demo.svg: `mllama chat` with the demo model about an image.

    python -m tools.terminal_svg [--output FILE] [--seed N] [QUESTION ...]

The command runs as it stands, and what it reads and writes is recorded piece by piece; only the pace at which
the pieces appear is made up. Without animation (on paper, with reduced motion) all of it is there at once.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from mllama import cli
from mllama.demo import sample_picture

OUTPUT = Path(__file__).parents[1] / "docs" / "demo.svg"
SEED = 186
QUESTIONS = ("What is in the image?", "Where is the purple circle?", "Is there a red triangle?")
COMMAND = ("chat", "--image", "shapes.png")

COLUMNS = 60  # of the text; the image stands to the right of it
FONT, ADVANCE, LINE = 14, 8.43, 21  # pixels; most monospaced fonts are 0.602 of their size wide
FAMILY = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"
MARGIN, BAR, IMAGE = 20, 32, 200
BACK, PLAIN, DIM, TYPED = "#11151c", "#e6e9ef", "#8b93a3", "#8fd18f"
BUTTONS = ("#ff5f57", "#febc2e", "#28c840")
PIECE, PAUSE = 0.09, 1.0  # seconds: from one piece of an answer to the next, before a typed line

# What appeared on the terminal at once: the text, its colour and whether a person typed it.
Event = tuple[str, str, bool]
_END = "/quit\n"


class _Recorder(io.StringIO):
    """A stream that notes each write."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note

    def write(self, text: str) -> int:
        self._note(text)
        return len(text)


class _Keyboard(io.StringIO):
    """Standard input whose lines are noted when they are read, as a terminal echoes them."""

    def __init__(self, text: str, note: Callable[[str], None]) -> None:
        super().__init__(text)
        self._note = note

    def readline(self, *_: int) -> str:
        line = super().readline()
        self._note(line)
        return line


def record(seed: int, questions: Sequence[str]) -> list[Event]:
    """Run the command on the image of a seed; what appeared, in order.

    Raises: RuntimeError if the command fails.
    """
    events: list[Event] = [("$ ", DIM, False), (f"mllama {' '.join(COMMAND)}\n", TYPED, True)]
    lines = "".join(f"{question}\n" for question in questions) + _END

    def noting(color: str, typed: bool = False) -> Callable[[str], None]:
        return lambda text: events.append((text, color, typed))

    stdin, before = sys.stdin, Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        sample_picture(seed)[0].save(Path(folder) / COMMAND[-1])
        os.chdir(folder)
        sys.stdin = _Keyboard(lines, noting(TYPED, typed=True))
        try:
            with (
                contextlib.redirect_stdout(_Recorder(noting(PLAIN))),
                contextlib.redirect_stderr(_Recorder(noting(DIM))),
            ):
                code = cli.main(list(COMMAND))
        finally:
            sys.stdin = stdin
            os.chdir(before)
    if code:
        raise RuntimeError("".join(text for text, *_ in events))
    return events


def placed(events: list[Event]) -> Iterator[tuple[int, int, str, str, float]]:
    """(row, column, word, colour, second) of every word; one that does not fit goes to the next row."""
    row = column = 0
    second = 0.0
    for text, color, is_typed in events:
        second += PAUSE if is_typed else PIECE * (color == PLAIN)
        for word in re.findall(r"\n| +|[^ \n]+", text):
            if word == "\n":
                row, column = row + 1, 0
                continue
            if column + len(word) > COLUMNS:
                row, column = row + 1, 0
            if not word.isspace():
                yield row, column, word, color, second
            column += len(word)


def embedded(seed: int) -> str:
    file = io.BytesIO()
    sample_picture(seed)[0].save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def draw(seed: int, questions: Sequence[str]) -> str:
    """The SVG."""
    events = record(seed, questions)
    while not events[-1][0].strip() or events[-1][0] == _END:
        events.pop()
    words = list(placed(events))
    width = round(3 * MARGIN + COLUMNS * ADVANCE + IMAGE)
    top, left = BAR + MARGIN // 2, width - MARGIN - IMAGE
    height = top + max((words[-1][0] + 1) * LINE, IMAGE + LINE) + MARGIN
    transcript = "".join(text for text, *_ in events)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img">',
            f"<title>{escape(transcript)}</title>",
            f"<style>text{{font:{FONT}px {FAMILY}}}.w{{animation:a 1ms step-end both}}"
            "@keyframes a{from{visibility:hidden}}"
            "@media(prefers-reduced-motion){.w{animation:none}}</style>",
            f'<rect width="{width}" height="{height}" rx="9" fill="{BACK}"/>',
            *(
                f'<circle cx="{MARGIN + 5 + 18 * i}" cy="{BAR // 2}" r="5" fill="{color}"/>'
                for i, color in enumerate(BUTTONS)
            ),
            f'<image x="{left}" y="{top}" width="{IMAGE}" height="{IMAGE}" '
            f'href="data:image/png;base64,{embedded(seed)}"/>',
            f'<text x="{left + IMAGE // 2}" y="{top + IMAGE + LINE}" fill="{DIM}" '
            f'text-anchor="middle">{COMMAND[-1]}</text>',
            *(
                f'<text class="w" x="{MARGIN + column * ADVANCE:.1f}" y="{top + LINE * row + FONT}" '
                f'textLength="{len(word) * ADVANCE:.1f}" fill="{color}" '
                f'style="animation-delay:{second:.2f}s">{escape(word)}</text>'
                for row, column, word, color, second in words
            ),
            "</svg>\n",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--seed", type=int, default=SEED, help="which image")
    parser.add_argument("questions", nargs="*", metavar="QUESTION", default=QUESTIONS)
    options = parser.parse_args(arguments)
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(draw(options.seed, options.questions))
    return 0


if __name__ == "__main__":
    sys.exit(main())
