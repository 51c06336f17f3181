"""The engine as an event loop asks for it, with requests as a server has read them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import jinja2

from mllama.engine.engine import Engine
from mllama.engine.interface import Piece, Refused, State, Stats, Unavailable, WorkFailed
from mllama.engine.jobs import Job
from mllama.engine.loop import Loop
from mllama.engine.prompts import (
    PreparedPicture,
    prepare_chat_with,
    prepare_picture,
    prepare_text,
)
from mllama.limits import MIB, REQUESTS, Limits
from mllama.processing.images import open_image
from mllama.processing.sources import ImageOpenError
from mllama.processing.template_errors import TemplateLimitError
from mllama.server.held_pixels import PixelBudget, Share
from mllama.server.known_pictures import KnownPictures
from mllama.server.protocol import Picture, Work
from mllama.wording import shown

_LOG = logging.getLogger(__name__)
_PIXEL_BYTES = 256 * MIB  # of known pictures
_HELD_BYTES = 2048 * MIB  # of pictures of requests: 139 of four tiles of 560 x 560


class AsyncEngine:
    """An engine whose requests are prepared in a few threads, and answered on an event loop.

    Args:
        engine: closed by its owner.
        num_threads: that prepare requests: open pictures, render templates, make tokens.
        limits: of what they may take.
        pixel_bytes: of pictures that are kept as they were prepared, for those who show them again.
        held_bytes: of the pictures, as they were prepared, of requests that have not ended.
    """

    def __init__(
        self,
        engine: Engine,
        num_threads: int = 2,
        limits: Limits = REQUESTS,
        pixel_bytes: int = _PIXEL_BYTES,
        held_bytes: int = _HELD_BYTES,
    ) -> None:
        self._engine, self._limits = engine, limits
        self._known = KnownPictures(pixel_bytes)
        self._held = PixelBudget(held_bytes)
        self._threads = ThreadPoolExecutor(num_threads, "mllama-prepare")
        self._preparing: dict[str, bool] = {}  # by key: whether it has been cancelled
        self._mail: Mail | None = None

    async def submit(self, work: Work) -> AsyncIterator[Piece]:
        """See :class:`mllama.server.protocol.Engine`."""
        loop = asyncio.get_running_loop()
        arrived = time.monotonic()
        self._engine.loop.require_room(len(self._preparing))
        if self._mail is None or self._mail.event_loop is not loop:
            self._mail = Mail(loop)
        if work.pictures:
            self._held.require_room()
        self._preparing[work.key] = False
        share = self._held.share()
        try:
            try:
                prepare = partial(self._prepare, work, self._mail, share)
                job = await loop.run_in_executor(self._threads, prepare)
            finally:
                is_cancelled = self._preparing.pop(work.key)
            if is_cancelled:
                raise Unavailable("the request was cancelled")
        except BaseException:
            share.end()
            raise
        job.arrived = arrived
        pieces = Pieces(work.key, self._mail, self._engine.loop, share)
        self._engine.loop.put(job)
        return pieces

    def cancel(self, key: str) -> None:
        """End a request before the next step."""
        if key in self._preparing:
            self._preparing[key] = True
        else:
            self._engine.loop.cancel(key)

    def health(self) -> State:
        return self._engine.loop.state

    def stats(self) -> Stats:
        stats, known = self._engine.stats(), self._known
        counters = {"pictures": known.num_asked, "picture_files_known": known.num_known}
        return replace(stats, counters={**stats.counters, **counters})

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)

    def _prepare(self, work: Work, mail: Mail, share: Share) -> Job:
        """Raises: Refused; Overloaded; Unavailable."""
        processor, limits = self._engine.processor, self._limits
        try:
            if work.messages is None:
                assert work.prompt is not None
                prompt = prepare_text(processor, work.prompt, limits=limits)
            else:
                pictures = [self._picture(picture, share) for picture in work.pictures]
                tools = list(work.tools) or None
                prompt = prepare_chat_with(
                    processor, work.messages, pictures, limits=limits, tools=tools
                )
            return self._engine.job(work.key, prompt, work.options, mail, work.constraint)
        except jinja2.TemplateError as error:
            if type(error) in (jinja2.TemplateError, TemplateLimitError):
                words = f"the chat template refuses the messages: {error}"
            else:  # what jinja and Python say of a template is not for those who cannot see it
                _LOG.warning("the chat template failed at a request: %s", shown(str(error)))
                words = "the chat template cannot write these messages"
            raise Refused(words, "messages") from None
        except (ValueError, TypeError) as error:
            if isinstance(error, Refused):
                raise
            raise Refused(str(error), "prompt" if work.messages is None else "messages") from None

    def _picture(self, picture: Picture, share: Share) -> PreparedPicture:
        """Raises: Refused naming its place; Overloaded."""
        try:
            prepared = self._known.get(picture.data, self._prepared)
        except ImageOpenError as error:
            raise Refused(f"{picture.place}: {error}", picture.place) from None
        share.take(prepared)
        return prepared

    def _prepared(self, data: bytes) -> PreparedPicture:
        image = open_image(data, limits=self._limits, allow_paths=False)
        return prepare_picture(self._engine.processor, image, limits=self._limits)


class Mail:
    """The outbox of an event loop: what a step has for all of its requests comes in one call."""

    def __init__(self, event_loop: asyncio.AbstractEventLoop) -> None:
        self.event_loop = event_loop
        self._boxes: dict[str, asyncio.Queue[Piece | Exception]] = {}

    def open(self, key: str) -> asyncio.Queue[Piece | Exception]:
        return self._boxes.setdefault(key, asyncio.Queue())

    def shut(self, key: str) -> None:
        self._boxes.pop(key, None)

    def post(self, news: Sequence[tuple[str, Piece | Exception]]) -> None:
        self.event_loop.call_soon_threadsafe(self._deliver, news)

    def _deliver(self, news: Sequence[tuple[str, Piece | Exception]]) -> None:
        for key, new in news:
            if (box := self._boxes.get(key)) is not None:
                box.put_nowait(new)


class Pieces:
    """The pieces of one request. Closed or forgotten before its end, it ends the request."""

    def __init__(self, key: str, mail: Mail, loop: Loop, share: Share) -> None:
        self._key, self._mail, self._loop, self._share = key, mail, loop, share
        self._box = mail.open(key)
        self._has_ended = False

    def __aiter__(self) -> Pieces:
        return self

    async def __anext__(self) -> Piece:
        if self._has_ended:
            raise StopAsyncIteration
        try:
            new = await self._box.get()
        except asyncio.CancelledError:
            self._end()
            raise
        if isinstance(new, Exception):
            self._end(is_over=True)
            raise WorkFailed(str(new)) from new
        if new.usage is not None:
            self._end(is_over=True)
        return new

    async def aclose(self) -> None:
        self._end()

    def _end(self, is_over: bool = False) -> None:
        if self._has_ended:
            return
        self._has_ended = True
        self._mail.shut(self._key)
        self._share.end()
        if not is_over:
            self._loop.cancel(self._key)

    def __del__(self) -> None:
        self._end()
