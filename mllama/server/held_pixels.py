"""A bound on the pixels of all requests together: small files become large pictures, and a long queue of them
would take all of the memory."""

from __future__ import annotations

import threading
from collections import Counter

from mllama.engine.interface import Overloaded
from mllama.engine.prompts import PreparedPicture


class PixelBudget:
    """Bytes of the prepared pictures of requests that have not ended. One that several of them have counts
    once. Threads may ask at the same time.

    Args:
        max_bytes: beyond which no picture is taken beside those of other requests; a request alone is.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._num_holders: Counter[PreparedPicture] = Counter()
        # Reentrant, since the garbage collector may end a request anywhere.
        self._lock = threading.RLock()

    @property
    def num_bytes(self) -> int:
        """That are held."""
        return self._num_bytes

    def require_room(self) -> None:
        """Before the work of preparing a picture. Raises: Overloaded where there is none."""
        if self._num_bytes >= self._max_bytes:
            raise self._full()

    def share(self) -> Share:
        """A request's part."""
        return Share(self)

    def _take(self, picture: PreparedPicture, own: set[PreparedPicture]) -> None:
        is_new = picture not in self._num_holders
        others = self._num_bytes - sum(held.pixels.nbytes for held in own)
        if is_new and others and self._num_bytes + picture.pixels.nbytes > self._max_bytes:
            raise self._full()
        self._num_holders[picture] += 1
        self._num_bytes += picture.pixels.nbytes if is_new else 0

    def _give_back(self, pictures: set[PreparedPicture]) -> None:
        for picture in pictures:
            self._num_holders[picture] -= 1
            if not self._num_holders[picture]:
                del self._num_holders[picture]
                self._num_bytes -= picture.pixels.nbytes

    def _full(self) -> Overloaded:
        return Overloaded(
            f"the pictures of the requests that are being answered take {self._num_bytes} bytes; at most "
            f"{self._max_bytes} are held"
        )


class Share:
    """The pictures of one request, given back by end()."""

    def __init__(self, budget: PixelBudget) -> None:
        self._budget = budget
        self._own: set[PreparedPicture] = set()
        self._has_ended = False

    def take(self, picture: PreparedPicture) -> None:
        """Raises: Overloaded where there is no room for it."""
        with self._budget._lock:
            if not self._has_ended and picture not in self._own:
                self._budget._take(picture, self._own)
                self._own.add(picture)

    def end(self) -> None:
        """The request needs them no longer; what a thread still takes for it is not counted."""
        with self._budget._lock:
            self._has_ended = True
            self._budget._give_back(self._own)
            self._own.clear()
