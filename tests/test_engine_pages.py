"""Pools of pages and tiles: nothing has two owners by mistake, and everything comes back."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from mllama.engine.pages import SCRATCH_PAGE, PagePool, TilePool


def test_pages_are_taken_once_and_free_after_their_last_holder():
    pool = PagePool(4)
    pages = [pool.take() for _ in range(3)]
    assert sorted(pages) == [1, 2, 3] and SCRATCH_PAGE not in pages and pool.num_free == 0
    with pytest.raises(ValueError, match="all 3 pages are held"):
        pool.take()
    pool.share(pages[0])
    assert pool.release(pages[0]) == 1 and pool.num_free == 0
    assert pool.release(pages[0]) == 0 and pool.num_free == 1
    assert pool.take() == pages[0]


@pytest.mark.parametrize("page", [SCRATCH_PAGE, 2, 7, -1])
def test_what_nobody_holds_is_neither_shared_nor_released(page):
    pool = PagePool(4)
    pool.take()
    for call in (pool.share, pool.release):
        with pytest.raises(ValueError, match=f"page {page} is held by nobody"):
            call(page)


def test_a_pool_has_more_than_its_scratch_page():
    with pytest.raises(ValueError, match="num_pages=1"):
        PagePool(1)


def test_random_holders_of_pages(seed):
    draw, pool, held = random.Random(seed), PagePool(20), Counter()
    for _ in range(2000):
        action = draw.choice(["take", "share", "release"])
        if action == "take" and pool.num_free:
            page = pool.take()
            assert not held[page] and page != SCRATCH_PAGE
            held[page] = 1
        elif held and action != "take":
            page = draw.choice(list(held))
            change = 1 if action == "share" else -1
            (pool.share if action == "share" else pool.release)(page)
            held[page] += change
            held = +held
        assert all(pool.holders(page) == held[page] for page in range(20))
        assert pool.num_free == 19 - len(held)


def test_a_picture_is_stored_once():
    pool = TilePool(6)
    a, b, again = pool.hold([(b"a", 2), (b"b", 3), (b"a", 2)])
    assert a is again and a.holders == 2 and len({*a.slots, *b.slots}) == 5 and pool.num_free == 1
    (other,) = pool.hold([(b"a", 2)])
    assert other is a and a.holders == 3


def test_pictures_are_held_all_or_none():
    pool = TilePool(6)
    (a,) = pool.hold([(b"a", 2)])
    a.is_encoded = True
    pool.release(a)
    assert pool.hold([(b"a", 2), (b"b", 3), (b"c", 2)]) is None
    assert (pool.num_free, pool.num_unused, a.holders) == (4, 2, 0)
    again, _ = pool.hold([(b"a", 2), (b"b", 4)])  # what is wanted makes no room for the rest of it
    assert again is a and pool.num_free == 0


def test_unused_pictures_go_when_slots_are_needed_the_least_recently_used_first():
    pool = TilePool(6)
    held = pool.hold([(b"a", 2), (b"b", 2), (b"c", 2)])
    for picture in held:
        picture.is_encoded = True
    a, b, c = held
    for picture in (b, a, c):
        pool.release(picture)
    pool.hold([(b"d", 1)])
    assert pool.num_unused == 4
    a_again, c_again, b_again = pool.hold([(b"a", 2), (b"c", 2), (b"b", 1)])
    assert a_again is a and c_again is c and b_again is not b and not b_again.is_encoded


def test_unused_pictures_stay_within_their_bytes():
    pool = TilePool(6, slot_bytes=10, cache_bytes=39)  # three slots
    held = pool.hold([(b"a", 2), (b"b", 2), (b"c", 2)])
    for picture in held:
        picture.is_encoded = True
    for picture in held:
        pool.release(picture)
        assert pool.num_unused <= 3
    assert pool.hold([(b"c", 2)])[0] is held[2]


def test_what_was_never_encoded_is_not_kept():
    pool = TilePool(2)
    (picture,) = pool.hold([(b"a", 2)])
    pool.release(picture)
    assert pool.num_free == 2
    with pytest.raises(ValueError, match="held by nobody"):
        pool.release(picture)


def test_a_forgotten_picture_is_given_to_nobody_and_its_slots_come_back():
    pool = TilePool(4)
    (old,) = pool.hold([(b"a", 2)])
    old.is_encoded = True
    pool.forget(old)
    (new,) = pool.hold([(b"a", 2)])
    assert new is not old and not {*new.slots} & {*old.slots}
    pool.release(old)
    assert pool.num_free == 2
    new.is_encoded = True
    pool.release(new)
    pool.clear()
    assert (pool.num_free, pool.num_unused) == (4, 0)


def test_random_pictures(seed):
    draw, pool, held = random.Random(seed), TilePool(12, 1, 5), []
    tiles = {bytes([i]): draw.randint(1, 4) for i in range(8)}
    for _ in range(2000):
        if draw.random() < 0.5:
            wanted = [(key, tiles[key]) for key in draw.choices(list(tiles), k=draw.randint(1, 3))]
            before = (pool.num_free, pool.num_unused)
            got = pool.hold(wanted)
            if got is None:
                assert before == (pool.num_free, pool.num_unused)
            for picture in got or []:
                picture.is_encoded = draw.random() < 0.9
                held.append(picture)
        elif held:
            picture = held.pop(draw.randrange(len(held)))
            if draw.random() < 0.1:
                pool.forget(picture)
            pool.release(picture)
        slots = [slot for picture in {id(p): p for p in held}.values() for slot in picture.slots]
        assert len(slots) == len(set(slots)) and pool.num_unused <= 5
        assert len(slots) + pool.num_free + pool.num_unused == 12
