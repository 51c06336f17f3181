"""Pictures of requests: data: URLs, hosts that are named, and everything that must not be fetched or read."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("httpx2")
pytest.importorskip("fastapi")

import httpx2
from server_helpers import PNG, Listener, http_answer, listening

from mllama.engine.interface import Overloaded
from mllama.server import fetching
from mllama.server.addresses import is_public
from mllama.server.body import BodyBudget
from mllama.server.errors import RequestError
from mllama.server.fetching import Fetcher
from mllama.server.pictures import Pictures

PUBLIC = "93.184.216.34"
DATA = "data:image/png;base64," + base64.b64encode(PNG).decode()
PLACE = "messages[0].content[1]"


@pytest.fixture(scope="module")
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as threads:
        yield threads


def read(
    executor: ThreadPoolExecutor,
    *urls: str,
    fetcher: Fetcher | None = None,
    take: Callable[[int], None] = lambda count: None,
) -> list[bytes]:
    pictures = Pictures(fetcher or Fetcher((), 2**20), executor)
    links = [(f"messages[0].content[{i + 1}]", url) for i, url in enumerate(urls)]
    return [picture.data for picture in asyncio.run(pictures.read(links, take))]


def refusal(
    executor: ThreadPoolExecutor, *urls: str, fetcher: Fetcher | None = None
) -> RequestError:
    with pytest.raises(RequestError) as caught:
        read(executor, *urls, fetcher=fetcher)
    error = caught.value
    assert error.status == 400 and len(error.message) < 500
    assert "Error" not in error.message and "Traceback" not in error.message
    return error


# data: URLs


def test_data_urls_are_read_in_order(executor):
    other = "DATA:image/jpeg;charset=x;base64," + base64.urlsafe_b64encode(b"\xff\xef").decode()
    assert read(executor, DATA, " " + other, DATA) == [PNG, b"\xff\xef", PNG]


@pytest.mark.parametrize(
    "url",
    [
        "data:,",
        "data:text/plain;base64,AAAA",
        "data:image/png,AAAA",
        "data:image/png;base64",
        "data:image/png;base64,",
        "data:image/png;base64,\u20ac",
        "data:image/png;base64,A",
        "data:" + "x" * 100_000,
        "data:image/png" + ";a" * 50_000 + ";base64,AAAA",
    ],
)
def test_data_urls_that_are_none(executor, url):
    error = refusal(executor, DATA, url)
    assert error.param == "messages[0].content[2]" and error.message.startswith(error.param)


def test_a_data_url_has_a_limit(executor):
    error = refusal(executor, "data:image/png;base64," + "A" * (28 * 2**20))
    assert "max_bytes" in error.message


def test_the_number_of_pictures_has_a_limit(executor):
    assert len(read(executor, *[DATA] * 4)) == 4
    error = refusal(executor, *[DATA] * 5)
    assert "5 pictures" in error.message and "--max-images" in error.message


# The disk


@pytest.mark.parametrize("form", ["{}", "file://{}", "FILE:{}", " file://{}", "file://localhost{}"])
def test_nothing_is_read_from_the_disk(executor, tmp_path, monkeypatch, form):
    path = tmp_path / "secret.png"
    path.write_bytes(PNG)
    monkeypatch.setattr("builtins.open", lambda *a, **k: pytest.fail("a file was opened"))
    monkeypatch.setattr("os.open", lambda *a, **k: pytest.fail("a file was opened"))
    monkeypatch.setattr("os.stat", lambda *a, **k: pytest.fail("a file was looked for"))
    error = refusal(executor, form.format(path))
    monkeypatch.undo()
    assert "no file is read" in error.message


@pytest.mark.parametrize(
    "url",
    "photo.png ftp://example.org/a.png gopher://a/ javascript:1 blob:x s3://a/b C:\\a.png //a/b "
    "\u0000 http:/example.org http:example.org http://".split(" "),
)
def test_other_schemes_are_refused(executor, url):
    refusal(executor, url)


# Which hosts


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/a.png",
        "https://EXAMPLE.org./a.png",
        "https://images.example.org/a.png",
        "https://example.com:444/a.png",
        "https://example.com.evil.org/a.png",
    ],
)
def test_hosts_have_to_be_named(executor, url):
    async def resolve(host: str, port: int) -> list[str]:
        pytest.fail("a name was looked up")

    error = refusal(executor, url, fetcher=Fetcher(["example.com"], 2**20, resolve=resolve))
    host = httpx2.URL(url).host.rstrip(".")
    assert f"--allow-image-host {host}" in error.message


@pytest.mark.parametrize(
    "url",
    [
        "https://user@example.com/",
        "https://user:word@example.com/",
        "https://example.com\\@127.0.0.1/",
        "https://exa mple.com/",
        "https://example.com\r\nHost: a/",
        "https://example.com\t/",
        "https://[::1/",
        "https://example.com:99999/",
        "https://ex\u3002mple.com/",
        "https://example.com/" + "a" * 5000,
    ],
)
def test_urls_that_are_read_in_two_ways_are_refused(executor, url):
    async def resolve(host: str, port: int) -> list[str]:
        pytest.fail("a name was looked up")

    refusal(executor, url, fetcher=Fetcher(["example.com"], 2**20, resolve=resolve))


@pytest.mark.parametrize("host", ["", "a b", "http://a", "a/b", "a:0", "a:65536", "a:b", "*"])
def test_a_host_on_the_command_line_is_a_name(host):
    with pytest.raises(ValueError, match="a host of pictures"):
        Fetcher([host], 1)


# Which addresses

LOCAL = (
    "127.0.0.1 127.255.0.1 0.0.0.0 10.0.0.1 172.16.0.1 192.168.0.1 169.254.169.254 100.64.0.1 "
    "100.100.100.200 192.0.0.1 192.0.2.1 198.18.0.1 198.51.100.1 203.0.113.1 224.0.0.1 240.0.0.1 "
    "255.255.255.255 192.88.99.1 168.63.129.16 :: ::1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:7f00:1 "
    "::ffff:10.0.0.1 ::ffff:168.63.129.16 64:ff9b::127.0.0.1 64:ff9b::a00:1 64:ff9b:1::8.8.8.8 "
    "2002:7f00:1:: 2002:808:808:: 2001:0:808:808:: fe80::1 fe80::1%lo fec0::1 fc00::1 fd00:ec2::254 "
    "ff02::1 2001:db8::1 100::1 2606:2800::5efe:7f00:1 2606:2800::200:5efe:8.8.8.8"
).split()


@pytest.mark.parametrize("address", [*LOCAL, "", "localhost", "1", "0177.0.0.1", "1.2.3", None])
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", [PUBLIC, "8.8.8.8", "2606:2800:220:1::1", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"]
)
def test_addresses_that_are_public(address):
    assert is_public(address)


@pytest.mark.parametrize("addresses", [[], *([a] for a in LOCAL), [PUBLIC, "10.0.0.1"]])
def test_no_address_of_a_name_may_be_local(executor, addresses):
    async def resolve(host: str, port: int) -> list[str]:
        return addresses

    transport = httpx2.MockTransport(lambda request: pytest.fail("connected"))
    fetcher = Fetcher(["example.com"], 2**20, resolve=resolve, transport=transport)
    error = refusal(executor, "https://example.com/a.png", fetcher=fetcher)
    assert "no host of the public internet" in error.message
    assert all(address not in error.message for address in addresses if len(address) > 3)


SPELLINGS = (
    "127.0.0.1 127.1 2130706433 0177.0.0.1 017700000001 0x7f.0.0.1 0x7f000001 127.0.0.1. localhost "
    "LOCALHOST localhost. 0.0.0.0 0 [::1] [::] [0:0:0:0:0:0:0:1] [::ffff:127.0.0.1] [::ffff:7f00:1] "
    "[::127.0.0.1] [64:ff9b::7f00:1] [64:ff9b::127.0.0.1]"
).split()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_no_spelling_of_this_machine_is_connected_to(executor, spelling):
    """Each host is named on the command line, and the system's resolver is asked."""
    with listening(http_answer()) as four, listening(http_answer(), _six()) as six:
        for listener in (four, six):
            host = f"{spelling}:{listener.port}"
            try:
                fetcher = Fetcher([host], 2**20)
            except ValueError:
                fetcher = Fetcher((), 2**20)
            refusal(executor, f"http://{host}/a.png", fetcher=fetcher)
            refusal(executor, f"https://{host}/a.png", fetcher=fetcher)
        assert four.connections == six.connections == 0


def _six() -> str:
    try:
        Listener("::1", b"").close()
    except OSError:
        return "127.0.0.1"
    return "::1"


# What is fetched


class Rerouted(httpx2.AsyncBaseTransport):
    """Checks which address is asked for, and connects to a listener in its stead."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._inner = httpx2.AsyncHTTPTransport()
        self.asked: list[tuple[str, str, Any]] = []

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        sni = request.extensions["sni_hostname"]
        self.asked.append((str(request.url), request.headers["host"], sni))
        target = httpx2.URL(f"http://127.0.0.1:{self._port}{request.url.path}")
        return await self._inner.handle_async_request(
            httpx2.Request("GET", target, headers=request.headers)
        )


def fetched(
    executor: ThreadPoolExecutor, listener: Listener, addresses: list[str], most: int = 2**20
) -> tuple[list[bytes], Rerouted]:
    looked_up = []

    async def resolve(host: str, port: int) -> list[str]:
        looked_up.append((host, port))
        return addresses

    transport = Rerouted(listener.port)
    fetcher = Fetcher(["example.com"], most, resolve=resolve, transport=transport)
    found = read(executor, "https://Example.com/a.png?b", fetcher=fetcher)
    assert looked_up == [("example.com", 443)]
    return found, transport


@pytest.mark.parametrize(
    ("address", "url"),
    [(PUBLIC, f"https://{PUBLIC}/a.png?b"), ("2606:2800::1", "https://[2606:2800::1]/a.png?b")],
)
def test_the_checked_address_is_asked_under_the_hosts_name(executor, monkeypatch, address, url):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with listening(http_answer()) as listener:
        found, transport = fetched(executor, listener, [address, "8.8.8.8"])
        assert found == [PNG] and listener.connections == 1
        assert transport.asked == [(url, "example.com", "example.com")]
        (request,) = listener.requests
        assert b"Host: example.com\r\n" in request and b"identity" in request
        assert b"ookie" not in request and b"uthorization" not in request


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (http_answer(status="302 Found", more="Location: http://127.0.0.1/\r\n"), "redirects"),
        (http_answer(status="404 Not Found"), "answered 404"),
        (http_answer(kind="text/html"), '"text/html", expected an image'),
        (http_answer(kind="image/\x7f"), "expected an image"),
        (http_answer(more="Content-Encoding: gzip\r\n"), "compressed"),
        (http_answer(body=b"x" * 70_000), "more than 65536 bytes"),
        (http_answer(more="Content-Length: 99999\r\n"), "cannot be reached"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "cannot be reached"),
        (b"", "cannot be reached"),
    ],
)
def test_answers_that_are_no_picture(executor, answer, words):
    with listening(answer) as listener:
        with pytest.raises(RequestError, match=words) as caught:
            fetched(executor, listener, [PUBLIC], most=65536)
        assert listener.connections == 1
    assert caught.value.status == 400 and caught.value.param == PLACE


def test_what_is_fetched_counts_as_what_is_sent(executor, monkeypatch):
    monkeypatch.setattr(fetching, "is_public", lambda address: True)
    budget = BodyBudget(len(PNG) + 1)
    with listening(http_answer()) as listener, budget.share() as take:
        url = f"http://127.0.0.1:{listener.port}/"
        fetcher = Fetcher([f"127.0.0.1:{listener.port}"], 2**20)
        assert read(executor, url, fetcher=fetcher, take=take) == [PNG]
        with budget.share() as other, pytest.raises(Overloaded, match="bytes"):
            read(executor, url, fetcher=fetcher, take=other)


def test_a_slow_answer_ends(executor, monkeypatch):
    monkeypatch.setattr(fetching, "MOST_SECONDS", 0.2)
    with listening(http_answer(), pause=5) as listener:
        with pytest.raises(RequestError, match=r"more than 0\.2 s"):
            fetched(executor, listener, [PUBLIC])


def test_without_the_look_at_its_address_this_machine_would_be_reached(executor, monkeypatch):
    monkeypatch.setattr(fetching, "is_public", lambda address: True)
    with listening(http_answer()) as listener:
        fetcher = Fetcher([f"2130706433:{listener.port}"], 2**20)
        assert read(executor, f"http://2130706433:{listener.port}/", fetcher=fetcher) == [PNG]
        assert listener.connections == 1


def test_no_proxy_of_the_environment_is_asked(executor, monkeypatch):
    monkeypatch.setattr(fetching, "is_public", lambda address: True)

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    with listening(http_answer()) as target, listening(http_answer()) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        fetcher = Fetcher([f"example.com:{target.port}"], 2**20, resolve=resolve)
        url = f"http://example.com:{target.port}/a.png"
        assert read(executor, url, fetcher=fetcher) == [PNG]
        assert target.connections == 1 and proxy.connections == 0
        assert f"Host: example.com:{target.port}\r\n".encode() in target.requests[0]
