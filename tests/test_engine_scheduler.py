"""The scheduler: whatever the pools, the chunks and the company, each answer is that of its request alone."""

from __future__ import annotations

import random

import pytest
from fake_runner import IMAGE, PAGE, VOCABULARY, FakeEngine, prompt, request_of

from mllama.engine.pages import PagePool, TilePool
from mllama.engine.plan import PENDING, Limits
from mllama.engine.prefix import Scope
from mllama.engine.scheduler import Scheduler
from mllama.engine.sequence import Picture, Request, State
from mllama.semantics import PRESETS, Semantics

SEMANTICS = [
    *PRESETS.values(),
    Semantics(imageless_rows="leak"),
    Semantics(decode_rows="repeat_last"),
]


def random_request(draw: random.Random, engine: FakeEngine) -> Request:
    """A new conversation or the next turn of one, with many equal beginnings."""
    names: list[str] = []
    if engine.sequences and draw.random() < 0.5:
        earlier = draw.choice(list(engine.sequences.values()))
        tokens = [*earlier.request.tokens, *engine.answers[earlier.id]]
        names = [picture.key.decode() for picture in earlier.request.pictures]
        tokens += [draw.randrange(VOCABULARY)] * draw.randint(0, 3)
    else:
        tokens = [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2][: draw.randint(1, 11)]
    for _ in range(draw.choice([0, 0, 1, 1, 2])):
        if len(names) < 3:
            tokens.append(IMAGE)
            names.append(draw.choice("abc"))
        tokens += [draw.randrange(2)] * draw.randint(0, 5)
    request = request_of(
        tokens,
        names,
        max_new_tokens=draw.choice([1, 5, 12, 20, 30]),
        stop_token_ids=frozenset(draw.sample(range(VOCABULARY), draw.choice([0, 0, 1]))),
        copies=draw.choice([1, 1, 1, 1, 3]),
    )
    if len(tokens) + request.max_new_tokens > engine.limits.max_length:
        return random_request(draw, engine)
    return request


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_answers_do_not_depend_on_pools_chunks_or_reuse(semantics, seed):
    draw = random.Random(f"{seed} {semantics}")
    source = FakeEngine(semantics, pages=14)
    requests = []
    for _ in range(12):
        requests.append((random_request(draw, source), draw.randrange(3)))
        source.add(*requests[-1])
        source.finish()
    answers = []
    for options in (
        {"pages": 14, "max_batch_size": 6, "max_batch_tokens": 6},
        {"pages": 14, "prefix_reuse": False},
        {"pages": 400, "max_batch_tokens": 400, "is_ahead": True},
        {"pages": 20, "slots": 6, "cache_slots": 0, "is_ahead": True},
    ):
        engine = FakeEngine(semantics, max_length=14 * PAGE, **options)
        for request in requests:
            engine.add(*request)
        engine.finish()
        engine.check_answers()
        answers.append(list(engine.answers.values()))
    assert all(other == answers[0] for other in answers)
    assert set(engine.reasons.values()) <= {"stop", "length"}


def test_a_thousand_random_cancels_give_everything_back(seed):
    draw = random.Random(seed)
    engine = FakeEngine(pages=30, slots=12, cache_slots=4, max_length=56, is_ahead=True)
    cancelled = 0
    while cancelled < 1000:
        while len(engine.scheduler.sequences()) < 10:
            engine.add(random_request(draw, engine))
        engine.step()
        alive = [sequence.id for sequence in engine.scheduler.sequences()]
        chosen = draw.sample(alive, min(len(alive), draw.randint(0, 4)))
        engine.scheduler.cancel(chosen)
        assert not {*chosen} & {sequence.id for sequence in engine.scheduler.sequences()}
        cancelled += len(chosen)
        if len(engine.sequences) > 40:  # the next turns are of the latest conversations
            del engine.sequences[min(engine.sequences)]
    engine.scheduler.cancel([sequence.id for sequence in engine.scheduler.sequences()])
    engine.check_given_back()  # at once, whatever still runs
    engine.finish()


def test_running_rows_go_first_and_a_long_prompt_comes_in_chunks():
    engine = FakeEngine(max_batch_tokens=8, max_batch_size=4)
    engine.add(prompt("ab", max_new_tokens=30))
    engine.step()
    (long,) = engine.add(prompt("x" * 20))
    plans = [engine.step() for _ in range(3)]
    assert [[len(row.tokens) for row in plan.rows] for plan in plans] == [[1, 7], [1, 7], [1, 6]]
    assert [plan.num_decoding for plan in plans] == [1, 1, 1]
    assert [row.sample_step for plan in plans for row in plan.rows[1:]] == [None, None, 0]
    assert long.state is State.RUNNING
    engine.finish()
    engine.check_answers()


def test_prompts_are_computed_in_the_order_of_their_arrival():
    engine = FakeEngine(max_batch_tokens=8, max_prefills=2)
    for text in ("abcdefghij", "klmn", "opq"):
        engine.add(prompt(text))
    sizes = [{row.sequence: len(row.tokens) for row in engine.step().rows} for _ in range(3)]
    assert sizes == [{0: 8}, {0: 2, 1: 4}, {0: 1, 1: 1, 2: 3}]


def test_a_step_encodes_few_new_pictures_and_each_once():
    engine = FakeEngine(max_batch_tokens=64, max_new_pictures=1)
    for names in ("ab", "ab", "bc"):
        engine.add(prompt("0#12#3", *names))
    plans = [engine.step() for _ in range(3)]
    assert [[encode.key for encode in plan.encodes] for plan in plans] == [[b"a"], [b"b"], [b"c"]]
    # The text up to the picture that is not there yet is read meanwhile.
    assert [[len(row.tokens) for row in plan.rows] for plan in plans] == [
        [4, 4, 1],
        [2, 2, 3],
        [1, 1, 2],
    ]
    engine.finish()
    engine.check_answers()
    assert engine.runner.encoded == [b"a", b"b", b"c"]


def test_where_rows_leak_no_text_is_read_before_all_pictures_are_there():
    engine = FakeEngine("transformers", max_batch_tokens=64, max_new_pictures=1)
    engine.add(prompt("0#12#3", "a", "b"))
    assert [engine.step().num_tokens for _ in range(2)] == [0, 6]


def test_a_picture_that_no_token_to_compute_sees_takes_no_slot():
    engine = FakeEngine(slots=6)
    engine.add(prompt("01#3456701#3", "a", "b"))
    engine.finish()
    (second,) = engine.add(prompt("01#3456701#3and more#", "a", "b", "c"))
    engine.step()
    assert second.cached_tokens == 12 and [p.key for p in second.held] == [b"b", b"c"]
    assert engine.tiles.num_unused == 2
    engine.finish()
    engine.check_answers()
    assert engine.runner.encoded == [b"a", b"b", b"c"]


def test_the_youngest_makes_room_and_its_answer_goes_on():
    engine = FakeEngine(pages=8, max_batch_tokens=16)
    for seed, text in enumerate(("abcd", "efgh", "ijkl")):
        engine.add(prompt(text, max_new_tokens=20), seed)
    preempted = []
    while engine.scheduler.has_work:
        before = {s.id: s.state for s in engine.scheduler.sequences()}
        engine.step()
        preempted += [
            s.id
            for s in engine.scheduler.sequences()
            if s.state is State.WAITING and before[s.id] is not State.WAITING
        ]
    assert preempted[0] == 2 and 0 not in preempted
    assert engine.scheduler.num_preemptions == len(preempted)
    assert [len(answer) for answer in engine.answers.values()] == [20, 20, 20]
    engine.check_answers()


def test_what_is_preempted_waits_for_its_latest_token():
    """It gives up pages that are copies of what it finds in the index, so that there is room at once."""
    engine = FakeEngine(pages=9, is_ahead=True)
    for seed in (1, 2):
        engine.add(prompt("01234567", max_new_tokens=12), seed)
    engine.finish()
    engine.check_answers()
    assert engine.scheduler.num_preemptions == 1


def test_those_that_run_keep_a_page_each_when_another_comes():
    engine = FakeEngine(pages=8, max_batch_size=4)
    for _ in range(2):
        engine.add(prompt("abc", max_new_tokens=8))  # will take three pages each
    engine.step()
    (other,) = engine.add(prompt("defghijklmnopqrstu", max_new_tokens=2))  # five, and six are free
    assert engine.step().num_decoding == 2 and other.state is State.WAITING
    engine.finish()
    engine.check_answers()
    assert engine.scheduler.num_preemptions == 0


def test_answers_to_one_prompt_share_what_is_computed():
    engine = FakeEngine(max_batch_tokens=64, max_new_pictures=4)
    request = prompt("0123456#9012", "a", copies=4)
    added = engine.add(request)
    assert [sequence.group for sequence in added] == [0, 0, 0, 0]
    engine.finish()
    engine.check_answers()
    assert [sequence.cached_tokens for sequence in added] == [0, 8, 8, 8]
    assert len({tuple(answer) for answer in engine.answers.values()}) == 4
    assert engine.runner.encoded == [b"a"]


def test_the_first_of_several_answers_is_cancelled_in_its_prompt():
    engine = FakeEngine(max_batch_tokens=8)
    added = engine.add(prompt("0123456789012", copies=3))
    engine.step()
    engine.scheduler.cancel([added[0].id])
    engine.finish()
    engine.check_answers()
    assert engine.reasons == {1: "length", 2: "length"}
    assert [sequence.cached_tokens for sequence in added] == [0, 8, 12]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (
            prompt("abc", max_new_tokens=38),
            "3 tokens and max_new_tokens is 38; a sequence may have 40",
        ),
        (
            prompt("abc", max_new_tokens=31),
            "3 tokens and max_new_tokens is 31: 9 pages of 4 tokens, the pool has 8",
        ),
        (prompt("a#b#c", "a", "b", tiles=3), "have 6 tiles, the pool has 5"),
    ],
)
def test_what_could_never_run_is_refused_with_the_numbers(request_, words):
    engine = FakeEngine(pages=8, slots=5, max_length=40)
    with pytest.raises(ValueError, match=words):
        engine.add(request_)
    assert not engine.scheduler.has_work


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"tokens": ()}, "the prompt has no token"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"copies": 0}, "copies must be at least 1, got 0"),
        (
            {"pictures": (Picture(b"a", 3, 1),)},
            r"rising positions of a prompt of 3 tokens, got \[3\]",
        ),
        ({"pictures": (Picture(b"a", 1, 1),) * 2}, r"got \[1, 1\]"),
        ({"pictures": (Picture(b"a", 1, 0),)}, r"at least one tile, got \[0\]"),
    ],
)
def test_a_request_is_checked(request_, words):
    with pytest.raises(ValueError, match=words):
        Request(**{"tokens": (1, 2, 3), "max_new_tokens": 1, **request_})


def test_what_just_fits_runs():
    engine = FakeEngine(pages=8, slots=4)
    engine.add(prompt("a#b#c", "a", "b", max_new_tokens=27))
    engine.add(prompt("a#b#c", "c", "d", max_new_tokens=27))
    engine.finish()
    engine.check_answers()
    assert engine.reasons == {0: "length", 1: "length"}


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"max_prefills": 0}, "max_prefills must be at least 1, got 0"),
        ({"max_batch_tokens": 3}, "max_batch_tokens=3 must be at least max_batch_size=4"),
    ],
)
def test_limits_are_checked(limits, words):
    with pytest.raises(ValueError, match=words):
        FakeEngine(**{"max_batch_size": 4, **limits})


def test_finish_reasons():
    engine = FakeEngine()
    (sequence,) = engine.add(prompt("abc"))
    engine.finish()
    assert engine.reasons == {0: "length"} and len(engine.answers[0]) == 8
    stop = engine.answers[0][2]
    engine.add(prompt("abc", stop_token_ids=frozenset([stop])))
    (stopped,) = engine.add(prompt("abc"), seed=1)
    engine.step()
    engine.scheduler.finish(stopped.id, "stop")  # as for a stop string
    engine.scheduler.finish(stopped.id, "cancelled")  # it has ended
    engine.finish()
    assert engine.reasons[1] == "stop" and engine.answers[1][-1] == stop
    assert (sequence.finish_reason, stopped.finish_reason) == ("length", "stop")
    assert sequence.state is State.FINISHED


def test_logits_that_are_not_finite_end_one_sequence_and_nothing_of_it_is_shared():
    engine = FakeEngine(max_batch_tokens=64)
    (bad,) = engine.add(prompt("0123456#", "a"))
    (good,) = engine.add(prompt("other text"))
    engine.step()
    engine.step()
    engine.runner.broken.add(bad.id)
    engine.finish()
    assert engine.reasons == {bad.id: "error", good.id: "length"}
    engine.check_answers()
    (again,) = engine.add(prompt("0123456#89", "a"))
    engine.finish()
    assert again.cached_tokens == 0 and engine.runner.encoded == [b"a", b"a"]


def test_a_failed_step_ends_its_sequences_and_the_others_go_on():
    engine = FakeEngine(max_batch_tokens=8, max_batch_size=8, max_prefills=1, is_ahead=True)
    engine.add(prompt("abcdefgh#", "a"))
    engine.step()
    (other,) = engine.add(prompt("ijklmnop", max_new_tokens=30))
    waiting = engine.add(prompt("abcdefgh#", "a"))[0]
    while other.num_new < 3:
        engine.step()
    engine.fail_running()
    assert engine.reasons[0] == "error"
    assert len(engine.scheduler.prefix) == 0 and engine.scheduler.num_admitted == 0
    engine.finish()
    engine.check_answers()
    assert engine.reasons[waiting.id] in ("length", "error")


def test_what_was_planned_after_a_failed_step_is_void():
    engine = FakeEngine(is_ahead=True)
    engine.add(prompt("abc"))
    engine.step()
    (other,) = engine.add(prompt("def"))
    engine.fail_running()
    assert engine.reasons == {0: "error"}
    assert (other.state, other.pending, other.stored) == (State.WAITING, 0, 0)
    engine.finish()
    engine.check_answers()
    assert engine.reasons[other.id] == "length"


def test_the_pictures_of_a_failed_step_fail_it_for_those_that_brought_them():
    engine = FakeEngine("transformers", max_new_pictures=1)
    (sequence,) = engine.add(prompt("a#b#", "a", "b"))
    plan = engine.scheduler.plan()
    assert plan.encodes and not plan.rows
    assert [event.finish_reason for event in engine.scheduler.fail(plan)] == ["error"]
    assert sequence.state is State.FINISHED
    engine.check_given_back()


def test_tokens_of_a_step_that_still_runs_are_pending():
    engine = FakeEngine(is_ahead=True)
    engine.add(prompt("abc", max_new_tokens=3))
    rows = [engine.step().rows for _ in range(4)]
    assert [row[0].tokens for row in rows[1:3]] == [(PENDING,), (PENDING,)] and rows[3] == ()
    assert [row[0].sample_step for row in rows[:3]] == [0, 1, 2]
    engine.finish()
    engine.check_answers()


def test_results_come_in_the_order_of_the_steps():
    scheduler = Scheduler(Limits(8, 4, 4, 1, 64), PagePool(9), TilePool(1), Scope("float32"))
    assert scheduler.plan().is_empty
    scheduler.add(prompt("abc"))
    first, second = scheduler.plan(), scheduler.plan()
    with pytest.raises(RuntimeError, match="2 steps are planned"):
        scheduler.plan()
    with pytest.raises(ValueError, match=r"steps \[1, 2\] are missing, in this order, got 2"):
        scheduler.accept(second, {0: 1})
    scheduler.accept(first, {0: 1})
