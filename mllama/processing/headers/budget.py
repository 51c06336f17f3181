"""What one image may still take of its limits, while the walk over its file adds up."""

from __future__ import annotations

from mllama.limits import Limits
from mllama.processing.sources import ImageOpenError

_MORE_THAN = {
    "max_segments": "consists of more than {} segments, chunks and other pieces",
    "max_scans": "has more than {} scans or frames",
    "max_scanned_samples": "has scans or frames over more than {} samples",
    "max_metadata": "takes more than {} bytes for what it says about itself",
    "max_slow_values": "has more than {} pixels or bytes of text, of run lengths or with a maximum of "
    "its own, which are decoded one by one: save it as PNG",
}


class Budget:
    """Adds up what the pieces of an image's file ask for.

    Every method raises ImageOpenError that names the image and the limit, as soon as it is exceeded.
    """

    def __init__(self, name: str, limits: Limits) -> None:
        self.name, self.limits = name, limits
        self._spent = dict.fromkeys(_MORE_THAN, 0)

    def spend(self, limit: str, amount: int) -> None:
        """Take `amount` of what `limit` allows."""
        most = getattr(self.limits, limit)
        self._spent[limit] += amount
        if self._spent[limit] > most:
            raise ImageOpenError(f"{self.name} {_MORE_THAN[limit].format(most)} ({limit})")

    def segments(self, count: int = 1) -> None:
        self.spend("max_segments", count)

    def metadata(self, count: int) -> None:
        self.spend("max_metadata", count)

    def size(self, width: int, height: int) -> None:
        """Check the sides and the area of an image, or of a piece of it that is decoded whole."""
        limits = self.limits
        if width < 1 or height < 1:
            raise ImageOpenError(f"{self.name} is {width} x {height} pixels; it needs at least one")
        if width * height > limits.max_pixels:
            raise ImageOpenError(
                f"{self.name} is {width} x {height} = {width * height} pixels; at most "
                f"{limits.max_pixels} are decoded (max_pixels)"
            )
        if max(width, height) > limits.max_side:
            raise ImageOpenError(
                f"{self.name} is {width} x {height} pixels; its sides may have {limits.max_side} (max_side)"
            )

    def decoded(self, count: int) -> None:
        """Check the memory that decoding takes at its peak, in bytes."""
        if count > self.limits.max_decoded_bytes:
            raise ImageOpenError(
                f"{self.name} takes {count} bytes to decode; at most {self.limits.max_decoded_bytes} are "
                "spent (max_decoded_bytes)"
            )

    def damaged(self, why: str) -> ImageOpenError:
        """The error for a structure that cannot be followed."""
        return ImageOpenError(f"{self.name} has a damaged header: {why}")
