"""An engine that answers chats one after another by `model.stream`, for tests of what is around an engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mllama.engine.interface import Piece, State, Stats, Usage
from mllama.server.protocol import Work


class SerialEngine:
    def __init__(self, model: Any, processor: Any) -> None:
        self._model, self._processor = model, processor
        self._thread = ThreadPoolExecutor(1)
        self._cancelled: set[str] = set()

    async def submit(self, work: Work) -> AsyncIterator[Piece]:
        return self._pieces(work)

    async def _pieces(self, work: Work) -> AsyncIterator[Piece]:
        loop = asyncio.get_running_loop()
        found: asyncio.Queue[Piece | BaseException] = asyncio.Queue()

        def put(piece: Piece | BaseException) -> None:
            loop.call_soon_threadsafe(found.put_nowait, piece)

        def run() -> None:
            try:
                for piece in self._answered(work):
                    put(piece)
            except BaseException as error:
                put(error)

        self._thread.submit(run)
        while True:
            piece = await found.get()
            if isinstance(piece, BaseException):
                raise piece
            yield piece
            if piece.usage:
                return

    def _answered(self, work: Work) -> Any:
        pictures = iter(work.pictures)
        messages = [dict(message) for message in work.messages or ()]
        for message in messages:
            if isinstance(message["content"], list):
                message["content"] = [
                    {**part, "image": next(pictures).data} if part["type"] == "image" else part
                    for part in message["content"]
                ]
        inputs = self._processor.apply_chat_template(
            messages,
            tools=list(work.tools) or None,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            escape_special_tokens=True,
        )
        count, limit = 0, work.options.max_tokens or 64
        for text in self._model.stream(
            **inputs, tokenizer=self._processor, max_new_tokens=limit, do_sample=False
        ):
            count += 1
            if work.key in self._cancelled:
                return
            yield Piece(text=text)
        usage = Usage(inputs["input_ids"].shape[1], count)
        yield Piece(finish_reason="length" if count == limit else "stop", usage=usage)

    def cancel(self, key: str) -> None:
        self._cancelled.add(key)

    def health(self) -> State:
        return "ready"

    def stats(self) -> Stats:
        return Stats(gauges={"threads": float(threading.active_count())})
