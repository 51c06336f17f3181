"""What `/metrics` tells: the server's own counts, and those of the engine."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import aclosing
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)

from mllama.engine.interface import Piece, Usage
from mllama.server.protocol import Engine
from mllama.wording import shown

_LOG = logging.getLogger(__name__)
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_MOST_LOGGED = 100  # names of unknown fields; whoever sends them chooses them
# Names that the engine gives what it counts, in words.
ENGINE_WORDS = {
    "answers_running": "Answers whose prompt is being read or that are being written",
    "answers_waiting": "Answers that wait for their turn",
    "cache_usage_ratio": "Of pages or of tiles, whichever are scarcer: the share that answers hold",
    "pages_used": "Pages of keys and values of text that answers hold",
    "pages_kept": "Pages that no answer holds, kept for prompts that begin alike",
    "pages": "Pages in all",
    "tiles_used": "Image tiles whose keys and values answers hold",
    "tiles_kept": "Image tiles that no answer holds, kept for the next question about them",
    "tiles": "Image tiles in all",
    "steps": "Steps, each one forward over tokens of many requests",
    "step_tokens": "Tokens of steps, of prompts and answers",
    "encoded_pictures": "Pictures through the vision tower",
    "preemptions": "Times that an answer gave up its pages to older ones, to be computed again",
    "prefix_hits": "Pages of prompts that were found, not computed",
    "picture_hits": "Pictures of prompts that were found, not encoded",
    "pictures": "Pictures of requests",
    "picture_files_known": "Pictures whose file had been decoded before",
    "step_seconds": "Time of a step",
    "batch_size": "Requests of a step",
}


class Metrics:
    """Of one server; nothing is counted for the process as a whole."""

    def __init__(self, engine: Engine) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(_OfEngine(engine))

        def counter(name: str, words: str, labels: Collection[str] = ()) -> Counter:
            return Counter(f"mllama_{name}", words, labels, registry=registry)

        def histogram(name: str, words: str) -> Histogram:
            return Histogram(f"mllama_{name}", words, buckets=_SECONDS, registry=registry)

        self._finished = counter("answers_finished", "Answers by how they ended", ["reason"])
        self._rejected = counter("requests_rejected", "Requests by the error they got", ["status"])
        self._prompt = counter("prompt_tokens", "Tokens of prompts, one for a picture")
        self._cached = counter("cached_tokens", "Tokens of prompts that were computed before")
        self._generated = counter("generated_tokens", "Tokens of answers")
        self._unknown = counter("unknown_fields", "Fields of requests that were left out")
        self._queue = histogram("queue_seconds", "From arrival to the first step")
        self._first = histogram("time_to_first_token_seconds", "From arrival to the first text")
        self._between = histogram("inter_token_seconds", "Between two pieces of an answer")
        self._whole = histogram("request_seconds", "From arrival to the last text")
        self.open = Gauge("mllama_requests_open", "Requests being answered", registry=registry)
        self._logged: set[str] = set()

    def text(self) -> bytes:
        """In the form of Prometheus."""
        return generate_latest(self._registry)

    def unknown(self, names: Collection[str]) -> None:
        """Count fields that were left out; each name is logged once."""
        self._unknown.inc(len(names))
        for name in names:
            if name not in self._logged and len(self._logged) < _MOST_LOGGED:
                self._logged.add(name)
                _LOG.warning("the field %s of a request is unknown and left out", shown(name[:80]))

    def rejected(self, status: int) -> None:
        self._rejected.labels(str(status)).inc()

    async def watched(self, pieces: AsyncIterator[Piece], arrived: float) -> AsyncIterator[Piece]:
        """The pieces, timed and counted. `arrived` is a `time.monotonic()`."""
        last: dict[int, float] = {}
        try:
            async with aclosing(pieces):  # type: ignore[type-var]
                async for piece in pieces:
                    if piece.text or piece.tool_calls:
                        now = time.monotonic()
                        if piece.index in last:
                            self._between.observe(now - last[piece.index])
                        elif not last:
                            self._first.observe(now - arrived)
                        last[piece.index] = now
                    if piece.finish_reason:
                        self._finished.labels(piece.finish_reason).inc()
                    if piece.usage:
                        self._ended(piece.usage, arrived)
                    yield piece
        except (GeneratorExit, asyncio.CancelledError):
            self._finished.labels("cancelled").inc()
            raise
        except Exception:
            self._finished.labels("error").inc()
            raise

    def _ended(self, usage: Usage, arrived: float) -> None:
        self._prompt.inc(usage.prompt_tokens)
        self._cached.inc(usage.cached_tokens)
        self._generated.inc(usage.completion_tokens)
        self._queue.observe(usage.queue_seconds)
        self._whole.observe(time.monotonic() - arrived)


class _OfEngine:
    """Asked for when somebody reads the metrics."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> list[Any]:
        return []  # the engine may not be ready

    def collect(self) -> Iterator[Any]:
        stats = self._engine.stats()
        for name, value in stats.gauges.items():
            yield GaugeMetricFamily(f"mllama_{name}", ENGINE_WORDS.get(name, name), value)
        for name, value in stats.counters.items():
            yield CounterMetricFamily(f"mllama_{name}", ENGINE_WORDS.get(name, name), value)
        for name, found in stats.distributions.items():
            bounds = ["+Inf" if bound == float("inf") else str(bound) for bound in found.bounds]
            yield HistogramMetricFamily(
                f"mllama_{name}",
                ENGINE_WORDS.get(name, name),
                buckets=list(zip(bounds, found.counts)),
                sum_value=found.total,
            )
