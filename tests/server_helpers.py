"""An engine that echoes, a server before it, and a listener that counts connections."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import httpx2
from grammar_helpers import demo_compiler, walk

from mllama.demo import checkpoint_path
from mllama.engine.interface import (
    FinishReason,
    Overloaded,
    Piece,
    Refused,
    State,
    Stats,
    Token,
    Usage,
    WorkFailed,
)
from mllama.processing.tokenizer import MllamaTokenizer
from mllama.server.protocol import Work
from mllama.server.settings import Settings

PNG = bytes.fromhex(  # one grey pixel
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154"
    "78da6368000000820081da45083b0000000049454e44ae426082"
)

# Seconds for what takes a moment where the machine has nothing else to do.
PATIENCE = 120.0
# The functions of httpx2, which by themselves wait 5 seconds.
web = SimpleNamespace(
    **{
        name: partial(getattr(httpx2, name), timeout=PATIENCE)
        for name in ("get", "options", "post", "request", "stream")
    }
)


class Listener:
    """Answers every connection with the same bytes, and counts them."""

    def __init__(self, host: str, answer: bytes, pause: float = 0.0) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.bind((host, 0))
        self._socket.listen(16)
        self.port: int = self._socket.getsockname()[1]
        self.requests: list[bytes] = []
        self.connections = 0
        self._answer = answer
        self._end = threading.Event()
        self._pause = pause
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        self._socket.settimeout(0.05)
        while not self._end.is_set():
            try:
                connection, _ = self._socket.accept()
            except TimeoutError:
                continue
            self.connections += 1
            with connection:
                connection.settimeout(PATIENCE)
                try:
                    self.requests.append(connection.recv(65536))
                    self._end.wait(self._pause)
                    connection.sendall(self._answer)
                except OSError:
                    pass

    def close(self) -> None:
        self._end.set()
        self._thread.join()
        self._socket.close()


@contextmanager
def listening(
    answer: bytes = b"", host: str = "127.0.0.1", pause: float = 0.0
) -> Iterator[Listener]:
    listener = Listener(host, answer, pause)
    try:
        yield listener
    finally:
        listener.close()


def http_answer(
    body: bytes = PNG, kind: str = "image/png", status: str = "200 OK", more: str = ""
) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nConnection: close\r\n{more}\r\n"
    return head.encode() + body


class EchoEngine:
    """Answers with the words of the last message or of the prompt, one for each piece.

    A word at the beginning, after pictures, makes it do other things. "!refuse" and "!full" are
    not answered; "!hang-before" hangs before the first word and "!hang" after it, where "!held"
    waits to be released; "!fail", "!crash" and "!short" end after the second; "!slow" pauses.
    An answer that has a constraint is random tokens of the demo model that it allows.
    """

    def __init__(self) -> None:
        self.state: State = "ready"
        self.works: list[Work] = []
        self.cancelled: set[str] = set()
        self.running: set[str] = set()
        self.released = threading.Event()
        self._tokenizer = MllamaTokenizer.from_pretrained(checkpoint_path())

    async def submit(self, work: Work) -> AsyncIterator[Piece]:
        self.works.append(work)
        words = _last_text(work).split()
        first = next((word for word in words if word != "<picture>"), "")
        command = first if first.startswith("!") else ""
        if command == "!refuse":
            raise Refused("the prompt has 9 tokens; at most 8 are taken", "messages")
        if command == "!full":
            raise Overloaded("4 requests wait already; at most 4 do", 1.5)
        if command == "!hang-before":
            self.running.add(work.key)
            try:
                await asyncio.Event().wait()
            finally:
                self.running.discard(work.key)
        if work.constraint is not None:
            return self._constrained(work)
        return self._pieces(work, words, command)

    async def _pieces(self, work: Work, words: list[str], command: str) -> AsyncIterator[Piece]:
        self.running.add(work.key)
        try:
            limit = work.options.max_tokens
            for i in range(work.options.n):
                kept, length = words[:limit], 0
                for j, word in enumerate(kept):
                    if j == 2:
                        if command == "!fail":
                            raise WorkFailed("the numbers of the answer are not finite")
                        if command == "!crash":
                            raise RuntimeError("/secret/path")
                        if command == "!short":
                            return
                    if j and command == "!hang":
                        await asyncio.Event().wait()
                    while j and command == "!held" and not self.released.is_set():
                        await asyncio.sleep(0.01)
                    if j and command in ("!slow", "!fail", "!crash"):
                        await asyncio.sleep(0.1)
                    text = word if j == 0 else f" {word}"
                    count = work.options.top_logprobs
                    likeliest = (Token("x", b"x", -1.0),) * (count or 0)
                    token = Token(text, text.encode(), -0.5, likeliest, length)
                    length += len(text)
                    yield Piece(i, text, (token,) if count is not None else ())
                reason = "length" if len(kept) < len(words) else "stop"
                used = Usage(len(words) + len(work.pictures), len(kept) * work.options.n, 1, 0.01)
                last = i == work.options.n - 1
                yield Piece(
                    i,
                    finish_reason=reason,
                    usage=used if last else None,
                )
        finally:
            self.running.discard(work.key)

    async def _constrained(self, work: Work) -> AsyncIterator[Piece]:
        count, limit = 0, work.options.max_tokens
        for i in range(work.options.n):
            assert work.constraint is not None
            tokens = walk(work.constraint.fork(), self._tokenizer, random.Random(count))
            reason: FinishReason = "stop"
            for j, token in enumerate(tokens):
                if j == limit:
                    reason = "length"
                    break
                count += 1
                yield Piece(i, self._tokenizer.decode([token]))
                await asyncio.sleep(0)
            usage = Usage(1, count) if i == work.options.n - 1 else None
            yield Piece(i, finish_reason=reason, usage=usage)

    def cancel(self, key: str) -> None:
        self.cancelled.add(key)

    def health(self) -> State:
        return self.state

    def stats(self) -> Stats:
        return Stats(gauges={"requests_running": float(len(self.running))})


def _last_text(work: Work) -> str:
    if work.messages is None:
        assert work.prompt is not None
        return work.prompt if isinstance(work.prompt, str) else " ".join(map(str, work.prompt))
    content = work.messages[-1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(part.get("text", "<picture>") for part in content)


class Running:
    """A server in a thread of its own."""

    def __init__(self, engine: EchoEngine, app: Any, url: str) -> None:
        self.engine = engine
        self.app = app
        self.url = url
        self.port = int(url.rsplit(":", 1)[1])


@contextmanager
def served(template_writes_calls: bool = True, **options: Any) -> Iterator[Running]:
    import uvicorn

    from mllama.server.app import create_app
    from mllama.server.listening import configuration

    engine = EchoEngine()
    settings = Settings(**{"models": ("echo",), "version": "1", "port": 0, **options})
    app = create_app(engine, settings, demo_compiler(), template_writes_calls)
    server = uvicorn.Server(configuration(app, settings))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(engine, app, f"http://127.0.0.1:{port}")
    finally:
        server.should_exit = True
        thread.join(10)


def openai_client(url: str) -> Any:
    """An `openai.OpenAI` that takes nothing but answers as they are described, and asks once."""
    from openai import OpenAI

    return OpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    )


def eventually(holds: Any, seconds: float = PATIENCE) -> None:
    """Waits until it does. Fails where it does not in time."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not come to hold"
        time.sleep(0.01)
