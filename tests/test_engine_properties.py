"""The scheduler under any order of requests, cancels and faults: what always holds, and what at the end.

After each step `FakeEngine` holds that no page or slot has an owner too many or is written by two, that the
step keeps its budget, that the oldest gets on and is never preempted; at its end that everything is given
back, and that each answer is that of its request alone.
"""

from __future__ import annotations

from fake_runner import IMAGE, PAGE, VOCABULARY, FakeEngine, request_of
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from mllama.engine.sequence import Request, Sequence
from mllama.semantics import PRESETS, Semantics

SEMANTICS = [
    *PRESETS.values(),
    Semantics(imageless_rows="leak"),
    Semantics(decode_rows="repeat_last"),
]
LONGEST = 14 * PAGE
# The openings are few, so that beginnings are shared; `#` is a picture.
TURNS = st.lists(
    st.sampled_from(["#", "##", "0", "00000", "1#", "01234567", "0123456701#"]),
    min_size=1,
    max_size=4,
).map("".join)


@st.composite
def requests(draw: st.DrawFn, before: tuple[int, ...] = (), shown: tuple[str, ...] = ()) -> Request:
    """A new conversation, or the next turn behind the tokens of one that shows some pictures."""
    tokens, names = list(before), list(shown)
    for character in draw(TURNS):
        if character != "#":
            tokens.append(int(character))
        elif len(names) < 3:
            tokens.append(IMAGE)
            names.append(draw(st.sampled_from("abc")))
    tokens = tokens[: LONGEST - 1] or [0]
    return request_of(
        tokens,
        names[: tokens.count(IMAGE)],
        max_new_tokens=draw(st.integers(1, min(30, LONGEST - len(tokens)))),
        stop_token_ids=frozenset(draw(st.sets(st.integers(0, VOCABULARY - 1), max_size=1))),
        copies=draw(st.sampled_from([1, 1, 1, 3])),
    )


class Machine(RuleBasedStateMachine):
    engine: FakeEngine

    @initialize(
        semantics=st.sampled_from(SEMANTICS),
        pages=st.sampled_from([14, 15, 17, 24, 200]),
        slots=st.sampled_from([6, 7, 12]),
        cache_slots=st.sampled_from([None, 0, 3]),
        size=st.sampled_from([1, 3, 5, 8]),
        more_tokens=st.sampled_from([0, 1, 5, 30]),
        max_prefills=st.integers(1, 3),
        max_new_pictures=st.integers(1, 2),
        is_ahead=st.booleans(),
        prefix_reuse=st.sampled_from([True, True, True, False]),
    )
    def begin(self, semantics: Semantics, size: int, more_tokens: int, **options: int) -> None:
        self.engine = FakeEngine(
            semantics,
            max_batch_size=size,
            max_batch_tokens=size + more_tokens,
            max_length=LONGEST,
            **options,
        )

    def alive(self) -> list[Sequence]:
        return self.engine.scheduler.sequences()

    @rule(request=requests(), seed=st.integers(0, 2))
    def add(self, request: Request, seed: int) -> None:
        self.engine.add(request, seed)

    @precondition(lambda self: self.engine.sequences)
    @rule(data=st.data(), seed=st.integers(0, 2))
    def add_next_turn(self, data: st.DataObject, seed: int) -> None:
        earlier = data.draw(st.sampled_from(list(self.engine.sequences.values())))
        tokens = (*earlier.request.tokens, *self.engine.answers[earlier.id])
        shown = tuple(picture.key.decode() for picture in earlier.request.pictures)
        self.engine.add(data.draw(requests(tokens, shown)), seed)

    @rule(count=st.sampled_from([1, 2, 5, 15]))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()

    @precondition(lambda self: self.alive())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sampled_from(self.alive()))
        self.engine.scheduler.cancel([chosen.id])
        assert chosen not in self.alive() and not chosen.pages and not chosen.held

    @precondition(lambda self: self.alive())
    @rule(data=st.data())
    def break_numbers(self, data: st.DataObject) -> None:
        self.engine.runner.broken.add(data.draw(st.sampled_from(self.alive())).id)

    @precondition(lambda self: self.engine.is_ahead)
    @rule()
    def fail_a_step(self) -> None:
        self.engine.fail_running()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.finish()
        self.engine.check_answers()
        assert self.engine.reasons.keys() | self.cancelled() == self.engine.sequences.keys()
        self.engine.scheduler.prefix.clear()
        assert self.engine.pages.num_free == self.engine.pages.num_pages

    def cancelled(self) -> set[int]:
        sequences = self.engine.sequences.values()
        return {sequence.id for sequence in sequences if sequence.finish_reason == "cancelled"}


TestScheduler = Machine.TestCase
TestScheduler.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
