"""The two routes that ask the engine for text."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from mllama.engine.interface import Piece, Unavailable, Usage
from mllama.server import answers
from mllama.server.body import BodyBudget, read_body
from mllama.server.called import with_calls
from mllama.server.errors import as_request_error
from mllama.server.fields import read
from mllama.server.metrics import Metrics
from mllama.server.protocol import Engine
from mllama.server.schema import ChatRequest, CompletionRequest, Sampling, unknown_fields
from mllama.server.settings import Settings
from mllama.server.sse import EventStream
from mllama.server.watching import Gate, Watch, ended
from mllama.server.work import Asked, Preparation, Written, check_model

_STATES = {
    "loading": "the model is being loaded",
    "draining": "the server is ending and takes no more requests",
    "dead": "the engine has failed and answers no more",
}


class Routes:
    """Answers requests with an engine."""

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        preparation: Preparation,
        metrics: Metrics,
        gate: Gate,
        budget: BodyBudget,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._preparation = preparation
        self._metrics = metrics
        self._gate = gate
        self._budget = budget

    async def chat(self, request: Request) -> Response:
        """/v1/chat/completions."""
        return await self._answered(request, ChatRequest)

    async def completions(self, request: Request) -> Response:
        """/v1/completions."""
        return await self._answered(request, CompletionRequest)

    async def _answered(self, request: Request, model: type[Sampling]) -> Response:
        try:
            async with AsyncExitStack() as stack:
                stack.enter_context(self._gate)
                stack.enter_context(self._metrics.open.track_inprogress())
                return await self._begun(request, model, stack)
        except ClientDisconnect:
            return Response(status_code=499)  # which nobody reads
        except Exception as error:
            refusal = as_request_error(error)
            self._metrics.rejected(refusal.status)
            return refusal.response()

    async def _begun(
        self, request: Request, model: type[Sampling], stack: AsyncExitStack
    ) -> Response:
        arrived = time.monotonic()
        if (state := self._engine.health()) != "ready":
            raise Unavailable(_STATES[state])
        take = stack.enter_context(self._budget.share())
        parse = partial(self._parsed, model=model)
        parsed, name, written = await read_body(request, self._settings.body, take, parse)
        watch = await stack.enter_async_context(Watch(request.receive, self._gate))
        asked = await watch.until(self._asked(parsed, written, take))
        for one in asked:  # whatever happens from here on
            stack.callback(self._engine.cancel, one.work.key)
        pieces = self._metrics.watched(await watch.until(self._submitted(asked)), arrived)
        is_chat = isinstance(parsed, ChatRequest)
        heading = answers.Heading(("chatcmpl-" if is_chat else "cmpl-") + asked[0].work.key, name)
        count = len(asked) * parsed.answers
        with_tokens = asked[0].work.options.top_logprobs is not None
        if parsed.stream:
            make_events = answers.chat_events if is_chat else answers.completion_events
            events = make_events(heading, pieces, count, with_tokens, parsed.wants_usage)
            return EventStream(_closing(events, pieces), watch, stack.pop_all())
        async with aclosing(pieces):
            found = await watch.until(answers.collected(pieces, count))
        make_body = answers.chat_body if is_chat else answers.completion_body

        def made() -> Response:
            return JSONResponse(make_body(heading, *found, with_tokens))

        if not with_tokens:
            return made()
        return await asyncio.get_running_loop().run_in_executor(None, made)

    def _parsed(
        self, body: dict[str, Any], model: type[Sampling]
    ) -> tuple[Sampling, str, Written | None]:
        """The request, the model's name, and its conversation, if it is a chat."""
        parsed = read(model, body)
        if names := unknown_fields(model, body):
            self._metrics.unknown(names)
        name = check_model(parsed.model, self._settings)
        is_chat = isinstance(parsed, ChatRequest)
        return parsed, name, self._preparation.written(parsed) if is_chat else None

    async def _asked(
        self, parsed: Sampling, written: Written | None, take: Callable[[int], None]
    ) -> list[Asked]:
        if isinstance(parsed, ChatRequest):
            assert written is not None
            return await self._preparation.chat(parsed, written, take)
        assert isinstance(parsed, CompletionRequest)
        return await self._preparation.completions(parsed)

    async def _submitted(self, asked: Sequence[Asked]) -> AsyncIterator[Piece]:
        """Pieces of all, whose answers are numbered through."""
        if len(asked) == 1:
            pieces = await self._engine.submit(asked[0].work)
            use = asked[0].tool_use
            return pieces if use is None else with_calls(pieces, use)
        sources = [await self._engine.submit(one.work) for one in asked]
        return merged(sources, asked[0].work.options.n)


async def _closing(events: Any, pieces: Any) -> AsyncIterator[Any]:
    async with aclosing(pieces), aclosing(events):
        async for event in events:
            yield event


async def merged(
    sources: Sequence[AsyncIterator[Piece]], answers_each: int
) -> AsyncIterator[Piece]:
    """The pieces of some requests as those of one, as they come; usage is the sum, at the end."""
    tasks: dict[asyncio.Future[Any], int] = {}

    def ask(i: int) -> None:
        tasks[asyncio.ensure_future(anext(sources[i], None))] = i

    used: list[Usage] = []
    try:
        for i in range(len(sources)):
            ask(i)
        while tasks:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                i = tasks.pop(task)
                piece = task.result()
                if piece is None:
                    continue
                if piece.usage:
                    used.append(piece.usage)
                ask(i)
                index = i * answers_each + piece.index
                yield replace(piece, index=index, usage=None)
        if len(used) == len(sources):
            yield Piece(usage=_sum(used))
    finally:
        for task in tasks:
            await ended(task)


def _sum(used: Sequence[Usage]) -> Usage:
    return Usage(
        sum(u.prompt_tokens for u in used),
        sum(u.completion_tokens for u in used),
        sum(u.cached_tokens for u in used),
        max(u.queue_seconds for u in used),
    )
