"""The prefix index: which page already holds the keys and values of the text that a prompt begins with.

A page is known by a key, chained from page to page, that holds everything its keys and values depend on:
the model's `Scope` in the root, and in each link the position, the tokens and the pictures whose tokens
they are. What a prompt token sees follows from the text before it, so that under the semantics of Meta
nothing more is needed, and what comes before a picture's token is shared between different pictures.

Two things do not follow from the text before a token:

* Where image-less rows leak, the tokens before the first picture attend to all pictures of the prompt,
  also to those after them: all pictures belong to the root.
* Where the mask ends with the prompt and that has two or more pictures, generated tokens see none; read
  again in the next turn's prompt they do. Such tokens are neither offered nor looked up.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from mllama.engine.pages import PagePool
from mllama.semantics import Semantics


@dataclass(frozen=True)
class Scope:
    """What the keys and values of every text depend on.

    Attributes:
        dtype: of the keys and values.
        adapter: the identity of the adapter that computes them, empty for none.
        semantics: of the model.
    """

    dtype: str
    adapter: str = ""
    semantics: Semantics = field(default_factory=Semantics)

    def root(self, pictures: Sequence[bytes]) -> bytes:
        """The key that the first page of a prompt with these pictures continues."""
        leaks = self.semantics.imageless_rows == "leak"
        seen = [picture.hex() for picture in pictures] if leaks else []
        entries = [self.dtype, self.adapter, asdict(self.semantics), seen]
        return hashlib.sha256(json.dumps(entries).encode()).digest()

    def answers_are_blind(self, num_pictures: int) -> bool:
        """Whether generated tokens see no picture, though the last token of the prompt does."""
        return self.semantics.decode_rows == "prompt_only" and num_pictures >= 2


def next_key(
    previous: bytes, position: int, tokens: Sequence[int], pictures: Sequence[tuple[int, bytes]]
) -> bytes:
    """The key of a full page.

    Args:
        previous: the key of the page before, or the root.
        position: of its first token.
        tokens: of the page.
        pictures: position and key of those whose tokens are among them.
    """
    numbers = array("q", [position, len(tokens), *tokens, len(pictures)])
    state = hashlib.sha256(previous + numbers.tobytes())
    for place, key in pictures:
        state.update(array("q", [place, len(key)]).tobytes() + key)
    return state.digest()


class PrefixIndex:
    """The pages that can be found by their key. It holds each once, besides the sequences that do.

    Pages that only the index holds are given up when the pool has no other: the one whose last use is longest
    ago first, and of one text its end before its beginning.

    Args:
        pool: of the pages.
        is_on: False: nothing is offered or found.
    """

    def __init__(self, pool: PagePool, is_on: bool = True) -> None:
        self._pool, self.is_on = pool, is_on
        self._pages: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._pages)

    @property
    def pages(self) -> list[int]:
        """The pages that can be found."""
        return list(self._keys)

    @property
    def num_available(self) -> int:
        """Pages that take() can give: the free ones, and those that only the index holds."""
        return self._pool.num_free + len(self._unused)

    def take(self, count: int) -> list[int]:
        """Pages for new tokens. Raises: ValueError where there are not as many, and none is taken."""
        if count > self.num_available:
            raise ValueError(f"{self.num_available} pages are available, {count} are asked for")
        while self._pool.num_free < count:
            self.forget(next(iter(self._unused)))
        return [self._pool.take() for _ in range(count)]

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The pages of the longest beginning of ``keys`` that is here, each held once more."""
        found = []
        for key in keys:
            if (page := self._pages.get(key)) is None:
                break
            self._pool.share(page)
            self._unused.pop(page, None)
            found.append(page)
        return found

    def offer(self, key: bytes, page: int) -> None:
        """Let others find a full page that its caller holds; of two with one key the first counts."""
        if self.is_on and key not in self._pages:
            self._pool.share(page)
            self._pages[key], self._keys[page] = page, key

    def release(self, pages: Sequence[int]) -> None:
        """Give back the pages of one text, in its order."""
        for page in reversed(pages):
            if self._pool.release(page) == 1 and page in self._keys:
                self._unused[page] = None

    def forget(self, page: int) -> None:
        """Let nobody find a page any more."""
        if (key := self._keys.pop(page, None)) is not None:
            del self._pages[key]
            self._unused.pop(page, None)
            self._pool.release(page)

    def clear(self) -> None:
        """Forget all pages."""
        for page in list(self._keys):
            self.forget(page)
