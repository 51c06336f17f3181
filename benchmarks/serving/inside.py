"""The engine without a server: the same requests in this process, and the parts of a step timed alone."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import torch
from PIL import Image

from benchmarks.serving.client import Answer
from benchmarks.serving.requests import LONGEST, Request
from mllama.engine.engine import Engine
from mllama.engine.interface import Options
from mllama.engine.pages import PAGE_SIZE
from mllama.engine.plan import Encode, Plan, Row
from mllama.engine.prompts import Prompt, prepare_chat
from mllama.engine.runner import Runner
from mllama.engine.sampling import Sampling
from mllama.stores import KeyValueStore

NAME = "the engine in-process"


class Inside:
    """Asks an engine of this process, each stream from a thread of its own."""

    name = NAME

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def answer(self, requests: Sequence[Request], streams: int) -> list[Answer]:
        with ThreadPoolExecutor(streams) as threads:
            return list(threads.map(self._ask, requests))

    def cpu_seconds(self) -> float:
        return time.process_time()

    def _ask(self, request: Request) -> Answer:
        begin = time.perf_counter()
        texts = self._engine.submit(messages_of(request), images_of(request), options_of(request))
        text, arrivals = "", []
        for piece in texts:
            text += piece
            arrivals.append(time.perf_counter())
        last = texts.pieces[-1]
        assert last.usage is not None and last.finish_reason is not None
        tokens, end = last.usage.completion_tokens, time.perf_counter()
        return Answer(text, tokens, begin, end, tuple(arrivals), last.finish_reason)


def messages_of(request: Request) -> list[dict[str, Any]]:
    """As templates take them."""
    picture = [] if request.picture is None else [{"type": "image"}]
    return [{"role": "user", "content": [*picture, {"type": "text", "text": request.text}]}]


def images_of(request: Request) -> list[Image.Image]:
    return [] if request.picture is None else [Image.open(io.BytesIO(request.picture))]


def options_of(request: Request) -> Options:
    """What `requests.our_body` asks of the server."""
    if request.tokens is None:
        return Options(max_tokens=LONGEST, temperature=0)
    if request.with_stops:
        return Options(max_tokens=request.tokens, temperature=0, ignore_eos=True)
    return Options(max_tokens=request.tokens, temperature=0, min_tokens=request.tokens)


class Alone:
    """Steps of a model that nothing else runs on, with pools of their own."""

    def __init__(self, model: Any, processor: Any) -> None:
        vision = model.config.vision_config
        self._store = KeyValueStore(
            model.config.get_text_config(),
            dtype=model.dtype,
            device=model.device,
            num_pages=1 + model.config.get_text_config().max_position_embeddings // PAGE_SIZE,
            num_slots=vision.max_num_tiles,
            tokens_per_tile=vision.num_patches,
        )
        self._model, self._processor = model, processor

    def chunk(self, tokens: int, rounds: int) -> list[float]:
        """Seconds of a step that reads so many tokens of a prompt, the first ones, and samples one."""
        ids = torch.arange(tokens) % self._model.config.get_text_config().vocab_size
        pages = tuple(range(1, 1 + -(-tokens // PAGE_SIZE)))
        row = Row(0, tuple(ids.tolist()), 0, pages, (), ((tokens, 0, 0),), sample_step=0)
        return self._timed(Plan(0, (), (row,), 0), Prompt(row.tokens), rounds)

    def picture(self, request: Request, rounds: int) -> list[float]:
        """Seconds of a step in which a picture passes the tower, and nothing else is done."""
        prompt = prepare_chat(self._processor, messages_of(request), images_of(request))
        (picture,) = prompt.pictures
        slots = tuple(range(picture.num_slots(self._model.semantics)))
        return self._timed(Plan(0, (Encode(picture.key, slots, 0, 0),), (), 0), prompt, rounds)

    def _timed(self, plan: Plan, prompt: Prompt, rounds: int) -> list[float]:
        runner = Runner(self._model, self._store)
        runner.add(0, prompt.pictures, Sampling(), prompt.tokens)
        seconds = []
        for _ in range(rounds + 1):  # the first warms up
            begin = time.perf_counter()
            runner.run(plan)
            seconds.append(time.perf_counter() - begin)
        return seconds[1:]


def timed_alone(
    model: Any, processor: Any, tokens: int, picture: Request, rounds: int
) -> tuple[float, float]:
    """The median seconds of a chunk of so many tokens, and of a picture through the tower."""
    alone = Alone(model, processor)
    return median(alone.chunk(tokens, rounds)), median(alone.picture(picture, rounds))
