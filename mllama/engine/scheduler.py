"""Which tokens of which sequences the next step computes, and where their keys and values go.

Every step first decodes one token of each running sequence; what is left of its tokens goes to chunks of
prompts, first come first served. A sequence is admitted when there are pages for all of its text and slots
for all of its pictures, strictly in the order of arrival, so that those that run are always older than
those that wait. Where a running one needs a page and there is none, the youngest gives up its pages and
waits again; its text stays. The oldest is never preempted: a request that could not run alone is refused.

Answers to one prompt (``copies``) are sequences of their own. All but the first wait until its prompt is
computed, find that in the prefix index, and compute what is behind its last full page themselves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mllama.engine.pages import PAGE_SIZE, PagePool, TilePool
from mllama.engine.plan import PENDING, Encode, Limits, Plan, Row
from mllama.engine.prefix import PrefixIndex, Scope
from mllama.engine.sequence import FinishReason, Request, Sequence, State

# The step that runs, and the one that is planned meanwhile.
_MOST_IN_FLIGHT = 2


@dataclass(frozen=True)
class Event:
    """What a step did for a sequence.

    Attributes:
        sequence: its id.
        token: the next of its answer; None where there is none.
        finish_reason: None while it goes on.
    """

    sequence: int
    token: int | None
    finish_reason: FinishReason | None


class Scheduler:
    """The sequences of an engine, from arrival to end. Of one thread.

    Args:
        limits: of steps and sequences.
        pages, tiles: the pools, used by nobody else.
        scope: what the keys and values of every text depend on.
        prefix_reuse: whether prompts begin with pages that others have computed.
        page_size: tokens of a page.

    Attributes:
        prefix: the prefix index.
        num_preemptions: so far.
        num_prefix_hits: pages, of what was admitted so far, that others had computed.
        num_picture_hits: pictures of it that others had brought.
    """

    def __init__(
        self,
        limits: Limits,
        pages: PagePool,
        tiles: TilePool,
        scope: Scope,
        *,
        prefix_reuse: bool = True,
        page_size: int = PAGE_SIZE,
    ) -> None:
        self.limits, self._pages, self._tiles, self._scope = limits, pages, tiles, scope
        self._page_size = page_size
        self.prefix = PrefixIndex(pages, prefix_reuse)
        self.num_preemptions = self.num_prefix_hits = self.num_picture_hits = 0
        self._num_arrived = self._num_planned = 0
        self._sequences: dict[int, Sequence] = {}
        # Both in the order of arrival, and all of the first before all of the second.
        self._admitted: list[Sequence] = []
        self._waiting: deque[Sequence] = deque()
        self._in_flight: deque[Plan] = deque()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_admitted(self) -> int:
        """Sequences that are prefilling or running."""
        return len(self._admitted)

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    def sequences(self) -> list[Sequence]:
        """Those that are not finished, the oldest first."""
        return list(self._sequences.values())

    def check(self, request: Request) -> None:
        """Any thread may ask.

        Raises: ValueError with the numbers if a request could never run, even alone.
        """
        given = f"the prompt has {len(request.tokens)} tokens and max_new_tokens is {request.max_new_tokens}"
        total = len(request.tokens) + request.max_new_tokens
        if total > self.limits.max_length:
            raise ValueError(f"{given}; a sequence may have {self.limits.max_length}")
        pages = self._num_pages(total - 1)  # the last token is never read
        if pages > self._pages.num_pages:
            raise ValueError(
                f"{given}: {pages} pages of {self._page_size} tokens, the pool has {self._pages.num_pages}"
            )
        slots = sum({picture.key: picture.num_tiles for picture in request.pictures}.values())
        if slots > self._tiles.num_slots:
            raise ValueError(
                f"the pictures of the prompt have {slots} tiles, the pool has {self._tiles.num_slots}"
            )

    def add(self, request: Request) -> list[Sequence]:
        """Let the sequences of a request wait for their turn. Raises: as check()."""
        self.check(request)
        group = self._num_arrived
        added = [
            Sequence(request, group + copy, group, self._scope) for copy in range(request.copies)
        ]
        self._num_arrived += request.copies
        self._sequences.update((sequence.id, sequence) for sequence in added)
        self._waiting.extend(added)
        return added

    def plan(self) -> Plan:
        """The next step. It may be made while the one before is running, whose tokens are PENDING then.

        An empty one is not run and has no results. Every other is, also where a sequence has ended since.

        Raises: RuntimeError if the results of two steps are missing.
        """
        if len(self._in_flight) >= _MOST_IN_FLIGHT:
            raise RuntimeError(f"{_MOST_IN_FLIGHT} steps are planned whose results are not here")
        decoding = self._choose_decoding()
        budget = self.limits.max_batch_tokens - len(decoding)
        encodes: list[Encode] = []
        chunks: list[tuple[Sequence, int]] = []
        prefilling = [s for s in self._admitted if s.state is State.PREFILLING]
        for index in range(self.limits.max_prefills):
            if index == len(prefilling):
                admitted = self._admit() if budget else None
                if admitted is None:
                    break
                prefilling.append(admitted)
            count = self._choose_chunk(prefilling[index], budget, encodes)
            if count:
                chunks.append((prefilling[index], count))
                budget -= count
        rows = [self._row(s, 1) for s in decoding] + [self._row(s, count) for s, count in chunks]
        plan = Plan(self._num_planned, tuple(encodes), tuple(rows), len(decoding))
        self._num_planned += 1
        if not plan.is_empty:
            self._in_flight.append(plan)
        return plan

    def accept(self, plan: Plan, tokens: Mapping[int, int | None]) -> list[Event]:
        """Take over the results of the oldest step whose results are missing.

        Args:
            tokens: for each row that samples, by the id of its sequence, the token; None where the logits are
                not finite: that sequence ends, and nobody is given what it has computed.
        Returns: what is new, of sequences that are not finished or cancelled.
        """
        self._take_off(plan)
        events = []
        for row in plan.rows:
            sequence = self._sequences.get(row.sequence)
            if sequence is None:
                continue
            token = tokens[row.sequence] if row.sample_step is not None else None
            if row.sample_step is not None and token is None:
                for page in sequence.pages:
                    self.prefix.forget(page)
                for picture in sequence.held:
                    self._tiles.forget(picture)
                events.append(self._end(sequence, None, "error"))
                continue
            self._offer(sequence)
            if token is not None:
                events.append(self._append(sequence, token))
        return events

    def finish(self, sequence_id: int, reason: FinishReason) -> None:
        """End a sequence before the next step, for a reason of the caller's, unless it has ended."""
        if (sequence := self._sequences.get(sequence_id)) is not None:
            self._end(sequence, None, reason)

    def cancel(self, sequence_ids: Iterable[int]) -> None:
        """End sequences before the next step: all that they hold is given back."""
        for sequence_id in sequence_ids:
            self.finish(sequence_id, "cancelled")

    def fail(self, plan: Plan) -> list[Event]:
        """A step has failed: its sequences end, all others are computed anew, and nothing stored is trusted.

        A step that is planned after it is void, too.
        """
        self._take_off(plan)
        self._in_flight.clear()
        ids = dict.fromkeys(work.sequence for work in (*plan.encodes, *plan.rows))
        failed = [self._sequences[i] for i in ids if i in self._sequences]
        events = [self._end(sequence, None, "error") for sequence in failed]
        while self._admitted:
            self._preempt()
        for sequence in self._sequences.values():
            sequence.pending = 0  # sampled again: a function of the same logits, seed and step
        self.prefix.clear()
        self._tiles.clear()
        return events

    def _num_pages(self, tokens: int) -> int:
        return -(-tokens // self._page_size)

    def _choose_decoding(self) -> list[Sequence]:
        """The running sequences that decode, each with a page for its token; the youngest make room."""
        decoding = []
        for sequence in list(self._admitted):
            if sequence.state is not State.RUNNING:  # or preempted by an older one just now
                continue
            if sequence.num_new < sequence.request.max_new_tokens and self._has_room(sequence):
                decoding.append(sequence)
        return decoding

    def _has_room(self, sequence: Sequence) -> bool:
        """Give a sequence a page for its next token, unless it is preempted itself."""
        while self._num_pages(sequence.stored + 1) > len(sequence.pages):
            if self.prefix.num_available:
                sequence.pages += self.prefix.take(1)
            else:
                self.num_preemptions += 1
                if self._preempt() is sequence:
                    return False
        return True

    def _admit(self) -> Sequence | None:
        """The sequence that has waited longest, if there is room for it."""
        if not self._waiting or len(self._admitted) >= self.limits.max_batch_size:
            return None
        sequence = self._waiting[0]
        # Preempted just now, its latest token may not be known yet.
        if sequence.pending or self._shares_with_prefilling(sequence):
            return None
        # At least one token is computed, whose logits give the next.
        known = min(len(sequence.text) - 1, sequence.num_shareable) // self._page_size
        found = self.prefix.find(sequence.page_keys(known, self._page_size))
        missing = self._num_pages(len(sequence.text)) - len(found)
        start = len(found) * self._page_size
        first = sequence.first_seen(start)
        wanted = [(picture.key, picture.num_tiles) for picture in sequence.request.pictures[first:]]
        # Those that run will need pages soon, and would take them from the one admitted last.
        has_pages = missing + len(self._admitted) <= self.prefix.num_available
        held = self._tiles.hold(wanted) if has_pages else None
        if held is None:
            self.prefix.release(found)
            return None
        sequence.first_picture, sequence.held = first, held
        sequence.pages = found + self.prefix.take(missing)
        sequence.num_offered = len(found)
        sequence.stored = start
        if sequence.cached_tokens is None:
            sequence.cached_tokens = start
        self.num_prefix_hits += len(found)
        self.num_picture_hits += len({picture.key for picture in held if picture.is_encoded})
        sequence.state = State.PREFILLING
        self._admitted.append(self._waiting.popleft())
        return sequence

    def _shares_with_prefilling(self, sequence: Sequence) -> bool:
        """Whether another answer to the same prompt is computing pages that this one will find."""
        pages = (sequence.prompt_length - 1) // self._page_size
        return self.prefix.is_on and any(
            other.group == sequence.group and other.num_offered < pages for other in self._admitted
        )

    def _choose_chunk(self, sequence: Sequence, budget: int, encodes: list[Encode]) -> int:
        """How many tokens of a prompt are read; the new pictures that they see are appended."""
        end = min(sequence.stored + budget, len(sequence.text))
        for offset, picture in enumerate(sequence.held):
            index = sequence.first_picture + offset
            needed = sequence.needed_from(index)
            if needed >= end:
                break
            if picture.is_encoded:
                continue
            if len(encodes) == self.limits.max_new_pictures:
                end = max(needed, sequence.stored)
                break
            encodes.append(Encode(picture.key, picture.slots, sequence.id, index))
            picture.is_encoded = True
        return end - sequence.stored

    def _row(self, sequence: Sequence, count: int) -> Row:
        """The next ``count`` tokens of a sequence, which are computed from here on."""
        start, end = sequence.stored, sequence.stored + count
        tokens = tuple(sequence.text[start:end]) or (PENDING,)
        samples = end == len(sequence.text) + sequence.pending
        row = Row(
            sequence=sequence.id,
            tokens=tokens,
            start=start,
            pages=tuple(sequence.pages[: self._num_pages(end)]),
            tiles=tuple(slot for picture in sequence.held for slot in picture.slots),
            sights=sequence.sights(start, count),
            sample_step=sequence.num_new if samples else None,
        )
        sequence.stored = end
        if samples:
            sequence.pending += 1
            sequence.state = State.RUNNING
        return row

    def _offer(self, sequence: Sequence) -> None:
        """Let others find the pages that are full, if only after the step that is planned already; of a
        sequence that was preempted since, none."""
        full = min(sequence.stored, sequence.num_shareable) // self._page_size
        if full > sequence.num_offered:
            keys = sequence.page_keys(full, self._page_size)
            for index in range(sequence.num_offered, full):
                self.prefix.offer(keys[index], sequence.pages[index])
            sequence.num_offered = full

    def _append(self, sequence: Sequence, token: int) -> Event:
        sequence.pending -= 1
        sequence.text.append(token)
        if token in sequence.request.stop_token_ids:
            return self._end(sequence, token, "stop")
        if len(sequence.text) - sequence.prompt_length == sequence.request.max_new_tokens:
            return self._end(sequence, token, "length")
        return Event(sequence.id, token, None)

    def _end(self, sequence: Sequence, token: int | None, reason: FinishReason) -> Event:
        del self._sequences[sequence.id]
        (self._waiting if sequence.state is State.WAITING else self._admitted).remove(sequence)
        self._give_back(sequence)
        sequence.state, sequence.finish_reason = State.FINISHED, reason
        return Event(sequence.id, token, reason)

    def _preempt(self) -> Sequence:
        """The youngest gives up what it holds, and waits before all that wait."""
        sequence = self._admitted.pop()
        self._give_back(sequence)
        sequence.state = State.WAITING
        self._waiting.appendleft(sequence)
        return sequence

    def _give_back(self, sequence: Sequence) -> None:
        self.prefix.release(sequence.pages)
        for picture in sequence.held:
            self._tiles.release(picture)
        sequence.forget_stored()

    def _take_off(self, plan: Plan) -> None:
        if not self._in_flight or self._in_flight[0].number != plan.number:
            missing = [other.number for other in self._in_flight]
            raise ValueError(
                f"the results of steps {missing} are missing, in this order, got {plan.number}"
            )
        self._in_flight.popleft()
