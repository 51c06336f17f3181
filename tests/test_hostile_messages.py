"""Messages and options of others, in children with limits: no file touched, no memory eaten, errors short."""

from pathlib import Path

import pytest
from confinement import confined

SCRIPTS = Path(__file__).parent / "hostile"
LIMITS = {  # seconds, MiB
    "files": (120, 4096),
    "folders": (120, 4096),
    "sizes": (240, 4096),
    "counts": (240, 6144),
    "options": (240, 6144),
    "odd": (120, 4096),
    "calls": (240, 6144),
}


@pytest.mark.parametrize("name", LIMITS)
def test_hostile(name, tmp_path):
    seconds, mebibytes = LIMITS[name]
    code = f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import {name}"
    ended = confined(code, tmp_path, seconds=seconds, mebibytes=mebibytes)
    print(f"{ended.seconds:.1f} s, {ended.peak} MiB")
    assert ended.kind == "ok", ended.err[-1500:]
