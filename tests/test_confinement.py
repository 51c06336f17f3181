"""The children that hostile code runs in say how it ended, whatever it does."""

from __future__ import annotations

from confinement import confined, confined_cases


def test_how_a_child_ends() -> None:
    assert confined("import sys; print(sys.argv[1])", "word").out == "word\n"
    assert confined("raise ValueError('why')").err.endswith("ValueError: why\n")
    assert confined("import os; os.abort()").kind == "SIGABRT"
    assert confined("while True: pass", seconds=0.5).kind == "timeout"
    assert confined("import time; time.sleep(60)", seconds=0.2).kind == "timeout"
    # Waiting for the processor costs nothing.
    assert confined("import time; time.sleep(1.5)", seconds=1).kind == "ok"
    assert confined("bytes(1 << 31)", mebibytes=1024).kind == "error"


def test_how_cases_end() -> None:
    """One takes no other along, and none sees what another did to what the setup made."""
    ended = confined_cases(
        "import os, signal, time\nseen = []",
        {
            "right": "seen.append(1)\nassert seen == [1]\nprint('word')",
            "apart": "seen.append(2)\nassert seen == [2]",
            "wrong": "raise ValueError('why')",
            "leaves": "raise SystemExit(0)",
            "crashes": "print('before', flush=True)\nos.kill(os.getpid(), signal.SIGSEGV)",
            "spins": "while True: pass",
            "waits": "time.sleep(1.2)",
            "hangs": "print('before', flush=True)\ntime.sleep(60)",
            "hangs with a closed output": "os.close(1)\nos.close(2)\ntime.sleep(60)",
            "says much": "print('x' * 10**6)",
            "eats": "bytes(1 << 31)",
        },
        seconds=0.5,
        mebibytes=1024,
    )
    kinds = {name: e.kind for name, e in ended.items()}
    assert kinds == {
        "right": "ok",
        "apart": "ok",
        "wrong": "error",
        "leaves": "error",
        "crashes": "SIGSEGV",
        "spins": "timeout",
        "waits": "ok",
        "hangs": "timeout",
        "hangs with a closed output": "timeout",
        "says much": "ok",
        "eats": "error",
    }
    assert ended["right"].out == "word\n" and ended["crashes"].out == "before\n"
    assert ended["wrong"].out.endswith("ValueError: why\n") and ended["hangs"].out == "before\n"
    assert len(ended["says much"].out) < 10**5
    assert 4 <= ended["hangs"].seconds < 60  # eight times as long
