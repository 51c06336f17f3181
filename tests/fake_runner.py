"""A runner without a model: keys and values are hashes of all that they would depend on.

What it answers goes through page rows, tile rows and sights, and is compared with `answer_alone`, which
knows no page: a page that is shared, overwritten or read too early changes every token after it.
"""

from __future__ import annotations

import pickle
from collections import Counter, deque

from mllama.engine.pages import SCRATCH_PAGE, PagePool, TilePool
from mllama.engine.plan import PENDING, Limits, Plan
from mllama.engine.prefix import Scope
from mllama.engine.scheduler import Event, Scheduler
from mllama.engine.sequence import Picture, Request, Sequence, State
from mllama.processing.image_spans import image_spans
from mllama.semantics import PRESETS, Semantics

IMAGE = 99
VOCABULARY = 8
PAGE = 4


def prompt(text: str, *names: str, tiles: int = 2, **options) -> Request:
    """A request of one token per character; `#` is an image token, its picture the next of ``names``."""
    tokens = [IMAGE if c == "#" else ord(c) % VOCABULARY for c in text]
    return request_of(tokens, list(names), tiles=tiles, **options)


def request_of(tokens: list[int], names: list[str], tiles: int = 2, **options) -> Request:
    places = [i for i, token in enumerate(tokens) if token == IMAGE]
    pictures = tuple(Picture(n.encode(), p, tiles) for n, p in zip(names, places, strict=True))
    return Request(tuple(tokens), pictures=pictures, **{"max_new_tokens": 8, **options})


def _content(key: bytes, tile: int) -> int:
    return hash((int.from_bytes(key, "big"), tile))


def _state(past: list[int], token: int, seen: list[int]) -> int:
    """The keys and values of a token in all layers."""
    return hash((tuple(past), token, tuple(seen)))


def _sampled(state: int, seed: int, step: int) -> int:
    return hash((state, seed, step)) % VOCABULARY


def answer_alone(request: Request, seed: int, semantics: Semantics) -> list[int]:
    """The answer by the rules of `mllama.semantics` alone."""
    spans = image_spans(request.tokens, IMAGE)
    is_blind = semantics.decode_rows == "prompt_only" and len(spans) > 1
    text, past, answer = list(request.tokens), [], []
    while True:
        for position in range(len(past), len(text)):
            seen = [j for j, (begin, end) in enumerate(spans) if begin <= position < end]
            if position >= len(request.tokens):
                last = len(request.tokens) - 1
                seen = [j for j, (begin, end) in enumerate(spans) if begin <= last < end]
                seen = [] if is_blind else seen
            if not seen and semantics.imageless_rows == "leak":
                seen = list(range(len(spans)))
            shown = [request.pictures[j] for j in seen]
            tiles = [_content(p.key, i) for p in shown for i in range(p.num_tiles)]
            past.append(_state(past, text[position], tiles))
        answer.append(_sampled(past[-1], seed, len(answer)))
        text.append(answer[-1])
        if answer[-1] in request.stop_token_ids or len(answer) == request.max_new_tokens:
            return answer


class FakeRunner:
    """Runs plans.

    Attributes:
        seeds: of each sequence.
        broken: sequences whose logits are not finite.
        encoded: the keys of all pictures that went through the tower.
    """

    def __init__(self, semantics: Semantics, page_size: int) -> None:
        self._semantics, self._page_size = semantics, page_size
        self._pages: dict[tuple[int, int], int] = {}
        self._slots: dict[int, int] = {}
        self._latest: dict[int, int] = {}
        self.seeds: dict[int, int] = {}
        self.broken: set[int] = set()
        self.encoded: list[bytes] = []

    def run(self, plan: Plan) -> dict[int, int | None]:
        for encode in plan.encodes:
            self.encoded.append(encode.key)
            for tile, slot in enumerate(encode.slots):
                self._slots[slot] = _content(encode.key, tile)
        written: dict[tuple[int, int], int] = {}  # no row reads what another writes in this step
        sampled: dict[int, int | None] = {}
        for row in plan.rows:
            at = [(page, offset) for page in row.pages for offset in range(self._page_size)]
            past = [self._pages[place] for place in at[: row.start]]
            seen = [(begin, end) for count, begin, end in row.sights for _ in range(count)]
            assert len(seen) == len(row.tokens)
            for token, (begin, end) in zip(row.tokens, seen):
                slots = row.tiles[begin:end]
                if not slots and self._semantics.imageless_rows == "leak":
                    slots = row.tiles
                token = self._latest[row.sequence] if token == PENDING else token
                state = _state(past, token, [self._slots[slot] for slot in slots])
                written[at[len(past)]] = state
                past.append(state)
            if row.sample_step is not None:
                token = _sampled(past[-1], self.seeds[row.sequence], row.sample_step)
                self._latest[row.sequence] = token
                sampled[row.sequence] = None if row.sequence in self.broken else token
        self._pages.update(written)
        return sampled


class FakeEngine:
    """A scheduler and a fake runner, step by step, with every rule held after each.

    Args:
        pages, slots: of the pools, without the scratch page.
        is_ahead: plan a step before the results of the one before are there.
    """

    def __init__(
        self,
        semantics: str | Semantics = "meta",
        *,
        pages: int = 64,
        slots: int = 16,
        cache_slots: int | None = None,
        is_ahead: bool = False,
        prefix_reuse: bool = True,
        **limits: int,
    ) -> None:
        self.semantics = PRESETS[semantics] if isinstance(semantics, str) else semantics
        self.limits = Limits(
            **{
                "max_batch_tokens": 16,
                "max_batch_size": 8,
                "max_prefills": 4,
                "max_new_pictures": 1,
                "max_length": 4 * pages,
                **limits,
            }
        )
        self.pages, self.tiles = PagePool(pages + 1), TilePool(slots, 10, 10 * (cache_slots or 0))
        if cache_slots is None:
            self.tiles = TilePool(slots)
        self._cache_slots = slots if cache_slots is None else cache_slots
        self.scheduler = Scheduler(
            self.limits,
            self.pages,
            self.tiles,
            Scope("float32", semantics=self.semantics),
            prefix_reuse=prefix_reuse,
            page_size=PAGE,
        )
        self.runner = FakeRunner(self.semantics, PAGE)
        self.is_ahead = is_ahead
        self._running: deque[tuple[Plan, dict[int, int | None]]] = deque()
        self.plans: list[Plan] = []
        self.sequences: dict[int, Sequence] = {}
        self.answers: dict[int, list[int]] = {}
        self.reasons: dict[int, str] = {}

    def add(self, request: Request, seed: int = 0) -> list[Sequence]:
        added = self.scheduler.add(request)
        for copy, sequence in enumerate(added):
            self.sequences[sequence.id], self.answers[sequence.id] = sequence, []
            self.runner.seeds[sequence.id] = seed + copy
        return added

    def step(self) -> Plan:
        oldest = next(iter(self.scheduler.sequences()), None)
        was_admitted = oldest is not None and oldest.state is not State.WAITING
        plan = pickle.loads(pickle.dumps(self.scheduler.plan()))
        self.check(plan)
        if oldest is not None:
            assert not was_admitted or oldest.state is not State.WAITING, "the oldest was preempted"
            in_work = {work.sequence for work in (*plan.rows, *plan.encodes)}
            assert oldest.id in in_work or self._running, "the oldest does not get on"
        if not plan.is_empty:
            self.plans.append(plan)
            self._running.append((plan, self.runner.run(plan)))
        if self._running and (plan.is_empty or not self.is_ahead or len(self._running) > 1):
            self.take(self.scheduler.accept(*self._running.popleft()))
        return plan

    def take(self, events: list[Event]) -> None:
        for event in events:
            if event.token is not None:
                self.answers[event.sequence].append(event.token)
            if event.finish_reason is not None:
                self.reasons[event.sequence] = event.finish_reason

    def finish(self, most_steps: int = 5000) -> None:
        """Run until everything is answered, and hold that everything is given back."""
        for _ in range(most_steps):
            if not self.scheduler.has_work and not self._running:
                break
            self.step()
        assert not self.scheduler.has_work, "not finished"
        self.check_given_back()

    def fail_running(self) -> None:
        """The oldest step whose results are missing fails, while the next is planned."""
        if self._running:
            self.check(self.scheduler.plan())
            self.take(self.scheduler.fail(self._running[0][0]))
            self._running.clear()

    def check_given_back(self) -> None:
        assert self.pages.num_free + len(self.scheduler.prefix) == self.pages.num_pages
        assert self.tiles.num_free + self.tiles.num_unused == self.tiles.num_slots

    def check_answers(self) -> None:
        """Finished answers are those of each request alone; others the beginning of it."""
        for sequence in self.sequences.values():
            alone = answer_alone(sequence.request, self.runner.seeds[sequence.id], self.semantics)
            given = self.answers[sequence.id]
            if self.reasons.get(sequence.id) in ("stop", "length"):
                assert given == alone, sequence.id
            assert given == alone[: len(given)], sequence.id

    def check(self, plan: Plan) -> None:
        limits, sequences = self.limits, self.scheduler.sequences()
        decoding, chunks = plan.rows[: plan.num_decoding], plan.rows[plan.num_decoding :]
        assert plan.num_tokens <= limits.max_batch_tokens
        assert len(plan.rows) <= limits.max_batch_size and len(chunks) <= limits.max_prefills
        assert len(plan.encodes) <= limits.max_new_pictures
        assert all(len(row.tokens) == 1 and row.sample_step is not None for row in decoding)
        admitted = [s for s in sequences if s.state is not State.WAITING]
        assert (
            sequences[: len(admitted)] == admitted and len(admitted) == self.scheduler.num_admitted
        )
        # Pages: every holder is known, and what a row writes nobody else holds.
        held = Counter(page for s in sequences for page in s.pages)
        assert SCRATCH_PAGE not in held
        indexed = Counter(self.scheduler.prefix.pages)
        for page in range(1, self.pages.num_pages + 1):
            assert self.pages.holders(page) == held[page] + indexed[page], page
        for row in plan.rows:
            for page in row.pages[row.start // PAGE :]:
                assert held[page] == 1 and not indexed[page], page
            assert len(row.pages) == -(-(row.start + len(row.tokens)) // PAGE)
        # Slots: each belongs to one picture, is unused or free.
        pictures = {id(picture): picture for s in sequences for picture in s.held}
        slots = [slot for picture in pictures.values() for slot in picture.slots]
        assert len(slots) == len(set(slots))
        assert len(slots) + self.tiles.num_unused + self.tiles.num_free == self.tiles.num_slots
        assert self.tiles.num_unused <= self._cache_slots
        users = Counter(id(picture) for s in sequences for picture in s.held)
        assert all(picture.holders == users[key] for key, picture in pictures.items())
