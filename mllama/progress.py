"""Progress bars."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def bar(label: str, total: int | None, unit: str, **options: Any) -> tqdm:
    """A bar on stderr that counts to `total`; silent where that is no terminal, or is closed.

    Args:
        label, total, unit: of what is counted; None where nobody knows how many there are.
        options: of tqdm, besides.
    """
    silent = True if sys.stderr is None else None  # None: tqdm asks stderr whether it is a terminal
    return tqdm(desc=label, total=total, unit=unit, disable=silent, **options)
