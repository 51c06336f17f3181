"""What the command line says about the server."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mllama.limits import MIB, REQUESTS, Limits
from mllama.server.body import BodyBounds


@dataclass(frozen=True)
class Settings:
    """Of a server.

    Attributes:
        models: names under which the one model is asked for; the first is told.
        version: of the package.
        api_keys: none of them: everybody is answered.
        host: where it listens.
        allowed_hosts: names under which it is reached beside the machine's own, where there is no key.
        image_hosts: hosts that pictures are fetched from.
        system_with_images: see `messages.template_messages`.
        max_new_tokens: length of an answer where the request names none, and the most it may ask for; None:
            the context decides.
        top_k: for requests that name none; None: the checkpoint decides.
        max_bytes_in_flight: of the bodies of all requests that are being read and answered.
        head_seconds: in which the head of a request has to arrive.
        reader_seconds: in which a client has to take something of an answer that waits for it.
        drain_seconds: in which running answers may finish when the server ends.
    """

    models: tuple[str, ...]
    version: str
    api_keys: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    image_hosts: tuple[str, ...] = ()
    max_images: int = 4
    system_with_images: Literal["fold", "error"] = "fold"
    max_new_tokens: int | None = None
    top_k: int | None = None
    limits: Limits = REQUESTS
    max_bytes_in_flight: int = 512 * MIB
    body: BodyBounds = field(default_factory=BodyBounds)
    head_seconds: float = 30.0
    reader_seconds: float = 60.0
    drain_seconds: float = 30.0
    max_connections: int = 1024
