"""What running answers notice of prompts and pictures that arrive: their inter-token time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from benchmarks.serving.client import Answer, ask
from benchmarks.serving.load import Served, percentile_99
from benchmarks.serving.requests import Request, Source
from benchmarks.timing import significant

STREAMS, PROMPT_TOKENS = 8, 1500
# Seconds between two pictures; with every so many of them a prompt arrives as well. Where so many are still
# open nothing arrives: a machine that is too slow for them would only queue them.
_PAUSE, _PICTURES_PER_PROMPT, _MOST_OPEN = 0.25, 4, 4
_PICTURES = 100  # at most


def disturbed(
    served: Served, source: Source, tokens: int, count: Callable[[str], int]
) -> dict[str, Any]:
    """Inter-token times of STREAMS answers of so many tokens, alone, and then while others arrive.

    The prompts have PROMPT_TOKENS tokens, the pictures as many tiles as there may be, and both are new.

    Args:
        count: tokens of a text.
    """
    running = [source.distinct(STREAMS, tokens) for _ in range(2)]
    alone = asyncio.run(_among(served, running[0], ()))
    among = asyncio.run(_among(served, running[1], _arriving(source, count)))
    return {
        "streams": STREAMS,
        "tokens": tokens,
        "prompt_tokens": PROMPT_TOKENS,
        "pause_s": _PAUSE,
        "prompt_pause_s": _PAUSE * _PICTURES_PER_PROMPT,
        "alone_ms": _spread(alone),
        "arriving_ms": _spread(among),
    }


def _arriving(source: Source, count: Callable[[str], int]) -> list[Request]:
    """Made beforehand, so that nothing but their sending takes the client's time."""
    text, found = source.words(PROMPT_TOKENS, count), []
    for number in range(_PICTURES):
        if number % _PICTURES_PER_PROMPT == 0:
            found.append(Request(f"{number} {text}", tokens=1))  # which begins as no other
        found.append(source.large(1))
    return found


async def _among(
    served: Served, running: Sequence[Request], arriving: Sequence[Request]
) -> list[Answer]:
    """The running answers, all of whose tokens have text."""

    def asked(body: dict[str, Any]) -> asyncio.Task[Answer]:
        return asyncio.ensure_future(ask(served.server.port, body))

    bodies = [served.body(request) for request in arriving]
    answers = asyncio.gather(*(asked(served.body(request)) for request in running))
    others: set[asyncio.Task[Answer]] = set()
    for request, body in zip(arriving, bodies, strict=True):
        if answers.done():
            break
        others.add(asked(body))
        if request.picture is not None:
            await asyncio.wait([answers], timeout=_PAUSE)
        while len(open_ := {one for one in others if not one.done()}) >= _MOST_OPEN:
            await asyncio.wait(open_, return_when=asyncio.FIRST_COMPLETED)
    found = await answers
    await asyncio.gather(*others)
    return found


def _spread(answers: Sequence[Answer]) -> dict[str, float]:
    gaps = [1e3 * gap for answer in answers for gap in answer.gaps]
    return {
        "median": significant(median(gaps)),
        "p99": significant(percentile_99(gaps)),
        "max": significant(max(gaps)),
        "count": len(gaps),
    }
