"""The prefix index: a page is shared with whom it would be the same, and with nobody else."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_runner import PAGE, FakeEngine, answer_alone, prompt, request_of

from mllama.engine.pages import PagePool
from mllama.engine.prefix import PrefixIndex, Scope, next_key
from mllama.engine.sequence import Sequence
from mllama.semantics import PRESETS, Semantics

META, TRANSFORMERS = PRESETS["meta"], PRESETS["transformers"]
FLOAT32 = Scope("float32")
OPENING = "a system text of its own"  # 24 tokens, six pages
LEAKS_AND_IS_BLIND = Semantics(imageless_rows="leak")


def keys(request, scope: Scope = FLOAT32) -> list[bytes]:
    return Sequence(request, 0, 0, scope).page_keys(len(request.tokens) // PAGE, PAGE)


def num_shared(a: list[bytes], b: list[bytes]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def run(engine: FakeEngine, request, seed: int = 0) -> Sequence:
    (sequence,) = engine.add(request, seed)
    engine.finish()
    engine.check_answers()
    return sequence


@pytest.mark.parametrize(
    "scope",
    [
        Scope("bfloat16"),
        Scope("float32", "adapter"),
        Scope("float32", semantics=TRANSFORMERS),
        Scope("float32", semantics=replace(META, vision_taps="output")),
        Scope("float32", semantics=replace(META, decode_rows="repeat_last")),
    ],
)
def test_the_root_holds_what_every_token_depends_on(scope):
    request = prompt("one two three")
    assert num_shared(keys(request), keys(request, scope)) == 0


def test_a_link_holds_tokens_position_pictures_and_all_before():
    key = next_key(b"root", 4, [1, 2, 3, 4], [(5, b"a")])
    others = [
        next_key(b"else", 4, [1, 2, 3, 4], [(5, b"a")]),
        next_key(b"root", 8, [1, 2, 3, 4], [(5, b"a")]),
        next_key(b"root", 4, [1, 2, 3, 5], [(5, b"a")]),
        next_key(b"root", 4, [1, 2, 3], [(4, b"a")]),
        next_key(b"root", 4, [1, 2, 3, 4], [(6, b"a")]),
        next_key(b"root", 4, [1, 2, 3, 4], [(5, b"b")]),
        next_key(b"root", 4, [1, 2, 3, 4], []),
        next_key(b"root", 4, [1, 2, 3, 4], [(5, b"a"), (6, b"")]),
    ]
    assert len({key, *others}) == len(others) + 1
    assert key == next_key(b"root", 4, [1, 2, 3, 4], [(5, b"a")])


@pytest.mark.parametrize(("semantics", "pages"), [(META, 6), (TRANSFORMERS, 0)])
def test_what_is_before_a_picture_is_shared_where_it_sees_none(semantics, pages):
    scope = Scope("float32", semantics=semantics)
    a, b = (keys(prompt(f"{OPENING}#what is it?", name), scope) for name in "ab")
    assert num_shared(a, b) == pages


@pytest.mark.parametrize("semantics", [META, TRANSFORMERS])
def test_a_later_picture_changes_what_is_before_it_only_where_rows_leak(semantics):
    scope = Scope("float32", semantics=semantics)
    one = keys(prompt("0123#567what is it?", "a"), scope)
    two = keys(prompt("0123#567what is it?and#?", "a", "b"), scope)
    assert num_shared(one, two) == (4 if semantics is META else 0)


@pytest.mark.parametrize("is_ahead", [False, True])
def test_trap_one_the_opening_before_different_pictures_is_computed_once(is_ahead):
    engine = FakeEngine("meta", is_ahead=is_ahead)
    assert run(engine, prompt(f"{OPENING}#what is it?", "a")).cached_tokens == 0
    assert run(engine, prompt(f"{OPENING}#what is it?", "b")).cached_tokens == len(OPENING)
    assert run(engine, prompt(f"{OPENING} and no picture")).cached_tokens == len(OPENING)
    assert run(engine, prompt(f"{OPENING}#what is it?", "a")).cached_tokens == 32


@pytest.mark.parametrize("semantics", [TRANSFORMERS, LEAKS_AND_IS_BLIND])
def test_trap_two_where_rows_leak_nothing_before_different_pictures_is_shared(semantics):
    engine = FakeEngine(semantics)
    for names in ("a", "b"):
        sequence = run(engine, prompt(f"{OPENING}#what is it?", *names))
        assert sequence.cached_tokens == 0
    for later in ("c", "d"):  # the picture that leaks may come long after the page
        assert run(engine, prompt(f"{OPENING}#what? and#?", "a", later)).cached_tokens == 0
    assert run(engine, prompt(f"{OPENING}#what? and#?", "a", "d")).cached_tokens == 32


def next_turn(request, seed: int, semantics: Semantics, more: str = "and then?"):
    """The answer and what the user says to it behind a request."""
    tokens = [*request.tokens, *answer_alone(request, seed, semantics)]
    tokens += prompt(more).tokens
    return request_of(tokens, [picture.key.decode() for picture in request.pictures])


@pytest.mark.parametrize(
    ("semantics", "names", "is_shared"),
    [
        (META, "", True),
        (META, "a", True),
        (META, "ab", False),
        (LEAKS_AND_IS_BLIND, "ab", False),
        (TRANSFORMERS, "ab", True),
    ],
)
def test_trap_three_answers_that_see_no_picture_are_not_offered(semantics, names, is_shared):
    engine = FakeEngine(semantics)
    request = prompt("what" + "#is it?" * len(names), *names, max_new_tokens=17)
    first = run(engine, request, seed=5)
    assert len(first.text) >= 4 * PAGE
    whole = len(request.tokens) if not is_shared else len(first.text) - 1
    assert len(engine.scheduler.prefix) == whole // PAGE
    second = run(engine, next_turn(request, 5, semantics))
    assert second.cached_tokens == whole // PAGE * PAGE


def test_an_answer_that_sees_no_picture_does_not_find_the_prompt_that_repeats_it():
    """The other way round: preempted, it is read again, and beside it is a prompt with the same tokens, which
    do see a picture there."""
    request = prompt("what#is#it", "a", "b", max_new_tokens=40)
    engine = FakeEngine("meta", pages=20, max_batch_tokens=64, max_new_pictures=2)
    engine.add(replace(next_turn(request, 5, META), max_new_tokens=12))
    engine.step()
    (sequence,) = engine.add(request, seed=5)
    engine.finish()
    engine.check_answers()
    assert engine.scheduler.num_preemptions == 1 and sequence.cached_tokens == 2 * PAGE


def test_at_least_one_token_is_computed():
    engine = FakeEngine()
    request = prompt("01234567")
    assert run(engine, request).cached_tokens == 0
    assert run(engine, request).cached_tokens == PAGE
    assert run(engine, prompt("012345670")).cached_tokens == 2 * PAGE


def test_pages_only_the_index_holds_go_when_others_are_needed_the_end_of_a_text_first():
    pool = PagePool(6)
    index = PrefixIndex(pool)
    old, new = index.take(3), index.take(2)
    for key, page in zip((b"0", b"1", b"2"), old):
        index.offer(key, page)
    for key, page in zip((b"3", b"4"), new):
        index.offer(key, page)
    with pytest.raises(ValueError, match="0 pages are available, 1 are asked for"):
        index.take(1)
    index.release(old)
    index.release(new)
    assert index.num_available == 5 and pool.num_free == 0
    assert len(index.take(2)) == 2
    assert index.find([b"0", b"1", b"2"]) == old[:1] and index.find([b"3", b"4"]) == new
    assert index.num_available == 0


def test_of_two_pages_with_one_key_the_first_counts():
    pool = PagePool(3)
    index = PrefixIndex(pool)
    (first,), (second,) = index.take(1), index.take(1)
    index.offer(b"key", first)
    index.offer(b"key", second)
    index.release([second])
    assert pool.holders(second) == 0 and index.find([b"key"]) == [first]


def test_a_forgotten_page_is_found_by_nobody_and_stays_with_its_holders():
    pool = PagePool(3)
    index = PrefixIndex(pool)
    (page,) = index.take(1)
    index.offer(b"key", page)
    index.forget(page)
    assert index.find([b"key"]) == [] and pool.holders(page) == 1
    index.release([page])
    assert pool.num_free == 2


def test_an_index_that_is_off_finds_nothing():
    engine = FakeEngine(prefix_reuse=False)
    request = prompt(f"{OPENING}#what is it?", "a")
    assert [run(engine, request).cached_tokens for _ in range(2)] == [0, 0]
    assert len(engine.scheduler.prefix) == 0
