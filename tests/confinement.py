"""Runs hostile code in a child process with limits on time and memory: no crash takes the tests along.

Time is that of the processor, so that other work on the machine fails no test. A child that waits instead is
given `_PATIENCE` times as long.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass
from typing import Any

_PATIENCE = 8
# Sanitizers map terabytes of addresses.
_SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")
# Not ru_maxrss, which begins with what the process was before it became this program.
_REPORT = """
import re as _re
print("peak", int(_re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024)
"""


@dataclass(frozen=True)
class Ended:
    """How a child ended: `kind` is "ok", "error" (an exit status), "timeout" or the name of a signal.

    Attributes:
        out, err: what it printed.
        seconds: how long it took by the clock.
        peak: its largest resident memory in MiB; 0 where it did not live to say.
    """

    kind: str
    out: str
    err: str
    seconds: float
    peak: int


def confined(
    code: str, *arguments: object, seconds: float = 30, mebibytes: int = 4096, **environment: str
) -> Ended:
    """Run Python code in a child with `arguments` in sys.argv.

    Args:
        seconds: of processor time, rounded up to whole ones, after which the child is killed; processes that
            it starts have as many of their own.
        mebibytes: of address space; torch takes about 1000 by being imported.
    """

    def limit() -> None:
        if not _SANITIZED:
            resource.setrlimit(resource.RLIMIT_AS, (mebibytes << 20,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), hard))

    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code) + _REPORT, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        preexec_fn=limit,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    try:
        out, err = process.communicate(timeout=_PATIENCE * seconds)
        status = process.returncode
        kind = "ok" if status == 0 else "error" if status > 0 else signal.Signals(-status).name
    except BaseException as error:  # also what ends a test that takes too long
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        kind = "timeout"
    body, _, peak = out.rpartition("peak ")
    if not peak.strip().isdigit():
        body, peak = out, "0"
    return _ended(kind, body, err, time.monotonic() - start, int(peak))


def _ended(kind: str, *others: Any) -> Ended:
    return Ended("timeout" if kind == "SIGXCPU" else kind, *others)


# The parent of the cases: each is a fork of a process that has run the setup, so that importing torch is paid
# once. A case that hangs or crashes takes nobody along.
_CASES = """
import json, os, resource, select, signal, sys, time, traceback
setup, cases, seconds, patience = json.load(open(sys.argv.pop(1)))
names = {"__name__": "cases"}
exec(setup, names)
for name, code in cases.items():
    sys.stdout.flush()
    start, (read, write) = time.monotonic(), os.pipe()
    child = os.fork()
    if child == 0:
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, hard))
        os.dup2(write, 1)
        os.dup2(write, 2)
        status = 1
        try:
            exec(code, names)
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    os.close(write)
    said, kind = b"", None
    while select.select([read], [], [], max(0, start + patience - time.monotonic()))[0]:
        if not (chunk := os.read(read, 1 << 16)):
            break
        said = (said + chunk)[-(1 << 16):]
    else:
        kind = "timeout"
        os.kill(child, signal.SIGKILL)
    os.close(read)
    _, status, usage = os.wait4(child, 0)
    if kind is None:
        code = os.waitstatus_to_exitcode(status)
        kind = "ok" if code == 0 else "error" if code > 0 else signal.Signals(-code).name
    ended = [kind, said.decode(errors="replace"), time.monotonic() - start, usage.ru_maxrss >> 10]
    print("case", json.dumps([name, ended]), flush=True)
"""


def confined_cases(
    setup: str, cases: dict[str, str], *, seconds: float = 10, mebibytes: int = 4096
) -> dict[str, Ended]:
    """Run many pieces of code, each in a fork of one child that has run `setup`.

    Args:
        setup: Python code that all cases start from: imports and helpers. It starts no threads, which a
            fork would not have.
        cases: code by name.
        seconds: of processor time for each case, rounded up to whole ones.
        mebibytes: of address space for each.
    Returns:
        how each case ended; `out` and `err` are one text, the end of what it printed.
    """
    setup, cases = textwrap.dedent(setup), {n: textwrap.dedent(c) for n, c in cases.items()}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump([setup, cases, math.ceil(seconds), _PATIENCE * seconds], file)
        file.flush()
        whole = 60 + seconds * len(cases)
        parent = confined(_CASES, file.name, seconds=whole, mebibytes=mebibytes)
    assert parent.kind == "ok", (parent.kind, parent.err[-2000:])
    lines = [line[5:] for line in parent.out.splitlines() if line.startswith("case ")]
    found = dict(json.loads(line) for line in lines)
    assert found.keys() == cases.keys(), "the parent of the cases has lost some"
    return {name: _ended(kind, said, said, *rest) for name, (kind, said, *rest) in found.items()}
