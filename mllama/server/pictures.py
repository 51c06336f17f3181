"""Pictures of a request: from data: URLs, and from hosts that the command line names.

Nothing is read from the disk for a request. What a file holds is looked at by the engine, which opens it.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from mllama.limits import REQUESTS, Limits
from mllama.processing.sources import ImageOpenError, check_bytes, read_source
from mllama.server.errors import RequestError, json_shown
from mllama.server.fetching import Fetcher
from mllama.server.messages import Link
from mllama.server.protocol import Picture

_SCHEME_LENGTH = 64  # characters in which it is looked for
_SCHEME = re.compile(r"\s{0,8}([A-Za-z][A-Za-z0-9+.\-]{0,30}):")
_DATA = re.compile(r"\s{0,8}data:image/[a-z0-9.+\-]{1,60}(;[a-z0-9=.+\-]{0,60}){0,3};base64,", re.I)


class Pictures:
    """Reads the pictures that requests link to.

    Args:
        fetcher: for http and https; it knows which hosts are allowed.
        executor: where base64 is decoded, with few threads.
        max_images: of a request.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        executor: Executor,
        *,
        max_images: int = 4,
        limits: Limits = REQUESTS,
    ) -> None:
        self._fetcher = fetcher
        self._executor = executor
        self._max_images = max_images
        self._limits = limits

    async def read(self, links: Sequence[Link], take: Callable[[int], None]) -> tuple[Picture, ...]:
        """Their files, in order.

        Args:
            take: called with the bytes that come over a network, see `body.BodyBudget.share`.
        Raises: RequestError naming the place of the first that cannot be had; what `take` does.
        """
        if len(links) > self._max_images:
            raise RequestError(
                400,
                f"the request has {len(links)} pictures; at most {self._max_images} are taken "
                "(--max-images)",
                param=links[self._max_images][0],
            )
        for place, url in links:  # before any of them takes time
            _check_scheme(url, place)
        tasks = [asyncio.ensure_future(self._read(url, place, take)) for place, url in links]
        try:
            return tuple(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _read(self, url: str, place: str, take: Callable[[int], None]) -> Picture:
        if not url[:_SCHEME_LENGTH].lstrip().lower().startswith("data:"):
            return Picture(await self._fetcher.fetch(url.strip(), place, take), place)
        loop = asyncio.get_running_loop()
        try:
            check_bytes(len(url) * 3 // 4 - 256, "the picture", self._limits)
            data = await loop.run_in_executor(self._executor, self._decoded, url)
        except ImageOpenError as error:
            raise _refused(place, str(error)) from None
        return Picture(data, place)

    def _decoded(self, url: str) -> bytes:
        data, _ = read_source(url, self._limits, allow_paths=False, name="the picture")
        if not data:
            raise ImageOpenError("the data: URL is empty; expected the bytes of a picture")
        return data


def _check_scheme(url: str, place: str) -> None:
    """Raises: RequestError for what is neither a data: URL of a picture nor the address of a web page."""
    found = _SCHEME.match(url[:_SCHEME_LENGTH])
    scheme = found[1].lower() if found else ""
    if scheme == "data":
        if not _DATA.match(url[:512]):
            start = url[:80].partition(",")[0]
            raise _refused(
                place,
                f"expected data:image/...;base64,..., got {json_shown(start)} before the data",
            )
    elif scheme not in ("http", "https"):
        kind = f"a {scheme}: URL" if scheme and len(scheme) > 1 else "no URL"
        raise _refused(
            place,
            f"{json_shown(url)} is {kind}; expected a data: URL, no file is read for a request",
        )


def _refused(place: str, reason: str) -> RequestError:
    return RequestError(400, f"{place}: {reason}", param=place, code="invalid_image")
