"""Who holds which page of keys and values and which tile slot of a picture: numbers and counts, no tensors.

A page holds the keys and values of ``PAGE_SIZE`` tokens in every self-attention layer, a slot those of
one image tile in every cross-attention layer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

PAGE_SIZE = 64
# The page that unused rows of a captured step write to; nobody reads it and nobody is given it.
SCRATCH_PAGE = 0


class PagePool:
    """The pages of a process, each with the number of its holders.

    Args:
        num_pages: of the pool, the scratch page included.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 2:
            raise ValueError(
                f"a page pool needs the scratch page and one more, got num_pages={num_pages}"
            )
        self._counts = [0] * num_pages
        # The page given back last is the next one taken: it may still be in the processor's cache.
        self._free = [page for page in reversed(range(num_pages)) if page != SCRATCH_PAGE]

    @property
    def num_pages(self) -> int:
        """Pages that can be taken: all but the scratch page."""
        return len(self._counts) - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    def holders(self, page: int) -> int:
        """How many hold a page; 0 for one that is free."""
        return self._counts[page]

    def take(self) -> int:
        """A free page, held once.

        Raises: ValueError where there is none.
        """
        if not self._free:
            raise ValueError(f"all {self.num_pages} pages are held")
        page = self._free.pop()
        self._counts[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more holder of a page that is held."""
        self._require_held(page)
        self._counts[page] += 1

    def release(self, page: int) -> int:
        """One holder less; the page is free after the last. Returns how many are left."""
        self._require_held(page)
        self._counts[page] -= 1
        if not self._counts[page]:
            self._free.append(page)
        return self._counts[page]

    def _require_held(self, page: int) -> None:
        if not 0 <= page < len(self._counts) or not self._counts[page]:
            raise ValueError(f"page {page} is held by nobody")


@dataclass(eq=False)
class StoredPicture:
    """The slots of a picture's tiles, one for each.

    Attributes:
        key: the identity of the picture.
        slots: in the order of the tiles.
        holders: sequences that use it.
        is_encoded: whether its keys and values are there, or will be before the text of this step is read.
    """

    key: bytes
    slots: tuple[int, ...]
    holders: int = 0
    is_encoded: bool = False


class TilePool:
    """The tile slots of a process. A picture is stored once, whoever shows it.

    A picture that nobody uses stays, for the next request that shows it, until its slots are needed or the
    unused ones take more than ``cache_bytes``; the one whose last use is longest ago goes first.

    Args:
        num_slots: of the pool.
        slot_bytes: keys and values of one tile in all layers.
        cache_bytes: what unused pictures may take; None: whatever is free.
    """

    def __init__(self, num_slots: int, slot_bytes: int = 1, cache_bytes: int | None = None) -> None:
        self.num_slots = num_slots
        self._free = list(reversed(range(num_slots)))
        self._pictures: dict[bytes, StoredPicture] = {}
        self._unused: OrderedDict[bytes, StoredPicture] = OrderedDict()  # least recently used first
        self._num_unused_slots = 0
        self._most_unused = num_slots if cache_bytes is None else cache_bytes // slot_bytes

    @property
    def num_free(self) -> int:
        """Slots that hold nothing."""
        return len(self._free)

    @property
    def num_unused(self) -> int:
        """Slots of pictures that are kept, but used by nobody."""
        return self._num_unused_slots

    def hold(self, wanted: Sequence[tuple[bytes, int]]) -> list[StoredPicture] | None:
        """Use pictures, all of them or none.

        Args:
            wanted: key and number of tiles of each. One that occurs twice is stored once and held twice.
        Returns: one for each of ``wanted``; None where the slots do not suffice, and nothing has changed.
        """
        new = {key: tiles for key, tiles in wanted if key not in self._pictures}
        unused = {key: self._unused[key] for key, _ in wanted if key in self._unused}
        kept = sum(len(picture.slots) for picture in unused.values())
        if sum(new.values()) > len(self._free) + self._num_unused_slots - kept:
            return None
        for key in unused:
            self._use(key)
        for key, tiles in new.items():
            while len(self._free) < tiles:
                self._evict()
            slots = tuple(self._free.pop() for _ in range(tiles))
            self._pictures[key] = StoredPicture(key, slots)
        held = [self._pictures[key] for key, _ in wanted]
        for picture in held:
            picture.holders += 1
        return held

    def release(self, picture: StoredPicture) -> None:
        """One holder less. What is unused then is kept, if it is encoded and within ``cache_bytes``."""
        if not picture.holders:
            raise ValueError(f"picture {picture.key.hex()[:16]} is held by nobody")
        picture.holders -= 1
        if picture.holders:
            return
        if self._pictures.get(picture.key) is not picture:  # forgotten while it was in use
            self._free.extend(picture.slots)
        elif not picture.is_encoded:
            del self._pictures[picture.key]
            self._free.extend(picture.slots)
        else:
            self._unused[picture.key] = picture
            self._num_unused_slots += len(picture.slots)
            while self._num_unused_slots > self._most_unused:
                self._evict()

    def forget(self, picture: StoredPicture) -> None:
        """Give the picture to nobody any more; its slots are free after its last holder."""
        if self._pictures.get(picture.key) is picture:
            if picture.key in self._unused:
                self._use(picture.key)
                self._free.extend(picture.slots)
            del self._pictures[picture.key]

    def clear(self) -> None:
        """Forget all pictures."""
        for picture in list(self._pictures.values()):
            self.forget(picture)

    def _use(self, key: bytes) -> None:
        self._num_unused_slots -= len(self._unused.pop(key).slots)

    def _evict(self) -> None:
        self.forget(next(iter(self._unused.values())))
