"""Pictures from the few hosts that the server's command line names.

A name is resolved once, every address of it has to be public, and the connection goes to the address that was
looked at, under the host's name. No redirect is followed and no proxy is used.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import httpx2

from mllama.server.addresses import is_public
from mllama.server.errors import RequestError, json_shown
from mllama.wording import shown

Resolve = Callable[[str, int], Awaitable[list[str]]]

MOST_SECONDS = 10.0
_MOST_AT_ONCE = 8
_LONGEST_URL = 4096
_PORTS = {"http": 80, "https": 443}
_URL = re.compile(r"https?://[!-\[\]-~]+", re.IGNORECASE)  # without blanks, controls and "\"
_NAME = re.compile(r"[a-z0-9._-]{1,253}|\[[0-9a-f:.]{2,45}\]")


class Fetcher:
    """Reads pictures over a network.

    Args:
        hosts: names, or name:port, as "images.example.org"; a name alone means the usual port of the scheme.
        max_bytes: of a picture.
        resolve: addresses of a name; the system's own resolver where none is given.
        transport: of the client; a connection to the address in the URL where none is given.
    Raises: ValueError for a host that is none.
    """

    def __init__(
        self,
        hosts: Iterable[str],
        max_bytes: int,
        *,
        resolve: Resolve | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._hosts = {_checked_host(host) for host in hosts}
        self._max_bytes = max_bytes
        self._resolve = resolve or _SystemResolver()
        self._transport = transport
        self._turns = asyncio.Semaphore(_MOST_AT_ONCE)
        self._tls: ssl.SSLContext | None = None

    async def fetch(self, url: str, place: str, take: Callable[[int], None]) -> bytes:
        """The file at an address.

        Args:
            take: called with the number of bytes of each piece, see `body.BodyBudget.share`.
        Raises: RequestError naming the place in the request and the reason; what `take` does.
        """
        parsed = self._parsed(url, place)
        try:
            return await asyncio.wait_for(self._fetch(parsed, place, take), MOST_SECONDS)
        except (asyncio.TimeoutError, httpx2.TimeoutException):
            reason = f"{_host(parsed)} took more than {MOST_SECONDS:g} s; send a data: URL"
        except (OSError, httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError):
            reason = f"{_host(parsed)} cannot be reached, or its answer is no HTTP"
        raise _refused(place, reason)

    def _parsed(self, url: str, place: str) -> httpx2.URL:
        if len(url) > _LONGEST_URL or not _URL.fullmatch(url):
            raise _refused(place, f"{json_shown(url)} is no URL; expected a data: URL")
        try:
            parsed = httpx2.URL(url)
            host, port = _host(parsed).rstrip("."), parsed.port
        except (httpx2.InvalidURL, ValueError):
            raise _refused(place, f"{json_shown(url)} is no URL; expected a data: URL") from None
        if parsed.userinfo:
            raise _refused(place, "the URL holds a user or a password; expected neither")
        named = {host} if port in (None, _PORTS[parsed.scheme]) else set()
        named.add(f"{host}:{port or _PORTS[parsed.scheme]}")
        if self._hosts.isdisjoint(named):
            host = shown(host[:253]) + (f":{port}" if port else "")
            raise _refused(
                place,
                f"pictures are not fetched from {host}; send a data: URL, or start the server with "
                f"--allow-image-host {host}",
            )
        return parsed

    async def _fetch(self, url: httpx2.URL, place: str, take: Callable[[int], None]) -> bytes:
        async with self._turns:
            address = await self._address(url, place)
            request = httpx2.Request(
                "GET",
                url.copy_with(host=address),
                headers={
                    "Host": url.netloc.decode("ascii"),
                    "Accept": "image/*",
                    "Accept-Encoding": "identity",
                    "User-Agent": "mllama",
                },
                extensions={"sni_hostname": _host(url)},
            )
            if self._tls is None:
                self._tls = httpx2.create_ssl_context(trust_env=False)
            async with httpx2.AsyncClient(
                verify=self._tls,
                trust_env=False,
                follow_redirects=False,
                timeout=MOST_SECONDS,
                transport=self._transport,
            ) as client:
                response = await client.send(request, stream=True)
                try:
                    return await self._read(response, _host(url), place, take)
                finally:
                    await response.aclose()

    async def _address(self, url: httpx2.URL, place: str) -> str:
        """The one that is connected to; it is looked up once."""
        port = url.port or _PORTS[url.scheme]
        addresses = await self._resolve(_host(url), port)
        if not addresses or not all(map(is_public, addresses)):
            raise _refused(place, f"{_host(url)} is no host of the public internet")
        return addresses[0]

    async def _read(
        self, response: httpx2.Response, host: str, place: str, take: Callable[[int], None]
    ) -> bytes:
        if 300 <= response.status_code < 400:
            raise _refused(place, f"{host} redirects, which is not followed; send the last address")
        if response.status_code != 200:
            raise _refused(place, f"{host} answered {response.status_code}, expected 200")
        kind = response.headers.get("content-type", "").split(";")[0].strip().lower()
        if not re.fullmatch(r"image/[a-z0-9.+-]{1,40}", kind):
            raise _refused(place, f"{host} sent {json_shown(kind)}, expected an image content type")
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise _refused(place, f"{host} sent a compressed answer, which was not asked for")
        data = bytearray()
        async for piece in response.aiter_raw():
            take(len(piece))
            data += piece
            if len(data) > self._max_bytes:
                raise _refused(
                    place, f"the picture of {host} has more than {self._max_bytes} bytes"
                )
        return bytes(data)


def _host(url: httpx2.URL) -> str:
    """As the name service has it."""
    return url.raw_host.decode("ascii").lower()


class _SystemResolver:
    """Asks the system once, without a cache of ours; it reads decimal and octal forms of an address too.

    In threads of its own: a name server that does not answer holds up nothing else.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_MOST_AT_ONCE, "mllama-resolver")

    async def __call__(self, host: str, port: int) -> list[str]:
        found = await asyncio.get_running_loop().run_in_executor(
            self._threads, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        return [str(entry[4][0]) for entry in found]


def _checked_host(text: str) -> str:
    host, colon, port = text.lower().rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text.lower(), ""
    host = host.rstrip(".")
    if not _NAME.fullmatch(host) or (port and not 0 < int(port if port.isdecimal() else 0) < 65536):
        raise ValueError(f"a host of pictures is a name, or name:port, got {shown(text)}")
    host = host.strip("[]")
    return f"{host}:{port}" if port else host


def _refused(place: str, reason: str) -> RequestError:
    return RequestError(400, f"{place}: {reason}", param=place, code="invalid_image")
