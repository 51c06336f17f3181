"""The child of `mllama.confined`: takes requests and answers them, under limits of the system.

It is run by its path, and imports nothing of this package: a start costs what the job itself imports. The
job is a Python file with a function `answer(request)` that returns a small JSON value and a text.

    confined_worker.py JOB BYTES [PATH ...]     BYTES: memory beyond that of the start; PATH: of sys.path
"""

from __future__ import annotations

import json
import marshal
import os
import sys
import time
from typing import Any

try:
    import resource
except ImportError:  # no such limits on this system; the parent's clock is there still
    resource = None

CHANNEL = 0  # a socket in the place of stdin
_MEMORY = b'{"ended": "memory"}'


def _confine(memory: int) -> None:
    """Give up what the job needs no more: memory, files to come, processes, core dumps."""
    if resource is None:
        return
    try:
        with open("/proc/self/statm", "rb") as file:
            memory += int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        memory += 64 << 20  # an interpreter with what it imported
    wanted = {"AS": memory, "CORE": 0, "FSIZE": 0, "NOFILE": 3, "NPROC": 0}
    for name, value in wanted.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is None:
            continue
        _, hard = resource.getrlimit(kind)
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        try:
            resource.setrlimit(kind, (value, value))
        except (OSError, ValueError):  # macOS has no limit of addresses
            pass


def _limit_time(seconds: float) -> None:
    # For the case that the parent is gone: it keeps the time as long as it lives.
    if resource is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        limit = int(time.process_time() + min(seconds, 10**6)) + 2
        if hard == resource.RLIM_INFINITY or limit < hard:
            resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))


def _receive(count: int) -> bytearray:
    data = bytearray(count)
    view, filled = memoryview(data), 0
    while filled < count:
        piece = os.read(CHANNEL, min(count - filled, 1 << 20))
        if not piece:  # the parent has gone, or wants no more
            os._exit(0)
        view[filled : filled + len(piece)] = piece
        filled += len(piece)
    return data


def _send(value: bytes, text: bytes = b"") -> None:
    for data in (
        len(value).to_bytes(4, "little") + len(text).to_bytes(8, "little") + value,
        text,
    ):
        view = memoryview(data)
        while view:
            view = view[os.write(CHANNEL, view[: 1 << 20]) :]


def _job(path: str) -> Any:
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec")
    names: dict[str, Any] = {"__name__": "job"}
    exec(code, names)
    return names["answer"]


def main() -> None:
    """Answer until the parent closes the channel or memory runs out."""
    job, memory, *paths = sys.argv[1:]
    sys.path += paths
    try:
        answer = _job(job)
        _confine(int(memory))
    except Exception as error:
        _send(json.dumps({"ended": f"{type(error).__name__}: {error}"[:500]}).encode())
        os._exit(1)
    _send(b'{"ready": true}')
    while True:
        seconds, request = marshal.loads(_receive(int.from_bytes(_receive(8), "little")))
        _limit_time(seconds)
        try:
            value, text = answer(request)
            del request
            encoded = json.dumps(value).encode()
            body = text.encode("utf-8", "surrogatepass")
        except MemoryError:
            _send(_MEMORY)
            os._exit(1)
        _send(encoded, body)


main()
