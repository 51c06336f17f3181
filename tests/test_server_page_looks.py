"""How the page looks: at three sizes, light and dark, in each of its states, and that nothing jumps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import browser_helpers as browsing
import pytest
from browser_helpers import answers, ask, begun, connected, drop, looked_at, message, opened

if not browsing.FOLDER:
    pytest.importorskip("httpx2")
    pytest.importorskip("fastapi")
    pytest.importorskip("llguidance")

from server_helpers import PNG, Running, served

LONG = (
    "A sentence of the ordinary kind, then https://example.org/"
    + "a-very-long-address/" * 12
    + "?q=1 and\n\n    def code(argument: int) -> int:\n        return argument_"
    + "x" * 90
    + "\n\nand the end."
)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with served(models=("demo", "other")) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsing.chromium() as found:
        yield found


@pytest.mark.parametrize("size", ["small", "phone", "desk"])
def test_nothing_serious_in_any_state(browser, server, size):
    def seen(state: str) -> None:
        looked_at(page, f"{size}-{state}", checked=size != "small")

    server.engine.released.clear()
    with opened(browser, server.url, size) as page:
        connected(page, "demo")
        page.locator("#samples img").last.evaluate("(one) => one.decode()")
        seen("empty")
        for i in (1, 3):
            page.get_by_role("button", name=f"Sample {i}").click()
            page.get_by_role("img", name=f"Sample {i}").wait_for()
        drop(page, (b"text", "notes.txt", "text/plain"))
        page.get_by_role("alert").wait_for()
        seen("pictures")
        page.evaluate("document.body.classList.add('dragging')")
        seen("drop")
        page.evaluate("document.body.classList.remove('dragging')")
        ask(page, f"!held {LONG}")
        begun(page)
        seen("streaming")
        server.engine.released.set()
        answers(page, 1)
        ask(page, "And in a few words?")
        answers(page, 2)
        seen("conversation")
        page.get_by_role("button", name="Edit").last.click()
        seen("editing")
        page.get_by_role("button", name="Cancel").click()
        ask(page, "!fail a b")
        answers(page, 3)
        seen("error")
        page.get_by_role("button", name="Settings").click()
        seen("settings")


@pytest.mark.parametrize("size", ["small", "phone", "desk"])
def test_nothing_moves_when_an_answer_ends(browser, server, size):
    places = """() => [...document.querySelectorAll("header, .turn, .turn .text, #composer, #text")]
        .map((one) => { const box = one.getBoundingClientRect(); return [one.id, box.top, box.height]; })"""
    server.engine.released.clear()
    with opened(browser, server.url, size) as page:
        connected(page, "demo")
        ask(page, "!held and a word")
        begun(page)
        before = page.evaluate(places)
        server.engine.released.set()
        answers(page, 1)
        assert page.locator(".figures span").count() == 3
        assert page.evaluate(places) == before


@pytest.mark.parametrize("size", ["phone", "desk"])
def test_a_long_conversation_scrolls_with_its_end_in_view(browser, server, size):
    server.engine.released.clear()
    with opened(browser, server.url, size) as page:
        for i in range(3):
            ask(page, "\n".join(["many words"] * 40))
            answers(page, i + 1)
        assert page.evaluate(
            "Math.abs(document.documentElement.scrollHeight - innerHeight - scrollY) < 2"
        )
        assert message(page).is_visible() and page.locator("header").is_visible()
        # Who reads what was said before is left there.
        ask(page, "!held " + "\n".join(["word"] * 200))
        begun(page)
        page.evaluate("scrollTo(0, 100)")
        server.engine.released.set()
        answers(page, 4)
        assert page.evaluate("scrollY") == 100
        box = page.locator("#composer").bounding_box()
        assert box["y"] + box["height"] <= page.viewport_size["height"] + 1


def test_the_composer_grows_with_its_words_to_a_limit(browser, server):
    with opened(browser, server.url, "phone") as page:
        box = message(page)
        heights = []
        for count in (1, 4, 100):
            box.fill("\n".join(["line"] * count))
            heights.append(box.bounding_box()["height"])
        assert heights[0] < heights[1] < heights[2] <= 0.4 * 844 + 1
        box.fill("")
        assert box.bounding_box()["height"] == heights[0]


def test_who_wants_no_motion_gets_none(browser, server):
    blinking = "getComputedStyle(document.querySelector('.busy .text'), '::after').animationName"
    for wish, name in (("reduce", "none"), ("no-preference", "blink")):
        with opened(browser, server.url, "desk", reduced_motion=wish) as page:
            ask(page, "!hang a")
            begun(page)
            assert page.evaluate(blinking) == name
            page.keyboard.press("Escape")
            answers(page, 1)


def test_a_small_picture_keeps_its_place(browser, server):
    with opened(browser, server.url, "small") as page:
        drop(page, *[(PNG, f"{i}.png", "image/png") for i in range(4)])
        page.locator("#tray li").nth(3).wait_for()
        ask(page, "four")
        assert answers(page, 1) == ["<picture> <picture> <picture> <picture> four"]
        boxes = [one.bounding_box() for one in page.locator(".turn.user img").all()]
        assert all(24 <= box["width"] <= 140 and 24 <= box["height"] <= 140 for box in boxes)
