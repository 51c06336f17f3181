"""What the environment would have `accelerate` do behind the options of a run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mllama.wording import listed

_PREFIX = "ACCELERATE_"


@contextmanager
def without_accelerate_variables(is_told: bool) -> Iterator[None]:
    """The environment without them while this lasts: a run does what its own options say.

    They choose precision, accumulation, sharding, compilation and devices, and `accelerate` reads them
    whenever something is made or prepared.

    Args:
        is_told: print which were there.
    """
    found = {name: value for name, value in os.environ.items() if name.startswith(_PREFIX)}
    if found and is_told:
        print(f"warning: not used: {listed(sorted(found))} of the environment", file=sys.stderr)
    for name in found:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(found)
