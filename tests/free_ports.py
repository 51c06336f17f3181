"""Ports for servers that are told where to listen."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def reserved() -> Iterator[int]:
    """A port of the loopback interface that the system gives nobody else while this lasts.

    A server may listen there: it allows its address to be used again, as all do, and so does this, where
    nobody listens.
    """
    with socket.socket() as kept:
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # as Ray's proxies have it
        kept.bind(("127.0.0.1", 0))
        yield kept.getsockname()[1]
