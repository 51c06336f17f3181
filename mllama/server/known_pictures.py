"""Pictures by the bytes of their files: one that was seen before is neither decoded nor resized again."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable

from mllama.engine.prompts import PreparedPicture


class KnownPictures:
    """What the vision tower reads, by the SHA-256 of a file; the least recently asked for goes first.

    The pixels are kept with a picture's identity, which alone would have to be believed: its keys and values
    may have left the pool before the request has its turn. They take a small part of what those take.
    Threads may ask at the same time.

    Args:
        max_bytes: of the pixels together.

    Attributes:
        num_asked, num_known: pictures that were asked for, and those of them that were there.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._kept: OrderedDict[bytes, PreparedPicture] = OrderedDict()
        self._lock = threading.Lock()
        self.num_asked = self.num_known = 0

    def get(self, data: bytes, prepare: Callable[[bytes], PreparedPicture]) -> PreparedPicture:
        """The picture of a file, prepared if it is not known. Raises: as `prepare`, and nothing is kept."""
        key = hashlib.sha256(data).digest()
        with self._lock:
            self.num_asked += 1
            if (found := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                self.num_known += 1
                return found
        made = prepare(data)
        with self._lock:
            if key not in self._kept:  # another thread may have been at the same file
                self._kept[key] = made
                self._num_bytes += made.pixels.nbytes
            while self._num_bytes > self._max_bytes:
                _, gone = self._kept.popitem(last=False)
                self._num_bytes -= gone.pixels.nbytes
        return made
