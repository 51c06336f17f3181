"""Many hostile inputs in one child with limits: how each ended, and the processor time it took."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from confinement import confined

_BEFORE = """
import json as _json, sys as _sys, time as _time

def attempt(name, call):
    start = _time.process_time()
    try:
        call()
        kind, text = "loaded", ""
    except BaseException as error:
        kind, text = type(error).__name__, str(error)
        if isinstance(error, (ValueError, FileNotFoundError)):
            kind = "refused " + kind
    seconds = _time.process_time() - start
    print(_json.dumps(["attempt", name, kind, text, seconds]), flush=True)
"""


@dataclass(frozen=True)
class Attempt:
    """How a call ended: `kind` is "loaded", "refused TYPE" or another error's type; `text` its message."""

    kind: str
    text: str
    seconds: float


def attempts(
    code: str,
    *arguments: Any,
    seconds: float = 60,
    mebibytes: int = 4096,
    peak: int = 1200,
    longest: int = 2000,
) -> dict[str, Attempt]:
    """What the calls of ``attempt(name, call)`` in ``code`` ended with, by name.

    Asserts that the child lived and kept within ``peak`` MiB, and that every error has at most ``longest``
    characters, none of which a terminal obeys.
    """
    ended = confined(_BEFORE + code, *arguments, seconds=seconds, mebibytes=mebibytes)
    assert ended.kind == "ok", (ended.kind, ended.out[-1000:], ended.err[-3000:])
    assert ended.peak < peak, (ended.peak, ended.out[-1000:])
    found: dict[str, Attempt] = {}
    for line in ended.out.splitlines():
        if line.startswith('["attempt"'):
            _, name, kind, text, taken = json.loads(line)
            found[name] = Attempt(kind, text, taken)
    for name, one in found.items():
        assert len(one.text) <= longest, (name, one.text[:300])
        assert one.text.replace("\n", "").isprintable(), (name, ascii(one.text[:300]))
    return found


def assert_refused(found: dict[str, Attempt], names: Any, seconds: float = 10) -> None:
    """Every name was tried, and its call ended in an error of the kind that callers expect, in time."""
    assert found.keys() == set(names)
    wrong = {
        n: (a.kind, a.text[:200]) for n, a in found.items() if not a.kind.startswith("refused ")
    }
    assert not wrong, wrong
    slow = {n: a.seconds for n, a in found.items() if a.seconds > seconds}
    assert not slow, slow
